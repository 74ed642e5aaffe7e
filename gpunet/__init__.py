"""gpunet trains convolutional networks: CUDA kernels on an NVIDIA GPU, the same program on NumPy without one.

The names below are imported when they are first used, so `import gpunet` itself costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_MODULES = ("data", "errors", "export", "models", "nn", "ops", "optim", "resources", "testing", "train")
_OBJECTS = {
    "GpunetError": "gpunet.errors",
    "Source": "gpunet.core.source",
    "Step": "gpunet.core.step",
    "Trainer": "gpunet.train",
    "load_config": "gpunet.train",
}
__all__ = ["__version__", *_MODULES, *_OBJECTS]


def __getattr__(name):
    if name in _MODULES:
        return import_module(f"gpunet.{name}")
    if name in _OBJECTS:
        value = globals()[name] = getattr(import_module(_OBJECTS[name]), name)
        return value
    raise AttributeError(f"module 'gpunet' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
