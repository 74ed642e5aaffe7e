"""Definitions of kernels/dropout.cu (Srivastava et al. 2014): a mask is drawn again wherever it is needed."""

import numpy as np

from gpunet.backends.numpy.values import wide
from gpunet.core.random import lanes


def dropout_apply(x, y, state, seed, site, threshold, scale, first, n):
    """y = x * scale where lane(first + i) >= threshold, else 0; forward and backward.

    Element i is place first + i of the whole batch; threshold = round(rate * 65536); the lanes are
    those of the stream (site, state.batch).
    """
    kept = lanes(seed, site, int(state["batch"]), first, n) >= threshold
    y.reshape(n)[:] = np.where(kept, wide(x.reshape(n)) * scale, 0)


def dropout_channels(x, y, state, seed, site, threshold, scale, first, n, pixels, c):
    """y = x * scale in the channels of an image where lane((first + image) * c + channel) >= threshold, else 0.

    Whole channels stay or go (Tompson et al. 2015); lanes, threshold and forward and backward as in dropout_apply.
    """
    kept = lanes(seed, site, int(state["batch"]), first * c, n * c).reshape(n, 1, c) >= threshold
    y.reshape(n, pixels, c)[:] = np.where(kept, wide(x.reshape(n, pixels, c)) * scale, 0)


def dropout_scale(x, y, scale, n):
    """y = x * scale."""
    y.reshape(n)[:] = wide(x.reshape(n)) * scale
