"""Pearson's test of counts against probabilities, without SciPy."""

import math

import numpy as np


def p_value(counts, probabilities):
    """Return P(a fit as bad as this or worse) for counts of independent draws with these probabilities.

    The chi-square distribution by Wilson and Hilferty's cube root (1931), good to some per cent of the tail.
    """
    counts, probabilities = np.asarray(counts, np.float64).ravel(), np.asarray(probabilities, np.float64).ravel()
    assert counts.size == probabilities.size > 1
    assert abs(probabilities.sum() - 1) < 1e-9
    expected = counts.sum() * probabilities
    assert expected.min() >= 5, "too few draws for this test"
    degrees = counts.size - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    width = 2 / (9 * degrees)
    z = ((statistic / degrees) ** (1 / 3) - (1 - width)) / math.sqrt(width)
    return math.erfc(z / math.sqrt(2)) / 2


def kept_p_value(kept, keep):
    """Return the same for the places of an array of bools that are kept with this probability."""
    kept = np.asarray(kept)
    return p_value([kept.sum(), kept.size - kept.sum()], [keep, 1 - keep])
