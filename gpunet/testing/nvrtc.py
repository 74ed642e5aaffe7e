"""NVRTC by ctypes: what CUDA's compiler says to a kernel, on a machine without a GPU, a driver or CuPy.

libnvrtc comes from the wheel nvidia-cuda-nvrtc. The options are those CuPy compiles with, its hidden ones too.
"""

import ctypes
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from gpunet.errors import GpunetError

LIBRARIES = ("cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12")  # below site-packages/nvidia
OPTIONS = ("-std=c++17", "-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v")
USAGE = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame"
    r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.S,
)


class Usage(NamedTuple):
    """What a kernel takes: registers and bytes of stack (spills and indexed arrays) a thread, shared bytes a block."""

    registers: int
    shared: int
    stack: int


class Build(NamedTuple):
    """The compiler's log and the intermediate assembly."""

    log: str
    ptx: str


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
            raise GpunetError(f"{name}: {architecture} {' '.join(defines)}: {kind}\n{log}")
        return Build(log, _text("PTX", program))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def usage(log: str) -> dict[str, Usage]:
    """Return {kernel: Usage} from the log of a build."""
    return {
        kernel: Usage(int(registers), int(shared or 0), int(stack))
        for kernel, stack, registers, shared in USAGE.findall(log)
    }


def _text(what, program):
    """Return what nvrtcGet<what> gives, whose size nvrtcGet<what>Size gives."""
    library, size = _library(), ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.value.decode()


def _check(code):
    if code:
        raise GpunetError(f"NVRTC: {_library().nvrtcGetErrorString(code).decode()}")


@cache
def _library():
    file = _file()
    if file is None:
        raise GpunetError("NVRTC: there is no libnvrtc; pip install nvidia-cuda-nvrtc")
    library = ctypes.CDLL(str(file))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _file():
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else ()
    return next((file for root in roots for part in LIBRARIES if (file := Path(root, part)).is_file()), None)
