"""The error function, which NumPy lacks: a series near 0, beyond a fit made from math.erfc on import."""

import math

import numpy as np
from numpy.polynomial import chebyshev, polynomial

SPLIT, END = 1.5, 6.0  # erf(6) is 1 in double precision

_SERIES = [2 / math.sqrt(math.pi) * (-1) ** k / (math.factorial(k) * (2 * k + 1)) for k in range(24)]
_TAIL = chebyshev.Chebyshev.interpolate(  # erfc(x) * exp(x*x) over 1/x
    np.vectorize(lambda u: math.erfc(1 / u) * math.exp(1 / u**2)), 18, [1 / END, 1 / SPLIT]
)


def erf(x):
    """erf(x) = 2/sqrt(pi) * integral of exp(-t*t) from 0 to x, relative error below 1e-15.

    Computed in float64; the result has x's type.
    """
    v = np.asarray(x, np.float64)
    size = np.abs(v)
    near = np.minimum(size, SPLIT)
    far = np.clip(size, SPLIT, END)
    tail = np.exp(-far * far) * _TAIL(1 / far)
    value = np.where(size < SPLIT, near * polynomial.polyval(near * near, _SERIES), 1 - tail)
    return np.copysign(value, v).astype(x.dtype)


def normal_distribution(v):
    """P(X <= v) for a standard normal X."""
    return (1 + erf(v * math.sqrt(0.5))) / 2


def normal_density(v):
    """exp(-v*v/2) / sqrt(2 pi)."""
    return np.exp(-v * v / 2) * (1 / math.sqrt(2 * math.pi))
