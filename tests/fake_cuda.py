"""A GPU, CuPy and cuBLAS for a machine that has none: what gpunet calls of them, with CuPy 14's signatures.

Kernels are run by the emulator, on the host's memory. As on a device, what is launched waits in its stream until
somebody waits for it; arguments are read when they are launched or captured, memory when they run. Whatever CUDA would
refuse, or do wrong in silence, is an error here: a pointer to nobody's memory, a leading dimension that is too small,
types that cuBLAS does not multiply, a copy while a graph is captured.
"""

import ctypes
from collections import Counter, deque
from ctypes import POINTER, c_double, c_float, c_int, c_longlong, c_size_t, c_void_p
from functools import cache, partial, wraps
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakValueDictionary

import ml_dtypes
import numpy as np

from gpunet.backends.emulator import Memory
from gpunet.backends.emulator.build import library
from gpunet.core import sources
from gpunet.core.backend import evaluate
from gpunet.core.state import STATE
from gpunet.errors import GpunetError

OUT_OF_MEMORY = 2
ERRORS = {  # cudaError, the same numbers as CUresult's
    1: "InvalidValue",
    OUT_OF_MEMORY: "MemoryAllocation",
    101: "InvalidDevice",
    209: "NoKernelImageForDevice",
    400: "InvalidResourceHandle",
    500: "SymbolNotFound",
    700: "IllegalAddress",
    900: "StreamCaptureUnsupported",
    901: "StreamCaptureInvalidated",
    905: "StreamCaptureIsolation",
}
BY_ADDRESS, MAPPED = 4, 2  # cudaMemcpyDefault, cudaHostAllocMapped
SIZES = {"int": 4, "unsigned int": 4, "long long": 8, "unsigned long long": 8, "unsigned char": 1, "float": 4,
         "double": 8, "State": STATE.itemsize}  # fmt: skip
REALS = {"float": 4, "double": 8, "half": 2, "bfloat16": 2}
PIXELS = {"uint8": 1, "float": 4}


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""

    def __init__(self, status):
        self.status = status
        super().__init__(f"cudaError{ERRORS[status]}")


class CUDADriverError(RuntimeError):
    """As CuPy's, but for the spelling of its names."""

    def __init__(self, status):
        self.status = status
        super().__init__(f"CUDA_ERROR_{ERRORS[status]}")


class Gpu:
    """The device: memory, streams, and a count of all that was called. `cubins`: (path, REAL, PIXEL) of each code."""

    def __init__(self, total=1 << 30, devices=1):
        self.total, self.devices, self.pinnable = total, devices, 1 << 30
        self.blocks, self.hosts = {}, {}  # Memory by its address: the device's, and the host's that kernels see
        self.streams, self.functions, self.cubins = {}, WeakValueDictionary(), {}
        self.counts, self.ran = Counter(), []  # ran: (stream, name, blocks) of kernels and products, in order
        self.broken = None  # the status that all waits and allocations end with, as after an illegal access
        self.hasty = set()  # streams that do what they are given at once; others wait until somebody waits for them
        self.selected = None  # the current device
        self.handles = count(1000)
        self._running, self._closed, self._dying = False, False, []

    @property
    def free(self):
        """Bytes that nobody holds."""
        return self.total - sum(memory.nbytes for memory in self.blocks.values())

    def has(self, pointer, nbytes, host=True):
        """Return whether so many bytes at an address are one allocation's: the device's, or mapped ones."""
        known = [*self.blocks.items(), *(self.hosts.items() if host else ())]
        return any(start <= pointer and pointer + nbytes <= start + memory.nbytes for start, memory in known)

    def refuse_capture(self):
        """Fail, and spoil the graph, if one is captured."""
        for stream in self.streams.values():
            if stream.captured is not None:
                stream.spoiled = True
                raise CUDARuntimeError(900)

    def step(self, stream):
        """Do what is next in a stream."""
        run = stream.waiting.popleft()
        outer, self._running = self._running, True
        try:
            run()
        finally:
            self._running = outer
            stream.done += 1

    def progress(self, most=None):
        """Do all that waits, or at most so many things: time passes, and nobody waited for it."""
        done = 0
        while done != most and (busy := [s for s in self.streams.values() if s.waiting]):
            self.step(busy[0])
            done += 1

    def close(self):
        """End the process, as it were: nothing runs any more, and what is freed later was freed by that."""
        self._closed = True

    def release(self, blocks, pointer):
        """Free memory, once all that may use it has run; within a kernel, a dead object's must wait until after."""
        self._dying.append((blocks, pointer))
        if self.broken:
            raise CUDARuntimeError(self.broken)
        if not self._running and not self._closed:
            self.progress()
            while self._dying:
                blocks, pointer = self._dying.pop()
                if pointer not in blocks:
                    raise CUDARuntimeError(1)
                del blocks[pointer]


