"""What `gpunet doctor` says: versions, GPUs, what each backend can do here, folders. A probe that fails is a line.

Changes nothing, but for making the folder of compiled kernels.
"""

import ctypes
import os
import platform
import sys
from pathlib import Path

import gpunet
from gpunet import backends, resources
from gpunet.backends.cuda import detect
from gpunet.errors import GpunetError
from gpunet.train.text import columns, size

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # hold a BLAS to so many


def report():
    """Return the lines as one text."""
    try:
        facts = detect.look()
    except Exception as error:
        facts = detect.Facts(trouble=_what(error))
    blocks = [
        [
            ("gpunet", lambda: f"{gpunet.__version__}, {resources.PACKAGE}"),
            ("python", lambda: f"{platform.python_version()}, {sys.executable}, {platform.platform()}"),
            ("numpy", _numpy),
            ("cupy", lambda: [f"{name} {number}" for name, number in facts.cupy] or "none"),
            ("driver", lambda: _driver(facts)),
            ("nvrtc", lambda: _nvrtc(facts)),
            ("cublas", lambda: _library("cublas", facts) or "none"),
            ("devices", lambda: _devices(facts)),
            ("used by", _holders),
        ],
        [(name, lambda name=name: _backend(name)) for name in backends.BACKENDS]
        + [("auto", lambda: backends.choose("auto")[1].removeprefix("backend: "))],
        [("kernel cache", _kernel_cache), ("data sets", _data), ("threads", _threads)],
    ]
    parts = (columns([row for label, probe in block for row in _rows(label, probe)], 2) for block in blocks)
    return "\n\n".join(parts)


def parity(name=None):
    """Hold every kernel of a backend against NumPy, print what differs most; return the command's exit code.

    name: cuda or emulator; None: cuda where it can run, else emulator.
    """
    known = ("cuda", "emulator")
    if name is None:
        name = next((other for other in known if backends.problem(other) is None), known[-1])
    if name not in known:
        raise GpunetError(f"doctor: --backend: expected {' or '.join(known)}, got {name!r}")
    backends.choose(name)
    from gpunet.testing.parity import main

    return main(name)


def _rows(label, probe):
    """Return (label, text) of a probe's text or list of texts."""
    try:
        said = probe()
    except Exception as error:
        said = f"cannot tell: {_what(error)}"
    lines = [said] if isinstance(said, str) else said
    return [(label if i == 0 else "", line) for i, line in enumerate(lines)]


def _what(error):
    """Return an error as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, GpunetError) else f"{type(error).__name__}: {text}"


def _numpy():
    import numpy
    from threadpoolctl import threadpool_info

    blas = [
        f"{info['internal_api']} {info['version']} with {info['num_threads']} threads"
        for info in threadpool_info()
        if info["user_api"] == "blas"
    ]
    return ", ".join([numpy.__version__, *(blas or ["its BLAS is unknown"])])


def _driver(facts):
    known = f"runs CUDA up to {detect.version(facts.driver)}" if facts.driver else "none"
    hidden = "" if facts.visible is None else f"CUDA_VISIBLE_DEVICES={facts.visible!r}"
    return "; ".join(filter(None, (known, facts.trouble, hidden)))


def _library(stem, facts):
    """Return the path of a library for the CuPy here, or for any CUDA where there is no CuPy."""
    majors = (facts.cuda,) if facts.cuda else (13, 12)
    return next((path for major in majors if (path := detect.library(stem, major))), None)


def _nvrtc(facts):
    path = _library("nvrtc", facts)
    if path is None:
        return "none"
    major, minor = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(path).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}, {path}"


def _devices(facts):
    free = detect.free() if facts.devices else {}
    lines = []
    for place, device in enumerate(facts.devices):
        parts = [f"{place}: {device.name}", "sm_{}{}".format(*device.capability), size(device.total)]
        if device.uuid in free:
            parts.append(f"{size(free[device.uuid])} of it free")
        lines.append(", ".join(parts))
    return lines or "none"


def _holders():
    return [
        f"{name} (process {pid}): {size(held) if held is not None else 'unknown'}"
        for pid, name, held in detect.holders()
    ]


def _backend(name):
    missing = backends.problem(name)
    if missing:
        return missing
    backends.backend(name)
    return "works"


def _kernel_cache():
    from gpunet.backends import cache

    return _folder(cache.folder())


def _data():
    from gpunet.data.download import cache_folder

    given = os.environ.get("GPUNET_DATA")
    return [_folder(place) for place in (*([Path(given).expanduser()] if given else []), cache_folder())]


def _folder(place):
    """Return the path and whether it can be written to, or made."""
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    kind = "writable" if os.access(there, os.W_OK | os.X_OK) else "not writable"
    return f"{place}, {kind}" + ("" if there == place else ", not there yet")


def _threads():
    set_to = [f"{name}={os.environ[name]}" for name in THREADS if name in os.environ]
    return ", ".join([f"{len(os.sched_getaffinity(0))} cores for this process", *set_to])
