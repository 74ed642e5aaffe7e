"""Definitions of kernels/prelu.cu (He et al. 2015). Outputs are overwritten."""

import numpy as np

from gpunet.backends.numpy.values import wide


def prelu_forward(x, slope, y, rows, c):
    """y = x where x > 0, else slope * x."""
    v = wide(x.reshape(rows, c))
    y.reshape(rows, c)[:] = np.where(v > 0, v, slope * v)


def prelu_backward(dy, x, slope, dx, rows, c):
    """dx = dy where x > 0, else slope * dy."""
    d = wide(dy.reshape(rows, c))
    dx.reshape(rows, c)[:] = np.where(x.reshape(rows, c) > 0, d, slope * d)


def prelu_backward_sums(dy, x, sums, rows, c, parts):
    """sums[p] = sum of dy * x where x <= 0 over the rows p*rows//parts .. (p+1)*rows//parts."""
    d, v = wide(dy.reshape(rows, c)), wide(x.reshape(rows, c))
    terms = np.where(v > 0, 0, d * v)
    for p in range(parts):
        part = slice(p * rows // parts, (p + 1) * rows // parts)
        sums.reshape(parts, c)[p] = terms[part].sum(axis=0, dtype=np.float64)