# cupy.cuda


def cupy(gpu):
    """Return what `import cupy` gives on this device."""
    cuda = SimpleNamespace(
        runtime=Runtime(gpu),
        driver=SimpleNamespace(launchKernel=partial(launchKernel, gpu)),
        function=SimpleNamespace(Module=partial(Module, gpu)),
        Stream=partial(Stream, gpu),
        Event=partial(Event, gpu),
        get_elapsed_time=get_elapsed_time,
    )
    return SimpleNamespace(cuda=cuda)


class Runtime:
    """cupy.cuda.runtime."""

    CUDARuntimeError = CUDARuntimeError

    def __init__(self, gpu):
        self._gpu = gpu

    def setDevice(self, device):
        if not 0 <= device < self._gpu.devices:
            raise CUDARuntimeError(101)
        self._gpu.selected = device

    def memGetInfo(self):
        return self._gpu.free, self._gpu.total

    def malloc(self, size):
        return self._allocate(self._gpu.blocks, size, self._gpu.free)

    def hostAlloc(self, size, flags):
        assert flags & MAPPED
        return self._allocate(self._gpu.hosts, size, self._gpu.pinnable)

    def _allocate(self, blocks, size, most):
        self._gpu.refuse_capture()
        if self._gpu.broken or size > most:
            raise CUDARuntimeError(self._gpu.broken or OUT_OF_MEMORY)
        memory = Memory(size)
        ctypes.memset(memory.pointer, 0xFF, size)  # NaN: what was there before is anybody's
        blocks[memory.pointer] = memory
        self._gpu.counts["malloc"] += 1
        return memory.pointer

    def free(self, ptr):
        self._gpu.release(self._gpu.blocks, ptr)

    def freeHost(self, ptr):
        self._gpu.release(self._gpu.hosts, ptr)

    def memsetAsync(self, ptr, value, size, stream):
        if not self._gpu.has(ptr, size):
            raise CUDARuntimeError(1)
        self._gpu.streams[stream].put(partial(ctypes.memset, ptr, value, size))

    def memcpyAsync(self, dst, src, size, kind, stream):
        self._gpu.refuse_capture()
        assert kind == BY_ADDRESS, "the others are undefined for some of the copies made here"
        for pointer in (dst, src):
            if self._gpu.has(pointer, 1) and not self._gpu.has(pointer, size):
                raise CUDARuntimeError(1)
        self._gpu.counts["memcpy"] += 1
        self._gpu.streams[stream].put(partial(ctypes.memmove, dst, src, size))


class Stream:
    """cupy.cuda.Stream: `waiting` is what it was given and has not done; `captured`, what goes into a graph."""

    def __init__(self, gpu, null=False, non_blocking=False, ptds=False, priority=None):
        assert non_blocking and not null and not ptds, "the others wait for the default stream"
        self._gpu, self.ptr = gpu, next(gpu.handles)
        self.waiting, self.given, self.done = deque(), 0, 0
        self.captured, self.spoiled = None, False
        gpu.streams[self.ptr] = self

    def put(self, run):
        if self.captured is not None:
            self.captured.append(run)
        else:
            self.waiting.append(run)
            self.given += 1
            if self.ptr in self._gpu.hasty:
                self.reach(self.given)

    def reach(self, place):
        while self.done < place:
            self._gpu.step(self)

    def synchronize(self):
        self._gpu.refuse_capture()
        self._gpu.counts["synchronize"] += 1
        self.reach(self.given)
        if self._gpu.broken:
            raise CUDARuntimeError(self._gpu.broken)

    def wait_event(self, event):
        if self.captured is not None:  # the event is none of the graph's
            self.spoiled = True
            raise CUDARuntimeError(905)
        self.put(partial(event.stream.reach, event.place))

    def begin_capture(self, mode=None):
        assert self.captured is None and mode is None, "relaxed: memory that dies meanwhile may be freed"
        self.captured = []
        self._gpu.counts["capture"] += 1

    def end_capture(self):
        captured, self.captured = self.captured, None
        if self.spoiled:
            self.spoiled = False
            raise CUDARuntimeError(901)
        return Graph(self._gpu, captured)


