"""cuBLAS by ctypes: matrix products on a stream, also while it is captured, which CuPy's binding refuses."""

import ctypes
from ctypes import byref, c_double, c_float, c_int, c_longlong, c_size_t, c_void_p

from gpunet.errors import GpunetError

DATA = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # cudaDataType
SUMS_IN_FLOAT = 68  # cublasComputeType: CUBLAS_COMPUTE_32F
COMPUTE = {"float32": SUMS_IN_FLOAT, "tf32": 77, "float64": 70, "float16": SUMS_IN_FLOAT, "bfloat16": SUMS_IN_FLOAT}
DEFAULT_ALGORITHM = -1
FULL_PRECISION = 16  # math mode: partial sums of a split product are not rounded to 16 bits
WORKSPACE = 32 << 20  # bytes: what NVIDIA advises for Hopper; given by us, so that a product repeats bit for bit
STATUS = {1: "NOT_INITIALIZED", 3: "ALLOC_FAILED", 7: "INVALID_VALUE", 8: "ARCH_MISMATCH", 11: "MAPPING_ERROR",
          13: "EXECUTION_FAILED", 14: "INTERNAL_ERROR", 15: "NOT_SUPPORTED"}  # fmt: skip


class Cublas:
    """A handle on one stream, with a workspace of its own."""

    def __init__(self, path, stream, workspace):
        self._library = ctypes.CDLL(path) if isinstance(path, str) else path
        self._handle, self._workspace = c_void_p(), workspace
        self._call("cublasCreate_v2", byref(self._handle))
        self._call("cublasSetStream_v2", self._handle, c_void_p(stream))
        self._call("cublasSetWorkspace_v2", self._handle, c_void_p(workspace.pointer), c_size_t(workspace.nbytes))
        self._call("cublasSetMathMode", self._handle, c_int(FULL_PRECISION))

    def bind(self, product):
        """Return a call that computes a gpunet.backends.device.Product."""
        p = product
        number = c_double if p.compute == "float64" else c_float
        one, factor = number(1), number(p.accumulate)
        batched = p.batch > 1
        arguments = [self._handle, c_int(p.left_transposed), c_int(p.right_transposed)]
        arguments += [c_int(p.m), c_int(p.n), c_int(p.k), byref(one)]
        for view, step, stride in ((p.left, p.left_step, p.left_stride), (p.right, p.right_step, p.right_stride)):
            arguments += _matrix(view, step, stride, batched)
        arguments += [byref(factor), *_matrix(p.out, p.out_step, p.out_stride, batched)]
        arguments += [c_int(p.batch)] if batched else []
        arguments += [c_int(COMPUTE[p.compute]), c_int(DEFAULT_ALGORITHM)]
        name = "cublasGemmStridedBatchedEx" if batched else "cublasGemmEx"

        def multiply():
            self._call(name, *arguments)

        multiply.keeps = p  # the memory that the addresses are in
        return multiply

    def version(self):
        """Return its version, such as 130100."""
        number = c_int()
        self._call("cublasGetVersion_v2", self._handle, byref(number))
        return number.value

    def _call(self, name, *arguments):
        code = getattr(self._library, name)(*arguments)
        if code:
            raise GpunetError(f"backend cuda: {name}: CUBLAS_STATUS_{STATUS.get(code, code)}")


def _matrix(view, step, stride, batched):
    """Return address, type, leading dimension and, for a batch, the stride of one operand."""
    found = [c_void_p(view.pointer), c_int(DATA[view.dtype.name]), c_int(step)]
    return [*found, c_longlong(stride)] if batched else found
