"""Weights and statistics in flat arenas: where each tensor lies, and the table that tells whose block is whose."""

import math
import zlib
from dataclasses import dataclass, field

import numpy as np

from gpunet.errors import GpunetError

BLOCK = 256  # elements; every tensor starts at a multiple, so that a block belongs to one parameter


@dataclass(eq=False)
class Parameter:
    """A tensor that outlives a step: a weight, or a running statistic.

    `initial(rng, shape)` gives its first value in float64 on the host. A weight's learning rate and decay are
    multiplied by `rate` and `decay`; a statistic s follows its batch value b by s += rate * (b - s). A constant, which
    neither trains nor is given a rate, stays as it is. A frozen one, weight or statistic, lies in an arena that no
    program writes: steps made from then on neither update it nor compute what would only serve that.
    """

    shape: tuple[int, ...]
    initial: object
    rate: float | None = None
    decay: float = 1.0
    group: int = 0
    trainable: bool = True
    frozen: bool = False
    name: str = field(default="", compare=False)

    def __post_init__(self):
        if self.rate is None:
            self.rate = 1.0 if self.trainable else 0.0

    @property
    def size(self):
        """Elements."""
        return math.prod(self.shape)


def generator(seed, name):
    """Return the NumPy generator that the first values of the parameter of this name are drawn from."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


class Layout:
    """Places of parameters in an arena of `size` elements, a multiple of BLOCK; padding stays zero."""

    def __init__(self, parameters):
        self.parameters = {}
        self.offsets = {}
        size = 0
        for p in parameters:
            if p.name in self.parameters:
                raise GpunetError(f"{p.name}: two parameters of one name; name their layers apart")
            self.parameters[p.name] = p
            self.offsets[p.name] = size
            size += -(-p.size // BLOCK) * BLOCK
        self.size = max(size, BLOCK)

    @property
    def blocks(self):
        """Blocks in the arena."""
        return self.size // BLOCK

    def table(self):
        """Return int32 (blocks,): the row of the parameter that each block belongs to."""
        counts = [-(-p.size // BLOCK) for p in self.parameters.values()]
        rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        return np.resize(rows, self.blocks) if len(rows) else np.zeros(self.blocks, np.int32)

    def rows(self, attribute, dtype):
        """Return one value a parameter, in row order (at least one row, so that a table is never empty)."""
        return np.array([getattr(p, attribute) for p in self.parameters.values()] or [0], dtype)

    def initial(self, seed, dtype):
        """Return the arena's first contents; each parameter draws from its own generator, keyed by its name."""
        arena = np.zeros(self.size, dtype)
        for name, p in self.parameters.items():
            with np.errstate(over="ignore"):  # infinite in float32: training says so
                self.slice(arena, name)[...] = p.initial(generator(seed, name), p.shape)
        return arena

    def slice(self, arena, name):
        """Return the view of one parameter in a host arena, in its own shape."""
        p = self.parameters[name]
        return arena[self.offsets[name] : self.offsets[name] + p.size].reshape(p.shape)

    def place(self, name):
        """Return elements (start, stop) of one parameter, whole blocks."""
        start = self.offsets[name]
        return start, start + -(-self.parameters[name].size // BLOCK) * BLOCK

    def part(self, index, parts, whole=False):
        """Return elements (start, stop) of one of `parts` even ranges of whole blocks, or of whole parameters."""
        start, stop = (i * self.blocks // parts * BLOCK for i in (index, index + 1))
        if whole:
            borders = [*self.offsets.values(), self.size]
            start, stop = (min(borders, key=lambda b, at=at: abs(b - at)) for at in (start, stop))
        return start, stop


def around(name):
    """Return a parameter's name and those of the layer and blocks around it: "a.b.weight", "a.b", "a"."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
