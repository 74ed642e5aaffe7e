"""Definitions of kernels/lrn.cu. Outputs are overwritten."""

import numpy as np

from gpunet.backends.numpy.values import windows


def lrn_across_forward(x, y, scale, share, beta, k, rows, c, size):
    """scale = k + share * sum of x^2 over the `size` channels around, y = x * scale^-beta."""
    v = x.reshape(rows, c).astype(np.float64)
    _normalise(v, y, scale, share, beta, k, _across(v * v, size))


def lrn_across_backward(dy, x, y, scale, dx, share, beta, rows, c, size):
    """dx = dy * scale^-beta - 2 * beta * share * x * sum of dy * y / scale over the channels around."""
    dy, x, y, scale = (a.reshape(rows, c).astype(np.float64) for a in (dy, x, y, scale))
    dx.reshape(rows, c)[:] = dy * scale**-beta - 2 * beta * share * x * _across(dy * y / scale, size)


def lrn_within_forward(x, y, scale, share, beta, k, n, h, w, c, size):
    """scale = k + share * sum of x^2 over the size x size pixels around, y = x * scale^-beta."""
    v = x.reshape(n, h, w, c).astype(np.float64)
    _normalise(v, y, scale, share, beta, k, _within(v * v, size))


def lrn_within_backward(dy, x, y, scale, dx, share, beta, n, h, w, c, size):
    """dx = dy * scale^-beta - 2 * beta * share * x * sum of dy * y / scale over the pixels around."""
    dy, x, y, scale = (a.reshape(n, h, w, c).astype(np.float64) for a in (dy, x, y, scale))
    dx.reshape(n, h, w, c)[:] = dy * scale**-beta - 2 * beta * share * x * _within(dy * y / scale, size)


def _normalise(v, y, scale, share, beta, k, sums):
    s = k + share * sums
    scale.reshape(v.shape)[:], y.reshape(v.shape)[:] = s, v * s**-beta


def _across(values, size):
    """Return the sums over windows of channels, zeros beyond the first and the last."""
    padded = np.pad(values, ((0, 0), (size // 2, size // 2)))
    return sum(padded[:, i : i + values.shape[1]] for i in range(size))


def _within(values, size):
    """Return the sums over windows of pixels, zeros around the image."""
    n, h, w, c = values.shape
    image, taps = windows(np.float64, n, h, w, c, h, w, size, size, 1, 1, size // 2, size // 2)
    image[:] = values
    return sum(taps)