class Graph:
    """cupy.cuda.Graph: it keeps no memory alive."""

    def __init__(self, gpu, captured):
        self._gpu, self._captured = gpu, captured

    def upload(self, stream=None):
        self._gpu.counts["upload"] += 1

    def launch(self, stream=None):
        self._gpu.refuse_capture()
        self._gpu.counts["graph"] += 1
        for run in self._captured:
            stream.put(run)


class Event:
    """cupy.cuda.Event: a place in a stream."""

    def __init__(self, gpu, block=False, disable_timing=False, interprocess=False):
        self._gpu, self.timed, self.stream, self.place = gpu, not disable_timing, None, 0

    def record(self, stream=None):
        self._gpu.refuse_capture()
        self.stream, self.place = stream, stream.given

    def synchronize(self):
        self._gpu.refuse_capture()
        self._gpu.counts["synchronize"] += 1
        self.stream.reach(self.place)


def get_elapsed_time(start_event, end_event):
    """cupy.cuda.get_elapsed_time: half a millisecond for each thing between."""
    if not (start_event.timed and end_event.timed):
        raise CUDARuntimeError(400)
    assert end_event.stream.done >= end_event.place, "CUDA says cudaErrorNotReady"
    return (end_event.place - start_event.place) / 2


class Module:
    """cupy.cuda.function.Module."""

    def __init__(self, gpu):
        self._gpu, self._kind = gpu, None

    def load_file(self, filename):
        assert isinstance(filename, str)
        self._kind = self._gpu.cubins.get(Path(filename).read_bytes())
        if self._kind is None:
            raise CUDADriverError(209)
        self._gpu.counts["load"] += 1

    def get_function(self, name):
        path, real, pixel = self._kind
        if name not in _kernels(path):
            raise CUDADriverError(500)
        return Function(self._gpu, self, _kernels(path)[name], real, pixel)


class Function:
    """cupy.cuda.function.Function: a kernel, which dies with its module."""

    def __init__(self, gpu, module, kernel, real, pixel):
        self._gpu, self.module, self.ptr = gpu, module, next(gpu.handles)
        self.kernel, self.real, self.pixel = kernel, real, pixel
        gpu.functions[self.ptr] = self

    def _itemsize(self, kind):
        wide = 8 if self.real == "double" else 4
        return {**SIZES, "real": REALS[self.real], "wide": wide, "pixel": PIXELS[self.pixel]}[kind]

    def read(self, address):
        """Copy the parameters from the addresses that stand at `address`, as many bytes of each as the kernel takes."""
        places = (c_void_p * len(self.kernel.arguments)).from_address(address)
        sizes = (8 if a.pointer else self._itemsize(a.type) for a in self.kernel.arguments)
        values = [ctypes.create_string_buffer(ctypes.string_at(at, n), n) for at, n in zip(places, sizes, strict=True)]
        self._check(values)
        return values

    def _check(self, values):
        """Fail where a pointer is not to as much memory as the kernel's extent says."""
        pairs = list(zip(self.kernel.arguments, values, strict=True))
        sizes = {a.name: int.from_bytes(v.raw, "little", signed="unsigned" not in a.type)
                 for a, v in pairs if not a.pointer and a.type not in ("float", "double", "wide", "real")}  # fmt: skip
        for argument, value in pairs:
            if argument.pointer:
                nbytes = evaluate(argument.extent, sizes) * self._itemsize(argument.type)
                pointer = int.from_bytes(value.raw, "little")
                where = f"{self.kernel.name}: {argument.name}: {nbytes} bytes at {pointer:#x}"
                assert self._gpu.has(pointer, nbytes), f"{where} are nobody's"

    def run(self, values, blocks, stream):
        """Run the kernel on the emulator."""
        self._check(values)
        code = _library(self.kernel.path, self.real, self.pixel)
        name, message = self.kernel.name.encode(), ctypes.create_string_buffer(1024)
        places = (c_void_p * len(values))(*map(ctypes.addressof, values))
        call = getattr(code, f"gpunet_call_{self.kernel.name}")
        if code.gpunet_run(call, places, blocks, 0, name, message, len(message)):
            raise GpunetError(message.value.decode())
        self._gpu.ran.append((stream, self.kernel.name, blocks))


