"""What figures from a GPU depend on: device, driver, libraries, clocks, who else is on it, and which gpunet this is.

Reads only, and changes no setting. What cannot be found out says so.
"""

import hashlib
import platform
import shutil
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from results import processor

import gpunet
from gpunet.backends.cuda import detect

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("numpy", "cupy-cuda13x", "cupy-cuda12x", "torch", "triton", "nvidia-cublas", "nvidia-cublas-cu12",
            "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")  # fmt: skip
QUERIES = (  # asked one by one: nvidia-smi refuses a whole list for one name that it does not know
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.max.sm",
    "clocks.max.memory",
    "clocks.sm",
    "clocks.memory",
    "power.limit",
    "power.draw",
    "temperature.gpu",
    "pstate",
    "mig.mode.current",
)
LOAD = ("clocks.sm", "clocks.memory", "power.draw", "temperature.gpu")


def device(options):
    """Return the name of the device."""
    if options.backend == "emulator":
        return f"emulator on {processor()}"
    facts = detect.look()
    return facts.devices[0].name if facts.devices else "no GPU"


def conditions(options):
    """Return {what: text} before anything runs on the device."""
    found = {
        "gpunet": f"{gpunet.__version__}, {commit()}",
        "started": f"{datetime.now():%Y-%m-%d %H:%M}",
        "python": f"{platform.python_version()}, {platform.platform()}",
        "processor": processor(),
        **packages(),
    }
    if options.backend == "cuda":
        facts = detect.look()
        found["device"] = device(options)
        found["driver runs CUDA"] = detect.version(facts.driver) if facts.driver else "no driver"
        found |= smi(QUERIES)
        held = detect.holders()
        found["on the GPU at the start"] = "; ".join(f"{n} ({pid})" for pid, n, _ in held) or "no process is known"
    return found


def on_device(bench):
    """Return {what: text} that only the backend knows."""
    if bench.emulated:
        return {"backend": "emulator: times mean nothing"}
    b, found = bench.backend, {}
    probes = {
        "CUDA runtime of CuPy": lambda: detect.version(b._runtime.runtimeGetVersion()),
        "cuBLAS": lambda: str(b._cublas.version()),
        "compiled for": lambda: f"sm_{b.architecture}",
        "multiprocessors": lambda: str(b._runtime.deviceGetAttribute(b._runtime.cudaDevAttrMultiProcessorCount, 0)),
        "L2, MiB": lambda: f"{bench.l2 / 2**20:.0f}",
        "free memory, MB": lambda: f"{b.memory()[0] / 1e6:,.0f}",
    }
    for name, probe in probes.items():
        try:
            found[name] = probe()
        except Exception as error:
            found[name] = f"cannot tell: {type(error).__name__}: {error}"
    return found


def at_the_end(options):
    """Return {what: text} right after the last item."""
    return {f"{name} at the end": text for name, text in smi(LOAD).items()} if options.backend == "cuda" else {}


def packages():
    """Return {package: version} of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit():
    """Return the commit, whether files differ from it, and a digest of the sources that holds without git."""
    head = output("git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = output("git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "status", "--porcelain")
    files = sorted(path for folder in ("gpunet", "kernels") for path in (ROOT / folder).rglob("*.*")
                   if path.suffix in (".py", ".cu", ".cuh", ".h"))  # fmt: skip
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    about = f"commit {head}{' with changes' if changed else ''}" if head else "no git"
    return f"{about}, sources {digest}"


def smi(names):
    """Return {name: what nvidia-smi says}; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not there"}
    found = {name: output("nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader") for name in names}
    return {name: text.splitlines()[0] for name, text in found.items() if text}


def output(*command):
    """Return what a command prints; nothing where it is absent, fails or takes too long."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
