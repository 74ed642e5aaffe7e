"""Working memory of one replica, and the layouts in it that several fast twins use.

A twin takes its views at bind time from one buffer, which every binding starts anew: what a replay leaves there is
gone at the next one, so constants are filled in at the start of each replay.
"""

from itertools import pairwise

import numpy as np

from gpunet.errors import GpunetError

ALIGN = 64  # bytes: a cache line, and the widest vector
BLOCK = 1 << 17  # bytes: a quarter of a core's second-level cache; a ufunc call then costs little beside its work
LINE = 512  # elements: an inner loop long enough that NumPy's iterator does not show


class Scratch:
    """`scratch(shape, dtype)` returns an uninitialised view; `reset()` begins the next binding at the start."""

    def __init__(self, nbytes=8 << 20):
        self.nbytes = nbytes
        memory = np.empty(nbytes + ALIGN, np.uint8)
        start = -memory.ctypes.data % ALIGN
        self._buffer = memory[start : start + nbytes]
        self._used = 0

    def reset(self):
        """Hand out from the beginning again."""
        self._used = 0

    def __call__(self, shape, dtype):
        """Return a view of a shape and dtype, aligned to 64 bytes."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if self._used + size > self.nbytes:
            raise GpunetError(
                f"scratch: expected at most {self.nbytes} bytes, got {self._used + size} with shape {shape}"
            )
        view = self._buffer[self._used : self._used + size].view(dtype).reshape(shape)
        self._used += -(-size // ALIGN) * ALIGN
        return view


def plain(*arrays):
    """Whether all arrays are of one type that NumPy's vector loops serve: float32 or float64."""
    return arrays[0].dtype in (np.float32, np.float64) and all(a.dtype == arrays[0].dtype for a in arrays)


def as_pixels(x):
    """Return x (..., c) as an array of pixels, each one element of void type.

    NumPy copies such elements three to six times faster than c floats each where they lie apart.
    """
    return x.view(f"V{x.shape[-1] * x.itemsize}")[..., 0]


def block_bytes(x):
    """Return how many bytes of x to work on at a time; a small array has smaller blocks, fewer constants to fill."""
    return min(BLOCK, max(BLOCK // 8, x.nbytes // 16))


def blocks(arrays, temporaries, size):
    """Yield, block by block, equally long flat pieces of the arrays, then the beginnings of the temporaries."""
    flat = [a.reshape(-1) for a in arrays]
    for start in range(0, flat[0].size, size):
        pieces = [a[start : start + size] for a in flat]
        yield (*pieces, *(t[: pieces[0].size] for t in temporaries))


def runner(steps):
    """Return the call that runs steps (ufunc, a, b, out) and (np.copyto, target, source, None)."""

    def run():
        for operation, a, b, out in steps:
            if out is None:
                operation(a, b)
            else:
                operation(a, b, out=out)  # np.maximum takes no third argument by place

    return run


class RepeatedRow:
    """A row of c elements repeated to a flat vector, a block of x, so that a ufunc needs no broadcast.

    Broadcasting a row costs a loop a pixel: with 16 channels four times the time of a flat pass.
    """

    def __init__(self, scratch, c, x):
        inner = max(1, LINE // c)
        repeat = max(1, block_bytes(x) // x.itemsize // (inner * c))
        self.flat = scratch((repeat * inner * c,), x.dtype)
        lines = self.flat.reshape(repeat, inner * c)
        self._first, self._rest = lines[0].reshape(inner, c), (lines[1:], lines[0])

    def fill(self, row):
        """Repeat this row."""
        np.copyto(self._first, row)
        np.copyto(*self._rest)


class ColumnSums:
    """Sums over the rows of quantities shaped like x, block by block, each block by one `ones @ X`.

    Rows go k to a line of about 512 elements. `groups` lists (entries, close): an entry is (start, stop, shape, ones,
    targets), where the caller leaves `ones @ quantity[start:stop].reshape(shape)` in each of its targets; `close`, a
    triple for np.dot, then folds a group. `finish()` returns the sums (parts, quantities, c).
    """

    DEPTH = 64  # blocks folded at a time: few enough for the cache, and sums of sums stay exact to the last bits

    @classmethod
    def fit(cls, scratch, x, rows, c, parts, quantities):
        """Return the sums, or None where they would take half of the scratch, or a part would have no row."""
        slots = cls.DEPTH + 1 + parts + 2 * x.nbytes // (cls.DEPTH * block_bytes(x))
        needed = slots * quantities * max(c, LINE) * x.itemsize
        return cls(scratch, x, rows, c, parts, quantities) if rows >= parts and needed <= scratch.nbytes // 2 else None

    def __init__(self, scratch, x, rows, c, parts, quantities):
        k = max(1, LINE // c)
        lines, dtype = max(1, block_bytes(x) // x.itemsize // (k * c)), x.dtype
        self._ones = scratch((max(lines, k, self.DEPTH + 1),), dtype)
        partial = scratch((self.DEPTH + 1, quantities, k, c), dtype)
        self._ragged = partial[0]  # what is left of a part, fewer rows than a line: one row of sums, the rest zeros
        cuts = [p * rows // parts for p in range(parts + 1)]
        plans = [self._plan(*ends, k, lines) for ends in pairwise(cuts)]
        folded = scratch((sum(len(p) for p in plans), quantities, k, c), dtype)
        self._total, self._sums = scratch((quantities, k, c), dtype), scratch((parts, quantities, c), dtype)
        self.groups, self._folds = [], []
        for plan, sums in zip(plans, self._sums, strict=True):
            first = len(self.groups)
            for spans in plan:
                slots = partial[0 if spans[0][1] - spans[0][0] < k else 1 :][: len(spans)]
                entries = [self._entry(*span, k, c, slot) for span, slot in zip(spans, slots, strict=True)]
                close = self._ones[: len(slots)], slots.reshape(len(slots), -1), folded[len(self.groups)].reshape(-1)
                self.groups.append((entries, close))
            self._folds.append((folded[first : len(self.groups)], sums))

    def _plan(self, start, stop, k, lines):
        """Return the (start, stop) of a part's blocks in groups; the ragged rest comes first in the last group."""
        whole = start + (stop - start) // k * k
        step = lines * k
        spans = [(i, min(i + step, whole)) for i in range(start, whole, step)]
        groups = [spans[i : i + self.DEPTH] for i in range(0, len(spans), self.DEPTH)] or [[]]
        if whole < stop:
            groups[-1].insert(0, (whole, stop))
        return groups

    def _entry(self, start, stop, k, c, slot):
        if stop - start < k:
            return start, stop, (stop - start, c), self._ones[: stop - start], [s[0] for s in slot]
        shape = (stop - start) // k, k * c
        return start, stop, shape, self._ones[: shape[0]], [s.reshape(-1) for s in slot]

    def begin(self):
        """Fill in what a replay needs; before the first block."""
        self._ones.fill(1)
        self._ragged.fill(0)

    def finish(self):
        """Return the sums (parts, quantities, c)."""
        for folded, sums in self._folds:
            np.add.reduce(folded, axis=0, out=self._total)
            np.add.reduce(self._total, axis=1, out=sums)
        return self._sums