_kernels, _library = cache(sources.parse), cache(library)


def launchKernel(
    gpu, f, grid_dim_x, grid_dim_y, grid_dim_z, block_dim_x, block_dim_y, block_dim_z, shared_mem_bytes, stream,
    kernel_params, extra,
):  # fmt: skip
    """cupy.cuda.driver.launchKernel."""
    if f not in gpu.functions:
        raise CUDADriverError(400)
    if not 1 <= grid_dim_x < 1 << 31:
        raise CUDADriverError(1)
    assert (grid_dim_y, grid_dim_z, block_dim_x, block_dim_y, block_dim_z, shared_mem_bytes, extra) == (
        1, 1, 256, 1, 1, 0, 0,
    )  # fmt: skip
    function = gpu.functions[f]
    gpu.counts["launch"] += 1
    gpu.streams[stream].put(partial(function.run, function.read(kernel_params), grid_dim_x, stream))


# cuBLAS

DTYPES = {0: np.dtype("f4"), 1: np.dtype("f8"), 2: np.dtype("f2"), 14: np.dtype(ml_dtypes.bfloat16)}
SUMS = {68: c_float, 77: c_float, 70: c_double}  # COMPUTE_32F, COMPUTE_32F_FAST_TF32, COMPUTE_64F: type of the factors
PRODUCTS = {  # (compute type, A and B, C), from the tables of cublasGemmEx
    (68, 0, 0), (68, 2, 2), (68, 2, 0), (68, 14, 14), (68, 14, 0), (77, 0, 0), (70, 1, 1),
}  # fmt: skip
INVALID, UNSUPPORTED = 7, 15
NUMBER = (POINTER(c_float), POINTER(c_double))
GEMM = (c_void_p, c_int, c_int, c_int, c_int, c_int, NUMBER)
OPERAND = (c_void_p, c_int, c_int)
STRIDED = (*OPERAND, c_longlong)


def takes(*kinds):
    """Have a function called with exactly these C types: ctypes would convert others, or cut them, without a word."""

    def decorate(function):
        @wraps(function)
        def call(self, *given):
            self.calls[function.__name__] += 1
            found = [POINTER(type(g._obj)) if hasattr(g, "_obj") else type(g) for g in given]
            assert len(found) == len(kinds), f"{function.__name__} takes {len(kinds)} arguments, got {len(found)}"
            for place, (got, kind) in enumerate(zip(found, kinds, strict=True)):
                allowed = kind if isinstance(kind, tuple) else (kind,)
                assert got in allowed, f"{function.__name__}: argument {place}: {got}"
            return self.fails.get(function.__name__) or function(self, *given)

        return call

    return decorate


def breaks_rules(transa, transb, m, n, k, lda, ldb, ldc):
    """Return whether cuBLAS refuses these sizes with INVALID_VALUE."""
    return (
        min(m, n, k) < 0
        or lda < max(1, k if transa else m)
        or ldb < max(1, n if transb else k)
        or ldc < max(1, m)
        or max(m, n, k, lda, ldb, ldc) >= 1 << 31
    )


