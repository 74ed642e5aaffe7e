"""What this machine and its libraries are, in words: on these the bits and the times of a training on a CPU depend."""

import platform

from threadpoolctl import threadpool_info


def processor():
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def blas():
    """Return the BLAS that NumPy multiplies with, its version and what processor it takes this one for."""
    return ", ".join(
        f"{info['internal_api']} {info['version']} {info.get('architecture', '')}".strip()
        for info in threadpool_info()
        if info["user_api"] == "blas"
    )
