"""Compiles .cu files with g++ and the words of kernels/emulator/cuda.h to libraries, kept by their content."""

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from gpunet import resources
from gpunet.backends import cache as kernel_cache
from gpunet.core import sources
from gpunet.errors import GpunetError

FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-Wall", "-Wno-unused", "-fno-strict-aliasing",
         "-ffp-contract=off")  # fmt: skip
SANITIZERS = {
    None: (),
    "address": ("-fsanitize=address,undefined", "-fsanitize-recover=address,undefined", "-fno-omit-frame-pointer",
                "-fsanitize-sections=gpunet_shared"),
    "thread": ("-fsanitize=thread",),
}  # fmt: skip
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}


def library(path, real="float", pixel="uint8", sanitizer=None):
    """Return the loaded library of a .cu file, compiled for these types unless the cache has it.

    It has gpunet_run, and gpunet_call_<kernel> for each kernel. Raises GpunetError with g++'s words.
    """
    return _loaded(_compiled(path, real, pixel, sanitizer))


def compile_all(wanted, sanitizer=None, show=None):
    """Compile every (path, real, pixel), two at a time; `show(done, count)` is called before and after each."""
    wanted = sorted(wanted, key=str)
    with ThreadPoolExecutor(2) as pool:
        for done, _ in enumerate(pool.map(lambda w: _compiled(*w, sanitizer), wanted)):
            if show:
                show(done + 1, len(wanted))


def runtime(sanitizer):
    """Return the sanitizer's library, which the process must load before any other (LD_PRELOAD)."""
    found = subprocess.run(["g++", f"-print-file-name={RUNTIMES[sanitizer]}"], capture_output=True, text=True).stdout
    return found.strip()


def _compiled(path, real, pixel, sanitizer):
    text = _text(path)
    flags = (*FLAGS, *SANITIZERS[sanitizer], f"-DREAL={real}", f"-DPIXEL={pixel}")
    name = kernel_cache.key(text, *flags, compiler())

    def make(target):
        command = ["g++", *flags, "-x", "c++", "-", "-o", str(target)]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        if done.returncode:
            raise GpunetError(f"{path}: g++ -DREAL={real} -DPIXEL={pixel}:", done.stderr.strip())

    return kernel_cache.kept(f"{path.stem}-{name}.so", make)


def _text(path):
    """Return the whole text: CUDA's words, the file with its includes, and a caller for each kernel."""
    shim = resources.kernels() / "emulator" / "cuda.h"
    calls = "".join(map(_caller, sources.parse(path).values()))
    return f'{sources.inlined(shim)}\n{sources.inlined(path)}\n#line 1 "callers"\n{calls}'


def _caller(kernel):
    """Return the function that calls a kernel with arguments by address, as cuLaunchKernel takes them."""
    given = (f"*({a.type}{'*' if a.pointer else ''}*)a[{i}]" for i, a in enumerate(kernel.arguments))
    return f'extern "C" void gpunet_call_{kernel.name}(void** a) {{ {kernel.name}({", ".join(given)}); }}\n'


@cache
def _loaded(path):
    code = ctypes.CDLL(str(path))
    code.gpunet_run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_char_p,
                                ctypes.c_char_p, ctypes.c_int)  # fmt: skip
    return code


@cache
def compiler():
    """Return the first line of `g++ --version`."""
    return subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
