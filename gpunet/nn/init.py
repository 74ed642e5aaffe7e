"""Initial values: functions (rng, shape) -> float64 array, drawn on the host, the same on every backend.

fan_in is the number of inputs that one output sums over, fan_out the number of outputs that one input reaches:
for shape (kh, kw, in, out) kh*kw*in and kh*kw*out, for (in, out) in and out.
"""

import numpy as np

from gpunet.errors import GpunetError


def fans(shape):
    """Return (fan_in, fan_out) of a weight's shape, whose last axes are in and out."""
    window = int(np.prod(shape[:-2]))
    return window * shape[-2], window * shape[-1]


def constant(value):
    """Every element is `value`."""
    return lambda rng, shape: np.full(shape, value, np.float64)


def normal(sd=0.01):
    """N(0, sd^2)."""
    return lambda rng, shape: rng.normal(0, sd, shape)


def xavier(distribution="normal"):
    """Variance 2 / (fan_in + fan_out) (Glorot & Bengio 2010), "normal" or "uniform"."""
    return _scaled(distribution, lambda shape: 2 / sum(fans(shape)))


def he(distribution="normal", gain=2.0):
    """Variance gain / fan_in (He et al. 2015), "normal" or "uniform"; gain 1/3 with "uniform" is PyTorch's default."""
    return _scaled(distribution, lambda shape: gain / fans(shape)[0])


def uniform(limit):
    """U(-limit, limit)."""
    return lambda rng, shape: rng.uniform(-limit, limit, shape)


def _scaled(distribution, variance):
    if distribution not in ("normal", "uniform"):
        raise GpunetError(f"init: distribution: expected 'normal' or 'uniform', got {distribution!r}")

    def draw(rng, shape):
        sd = np.sqrt(variance(shape))
        return rng.normal(0, sd, shape) if distribution == "normal" else rng.uniform(-sd * 3**0.5, sd * 3**0.5, shape)

    return draw


HEAD = he("uniform", 1 / 3)  # of a classifier's last layer: logits start small, so the loss starts near log(classes)
INITS = {"normal": normal, "uniform": uniform, "xavier": xavier, "he": he, "constant": constant}


def named(value):
    """Return an init from a function, a name, or [name, argument...]: "he", ["normal", 0.01], ["he", "uniform"]."""
    if callable(value):
        return value
    name, *arguments = [value] if isinstance(value, str) else list(value)
    if name not in INITS:
        raise GpunetError(f"init: expected one of {', '.join(INITS)}, got {name!r}")
    return INITS[name](*arguments)
