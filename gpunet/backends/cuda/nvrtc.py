"""NVRTC by ctypes: CUDA's compiler, which needs no GPU, no driver and no CuPy.

So the tests build what a GPU will run, byte for byte. libnvrtc comes from the wheel nvidia-cuda-nvrtc or a toolkit.
"""

import ctypes
import re
from functools import cache
from typing import NamedTuple

from gpunet.backends.cuda import detect
from gpunet.errors import GpunetError

# ftz: denormals count as zero, which is what spares the slow paths of exp, division and square root in float
OPTIONS = ("-std=c++17", "-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v")
USAGE = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers"
    r"(?:[^\n]*?(?P<deep>\d+) bytes cumulative stack size)?(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.S,
)


class Usage(NamedTuple):
    """What a kernel takes: registers a thread, shared bytes a block, and bytes a thread of memory for what should be
    in registers: its stack (spilled registers, arrays indexed at run time), and what spills store to it and load.
    """

    registers: int
    shared: int
    stack: int
    spill_stores: int = 0
    spill_loads: int = 0


class Build(NamedTuple):
    """The compiler's log, the intermediate assembly, and the code for one architecture."""

    log: str
    ptx: str
    cubin: bytes


def available() -> bool:
    """Whether libnvrtc is installed."""
    return _file() is not None


def compile(text: str, name: str, architecture: str = "sm_80", defines: tuple[str, ...] = ()) -> str:
    """Compile CUDA C++ and return the compiler's log; raises as `build` does."""
    return build(text, name, architecture, defines).log


def build(text: str, name: str, architecture: str = "sm_80", defines: tuple[str, ...] = ()) -> Build:
    """Compile CUDA C++; `name` stands for the text in errors where no #line renames it, `defines` are as "REAL=half".

    Raises GpunetError with the log where the text does not compile.
    """
    library, program = _library(), ctypes.c_void_p()
    options = [option.encode() for option in (*OPTIONS, f"-arch={architecture}", *(f"-D{d}" for d in defines))]
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None))
    try:
        failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = _text("ProgramLog", program)
        if failed:
            kind = library.nvrtcGetErrorString(failed).decode()
            raise GpunetError(f"{name}: {architecture} {' '.join(defines)}: {kind}", log)
        return Build(log, _text("PTX", program), _bytes("CUBIN", program))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def usage(log: str) -> dict[str, Usage]:
    """Return {kernel: Usage} from the log of a build."""
    found = {}
    for match in USAGE.finditer(log):
        registers, shared, stack, deep, stores, loads = (
            int(match[name] or 0) for name in ("registers", "shared", "stack", "deep", "stores", "loads")
        )
        found[match["kernel"]] = Usage(registers, shared, max(stack, deep), stores, loads)
    return found


def architectures() -> list[int]:
    """Return what it compiles for: 75, 80, 90, ..."""
    library, count = _library(), ctypes.c_int()
    _check(library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    known = (ctypes.c_int * count.value)()
    _check(library.nvrtcGetSupportedArchs(known))
    return sorted(known)


def version() -> str:
    """Return its version, such as "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def _text(what, program):
    return _bytes(what, program).rstrip(b"\0").decode()


def _bytes(what, program):
    """Return what nvrtcGet<what> gives, whose size nvrtcGet<what>Size gives."""
    library, size = _library(), ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(code):
    if code:
        raise GpunetError(f"NVRTC: {_library().nvrtcGetErrorString(code).decode()}")


@cache
def _library():
    file = _file()
    if file is None:
        raise GpunetError("NVRTC: there is no libnvrtc; pip install nvidia-cuda-nvrtc")
    library = ctypes.CDLL(file)
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


@cache
def _file():
    return detect.look().nvrtc
