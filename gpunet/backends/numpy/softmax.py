"""Definitions of kernels/softmax.cu. Outputs are overwritten and may be an input."""

import numpy as np

from gpunet.backends.numpy.values import wide


def softmax_forward(x, y, rows, c):
    """y = exp(x) / sum of exp(x) in every row."""
    v = wide(x.reshape(rows, c))
    powers = np.exp(v - v.max(axis=1, keepdims=True))
    y.reshape(rows, c)[:] = powers / powers.sum(axis=1, keepdims=True)


def softmax_backward(dy, y, dx, rows, c):
    """dx = y * (dy - sum of dy * y in the row)."""
    d, v = wide(dy.reshape(rows, c)), wide(y.reshape(rows, c))
    dx.reshape(rows, c)[:] = v * (d - (d * v).sum(axis=1, keepdims=True))
