"""What backends with memory of their own share: views by address, arguments as a launch takes them, products as cuBLAS
takes them. Knows no driver: `CUDA` and the emulator give five functions each, and so the emulator proves the rest.
"""

import ctypes
import operator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpunet.core.backend import evaluate
from gpunet.core.sources import SCALARS
from gpunet.core.trace import c_order
from gpunet.errors import GpunetError

THREADS = 256  # of every block, as in kernels/common.cuh
BLOCKS = 1 << 20  # the largest grid of a launch over=n, whose loop takes any
NAMES = {"float32": "float", "float64": "double", "float16": "half", "bfloat16": "bfloat16", "uint8": "uint8"}
CTYPES = {
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "long long": ctypes.c_longlong,
    "unsigned long long": ctypes.c_ulonglong,
    "unsigned char": ctypes.c_ubyte,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
assert CTYPES.keys() == SCALARS.keys()


@dataclass(frozen=True, eq=False)
class View:
    """An array in a device's memory: address, shape, dtype, strides in elements. `memory` is kept alive by it."""

    memory: object
    pointer: int
    shape: tuple
    dtype: np.dtype
    element_strides: tuple

    @cached_property
    def size(self):
        """Elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self):
        """Bytes of its elements."""
        return self.size * self.dtype.itemsize

    @property
    def contiguous(self):
        """Whether its elements follow each other in C order."""
        return self.element_strides == c_order(self.shape)

    def __getitem__(self, rows):
        """Return the view of a range of its first axis."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise GpunetError(f"view: expected a range of rows, got {rows}")
        offset = start * self.element_strides[0] * self.dtype.itemsize
        shape = (max(stop - start, 0), *self.shape[1:])
        return View(self.memory, self.pointer + offset, shape, self.dtype, self.element_strides)


def host_array(view):
    """Return the ndarray that a View is where its memory is the host's."""
    return at_address(view, view.shape, view.element_strides)


def at_address(view, shape, element_strides):
    """Return an ndarray of this shape and these strides that begins where a View in the host's memory does."""
    span = sum((n - 1) * step for n, step in zip(shape, element_strides, strict=True)) + 1 if np.prod(shape) else 0
    buffer = (ctypes.c_char * (span * view.dtype.itemsize)).from_address(view.pointer)
    buffer.keeps = view.memory
    return np.ndarray(shape, view.dtype, buffer, 0, tuple(s * view.dtype.itemsize for s in element_strides))


@dataclass(frozen=True)
class Product:
    """The arguments of cublasGemmStridedBatchedEx: column-major, so out^T = b^T a^T; `a`, `b`, `out` are Views.

    `left` is the b of out = a @ b, and so on. compute: float32, tf32 or float64.
    """

    m: int
    n: int
    k: int
    left: View
    left_transposed: bool
    left_step: int
    right: View
    right_transposed: bool
    right_step: int
    out: View
    out_step: int
    batch: int
    left_stride: int
    right_stride: int
    out_stride: int
    accumulate: bool
    compute: str

    @classmethod
    def of(cls, a, b, out, accumulate, compute):
        """The product out = a @ b or out += a @ b of row-major matrices, or of batches of them."""
        m, k = a.shape[-2:]
        n = b.shape[-1]
        left_transposed, left_step = _stored(b, "b")
        right_transposed, right_step = _stored(a, "a")
        out_transposed, out_step = _stored(out, "out")
        if out_transposed:
            raise GpunetError(f"matmul: out: expected rows of neighbours, got strides {out.element_strides}")
        batch = a.shape[0] if len(a.shape) == 3 else 1
        strides = (v.element_strides[0] if len(v.shape) == 3 else 0 for v in (b, a, out))
        return cls(n, m, k, b, left_transposed, left_step, a, right_transposed, right_step, out, out_step, batch,
                   *strides, bool(accumulate), compute)  # fmt: skip


def _stored(view, name):
    """Return (transposed, leading dimension) of a row-major matrix that cuBLAS is to read as its transpose."""
    rows, columns = view.shape[-2:]
    down, along = view.element_strides[-2:]
    down, along = down if rows > 1 else columns, along if columns > 1 else rows  # of one row or column: never taken
    if (along == 1 or columns == 1) and down >= columns:
        return False, down
    if (down == 1 or rows == 1) and along >= rows:
        return True, along
    raise GpunetError(f"matmul: {name}: expected rows or columns of neighbours, got strides {view.element_strides}")


def variant(kernel, arguments):
    """Return (REAL, PIXEL) that a kernel's file is to be compiled with for these arguments."""
    real = pixel = None
    for declared, given in zip(kernel.arguments, arguments, strict=True):
        if declared.type == "real" or (declared.type == "wide" and declared.pointer and real is None):
            real = NAMES[given.dtype.name]
        elif declared.type == "pixel":
            pixel = NAMES[given.dtype.name]
    return real or "float", pixel or "uint8"


def pack(kernel, arguments, real):
    """Return (an array of addresses of the arguments' values, the values): what cuLaunchKernel takes."""
    wide = "double" if real == "double" else "float"
    values = []
    for declared, given in zip(kernel.arguments, arguments, strict=True):
        if declared.pointer:
            values.append(ctypes.c_void_p(given.pointer))
        else:
            values.append(CTYPES[wide if declared.type == "wide" else declared.type](given))
    return (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values)), values


