"""Traced tensors, the trace, and the list: a program's launches in call order, before any memory exists.

A program is a Python function run once with a trace `t`. Nothing is computed; shapes, bytes and FLOPs are known
when it returns. This module knows no backend and no layer.
"""

import fnmatch
import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from gpunet.core import sources
from gpunet.core.backend import check_launch
from gpunet.core.random import site_of
from gpunet.errors import GpunetError


@dataclass(eq=False)
class Base:
    """A run of bytes: planned scratch, or (with `arena`) memory that outlives the program, found by its name."""

    nbytes: int
    arena: str | None = None
    over: "Base | None" = None  # may lie on this one, if nobody reads that one later
    path: str = ""


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a base: shape, dtype, offset and strides in elements."""

    base: Base
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int = 0
    strides: tuple[int, ...] | None = None

    @cached_property
    def size(self):
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self):
        """Bytes of its elements."""
        return self.size * self.dtype.itemsize

    @property
    def contiguous(self):
        """Whether its elements follow each other in C order."""
        return self.strides is None

    def reshape(self, *shape):
        """Return the same elements in another shape; one -1 is inferred."""
        if not self.contiguous:
            raise GpunetError(f"reshape: expected a contiguous tensor, got strides {self.strides}")
        known = math.prod([s for s in shape if s != -1])
        shape = tuple(self.size // max(known, 1) if s == -1 else int(s) for s in shape)
        if math.prod(shape) != self.size:
            raise GpunetError(f"reshape: shape {self.shape} has {self.size} elements, which {shape} cannot hold")
        return Tensor(self.base, shape, self.dtype, self.offset)

    def slice(self, start, stop):
        """Return elements start to stop of a one-dimensional tensor."""
        return Tensor(self.base, (stop - start,), self.dtype, self.offset + start)

    def strided(self, shape, strides, offset=0):
        """Return a view by shape and strides in elements; only a matmul takes one that is not contiguous."""
        return Tensor(self.base, tuple(shape), self.dtype, self.offset + offset, tuple(strides))

    @property
    def T(self):
        """The transposed matrix, as a view."""
        rows, columns = self.shape
        return self.strided((columns, rows), self.element_strides[::-1])

    @property
    def element_strides(self):
        """Strides in elements, also of a contiguous tensor."""
        if self.strides is not None:
            return self.strides
        return c_order(self.shape)


def c_order(shape):
    """Return the strides, in elements, of an array whose elements follow each other."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclass(eq=False)
class Entry:
    """One line of the list. `kind` is launch, matmul, call, reduce or barrier; `name` what is launched or called.

    kernel: the declaration of what is launched.
    """

    kind: str
    name: str
    arguments: tuple
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    path: str
    flops: int = 0
    options: dict = field(default_factory=dict)
    kernel: sources.Kernel | None = None

    @property
    def nbytes(self):
        """Bytes read and written, each tensor once."""
        return sum(t.nbytes for t in (*self.reads, *self.writes))


@dataclass(frozen=True)
class Share:
    """The images of one replica: `first` to `first + size` of a batch of `batch`, as replica `index` of `count`."""

    batch: int
    first: int
    size: int
    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, batch, index, count):
        """Replica `index`'s share of a batch cut into `count` even ranges."""
        first, stop = index * batch // count, (index + 1) * batch // count
        return cls(batch, first, stop - first, index, count)


