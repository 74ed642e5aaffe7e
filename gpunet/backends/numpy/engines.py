"""Which engine computes a convolution on NumPy: the one asked for, else a measured one (`gpunet tune`), else by a rule.

No choice depends on the batch size: a smaller batch at an epoch's end, or another replica, is computed the same way.
"""

import json

import numpy as np

from gpunet.backends import cache
from gpunet.backends.machine import blas, processor
from gpunet.backends.numpy import engine_winograd
from gpunet.core.backend import ENGINES
from gpunet.errors import GpunetError

WIDE = 32  # channels from which Winograd's transforms cost little beside its products
NARROW = 16  # and at least


def choose(g, types, numba, name=None, tuned=None):
    """Return the engine for a geometry: `name`, else that of the table `tuned`, else the rule's.

    What cannot compute this geometry, or these types here, is replaced by "blocked", which computes all.
    """
    wanted = name or (tuned or {}).get(geometry_key(g)) or _rule(g, types, numba)
    return wanted if computes(wanted, g, types, numba) else "blocked"


def computes(name, g, types, numba):
    """Whether an engine computes this geometry in these types, with numba or without."""
    if name == "winograd":
        return engine_winograd.covers(g, types.real.itemsize)
    if name == "direct":
        return _direct(g, types, numba)
    return name in ENGINES


def _direct(g, types, numba):
    if not numba or types.real != np.float32:
        return False
    from gpunet.backends.numpy import numba_direct  # needs numba

    return numba_direct.covers(g)


def _rule(g, types, numba):
    """Winograd in float32 where it halves the products, partial tiles counted; else register tiles, else blocks.

    Of fewer than WIDE channels it has to save two thirds.
    """
    width = min(g.c, g.outputs)
    most = 1 / 2 if width >= WIDE else 1 / 3
    suits = types.real == np.float32 and width >= NARROW and engine_winograd.covers(g)
    if suits and engine_winograd.products(g) < most:
        return "winograd"
    return "direct" if _direct(g, types, numba) else "blocked"


def geometry_key(g):
    """Return the text that stands for a geometry, whatever the batch, in a table."""
    return " ".join(str(v) for name, v in vars(g).items() if name != "n")


def table_path(backend, types):
    """Return the file of measured choices: one a processor, versions of NumPy, BLAS and numba, and type of numbers."""
    versions = [f"{name} {version}" for name, version in backend.versions.items()]
    return cache.folder() / f"engines-{cache.key(processor(), np.__version__, blas(), types.compute, *versions)}.json"


def read_table(backend, types):
    """Return {geometry_key: engine} as `gpunet tune --write` left it; nothing where there is none that can be read."""
    try:
        table = json.loads(table_path(backend, types).read_text(encoding="utf-8"))
    except (GpunetError, OSError, ValueError):
        return {}
    return {k: v for k, v in table.items() if v in ENGINES} if isinstance(table, dict) else {}
