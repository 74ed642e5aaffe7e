"""What runs a list: one package a backend, found by name."""

from importlib import import_module

from gpunet.errors import GpunetError

BACKENDS = ("numpy",)


def backend(name):
    """Return the backend called `name`."""
    if name not in BACKENDS:
        raise GpunetError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return import_module(f"gpunet.backends.{name}").Backend()
