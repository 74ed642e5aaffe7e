"""Definitions of kernels/stochastic_pool.cu (Zeiler and Fergus 2013). Outputs are overwritten."""

import numpy as np

from gpunet.backends.numpy.values import wide, windows
from gpunet.core.random import uniforms

NOWHERE = 255  # the index of a window in which no value is above 0


def stochastic_pool_forward(x, y, index, state, seed, site, first, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x,
                            pad_y, pad_x):  # fmt: skip
    """y = x at a place of the window drawn with probability a / sum of a, a = max(x, 0); index = ky*kw + kx of it.

    Drawn is the first place where the running sum of a is above u * the whole sum, or where a is not finite. The sums
    are in this order and in the type of arithmetic, whose rounding decides: so the same place is drawn everywhere.
    """
    activities = _activities(x, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x)
    place, running = first * oh * ow * c, np.zeros((n, oh, ow, c), activities[0].dtype)
    draws = uniforms(seed, site, int(state["batch"]), place, running.size).reshape(running.shape)
    goal = draws * sum(activities, running)
    value, tap, found = np.zeros_like(running), np.full(running.shape, NOWHERE, np.uint8), np.zeros(running.shape, bool)
    for i, a in enumerate(activities):
        running = running + a
        here = ~found & (a != 0)
        np.copyto(value, a, where=here)
        np.copyto(tap, i, where=here)
        found |= here & ((running > goal) | ~np.isfinite(a))
    y.reshape(value.shape)[:], index.reshape(tap.shape)[:] = value, tap


def stochastic_pool_expected(x, y, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x):
    """y = sum of a * a / sum of a over the window, a = max(x, 0): the mean of what would be drawn; 0 / 0 is 0."""
    activities = _activities(x, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x)
    total, squares = sum(activities), sum(a * a for a in activities)
    y.reshape(n, oh, ow, c)[:] = np.divide(squares, total, out=np.zeros_like(total), where=total != 0)


def _activities(x, n, h, w, c, *window):
    """Return max(x, 0) at each place of the window, arrays (n, oh, ow, c); zeros outside of the image, NaN stays."""
    v = wide(x.reshape(n, h, w, c))
    image, taps = windows(v.dtype, n, h, w, c, *window)
    image[:] = np.maximum(v, 0)
    return taps
