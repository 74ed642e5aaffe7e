"""The CUDA backend: kernels compiled by NVRTC, memory, streams and graphs through CuPy, products by cuBLAS.

Nothing is computed by CuPy: it is the way to the driver. What is launched and with which arguments is decided in
gpunet.backends.device, which the emulator shares.
"""

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from gpunet.backends import cache as kernel_cache
from gpunet.backends.cuda import cublas, detect, nvrtc
from gpunet.backends.device import THREADS, DeviceBackend
from gpunet.core import sources
from gpunet.errors import GpunetError

BY_ADDRESS = 4  # cudaMemcpyDefault: what is read may be shared memory, which is the host's
MAPPED = 2  # cudaHostAllocMapped: host memory that kernels write to
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
COMPILERS = 4  # files compiled at a time


class Memory:
    """Bytes of the device, or of the host where the device sees them; freed with the object."""

    def __init__(self, pointer, nbytes, free):
        self.pointer, self.nbytes, self._free = pointer, nbytes, free

    def __del__(self):
        if not sys.is_finalizing():  # then the driver has freed it
            with suppress(RuntimeError):  # CuPy's, of a device that an error has ended; that was told before
                self._free(self.pointer)


class Backend(DeviceBackend):
    """Runs lists on one NVIDIA GPU, on a stream of its own. `graphs`: a list that is replayed again becomes a graph."""

    name = "cuda"
    graphs = True
    workspace_bytes = cublas.WORKSPACE

    def __init__(self, device=0, facts=None):
        facts = facts or detect.look()
        missing = detect.problem(facts)
        if missing:
            raise GpunetError(f"backend cuda: {missing}")
        for path in (facts.nvrtc, facts.cublas):  # loaded before CuPy looks for them: it would take another version's
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        import cupy

        self._cupy, self._runtime, self._driver = cupy, cupy.cuda.runtime, cupy.cuda.driver
        self._cupy_version = ", ".join(" ".join(found) for found in facts.cupy)
        self.device = facts.devices[device]
        self._runtime.setDevice(device)
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.copies = cupy.cuda.Stream(non_blocking=True)
        self._modules = {}
        self._cublas = cublas.Cublas(facts.cublas, self.stream.ptr, self.malloc(cublas.WORKSPACE))

    @property
    def versions(self):
        """Return GPU, and versions of CuPy, cuBLAS and the compiler."""
        return {
            "device": self.device.name,
            "cupy": self._cupy_version,
            "cublas": self._cublas.version(),
            "nvrtc": nvrtc.version(),
        }

    # Memory

    def malloc(self, nbytes):
        """Return zeroed memory of the device by one cudaMalloc."""
        try:
            pointer = self._runtime.malloc(nbytes)
        except self._runtime.CUDARuntimeError as error:
            if error.status != OUT_OF_MEMORY:
                raise
            free, total = self.memory()
            raise GpunetError(
                f"backend cuda: {nbytes:,} bytes cannot be had: {free:,} of {total:,} are free on {self.device.name}; "
                f"{self.holders()}"
            ) from None
        memory = Memory(pointer, nbytes, self._runtime.free)
        self._runtime.memsetAsync(pointer, 0, nbytes, self.stream.ptr)
        self.stream.synchronize()  # the other stream may write to it next
        return memory

    def malloc_shared(self, nbytes):
        """Return zeroed memory of the host that kernels can write to and the host can read without waiting."""
        try:
            pointer = self._runtime.hostAlloc(nbytes, MAPPED)
        except self._runtime.CUDARuntimeError as error:
            if error.status != OUT_OF_MEMORY:
                raise
            raise GpunetError(f"backend cuda: {nbytes:,} bytes of pinned host memory cannot be had: {error}") from None
        memory = Memory(pointer, nbytes, self._runtime.freeHost)
        ctypes.memset(memory.pointer, 0, nbytes)
        return memory

    def memory(self):
        """Return (free, total) bytes of the device."""
        return self._runtime.memGetInfo()

    def holders(self):
        """Return who holds the device's memory, as far as nvidia-smi tells."""
        found = detect.holders()
        if not found:
            return super().holders()
        sizes = (f" {nbytes / 2**20:,.0f} MiB" if nbytes else "" for _, _, nbytes in found)
        return "memory is held by " + ", ".join(f"{h[1]} ({h[0]}){size}" for h, size in zip(found, sizes, strict=True))

    def copy_in(self, pointer, array):
        """Copy to the device, after all that the stream has been given."""
        self._runtime.memcpyAsync(pointer, array.ctypes.data, array.nbytes, BY_ADDRESS, self.stream.ptr)
        self.stream.synchronize()

    def copy_out(self, array, pointer):
        """Copy to the host, after all that the stream has been given."""
        self._runtime.memcpyAsync(array.ctypes.data, pointer, array.nbytes, BY_ADDRESS, self.stream.ptr)
        self.stream.synchronize()

    # Work

    def compile(self, wanted):
        """Compile the files that neither this process nor the cache has, some at a time."""
        missing = [w for w in sorted(wanted, key=str) if w not in self._modules]
        with ThreadPoolExecutor(COMPILERS) as pool:  # NVRTC runs without Python's lock
            for done, (key, path) in enumerate(zip(missing, pool.map(self._cubin, missing), strict=True), 1):
                module = self._cupy.cuda.function.Module()
                module.load_file(str(path))
                self._modules[key] = module
                if self.show:
                    self.show(done, len(missing))

    def _cubin(self, key):
        path, real, pixel = key
        text, architecture = sources.inlined(path), f"sm_{self.architecture}"
        defines = (f"REAL={real}", f"PIXEL={pixel}")
        name = kernel_cache.key(text, architecture, *defines, *nvrtc.OPTIONS, nvrtc.version())

        def make(target):
            target.write_bytes(nvrtc.build(text, path.name, architecture, defines).cubin)

        return kernel_cache.kept(f"{path.stem}-{name}.cubin", make)

    @property
    def architecture(self):
        """The newest architecture of the device's generation that the compiler knows: its code runs there."""
        major, minor = self.device.capability
        known = [a for a in nvrtc.architectures() if a // 10 == major and a % 10 <= minor]
        if not known:
            raise GpunetError(
                f"backend cuda: NVRTC {nvrtc.version()} does not compile for {self.device.name} (sm_{major}{minor}); "
                f"it knows {', '.join(f'sm_{a}' for a in nvrtc.architectures())}"
            )
        return known[-1]

    def bind_function(self, kernel, real, pixel, blocks, addresses):
        """Return the call that launches a kernel on the stream."""
        key = kernel.path, real, pixel
        self.compile({key})
        function = self._modules[key].get_function(kernel.name)
        launch, stream = self._driver.launchKernel, self.stream.ptr
        arguments = (function.ptr, blocks, 1, 1, THREADS, 1, 1, 0, stream, ctypes.addressof(addresses), 0)

        def run():
            try:
                launch(*arguments)
            except RuntimeError as error:  # CuPy's, which names no kernel
                raise GpunetError(f"backend cuda: {kernel.name}: {error}") from error

        run.function = function  # it keeps the module
        return run

    def bind_product(self, product):
        """Return the product by cuBLAS."""
        return self._cublas.bind(product)

    def capture(self, calls):
        """Return one launch of all the calls: a CUDA graph. Nothing is executed here."""
        self.stream.begin_capture()
        try:
            for call in calls:
                call()
        except BaseException:
            with suppress(RuntimeError):  # what went wrong first is what is told
                self.stream.end_capture()
            raise
        graph = self.stream.end_capture()
        graph.upload(self.stream)
        stream = self.stream

        def launch():
            graph.launch(stream)

        launch.keeps = calls  # their arguments' memory
        return launch

    def synchronize(self):
        """Wait for all that was launched; raises what went wrong on the device meanwhile."""
        self.stream.synchronize()

    # Copies beside the computation

    def mark(self):
        """Return an event: all that was launched until now."""
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(self.stream)
        return event

    def stage(self, pairs, after):
        """Copy (view, array in shared memory) pairs on a second stream, once `after` has come; return their event."""
        self.copies.wait_event(after)
        for view, array in pairs:
            self._runtime.memcpyAsync(view.pointer, array.ctypes.data, array.nbytes, BY_ADDRESS, self.copies.ptr)
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(self.copies)
        return event

    def wait(self, event):
        """Let what is launched from now on wait for an event."""
        self.stream.wait_event(event)

    def finish(self, event):
        """Wait for an event here."""
        event.synchronize()

    # Time

    def time(self, call, repeats=20):
        """Return the milliseconds of a call: the mean of `repeats` on the stream, after one that does not count."""
        start, stop = (self._cupy.cuda.Event() for _ in range(2))
        call()
        start.record(self.stream)
        for _ in range(repeats):
            call()
        stop.record(self.stream)
        stop.synchronize()
        return self._cupy.cuda.get_elapsed_time(start, stop) / repeats

