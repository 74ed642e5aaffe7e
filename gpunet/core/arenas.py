"""Memory that outlives a program: named arenas, allocated and filled at first use, one a replica or one for all."""

import math
from collections.abc import MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from gpunet.core.trace import Base, Tensor
from gpunet.errors import GpunetError


@dataclass
class _Arena:
    shape: tuple
    dtype: np.dtype
    content: object  # a function that gives the first contents, or None for zeros
    shared: bool
    adopt: bool
    open: bool

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def room(what):
    """Turn it into a GpunetError where there is not the memory for `what`, or no array can be so large."""
    try:
        yield
    except GpunetError:
        raise
    except (MemoryError, OverflowError, ValueError) as error:
        raise GpunetError(f"{what}: cannot be allocated: {error}") from None


class Arenas:
    """What a step keeps in memory. Declaring costs nothing, so that sizes are known before anything is allocated."""

    def __init__(self, backend, replicas):
        self.backend, self.replicas = backend, replicas
        self._arenas, self._memory, self._views = {}, {}, {}

    def declare(self, name, shape, dtype, content=None, *, shared=False, adopt=False, open=False):
        """Make an arena known. shared: all replicas use one; adopt: host memory may be the contents itself; open: the
        host may `peek` at it at any time.
        """
        if name in self._arenas:
            raise GpunetError(f"arena: the name {name!r} is taken")
        self._arenas[name] = _Arena(tuple(shape), np.dtype(dtype), content, shared, adopt, open)

    def __contains__(self, name):
        return name in self._arenas

    def __getitem__(self, name):
        """Return (shape, dtype)."""
        return self._arenas[name].shape, self._arenas[name].dtype

    def sizes(self):
        """Return {name: bytes in all replicas}."""
        return {name: a.nbytes * (1 if a.shared else self.replicas) for name, a in self._arenas.items()}

    def memory(self, name, replica):
        """Return the memory of an arena in a replica."""
        if name not in self._memory:
            with room(name):
                self._allocate(name)
        blocks = self._memory[name]
        return blocks[replica % len(blocks)]

    def _allocate(self, name):
        arena = self._arenas[name]
        content = arena.content() if arena.content else None
        if arena.adopt:
            self._memory[name] = [self.backend.adopt(content)]
            return
        count = 1 if arena.shared else self.replicas
        allocate = self.backend.allocate_shared if arena.open else self.backend.allocate
        self._memory[name] = [allocate(arena.nbytes) for _ in range(count)]
        if content is not None:
            self.set(name, content)

    def view(self, name, replica=0):
        """Return the backend's view of a whole arena in a replica."""
        if (name, replica) not in self._views:
            shape, dtype = self[name]
            memory = self.memory(name, replica)
            self._views[name, replica] = self.backend.view(memory, 0, Tensor(Base(0, name), shape, dtype))
        return self._views[name, replica]

    def get(self, name):
        """Return a host copy of replica 0's arena."""
        return self.backend.download(self.view(name))

    def peek(self, name):
        """Return replica 0's open arena as it is now, without waiting: kernels may be writing to it."""
        return self.backend.peek(self.view(name))

    def sum(self, name):
        """Return the sum of an arena over the replicas."""
        return sum(self.backend.download(self.view(name, r)) for r in range(self.replicas))

    def set(self, name, values):
        """Write host values to the arena in every replica."""
        for replica in range(1 if self._arenas[name].shared else self.replicas):
            self.backend.upload(self.view(name, replica), values)


class Tensors(MutableMapping):
    """Tensors by parameter name: reading copies from the device, assigning copies to it.

    `places` is {parameter: (arena, layout)}, `kind` what errors call them.
    """

    def __init__(self, arenas, kind, places):
        self._arenas, self._kind, self._places = arenas, kind, places

    def __getitem__(self, name):
        arena, layout = self._places[name]
        return layout.slice(self._arenas.get(arena), name)

    def __setitem__(self, name, value):
        if name not in self._places:
            raise GpunetError(f"{self._kind}: there is no '{name}'; known: {', '.join(self._places)}")
        arena, layout = self._places[name]
        value, expected = np.asarray(value), layout.parameters[name].shape
        if value.shape != expected:
            raise GpunetError(f"{self._kind}: {name}: expected shape {expected}, got {value.shape}")
        content = self._arenas.get(arena)
        layout.slice(content, name)[...] = value
        self._arenas.set(arena, content)

    def copy(self):
        """Return {name: array} of all; each arena is read once."""
        contents = {arena: self._arenas.get(arena) for arena in {arena for arena, _ in self._places.values()}}
        return {name: layout.slice(contents[arena], name) for name, (arena, layout) in self._places.items()}

    def __delitem__(self, name):
        raise GpunetError(f"{self._kind}: {name}: a network's tensors cannot be deleted")

    def __iter__(self):
        return iter(self._places)

    def __len__(self):
        return len(self._places)