class Trace:
    """What a program and its layers call. Passed on, never stored."""

    def __init__(self, types, share, layouts, arenas, *, training, engine, parts=None, seed=0, accumulate=False,
                 keep=()):  # fmt: skip
        self.real, self.wide = types.real, types.wide
        self.types = types
        self.share = share
        self.training = training
        self.engine = engine
        self.seed = seed
        self.entries = []
        self.kept = {}
        self.path = "program"
        self._layouts = layouts
        self._arenas = arenas
        self._accumulate = accumulate
        self._keep = tuple(keep)
        self._parts = parts
        self._external = {}
        self._operands = {}
        self._written = set()
        self._bound, self._quiet = {}, False

    # Places in the network

    @contextmanager
    def at(self, path):
        """Give the entries traced inside this path, and its site to their draws."""
        outer, self.path = self.path, path
        try:
            yield
        finally:
            self.path = outer

    @property
    def site(self):
        """The hash of the path, which keys the draws made here."""
        return site_of(self.path)

    def mark(self, name, tensor):
        """Keep `tensor` readable after a replay as `name`, if that was asked for."""
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self._keep):
            self.kept[name] = tensor

    def parts(self, rows, columns):
        """Return how many parts a sum down the columns of this share's matrix is cut into: the same in all replicas."""
        if self._parts is None:
            return 1
        rows = rows // self.share.size * max(1, self.share.batch // self.share.count)
        return self._parts(rows, -(-columns // 32))  # a block takes 32 columns of a part

    # Tensors

    def empty(self, shape, dtype=None):
        """Return a new tensor of scratch memory, `real` unless told."""
        dtype = np.dtype(dtype or self.real)
        shape = tuple(int(s) for s in shape)
        return Tensor(Base(math.prod(shape) * dtype.itemsize, path=self.path), shape, dtype)

    def over(self, x):
        """Return a new tensor like `x` that may lie in its memory: granted where nobody reads `x` later."""
        y = self.empty(x.shape, x.dtype)
        if x.contiguous and x.base.arena is None and x.nbytes == x.base.nbytes:
            y.base.over = x.base
        return y

    def arena(self, name):
        """Return all of an arena: memory that outlives the program, bound by its name."""
        if name not in self._external:
            self._external[name] = Base(0, arena=name)
        shape, dtype = self._arenas[name]
        return Tensor(self._external[name], tuple(shape), np.dtype(dtype))

    @contextmanager
    def bound(self, quiet=False, **arenas):
        """Let what is traced inside use other arenas: bound(weights="average"), bound(gradient="first_gradient").

        A gradient that goes to another arena overwrites what is there, in an accumulating program too. quiet: no tensor
        is marked, and batch statistics go nowhere.
        """
        before = self._bound, self._accumulate, self._keep, self._quiet
        written, self._written, self._bound, self._quiet = self._written, set(), arenas, quiet
        if quiet:
            self._keep = ()
        if "gradient" in arenas:
            self._accumulate = False
        try:
            yield
        finally:
            self._bound, self._accumulate, self._keep, self._quiet = before
            self._written |= written

    def weight(self, p):
        """Return a parameter's tensor."""
        name = self._arena_of(p)
        return self._parameter(self.arena(self._bound.get(name, name)), name, p)

    def parameters(self):
        """Return {name: parameter} of the weights that train, in the order of their arena and its tables."""
        return self._layouts["weights"].parameters

    def place(self, name):
        """Return (start, stop) of a weight in its arena, in elements, whole blocks."""
        return self._layouts["weights"].place(name)

    def operand(self, p):
        """Return a weight in `real`, as products take it; a program's first call casts the whole arena, once."""
        if self.real == self.wide:
            return self.weight(p)
        name = self._arena_of(p)
        arena = self._bound.get(name, name)
        if arena not in self._operands:
            wide = self.arena(arena)
            with self.at("operands"):
                self._operands[arena] = self.empty(wide.shape)
                self.launch("cast_forward", wide, self._operands[arena], wide.size)
        return self._parameter(self._operands[arena], name, p)

    def frozen(self, p):
        """Whether a parameter keeps its value in this step."""
        return self._arena_of(p) == "frozen"

    def gradient(self, p):
        """Return (tensor, accumulate): where a weight's gradient goes, and 1 if it is to be added to what is there.

        A program's first gradient of a weight overwrites; later ones, and all of an accumulating program, add. That of
        a frozen weight is scratch: nobody reads it, and so the plan drops what computes it.
        """
        if self.frozen(p):
            return self.empty(p.shape, self.wide), 0
        return self._result("gradient", "weights", p)

    def batch_statistic(self, p):
        """Return (tensor, accumulate): where this batch's value of a running statistic goes."""
        if p.name in self._written:
            raise GpunetError(f"{self.path}: expected one call of a layer with running statistics, got another")
        if self.frozen(p) or self._quiet:
            return self.empty(p.shape, self.wide), 0
        return self._result("batch_statistics", "statistics", p)

    def _result(self, arena, layout, p):
        again = self._accumulate or p.name in self._written
        self._written.add(p.name)
        return self._parameter(self.arena(self._bound.get(arena, arena)), layout, p), int(again)

    def _arena_of(self, p):
        """Return the name of the arena, and of the layout, that holds a parameter."""
        return next(name for name, layout in self._layouts.items() if p.name in layout.offsets)

    def _parameter(self, arena, layout, p):
        start = self._layouts[layout].offsets[p.name]
        return arena.slice(start, start + p.size).reshape(*p.shape)

    @property
    def written(self):
        """Names of the parameters whose gradient or batch statistic the program has computed."""
        return frozenset(self._written)

    # Entries

    def launch(self, kernel, *arguments):
        """Add a launch of gpunet's own kernel of this name, or of a Kernel from elsewhere (gpunet.ops).

        Arguments are checked here, where the layer is known.
        """
        if isinstance(kernel, str):
            if kernel not in sources.kernels():
                raise GpunetError(f"{self.path}: there is no kernel '{kernel}'")
            kernel = sources.kernels()[kernel]
        cast = check_launch(kernel, arguments, self.types, self.path)
        pairs = list(zip(kernel.arguments, cast, strict=True))
        self.entries.append(
            Entry(
                "launch",
                kernel.name,
                cast,
                tuple(v for a, v in pairs if a.pointer and a.const),
                tuple(v for a, v in pairs if a.output),
                self.path,
                kernel=kernel,
            )
        )

    def matmul(self, a, b, out, accumulate=0):
        """Add out = a @ b, or out += a @ b: matrices, or batches of them with the same leading size.

        a and b are both real, and out is real or wide, such as the gradient of a weight; or all are wide. cuBLAS has no
        product of wide operands that is rounded to real.
        """
        known = dict.fromkeys([(self.real, self.real), (self.real, self.wide), (self.wide, self.wide)])
        if a.dtype != b.dtype or (a.dtype, out.dtype) not in known:
            kinds = " or ".join(f"{operand} @ {operand} -> {result}" for operand, result in known)
            raise GpunetError(f"{self.path}: matmul: expected {kinds}, got {a.dtype} @ {b.dtype} -> {out.dtype}")
        m, k = a.shape[-2:]
        batch = a.shape[:-2]
        if len(batch) > 1 or b.shape != (*batch, k, b.shape[-1]) or out.shape != (*batch, m, b.shape[-1]):
            raise GpunetError(f"{self.path}: matmul: {a.shape} @ {b.shape} does not give {out.shape}")
        flops = 2 * out.size * k
        options = {"accumulate": accumulate, "compute": self.types.compute}
        self.entries.append(Entry("matmul", "matmul", (a, b, out), (a, b), (out,), self.path, flops, options))

    def call(self, name, reads, writes, flops=0, **options):
        """Add a call of the backend's own function `name` on `reads + writes`: one pass of an engine."""
        self.entries.append(
            Entry("call", name, (*reads, *writes), tuple(reads), tuple(writes), self.path, flops, options)
        )

    def reduce(self, x):
        """Return the sum of `x` over the replicas; `x` itself where there is one."""
        return self._collective("sum", x, x.shape)

    def gather(self, x):
        """Return `x` of every replica, stacked in replica order: shape (replicas, *x.shape)."""
        if self.share.count == 1:
            return x.reshape(1, *x.shape)
        return self._collective("gather", x, (self.share.count, *x.shape))

    def _collective(self, operation, x, shape):
        if self.share.count == 1:
            return x
        out = self.empty(shape, x.dtype)
        self.entries.append(Entry("reduce", operation, (x, out), (x,), (out,), self.path))
        return out

    def reduce_part(self, x):
        """Sum a part of an arena over the replicas, into this replica's own arena; nobody else reads that part."""
        if self.share.count > 1:
            self.entries.append(Entry("reduce", "sum", (x, x), (x,), (x,), self.path))

    def barrier(self):
        """Wait for all replicas here."""
        if self.share.count > 1:
            self.entries.append(Entry("barrier", "barrier", (), (), (), self.path))
