"""What the items of the GPU report work with: a backend, its clock, copies and arrays, and how long there is time.

Knows no part. Without a GPU the emulator stands in: every path is then proved, and no time means anything.
"""

import ctypes
import gc
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpunet import backends
from gpunet.backends import emulator
from gpunet.core.trace import Base, Tensor

BY_ADDRESS = 4  # cudaMemcpyDefault: what a step writes may be shared memory, which is the host's
SHORT = 0.3  # ms: a call that takes less is measured in a graph of many
L2 = 50 << 20  # bytes, where the device does not tell


class Skip(Exception):
    """Why an item has nothing to do here."""


@dataclass(frozen=True)
class Item:
    """One thing to find out. run(bench) returns a dict of what came out, see gpu_report.py.

    needs: seconds that must be left to begin it. apart: it gets a process of its own.
    """

    name: str
    run: object
    needs: float = 3.0
    apart: bool = False


class Emulated(emulator.Backend):
    """The emulator with what the report asks of the CUDA backend beside a backend's duties."""

    graphs = True

    def capture(self, calls):
        """Return all the calls as one."""

        def launch():
            for call in calls:
                call()

        return launch

    def time(self, call, repeats=20):
        """Return the milliseconds of a call, after one that does not count."""
        call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return 1e3 * (time.perf_counter() - start) / repeats


class Bench:
    """A backend and what is measured with it; `options` are the command's."""

    def __init__(self, options, deadline):
        self.options, self.quick, self.deadline = options, options.quick, deadline
        self.rounds, self.repeats = (1, 1) if self.quick else (5, 20)

    @property
    def left(self):
        """Seconds until the deadline."""
        return self.deadline - time.time()

    @property
    def emulated(self):
        """Whether the emulator stands in for a GPU."""
        return self.options.backend == "emulator"

    @cached_property
    def backend(self):
        """The backend; raises what is missing."""
        return Emulated() if self.emulated else backends.backend("cuda")

    @contextmanager
    def graphs(self, on):
        """Have the backend replay by graphs, or launch by launch."""
        before, self.backend.graphs = self.backend.graphs, on
        try:
            yield
        finally:
            self.backend.graphs = before

    # Time

    def measure(self, call, rounds=3):
        """Return the milliseconds of a call on the device: the median of some means.

        What is short is repeated in a graph: Python's launches would cost more than the kernel.
        """
        once = self.backend.time(call, 1 if self.quick else 3)
        inside, count = 1, 2
        if self.quick:
            rounds, inside = 1, 2
        elif once < SHORT:
            inside = 16
        repeated = self.backend.capture([call] * inside) if inside > 1 else call
        return statistics.median(self.backend.time(repeated, count) / inside for _ in range(rounds))

    # Memory

    def array(self, shape, dtype, values=None):
        """Return a View of new memory: these values, else random ones; whole numbers are 0."""
        dtype = np.dtype(dtype)
        tensor = Tensor(Base(0), tuple(int(n) for n in shape), dtype)
        view = self.backend.view(self.backend.allocate(tensor.nbytes), 0, tensor)
        if values is not None:
            self.backend.upload(view, values)
        elif dtype.kind not in "iub" and dtype.names is None:
            self._randomise(view)
        return view

    def _randomise(self, view):
        """Write normal numbers: a million of them, copied on until the memory is full."""
        tile = np.random.default_rng(0).standard_normal(min(view.size, 1 << 20), np.float32).astype(view.dtype)
        if not tile.size:
            return
        self.backend.copy_in(view.pointer, tile)
        done = tile.nbytes
        while done < view.nbytes:
            part = min(done, view.nbytes - done)
            self.copy(view.pointer + done, view.pointer, part)
            done += part
        self.backend.synchronize()

    def copy(self, to, source, nbytes):
        """Copy within the device, on the backend's stream."""
        b = self.backend
        if self.emulated:
            ctypes.memmove(to, source, nbytes)
        elif nbytes:
            b._runtime.memcpyAsync(to, source, nbytes, BY_ADDRESS, b.stream.ptr)

    @cached_property
    def bandwidth(self):
        """{bytes copied: best GB/s, what is read and what is written counted} of copies within the device."""
        sizes = (1 << 16,) if self.quick else (1 << 28, 1 << 29, 1 << 30, 1 << 31)
        found = {}
        for nbytes in sizes:
            here, there = (self.array((nbytes // 4,), np.float32) for _ in range(2))
            call = lambda h=here, t=there, n=nbytes: self.copy(t.pointer, h.pointer, n)  # noqa: E731
            best = min(self.backend.time(call, 1 if self.quick else 10) for _ in range(self.rounds))
            found[nbytes] = 2 * nbytes / best / 1e6
        return found

    @cached_property
    def l2(self):
        """Bytes of the second-level cache."""
        if self.emulated:
            return L2
        runtime = self.backend._runtime
        try:
            return int(runtime.deviceGetAttribute(runtime.cudaDevAttrL2CacheSize, 0)) or L2
        except Exception:
            return L2

    # Between two items

    def clean(self):
        """Give back what the last item held."""
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
