"""Whether CUDA can run here: what there is, and the one line that says what is missing and how to get it.

Knows nothing of CuPy but its distributions: it is not imported, no CUDA library is loaded, and no context is made.
"""

import ctypes
import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from uuid import UUID

DRIVER = "libcuda.so.1"
CUPY = 14  # the oldest major version
RELEASES = {12: 525, 13: 580}  # the first driver for a major version of CUDA
MODERN = (7, 5)  # the oldest capability that CUDA 13 compiles for; CUDA 12 takes older ones
WHEELS = {"cublas": "nvidia-cublas", "nvrtc": "nvidia-cuda-nvrtc"}
SPLIT = {"cublas": "cublas", "nvrtc": "cuda_nvrtc"}  # folders below nvidia/ in the wheels for CUDA 12
PATIENCE = 10  # seconds for a command to answer


@dataclass(frozen=True)
class Device:
    """A GPU as the driver describes it: capability (9, 0), bytes of memory."""

    name: str
    capability: tuple[int, int]
    total: int
    uuid: str = ""


@dataclass(frozen=True)
class Facts:
    """What there is. driver: the newest CUDA it runs, 13000 for 13.0; trouble: why it could not be loaded or started.

    cupy: (distribution, version) of every CuPy. cublas, nvrtc: paths of the libraries for that CuPy's CUDA.
    """

    driver: int | None = None
    trouble: str = ""
    devices: tuple[Device, ...] = ()
    cupy: tuple[tuple[str, str], ...] = ()
    cublas: str | None = None
    nvrtc: str | None = None
    visible: str | None = None  # CUDA_VISIBLE_DEVICES

    @property
    def cuda(self):
        """The major version of CUDA that the CuPy here is built for; None where its name does not tell."""
        found = [match for name, _ in self.cupy if (match := re.fullmatch(r"cupy-cuda(\d\d)\w*", name))]
        return int(found[0][1]) if found else None


