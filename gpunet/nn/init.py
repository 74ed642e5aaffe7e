"""Initial values: functions (rng, shape) -> float64 array, drawn on the host, the same on every backend.

fan_in is the number of inputs that one output sums over, fan_out the number of outputs that one input reaches:
for shape (kh, kw, in, out) kh*kw*in and kh*kw*out, for (in, out) in and out. `whitening` and `lsuv` need training
images, too: gpunet.nn.data_init, or [init] of a recipe, gives weights such values.
"""

import inspect
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from gpunet.errors import GpunetError

LARGEST = float(np.finfo(np.float32).max)


def fans(shape):
    """Return (fan_in, fan_out) of a weight's shape, whose last axes are in and out."""
    _matrix(shape)
    window = int(np.prod(shape[:-2]))
    return window * shape[-2], window * shape[-1]


def constant(value):
    """w = value."""
    _number("constant: value", value)
    return lambda rng, shape: np.full(shape, value, np.float64)


def zeros():
    """w = 0."""
    return constant(0)


def normal(sd=0.01):
    """w ~ N(0, sd^2)."""
    _number("normal: sd", sd, above=0)
    return lambda rng, shape: rng.normal(0, sd, shape)


def truncated_normal(sd=0.01, bound=2.0):
    """w ~ N(0, sd^2), drawn again beyond bound * sd; at bound 2 its deviation is 0.88 sd (as Keras has it)."""
    _number("truncated_normal: sd", sd, above=0)
    _number("truncated_normal: bound", bound, above=0)
    if bound < 0.1:
        raise GpunetError(f"init: truncated_normal: bound: expected at least 0.1, got {bound!r}")

    def draw(rng, shape):
        values = rng.normal(0, 1, shape)
        while (beyond := np.abs(values) > bound).any():
            values[beyond] = rng.normal(0, 1, np.count_nonzero(beyond))
        return sd * values

    return draw


def uniform(limit):
    """w ~ U(-limit, limit)."""
    _number("uniform: limit", limit, above=0)
    return lambda rng, shape: rng.uniform(-limit, limit, shape)


def xavier(distribution="normal"):
    """Variance 2 / (fan_in + fan_out) (Glorot & Bengio 2010), "normal" or "uniform"."""
    return _scaled(distribution, lambda shape: 2 / sum(fans(shape)))


def he(distribution="normal", gain=2.0):
    """Variance gain / fan_in (He et al. 2015), "normal" or "uniform"; gain 1/3 with "uniform" is PyTorch's default."""
    _number("he: gain", gain, above=0)
    return _scaled(distribution, lambda shape: gain / fans(shape)[0])


def orthogonal(gain=1.0):
    """W^T W = gain^2 I for W (fan_in, out), or W W^T where out is larger (Saxe et al. 2013); random otherwise."""
    _number("orthogonal: gain", gain, above=0)

    def draw(rng, shape):
        rows, columns = fans(shape)[0], shape[-1]
        q, r = np.linalg.qr(rng.normal(0, 1, (max(rows, columns), min(rows, columns))))
        q *= np.where(np.diag(r) < 0, -1, 1)  # without, QR's choice of signs makes some rotations likelier than others
        return gain * (q if rows >= columns else q.T).reshape(shape)

    return draw


