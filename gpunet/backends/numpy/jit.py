"""Python compiled by numba, where that extra is installed: the one place that says how, and keeps what was compiled.

Only `numba_*.py` import this module and `simd.py`, and nobody imports those without numba.
"""

import hashlib
from functools import cache
from pathlib import Path

import numba

from gpunet.backends import cache as kernels
from gpunet.errors import GpunetError

# Sums may be regrouped and products contracted, so that loops become vectors; what is not finite stays what it is.
FAST = {"reassoc", "contract", "arcp", "nsz"}


@cache
def _folder():
    """Return where compiled code is kept, a folder for each state of the sources; None where none can be had.

    numba looks at the file of a function alone, but these call each other.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    texts = (path.read_text(encoding="utf-8") for path in sources)
    try:
        place = kernels.folder() / f"numba-{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:16]}"
        place.mkdir(mode=0o700, exist_ok=True)
    except (GpunetError, OSError):
        return None  # it is compiled anew in each process then
    return place


def jit(function):
    """Compile a function for its arguments' types at its first call; it runs without the interpreter's lock."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(_folder() or "")
    try:
        return numba.njit(nogil=True, fastmath=FAST, error_model="numpy", cache=_folder() is not None)(function)
    finally:
        numba.config.CACHE_DIR = before  # the user's own
