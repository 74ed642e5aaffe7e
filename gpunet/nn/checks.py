"""Checks of the arguments that layers are made with."""

import math
import sys
from numbers import Real

from gpunet.errors import GpunetError


def number(value, what, low=-math.inf):
    """Return a finite number of at least `low`, or raise GpunetError that begins with `what`."""
    if isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max and low <= value:
        return value
    least = f" of at least {low}" if low > -math.inf else ""
    raise GpunetError(f"{what}: expected a finite number{least}, got {value!r}")


def share(value, what):
    """Return a rate of 0 <= rate < 1, or raise GpunetError that begins with `what`."""
    if isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < 1:
        return value
    raise GpunetError(f"{what}: expected 0 <= rate < 1, got {value!r}")


def whole(value, what, low=1, high=None):
    """Return a whole number of low <= value <= high, or raise GpunetError that begins with `what`."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high):
        return value
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise GpunetError(f"{what}: expected a whole number {limits}, got {value!r}")


def one_of(value, what, *known):
    """Return one of the known values, or raise GpunetError that begins with `what`."""
    if value in known:
        return value
    raise GpunetError(f"{what}: expected {' or '.join(map(repr, known))}, got {value!r}")
