"""The NumPy backend: every kernel is a Python function of the same name in the module of its stem.

Where `numba_<stem>.py` (with the extra `numba`) or `fast_<stem>.py` has the function too, the first of them is asked:
it is called once with the real arrays and returns the call to replay, or None for a case that it leaves to the next.
"""

import os
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np

from gpunet.backends.numpy.scratch import Scratch
from gpunet.backends.numpy.values import put, wide
from gpunet.errors import GpunetError

REDUCE_BLOCK = 16384  # elements summed at a time, so that partial sums stay in the cache


class Backend:
    """Runs lists on the CPU, one Python call an entry."""

    name = "numpy"
    workspace_bytes = 8 << 20

    blas, graphs, show = True, False, None

    def __init__(self, fast=True, numba=None):
        self.fast = fast
        self.numba = find_spec("numba") is not None if numba is None else numba

    @property
    def fuses(self):
        """Whether layers are fused: with numba, for NumPy would make no fewer passes over memory."""
        return self.fast and self.numba

    @cached_property
    def versions(self):
        """That of numba, where it compiles; NumPy's and its BLAS's are everybody's."""
        return {"numba": version("numba")} if self.numba else {}

    @property
    def replicas(self):
        """One a core that this process may use."""
        return len(os.sched_getaffinity(0))

    def engine(self, types, name=None):
        """Return the engine for each geometry; for 16-bit floats the portable one: their products are not BLAS's."""
        from gpunet.backends.numpy import engines

        if types.real.itemsize == 2:
            return "unfold"
        tuned = {} if name else engines.read_table(self, types)
        return partial(engines.choose, types=types, numba=self.numba, name=name, tuned=tuned)

    def parts(self, rows, tiles):
        """Return 1: a replica is one core."""
        return 1

    def prepare(self, launches):
        """Nothing is compiled."""

    def allocate(self, nbytes):
        """Return zeroed bytes, aligned to 64."""
        memory = np.zeros(nbytes + 64, np.uint8)
        start = -memory.ctypes.data % 64
        return memory[start : start + nbytes]

    def allocate_shared(self, nbytes):
        """Return zeroed bytes: all memory here is the host's."""
        return self.allocate(nbytes)

    def peek(self, view):
        """Return the view."""
        return view

    def adopt(self, array):
        """Return the bytes of a contiguous host array, which is used as it is."""
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def view(self, memory, offset, tensor):
        """Return the array for a tensor that lies `offset` bytes into `memory`."""
        itemsize = tensor.dtype.itemsize
        strides = tuple(s * itemsize for s in tensor.element_strides)
        return np.ndarray(tensor.shape, tensor.dtype, memory, offset + tensor.offset * itemsize, strides)

    def upload(self, view, array):
        """Copy into a view."""
        np.copyto(view, array)

    def download(self, view):
        """Return a copy."""
        return view.copy()

    def synchronize(self):
        """Nothing runs on its own."""

    def memory(self):
        """Return None: the host's memory is the system's affair."""

    def mark(self):
        """Return nothing: what was launched is done."""

    def stage(self, pairs, after):
        """Copy at once."""
        for view, array in pairs:
            np.copyto(view, array)

    def wait(self, event):
        """Nothing is under way."""

    def finish(self, event):
        """Nothing is under way."""

    def workspace(self):
        """Return the scratch buffer of one replica."""
        return Scratch(self.workspace_bytes)

    def bind_launch(self, kernel, arguments, workspace):
        """Bind the twin that numba compiles or the fast one, the first that covers the case, else the definition."""
        if kernel.definition is not None:
            return partial(kernel.definition, *arguments)
        for kind in ("numba", "fast"):
            twin = self._twin(kind, kernel)
            if twin is not None:
                workspace.reset()
                call = twin(*arguments, scratch=workspace)
                if call is not None:
                    return call
        twin = getattr(import_module(f"gpunet.backends.numpy.{kernel.stem}"), kernel.name, None)
        if twin is None:
            raise GpunetError(
                f"{kernel.path}: kernel {kernel.name} has no twin in gpunet/backends/numpy/{kernel.stem}.py"
            )
        return partial(twin, *arguments)

    def _twin(self, kind, kernel):
        """Return the kernel's function in module <kind>_<stem>, or None where there is none or it is not wanted."""
        module = f"gpunet.backends.numpy.{kind}_{kernel.stem}"
        if not self.fast or (kind == "numba" and not self.numba) or not find_spec(module):
            return None
        return getattr(import_module(module), kernel.name, None)

    def bind_matmul(self, a, b, out, accumulate, compute, workspace):
        """Multiply straight into `out`; an accumulating one goes by row blocks through scratch.

        16-bit operands are multiplied in float32, on copies that are allocated at every replay: right, and slow.
        """
        if 2 in (a.itemsize, out.itemsize):
            return lambda: put(out, wide(a) @ wide(b), accumulate)
        if not accumulate:
            return partial(np.matmul, a, b, out=out)
        workspace.reset()
        columns = out.shape[-1]
        step = max(1, min(out.shape[-2], workspace.nbytes // 2 // (columns * out.itemsize)))
        block = workspace((step, columns), out.dtype)
        stacked = [x.reshape(-1, *x.shape[-2:]) if x.ndim == 2 else x for x in (a, b, out)]
        pieces = [
            (x[r : r + step], y, block[: min(step, z.shape[0] - r)], z[r : r + step])
            for x, y, z in zip(*stacked, strict=True)
            for r in range(0, z.shape[0], step)
        ]

        def run():
            for x, y, product, z in pieces:
                np.matmul(x, y, out=product)
                np.add(z, product, out=z)

        return run

    def bind_call(self, name, views, options, workspace):
        """Bind an engine's pass, such as blocked_forward: function `forward` of module engine_blocked here.

        Where numba compiles and module numba_<engine> covers the case, that module's; it returns None for others.
        """
        engine, _, kind = name.partition("_")
        module, compiled = (f"gpunet.backends.numpy.{kind_of}_{engine}" for kind_of in ("engine", "numba"))
        for place in [compiled] * bool(self.numba and find_spec(compiled)) + [module]:
            workspace.reset()
            call = getattr(import_module(place), kind)(*views, **options, scratch=workspace)
            if call is not None:
                return call
        raise GpunetError(f"backend numpy: engine {engine} does not compute {options['geometry']}")

    def bind_reduce(self, operation, views, out):
        """Sum or stack the replicas' views; `out` may be one of them, which nobody else reads."""
        if operation == "gather":
            pairs = list(zip(out, views, strict=True))

            def run():
                for target, view in pairs:
                    np.copyto(target, view)

            return run
        flat = [v.reshape(-1) for v in views]
        total = out.reshape(-1)
        block = np.empty(min(REDUCE_BLOCK, max(total.size, 1)), total.dtype)
        pieces = [
            ([v[i : i + block.size] for v in flat], total[i : i + block.size], block[: min(block.size, total.size - i)])
            for i in range(0, total.size, block.size)
        ]

        def run():
            for parts, target, partial_sum in pieces:
                np.add(parts[0], parts[1], out=partial_sum)
                for part in parts[2:]:
                    np.add(partial_sum, part, out=partial_sum)
                np.copyto(target, partial_sum)

        return run