def blocks_of(kernel, arguments, most=BLOCKS):
    """Return how many blocks a launch has; an empty one still has one."""
    sizes = {d.name: operator.index(a) for d, a in zip(kernel.arguments, arguments, strict=True)
             if not d.pointer and SCALARS.get(d.type, "f")[0] in "iu"}  # fmt: skip
    count = evaluate(kernel.count, sizes)
    return max(1, count if kernel.form == "blocks" else min(-(-count // THREADS), most))


class DeviceBackend:
    """Binds entries to a device's memory. A subclass gives malloc, copy_in, copy_out, bind_function, bind_product."""

    workspace_bytes = 0
    replicas = 1
    blas = False
    fuses = True
    graphs = False
    most_blocks = BLOCKS
    versions = {}  # noqa: RUF012 - of what else its results depend on, by name
    show = None  # called with (files compiled, files to compile), for a line of progress

    # What the device gives

    def malloc(self, nbytes):
        """Return zeroed memory with an attribute `pointer`, aligned to 256 bytes; freed with the object."""
        raise NotImplementedError

    def malloc_shared(self, nbytes):
        """Return zeroed memory of the host that kernels can write to, at the same address."""
        raise NotImplementedError

    def compile(self, wanted):
        """Have each (path, REAL, PIXEL) compiled that is not; calls `show`."""
        raise NotImplementedError

    def copy_in(self, pointer, array):
        """Copy a contiguous host array to an address; it is there when this returns."""
        raise NotImplementedError

    def copy_out(self, array, pointer):
        """Copy to a contiguous host array what lies at an address, once it is computed."""
        raise NotImplementedError

    def bind_function(self, kernel, real, pixel, blocks, addresses):
        """Return a call that launches a kernel of a file compiled for these types."""
        raise NotImplementedError

    def bind_product(self, product):
        """Return a call that computes a Product."""
        raise NotImplementedError

    # What the core asks for

    def engine(self, types, name=None):
        """Return the one convolution engine that devices have, whatever is asked for."""
        return "unfold"

    def parts(self, rows, tiles):
        """Return how many parts to cut a sum over `rows` into, where each part takes `tiles` blocks."""
        return max(1, min(rows // 64, 512 // tiles))

    def prepare(self, launches):
        """Compile what these (kernel, arguments) need, arguments being tensors and numbers."""
        self.compile({(kernel.path, *variant(kernel, arguments)) for kernel, arguments in launches})

    def allocate(self, nbytes):
        """Return zeroed memory."""
        return self.malloc(max(nbytes, 1))

    def allocate_shared(self, nbytes):
        """Return zeroed memory of the host's that kernels can write to."""
        return self.malloc_shared(max(nbytes, 1))

    def peek(self, view):
        """Return the array that a view of shared memory is."""
        return host_array(view)

    def adopt(self, array):
        """Return memory with a copy of a host array."""
        array = np.ascontiguousarray(array)
        memory = self.allocate(array.nbytes)
        self.copy_in(memory.pointer, array)
        return memory

    def view(self, memory, offset, tensor):
        """Return the View of a traced tensor that lies `offset` bytes into `memory`."""
        pointer = memory.pointer + offset + tensor.offset * tensor.dtype.itemsize
        return View(memory, pointer, tensor.shape, tensor.dtype, tensor.element_strides)

    def upload(self, view, array):
        """Copy a host array, broadcast and converted, into a contiguous view."""
        if view.size:
            values = np.asarray(array, view.dtype)
            self.copy_in(view.pointer, np.ascontiguousarray(np.broadcast_to(values, view.shape)))

    def download(self, view):
        """Return a host copy of a contiguous view."""
        if not view.contiguous:
            raise GpunetError(f"download: expected a contiguous view, got strides {view.element_strides}")
        array = np.empty(view.shape, view.dtype)
        if view.size:
            self.copy_out(array, view.pointer)
        return array

    def synchronize(self):
        """Wait for all that was launched; here a launch returns when it is done."""

    def mark(self):
        """Return an event: all that was launched until now is done. None where a launch returns when it is done."""

    def stage(self, pairs, after):
        """Copy (view, host array) pairs, here at once; return their event."""
        for view, array in pairs:
            self.copy_in(view.pointer, array)

    def wait(self, event):
        """Let what is launched from now on wait for an event."""

    def finish(self, event):
        """Wait for an event here."""

    def memory(self):
        """Return (free, total) bytes, or None where that is not known."""

    def holders(self):
        """Return who else holds the device's memory, in words."""
        return "nobody else is known to hold memory"

    def workspace(self):
        """Return nothing: a kernel has its shared memory, and cuBLAS a workspace of the backend's."""

    def bind_launch(self, kernel, arguments, workspace):
        """Return the launch of a kernel of the file compiled for the arguments' types."""
        real, pixel = variant(kernel, arguments)
        addresses, values = pack(kernel, arguments, real)
        call = self.bind_function(kernel, real, pixel, blocks_of(kernel, arguments, self.most_blocks), addresses)
        call.keeps = arguments, addresses, values  # a launch knows where they are, and nothing else refers to them
        return call

    def bind_matmul(self, a, b, out, accumulate, compute, workspace):
        """Return the product out = a @ b, or out += a @ b."""
        if 0 in (a.size, b.size):
            raise GpunetError(f"matmul: expected matrices that are not empty, got {a.shape} @ {b.shape}")
        return self.bind_product(Product.of(a, b, out, accumulate, compute))

    def bind_reduce(self, operation, views, out):
        """There is one replica: a device."""
        raise GpunetError(f"backend {self.name}: replicas: expected 1, got {len(views)}; it runs on one device")

    def bind_call(self, name, views, options, workspace):
        """There is no engine of this name here."""
        raise GpunetError(f"backend {self.name}: there is no engine pass '{name}'")
