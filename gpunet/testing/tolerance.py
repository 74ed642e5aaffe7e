"""The one rule of when two results are the same, for tests of kernels, backends and users' own ops."""

import numpy as np

# Arithmetic in the type where it is wide enough, else one rounding on store; sums of some thousand values.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


def assert_close(name, got, expected, dtype):
    """Raise AssertionError unless |got - expected| <= tolerance(dtype) * (1 + |expected|) everywhere.

    dtype: the type whose rounding is the only excuse, an array's own or the storage type of the program it comes
    from. Integers are equal, NaN and infinities stand in the same places, a record agrees in every field (its
    floats as their own type). Values should be of order one: smaller ones are compared absolutely.
    """
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, f"{name}: expected shape {expected.shape}, got {got.shape}"
    if expected.dtype.names:
        for field in expected.dtype.names:
            assert_close(f"{name}.{field}", got[field], expected[field], expected[field].dtype)
        return
    if expected.dtype.kind in "iub":
        wrong = got != expected
    else:
        a, b = got.astype(np.float64), expected.astype(np.float64)
        with np.errstate(invalid="ignore"):
            near = np.abs(a - b) <= TOLERANCE[np.dtype(dtype).name] * (1 + np.abs(b))
        wrong = ~np.where(np.isfinite(b), near, (a == b) | (np.isnan(a) & np.isnan(b)))
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} elements differ, the first at {first}: "
            f"expected {expected[first]!r}, got {got[first]!r}"
        )


def largest_error(got, expected):
    """Return the largest |got - expected| / (1 + |expected|); 0 for equal integers, infinite where they differ."""
    got, expected = np.asarray(got), np.asarray(expected)
    if expected.dtype.names:
        return max(largest_error(got[field], expected[field]) for field in expected.dtype.names)
    if not expected.size:
        return 0.0
    if expected.dtype.kind in "iub":
        return 0.0 if (got == expected).all() else np.inf
    a, b = got.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b) / (1 + np.abs(b)))
    return float(np.where(np.isnan(error), np.inf, error).max())
