"""The seam between a traced list and what runs it: the Backend protocol, and the one door that checks every launch."""

from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Protocol

import ml_dtypes
import numpy as np

from gpunet.core.sources import SCALARS
from gpunet.core.state import STATE
from gpunet.errors import GpunetError


class Backend(Protocol):
    """What a backend offers. `place(tensor)` gives the memory of a traced tensor in one replica."""

    name: str
    workspace_bytes: int  # of one replica, beside the planned arenas
    replicas: int  # where the user says nothing
    blas: bool  # whether calls use the host's BLAS, which is then held at one thread
    fuses: bool  # whether chains of layers run as fused ones
    show: object  # None, or called with (files compiled, files to compile)
    versions: dict  # {what: version} of its own on which the bits of its results depend
    graphs: bool  # whether a list that is replayed again is captured, by capture(calls) -> call

    def engine(self, types, name=None):
        """Return the name of the engine that computes convolutions of these types, or geometry -> name.

        name: the one that the user asks for; where it cannot compute something another does.
        """

    def parts(self, rows, tiles):
        """Return how many parts a sum over `rows` is cut into where each part is `tiles` blocks of work."""

    def prepare(self, launches):
        """Make ready for (kernel, arguments) pairs, arguments traced tensors and numbers: compile what is missing."""

    def allocate(self, nbytes):
        """Return zeroed memory of so many bytes; arenas come from here and nothing else is ever allocated."""

    def allocate_shared(self, nbytes):
        """Return zeroed memory that the host may `peek` at while kernels write to it."""

    def peek(self, view):
        """Return the array that a view of shared memory is, without waiting for anything."""

    def adopt(self, array):
        """Return memory that holds `array`; a backend in host memory may use the array itself."""

    def view(self, memory, offset, tensor):
        """Return the backend's array for a traced tensor that lies `offset` bytes into `memory`."""

    def upload(self, view, array):
        """Copy a host array into a view."""

    def download(self, view):
        """Return a host copy of a view; waits until it is computed."""

    def workspace(self):
        """Return what the bindings of one replica share as scratch."""

    def synchronize(self):
        """Wait for all that was launched."""

    def memory(self):
        """Return (free, total) bytes of a device with memory of its own, or None."""

    def holders(self):
        """Return a sentence on who holds the device's memory, or nothing."""

    def mark(self):
        """Return an event: all that was launched until now is done."""

    def stage(self, pairs, after):
        """Copy (view, host array) pairs beside the computation, once event `after` has come; return their event."""

    def wait(self, event):
        """Let what is launched from now on wait for an event."""

    def finish(self, event):
        """Wait for an event here."""

    def bind_launch(self, kernel, arguments, workspace):
        """Return a call without arguments that launches `kernel` on views and scalars."""

    def bind_matmul(self, a, b, out, accumulate, compute, workspace):
        """Return a call that computes out = a @ b, or out += a @ b, as Types.compute says.

        `out` may be wide where a and b are not. Products of 16-bit floats are summed in
        float32 and rounded once, when they are stored.
        """

    def bind_call(self, name, views, options, workspace):
        """Return a call of the backend's own function `name` (an engine)."""

    def bind_reduce(self, operation, views, out):
        """Return a call that sums or gathers one view a replica, in replica order, into `out`."""


ENGINES = ("unfold", "blocked", "winograd", "direct")  # of a convolution: those that a backend may have

STORAGE = {
    "float32": "float32",
    "tf32": "float32",
    "float64": "float64",
    "float16": "float16",
    "bfloat16": ml_dtypes.bfloat16,
}


@dataclass(frozen=True)
class Types:
    """What `real` (storage) and `wide` (weights, sums, arithmetic) stand for in one program.

    compute: how products are computed, the name given to `of`. "tf32" stores float32 and multiplies in TF32 where the
    hardware has it; elsewhere it is float32.
    """

    real: np.dtype
    wide: np.dtype
    compute: str

    @classmethod
    def of(cls, name):
        """Types by one of their five names."""
        if name not in STORAGE:
            raise GpunetError(f"dtype: expected one of {', '.join(STORAGE)}, got {name!r}")
        real = np.dtype(STORAGE[name])
        return cls(real, np.dtype("float64" if name == "float64" else "float32"), name)

    @property
    def scaled(self):
        """Whether the loss is scaled: float16 holds 6e-8 to 65504 only; bfloat16 has float32's range."""
        return self.real == np.float16


@cache
def _compiled(expression):
    return compile(expression, "extent", "eval")


def evaluate(expression, sizes):
    """Return the value of an extent or launch expression over the integer arguments `sizes`."""
    return eval(_compiled(expression), {"__builtins__": {"min": min, "max": max}}, sizes)


def check_launch(kernel, arguments, types, place):
    """Check the arguments of a launch against the kernel's declaration; return them with scalars cast.

    Raises GpunetError that names `place`, kernel and argument where count, type, contiguity or extent do not fit.
    """
    if len(arguments) != len(kernel.arguments):
        names = ", ".join(a.name for a in kernel.arguments)
        raise GpunetError(
            f"{place}: {kernel.name}: expected {len(kernel.arguments)} arguments ({names}), got {len(arguments)}"
        )
    cast = []
    for declared, given in zip(kernel.arguments, arguments, strict=True):
        where = f"{place}: {kernel.name}: {declared.name}"
        cast.append(
            _check_tensor(declared, given, types, where) if declared.pointer else _cast(declared, given, types, where)
        )
    sizes = {a.name: v for a, v in zip(kernel.arguments, cast, strict=True) if not a.pointer}
    for declared, given in zip(kernel.arguments, cast, strict=True):
        if declared.pointer and given.size != evaluate(declared.extent, sizes):
            raise GpunetError(
                f"{place}: {kernel.name}: {declared.name}: expected {declared.extent} = "
                f"{evaluate(declared.extent, sizes)} elements, got {given.size} (shape {given.shape})"
            )
    return tuple(cast)


def dtypes_of(kind, types):
    """Return the dtypes that a declared C type accepts."""
    if kind == "real":
        return (types.real,)
    if kind == "wide":
        return (types.wide,)
    if kind == "pixel":
        return (np.dtype("u1"), np.dtype("f4"))
    if kind == "State":
        return (STATE,)
    return (np.dtype(SCALARS[kind]),)


def _check_tensor(declared, given, types, where):
    if not hasattr(given, "element_strides"):
        raise GpunetError(f"{where}: expected a tensor, got {type(given).__name__} {given!r}")
    accepted = dtypes_of(declared.type, types)
    if given.dtype not in accepted:
        raise GpunetError(f"{where}: expected {' or '.join(map(str, accepted))}, got {given.dtype}")
    if not given.contiguous:
        raise GpunetError(f"{where}: expected a contiguous tensor, got strides {given.strides} for shape {given.shape}")
    return given


def _cast(declared, given, types, where):
    dtype = dtypes_of(declared.type, types)[0]
    if not isinstance(given, Real):
        raise GpunetError(f"{where}: expected a number of type {declared.type}, got {type(given).__name__}")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not limits.min <= given <= limits.max or given != int(given):
            raise GpunetError(f"{where}: expected {declared.type} in [{limits.min}, {limits.max}], got {given!r}")
        return int(given)
    return float(dtype.type(given))
