"""The emulator: the very .cu files, compiled by g++ and run on the CPU, a fiber for each CUDA thread.

It trains whatever the CUDA backend trains, slowly; it is there to prove kernels, launches and products without a GPU.
Its memory is the host's, but handed out as addresses only, so that a mix-up of host and device fails here too.
"""

import ctypes
import platform
import shutil
import threading

import numpy as np

from gpunet.backends.device import DeviceBackend, at_address, host_array
from gpunet.backends.emulator.build import compile_all, compiler, library
from gpunet.errors import GpunetError

ORDERS = {"forward": 0, "backward": 1, "mixed": 2}  # in which the threads of a block run
ALIGN = 256  # bytes, as cudaMalloc's


def problem():
    """Return None where the emulator runs, or one line that says what is missing."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"its fibers are switched by x86-64 instructions, this machine is {platform.machine()}"
    if not shutil.which("g++"):
        return "there is no g++ to compile kernels with; install it (Debian: apt-get install g++)"
    return None


class Memory:
    """Zeroed bytes of the C library's, so that a sanitizer sees where they end."""

    def __init__(self, nbytes):
        self._libc = _libc()
        place = ctypes.c_void_p()
        if self._libc.posix_memalign(ctypes.byref(place), ctypes.c_size_t(ALIGN), ctypes.c_size_t(nbytes)):
            raise GpunetError(f"emulator: {nbytes:,} bytes cannot be had")
        self.pointer, self.nbytes = place.value, nbytes
        ctypes.memset(self.pointer, 0, nbytes)

    def __del__(self):
        if getattr(self, "pointer", None):
            self._libc.free(ctypes.c_void_p(self.pointer))


class Backend(DeviceBackend):
    """Runs lists on the emulator. order: how a block's threads take turns; sanitizer: None, "address" or "thread"."""

    name = "emulator"
    most_blocks = 8  # enough to see a grid-stride loop at work, few enough to spare fibers

    def __init__(self, order="forward", sanitizer=None, most_blocks=None):
        missing = problem()
        if missing:
            raise GpunetError(f"backend emulator: {missing}")
        self.order, self.sanitizer = ORDERS[order], sanitizer
        self.most_blocks = most_blocks or self.most_blocks

    @property
    def versions(self):
        """Return the compiler's version."""
        return {"compiler": compiler()}

    def malloc(self, nbytes):
        """Return zeroed memory of the C library's."""
        return Memory(nbytes)

    malloc_shared = malloc

    def copy_in(self, pointer, array):
        """Copy from the host to the host."""
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)

    def copy_out(self, array, pointer):
        """Copy from the host to the host."""
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)

    def compile(self, wanted):
        """Compile the files that are not in the cache, two at a time."""
        compile_all(wanted, self.sanitizer, self.show)

    def bind_function(self, kernel, real, pixel, blocks, addresses):
        """Return the call that runs the kernel's threads; it raises what the emulator found wrong."""
        code = library(kernel.path, real, pixel, self.sanitizer)
        call, run, order = getattr(code, f"gpunet_call_{kernel.name}"), code.gpunet_run, self.order
        name, message = kernel.name.encode(), ctypes.create_string_buffer(1024)

        def launch():
            with _one_at_a_time:
                if run(call, addresses, blocks, order, name, message, len(message)):
                    raise GpunetError(f"emulator: {message.value.decode()}")

        return launch

    def bind_product(self, product):
        """Return the product by NumPy, on exactly the memory that cuBLAS would read and write."""
        p = product
        left = _matrix(p.left, p.left_transposed, p.m, p.k, p.left_step, p.batch, p.left_stride)
        right = _matrix(p.right, p.right_transposed, p.k, p.n, p.right_step, p.batch, p.right_stride)
        out = _matrix(p.out, False, p.m, p.n, p.out_step, p.batch, p.out_stride)
        wide = np.float64 if p.compute == "float64" else np.float32

        def multiply():
            value = np.matmul(left.astype(wide), right.astype(wide))
            out[...] = (out + value if p.accumulate else value).astype(out.dtype)

        return multiply

    def bind_reduce(self, operation, views, out):
        """Sum or stack the replicas' views in replica order."""
        arrays, total = [host_array(v) for v in views], host_array(out)

        def reduce():
            total[...] = np.stack(arrays) if operation == "gather" else sum(arrays[1:], arrays[0])

        return reduce


_one_at_a_time = threading.Lock()  # shared memory and fibers are static


def _matrix(view, transposed, rows, columns, step, batch, stride):
    """Return what cuBLAS reads at an address: column-major matrices (batch, rows, columns), perhaps transposed."""
    if transposed:
        return _matrix(view, False, columns, rows, step, batch, stride).swapaxes(1, 2)
    return at_address(view, (batch, rows, columns), (stride, 1, step))


def _libc():
    library = ctypes.CDLL(None)  # a sanitizer's functions, where one is loaded before
    library.posix_memalign.restype = ctypes.c_int
    library.free.restype = None
    return library
