"""Definitions of kernels/elementwise.cu: sums, scaling, joining channels, bias, casts."""

import numpy as np

from gpunet.backends.numpy.values import put, wide


def add_forward(a, b, y, n):
    """y = a + b; y may be a or b."""
    y.reshape(n)[:] = wide(a.reshape(n)) + wide(b.reshape(n))


def scale_forward(x, y, factor, n):
    """y = factor * x; y may be x."""
    y.reshape(n)[:] = wide(x.reshape(n)) * wide(x).dtype.type(factor)


def concat_forward(x, y, rows, c, width, offset):
    """y[:, offset : offset + c] = x; the other columns stay."""
    y.reshape(rows, width)[:, offset : offset + c] = x.reshape(rows, c)


def concat_backward(dy, dx, rows, c, width, offset):
    """dx = dy[:, offset : offset + c]."""
    dx.reshape(rows, c)[:] = dy.reshape(rows, width)[:, offset : offset + c]


def bias_forward(b, y, rows, c):
    """y += b for every row, in place."""
    v = y.reshape(rows, c)
    v[:] = wide(v) + b


def column_sum(x, sums, rows, c, parts):
    """sums[p] = sum of the rows p*rows//parts .. (p+1)*rows//parts of x, overwritten."""
    for p in range(parts):
        part = x.reshape(rows, c)[p * rows // parts : (p + 1) * rows // parts]
        sums.reshape(parts, c)[p] = part.sum(axis=0, dtype=np.float64)


def sum_parts(x, y, accumulate, parts, n):
    """y (+)= sum over p of x[p]."""
    put(y.reshape(n), x.reshape(parts, n).sum(axis=0), accumulate)


def cast_forward(x, y, n):
    """y = x, rounded to the type of y."""
    y.reshape(n)[:] = x.reshape(n)