def dirac(groups=1, rest="zeros"):
    """w[kh // 2, kw // 2, i, i] = 1 in each group, all else of these filters 0: the output begins with the input.

    As many filters a group as it has inputs; those beyond get the init `rest` (Zagoruyko & Komodakis 2017).
    """
    if not isinstance(groups, Integral) or isinstance(groups, bool) or groups < 1:
        raise GpunetError(f"init: dirac: groups: expected a whole number from 1 on, got {groups!r}")
    rest = named(rest)

    def draw(rng, shape):
        if len(shape) != 4 or shape[-1] % groups:
            raise GpunetError(
                f"init: dirac: expected a convolution (kh, kw, in, out) whose {groups} groups divide out, got {shape}"
            )
        kh, kw, inputs, outputs = shape
        values = rest(rng, shape)
        for first in range(0, outputs, outputs // groups):
            same = min(inputs, outputs // groups)
            values[..., first : first + same] = 0
            values[kh // 2, kw // 2, range(same), range(first, first + same)] = 1
        return values

    return draw


@dataclass(frozen=True)
class FromData:
    """An init that needs training images, by its name in INITS, with its arguments."""

    name: str
    arguments: dict

    def __call__(self, rng, shape):
        """Refuse: a shape is not enough."""
        raise GpunetError(
            f"init: {self.name} needs training images, which a layer has not: have it in [init] of a recipe, or use "
            "gpunet.nn.data_init"
        )


def whitening(epsilon=5e-4):
    """w = +-v_i / sqrt(lambda_i + epsilon), v_i and lambda_i eigenvectors and eigenvalues of the covariance of patches.

    For the first convolution: of the normalised training images' patches of its size, 2 * kh * kw * in filters.
    Outputs have covariance lambda / (lambda + epsilon) (Jordan 2024, airbench, after Page 2019).
    """
    _number("whitening: epsilon", epsilon, above=0)
    return FromData("whitening", {"epsilon": epsilon})


def lsuv(tolerance=0.01, iterations=10):
    """Orthogonal, then w /= sd(output) layer by layer, until a layer's outputs on training images have variance 1.

    Done with a layer within `tolerance` of 1, or after so many iterations (Mishkin & Matas 2015).
    """
    _number("lsuv: tolerance", tolerance, above=0)
    if not isinstance(iterations, Integral) or isinstance(iterations, bool) or iterations < 1:
        raise GpunetError(f"init: lsuv: iterations: expected a whole number from 1 on, got {iterations!r}")
    return FromData("lsuv", {"tolerance": tolerance, "iterations": iterations})


def _check(what, value, least):
    """Check a number: not below `least`, and one that float32 can hold."""
    if not isinstance(value, Real) or not least <= value or not abs(value) <= LARGEST:
        raise GpunetError(f"init: {what}: expected a finite number{', 0 or more' if least == 0 else ''}, got {value!r}")


def _scaled(distribution, variance):
    if distribution not in ("normal", "uniform"):
        raise GpunetError(f"init: distribution: expected 'normal' or 'uniform', got {distribution!r}")

    def draw(rng, shape):
        sd = np.sqrt(variance(shape))
        return rng.normal(0, sd, shape) if distribution == "normal" else rng.uniform(-sd * 3**0.5, sd * 3**0.5, shape)

    return draw


def _matrix(shape):
    if len(shape) < 2:
        raise GpunetError(f"init: expected a weight with axes for inputs and outputs, got shape {tuple(shape)}")


def _number(what, value, above=None):
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(value) <= LARGEST:
        raise GpunetError(f"init: {what}: expected a number, got {value!r}")
    if above is not None and value <= above:
        raise GpunetError(f"init: {what}: expected a number above {above}, got {value!r}")


HEAD = he("uniform", 1 / 3)  # of a classifier's last layer: logits start small, so the loss starts near log(classes)
INITS = {
    "normal": normal,
    "truncated_normal": truncated_normal,
    "uniform": uniform,
    "xavier": xavier,
    "he": he,
    "orthogonal": orthogonal,
    "dirac": dirac,
    "constant": constant,
    "zeros": zeros,
    "whitening": whitening,
    "lsuv": lsuv,
}


def named(value):
    """Return an init from a function, a name, or [name, argument...]: "he", ["normal", 0.01], ["he", "uniform"]."""
    if callable(value):
        return value
    if not isinstance(value, str | list | tuple) or not value:
        raise GpunetError(f"init: expected a name, or a list of a name and its arguments, got {value!r}")
    name, *arguments = [value] if isinstance(value, str) else value
    if not isinstance(name, str) or name not in INITS:
        raise GpunetError(f"init: expected one of {', '.join(INITS)}, got {name!r}")
    try:
        inspect.signature(INITS[name]).bind(*arguments)
    except TypeError:
        known = ", ".join(inspect.signature(INITS[name]).parameters) or "none"
        raise GpunetError(f"init: {name}: expected the arguments {known}; got {arguments}") from None
    return INITS[name](*arguments)
