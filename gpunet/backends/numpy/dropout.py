"""Definition of kernels/dropout.cu (Srivastava et al. 2014): a mask is drawn again wherever it is needed."""

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
