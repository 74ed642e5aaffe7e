"""Reads a data file that happens to be a pickle, and runs nothing that it names.

A pickle is a program: it names functions and calls them. The few names with which NumPy arrays are written are answered
by stand-ins that note what the file says; any other name is refused. NumPy itself is called only after type, shape and
size have been checked, so a small file cannot ask for much memory either.
"""

import io
import math
import pickle
import pickletools

import numpy as np

from gpunet.errors import GpunetError

ARRAY_LIMIT = 200_000_000  # bytes of one array
STEP_LIMIT = 5_000_000  # operations; 60,000 images with their labels and names take half a million
FILE_LIMIT = 500_000_000  # bytes of a file: pixels written as UTF-8 text take half as much again
_ARRAY_NAMES = ("numpy.core.multiarray", "numpy._core.multiarray")


class _DType:
    """What a file says of an array's type."""

    def __init__(self, code):
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        self.order = "="

    def __setstate__(self, state):
        self.order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]


class _Array:
    """What a file says of an array; `array` is a read-only view of the bytes of the file."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        if dtype.code not in ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"):
            raise pickle.UnpicklingError(f"array of type '{dtype.code}': expected plain numbers")
        known = np.dtype(dtype.code).newbyteorder(dtype.order)
        size = math.prod(shape) * known.itemsize
        if size > ARRAY_LIMIT or size != len(raw) or min(shape, default=0) < 0:
            raise pickle.UnpicklingError(
                f"array of shape {shape}: {size} bytes asked for, {len(raw)} there, {ARRAY_LIMIT} allowed"
            )
        self.array = np.frombuffer(raw, known).reshape(shape, order="F" if fortran else "C")


class _Reader(pickle.Unpickler):
    """Hands out stand-ins only; methods and a bare object, because nothing can be set on those."""

    _ndarray = object()

    def find_class(self, module, name):
        if module in _ARRAY_NAMES and name == "_reconstruct":
            return self._reconstruct
        known = {
            ("numpy", "ndarray"): self._ndarray,
            ("numpy", "dtype"): self._dtype,
            ("_codecs", "encode"): self._encode,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}")
        return known[module, name]

    def _reconstruct(self, kind, shape, code):
        if kind is not self._ndarray:
            raise pickle.UnpicklingError("it reconstructs something that is no array")
        return _Array()

    def _dtype(self, code, align=False, copy=True):
        return _DType(code)

    def _encode(self, text, codec):
        if codec not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError(f"it encodes by '{codec}'")
        return text.encode("latin1")


def read_pickle(path):
    """Return the dictionary in a pickle file: names as str; arrays, numbers and lists as they stand there.

    Raises GpunetError for a file that is no pickle, is cut short, wants anything else, or is larger than allowed.
    """
    size = path.stat().st_size
    if size > FILE_LIMIT:
        raise GpunetError(f"{path}: refused: {size} bytes, at most {FILE_LIMIT} expected")
    data = path.read_bytes()
    if not data.startswith(b"\x80"):
        raise GpunetError(f"{path}: expected a pickle (first byte 0x80), got {size} bytes beginning {data[:8]!r}")
    try:
        _look_through(data)
    except Exception as error:  # pickletools raises what it meets
        raise GpunetError(
            f"{path}: cut short or damaged: {size} bytes are no whole pickle ({error}); fetch it anew"
        ) from None
    try:
        content = _Reader(io.BytesIO(data), encoding="bytes").load()
        return {
            key.decode() if isinstance(key, bytes) else key: value.array if isinstance(value, _Array) else value
            for key, value in content.items()
        }
    except Exception as error:  # a hostile file can make any step fail in any way
        raise GpunetError(
            f"{path}: refused: {' '.join(str(error).split())[:200]}; only arrays, numbers, texts, lists and "
            f"dictionaries are read"
        ) from None


def _look_through(data):
    """Step through the whole pickle without building anything: lengths must be true, memo places no more than steps.

    The C unpickler makes its memo as long as the highest place, and room for a text as long as it claims to be.
    """
    for step, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if operation.name.endswith("PUT") and argument > step:
            raise ValueError(f"memo place {argument} at step {step}")
        if step == STEP_LIMIT:
            raise ValueError(f"more than {STEP_LIMIT} operations")