def look() -> Facts:
    """Return what there is; raises nothing for what there is not."""
    driver, trouble, devices = _ask_driver()
    facts = Facts(driver, trouble, devices, _cupy(), visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    majors = (facts.cuda,) if facts.cuda else (13, 12)
    paths = {stem: next(filter(None, (library(stem, major) for major in majors)), None) for stem in WHEELS}
    return Facts(**{**vars(facts), **paths})


def problem(facts: Facts) -> str | None:
    """Return None where CUDA can run; else one line `what is missing: how to get it`."""
    return _driver_problem(facts) or _cupy_problem(facts) or _library_problem(facts)


def version(number: int) -> str:
    """Return 13000 as "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver_problem(facts):
    if facts.driver is None:
        odd = "" if "No such file" in facts.trouble else f" ({facts.trouble})"
        return (
            "no NVIDIA driver: there is no GPU, its driver is not installed, or a container was started without it"
            f"{odd}; backend numpy needs none"
        )
    if not facts.devices:
        if facts.trouble and "NO_DEVICE" not in facts.trouble:
            return f"the NVIDIA driver does not start ({facts.trouble}): see nvidia-smi; install the driver again"
        if facts.visible is not None:
            return f"no GPU is visible: CUDA_VISIBLE_DEVICES is {facts.visible!r}, which names none; unset it"
        return "an NVIDIA driver but no GPU: expected one in the list of nvidia-smi -L"
    if facts.driver < 12000:
        return (
            f"the NVIDIA driver is too old: it runs CUDA {version(facts.driver)}, CuPy {CUPY} needs 12.0 or newer; "
            f"install driver {RELEASES[12]} or newer"
        )
    return None


def _cupy_problem(facts):
    install = f'pip install "gpunet[cuda{_suitable(facts)}]"'
    if not facts.cupy:
        return f"an NVIDIA driver but no CuPy: {install}"
    names = " ".join(name for name, _ in facts.cupy)
    replace = f"pip uninstall -y {names} && {install}"
    if len(facts.cupy) > 1:
        found = ", ".join(f"{name} {number}" for name, number in facts.cupy)
        return f"more than one CuPy ({found}), and each has overwritten files of the other: {replace}"
    ((name, number),) = facts.cupy
    if "rocm" in name or "amd" in name:
        return f"{name} is for AMD's GPUs: {replace}"
    if int(re.match(r"\d*", number)[0] or 0) < CUPY:
        return f"{name} {number} is too old, CuPy {CUPY} or newer is needed: {replace}"
    if facts.cuda and facts.driver < 1000 * facts.cuda:
        release = f"driver {RELEASES[facts.cuda]}" if facts.cuda in RELEASES else f"a driver for CUDA {facts.cuda}"
        return (
            f"the NVIDIA driver is too old for {name}: it runs CUDA {version(facts.driver)}, expected {facts.cuda}.0 "
            f"or newer; install {release} or newer, or {replace}"
        )
    if facts.cuda and facts.cuda > 12 and facts.devices[0].capability < MODERN:
        device, least = facts.devices[0], "sm_{}{}".format(*MODERN)
        return f"{device.name} is sm_{'{}{}'.format(*device.capability)}, {name} takes {least} or newer: {replace}"
    return None


def _library_problem(facts):
    missing = [stem for stem in WHEELS if getattr(facts, stem) is None]
    if not missing:
        return None
    major = facts.cuda or _suitable(facts)
    wheels = " ".join(f"{WHEELS[stem]}-cu12" if major == 12 else f'"{WHEELS[stem]}=={major}.*"' for stem in missing)
    return f"{' and '.join(f'lib{stem}' for stem in missing)} of CUDA {major} not found: pip install {wheels}"


def _suitable(facts):
    """Return the CUDA, 13 or 12, that this driver runs and its first device still takes."""
    return 13 if facts.driver >= 13000 and facts.devices[0].capability >= MODERN else 12


def _ask_driver():
    """Return (the newest CUDA it runs or None, what went wrong or "", devices)."""
    number, count = ctypes.c_int(), ctypes.c_int()
    try:
        driver = ctypes.CDLL(DRIVER)
        _call(driver, "cuDriverGetVersion", ctypes.byref(number))
        _call(driver, "cuInit", 0)
        _call(driver, "cuDeviceGetCount", ctypes.byref(count))
        return number.value, "", tuple(_device(driver, place) for place in range(count.value))
    except (OSError, AttributeError) as error:  # AttributeError: a library of that name without such a function
        return number.value or None, str(error), ()


def _device(driver, place):
    device, total = ctypes.c_int(), ctypes.c_size_t()
    name, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    _call(driver, "cuDeviceGet", ctypes.byref(device), place)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDeviceGetAttribute", ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR, then _MINOR
    _call(driver, "cuDeviceGetAttribute", ctypes.byref(minor), 76, device)
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(total), device)
    text = name.value.decode(errors="replace")
    return Device(text, (major.value, minor.value), total.value, _uuid(driver, device))


def _uuid(driver, device):
    """Return the device's identifier as nvidia-smi writes it, or nothing: only `free` needs it."""
    uuid = (ctypes.c_ubyte * 16)()
    try:
        _call(driver, "cuDeviceGetUuid", ctypes.byref(uuid), device)
    except (OSError, AttributeError):
        return ""
    return f"GPU-{UUID(bytes=bytes(uuid))}"


def _call(driver, name, *arguments):
    """Call a function of the driver; an error is an OSError with its name."""
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorName(code, ctypes.byref(text))
        raise OSError(f"{name}: {text.value.decode() if text.value else f'error {code}'}")


def _cupy():
    """Return (name, version) of every CuPy that is installed, whatever it is built for."""
    found = {}
    for distribution in distributions():
        about = distribution.metadata or {}
        name = (about.get("Name") or "").lower()
        if re.fullmatch(r"(amd-)?cupy(-(cuda|rocm).*)?", name):
            found.setdefault(name, about.get("Version") or "0")
    return tuple(sorted(found.items()))


def library(stem: str, major: int) -> str | None:
    """Return the path of lib<stem>.so.<major> or None; it is not loaded. stem: cublas or nvrtc.

    The places are those of cuda.pathfinder in its order. That one finds by loading only, and takes CUDA 13's library
    for a CuPy built for 12 where both are there.
    """
    file = f"lib{stem}.so.{major}"
    return next((str(path) for folder in _folders(stem, major, file) if (path := Path(folder, file)).is_file()), None)


def _folders(stem, major, file):
    wheels = importlib.util.find_spec("nvidia")
    for root in (wheels and wheels.submodule_search_locations) or ():
        yield Path(root, f"cu{major}", "lib")
        yield Path(root, SPLIT[stem], "lib")
    if "CONDA_PREFIX" in os.environ:
        yield Path(os.environ["CONDA_PREFIX"], "lib")
    yield from filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    for path in re.findall(rf"^\s*{re.escape(file)} .*=> (.+)$", _output("/sbin/ldconfig", "-p"), re.M):
        yield Path(path).parent
    toolkit = os.environ.get("CUDA_PATH") or os.environ.get("CUDA_HOME")
    if toolkit:
        yield from (Path(toolkit, "lib64"), Path(toolkit, "lib"))


def holders() -> list[tuple[int, str, int | None]]:
    """Return (process id, name, bytes or None) of the processes that hold GPU memory, as far as nvidia-smi tells."""
    found = re.findall(r"^(\d+), (.*), (.+)$", _nvidia_smi("compute-apps=pid,process_name,used_memory"), re.M)
    return [(int(pid), name, _mebibytes(held)) for pid, name, held in found]


def free() -> dict[str, int]:
    """Return {uuid: bytes that are free} of the GPUs, as far as nvidia-smi tells: the driver would need a context."""
    found = re.findall(r"^(\S+), (.+)$", _nvidia_smi("gpu=uuid,memory.free"), re.M)
    return {uuid: _mebibytes(held) for uuid, held in found if held.isdecimal()}


def _nvidia_smi(query):
    return _output("nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits")


def _mebibytes(text):
    return int(text) * 2**20 if text.isdecimal() else None


def _output(*command):
    """Return what a command prints; nothing where it is absent, fails or takes too long."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=PATIENCE
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