class Cublas:
    """libcublas on a Gpu: its functions as ctypes gives them. `fails`: the status that a function returns."""

    def __init__(self, gpu):
        self._gpu, self.handles, self.calls, self.fails = gpu, {}, Counter(), {}

    @takes(POINTER(c_void_p))
    def cublasCreate_v2(self, handle):
        handle._obj.value = next(self._gpu.handles)
        self.handles[handle._obj.value] = SimpleNamespace(stream=None, workspace=None, mode=0)
        return 0

    @takes(c_void_p, c_void_p)
    def cublasSetStream_v2(self, handle, stream):
        mine = self.handles[handle.value]
        mine.stream, mine.workspace = self._gpu.streams[stream.value], None  # as documented
        return 0

    @takes(c_void_p, c_void_p, c_size_t)
    def cublasSetWorkspace_v2(self, handle, workspace, size):
        if workspace.value % 256 or not self._gpu.has(workspace.value, size.value, host=False):
            return INVALID
        self.handles[handle.value].workspace = workspace.value, size.value
        return 0

    @takes(c_void_p, c_int)
    def cublasSetMathMode(self, handle, mode):
        self.handles[handle.value].mode = mode.value
        return 0

    @takes(c_void_p, POINTER(c_int))
    def cublasGetVersion_v2(self, handle, version):
        assert handle.value in self.handles
        version._obj.value = 130100
        return 0

    @takes(*GEMM, *OPERAND, *OPERAND, NUMBER, *OPERAND, c_int, c_int)
    def cublasGemmEx(self, handle, *rest):
        *sizes, alpha, a, atype, lda, b, btype, ldb, beta, c, ctype, ldc, compute, algo = rest
        zero = c_longlong(0)
        operands = (a, atype, lda, zero), (b, btype, ldb, zero), (c, ctype, ldc, zero)
        return self._gemm(handle, sizes, alpha, beta, operands, 1, compute, algo)

    @takes(*GEMM, *STRIDED, *STRIDED, NUMBER, *STRIDED, c_int, c_int, c_int)
    def cublasGemmStridedBatchedEx(self, handle, *rest):
        *sizes, alpha, a, atype, lda, sa, b, btype, ldb, sb, beta, c, ctype, ldc, sc, batch, compute, algo = rest
        operands = (a, atype, lda, sa), (b, btype, ldb, sb), (c, ctype, ldc, sc)
        return self._gemm(handle, sizes, alpha, beta, operands, batch.value, compute, algo)

    def _gemm(self, handle, sizes, alpha, beta, operands, batch, compute, algo):
        mine = self.handles[handle.value]
        ta, tb, m, n, k = sizes = [s.value for s in sizes]
        (a, b, c) = operands = [tuple(part.value for part in operand) for operand in operands]
        if not {ta, tb} <= {0, 1} or batch < 1 or algo.value != -1 or breaks_rules(*sizes, a[2], b[2], c[2]):
            return INVALID
        if (compute.value, a[1], c[1]) not in PRODUCTS or a[1] != b[1]:
            return UNSUPPORTED
        assert [type(f._obj) for f in (alpha, beta)] == 2 * [SUMS[compute.value]], "factors are of the compute type"
        assert mine.workspace, "else cuBLAS allocates one"
        shapes = ((k, m) if ta else (m, k)), ((n, k) if tb else (k, n)), (m, n)
        for (pointer, kind, step, stride), (rows, columns) in zip(operands, shapes, strict=True):
            itemsize = DTYPES[kind].itemsize
            span = (batch - 1) * stride + (columns - 1) * step + rows
            assert pointer % itemsize == 0 and self._gpu.has(pointer, span * itemsize), "not the device's memory"
        apart = c[3] >= (n - 1) * c[2] + m or m <= c[3] <= c[2] // batch
        assert batch == 1 or apart, "matrices of the result lie over each other"
        factors = alpha._obj.value, beta._obj.value, np.dtype(SUMS[compute.value])
        mine.stream.put(partial(self._run, mine.stream, ta, tb, shapes, operands, batch, *factors))
        return 0

    def _run(self, stream, ta, tb, shapes, operands, batch, alpha, beta, wide):
        for number in range(batch):
            a, b, c = (self._matrix(operand, shape, number) for operand, shape in zip(operands, shapes, strict=True))
            left, right = (x[0][x[1]].astype(wide).T for x in (a, b))
            product = alpha * ((left.T if ta else left) @ (right.T if tb else right))
            memory, places = c
            if beta:
                product = product + wide.type(beta) * memory[places].astype(wide).T
            memory[places] = product.T.astype(memory.dtype)
        self._gpu.ran.append((stream.ptr, "gemm", batch))

    def _matrix(self, operand, shape, number):
        """Return (memory, places of the elements in it, a row for each column) of one matrix of a batch."""
        pointer, kind, step, stride = operand
        rows, columns = shape
        dtype, start = DTYPES[kind], number * stride
        span = start + (columns - 1) * step + rows
        assert self._gpu.has(pointer, span * dtype.itemsize), "freed before the product ran"
        memory = np.ndarray((span,), dtype, (ctypes.c_char * (span * dtype.itemsize)).from_address(pointer))
        return memory, start + np.arange(columns)[:, None] * step + np.arange(rows)
