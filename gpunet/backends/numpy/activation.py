"""Definitions of kernels/activation.cu. Every y and dx is overwritten and may be an input."""

import math

import numpy as np

from gpunet.backends.numpy.erf import erf
from gpunet.backends.numpy.values import wide


def relu_forward(x, y, n):
    """y = max(x, 0); a NaN stays one."""
    y.reshape(n)[:] = np.maximum(x.reshape(n), 0)


def relu_backward(dy, y, dx, n):
    """dx = dy where y > 0, else 0."""
    dx.reshape(n)[:] = np.where(y.reshape(n) > 0, dy.reshape(n), 0)


def leaky_relu_forward(x, y, slope, n):
    """y = x where x > 0, else slope * x."""
    v = wide(x.reshape(n))
    y.reshape(n)[:] = np.where(v > 0, v, v * slope)


def leaky_relu_backward(dy, y, dx, slope, n):
    """dx = dy where y > 0, else slope * dy; right for slope >= 0, where y has the sign of x."""
    v = wide(dy.reshape(n))
    dx.reshape(n)[:] = np.where(y.reshape(n) > 0, v, v * slope)


def sigmoid_forward(x, y, n):
    """y = 1 / (1 + exp(-x))."""
    y.reshape(n)[:] = _sigmoid(wide(x.reshape(n)))


def sigmoid_backward(dy, y, dx, n):
    """dx = dy * y * (1 - y)."""
    v = wide(y.reshape(n))
    dx.reshape(n)[:] = wide(dy.reshape(n)) * v * (1 - v)


def tanh_forward(x, y, n):
    """y = tanh(x)."""
    y.reshape(n)[:] = np.tanh(wide(x.reshape(n)))


def tanh_backward(dy, y, dx, n):
    """dx = dy * (1 - y*y)."""
    v = wide(y.reshape(n))
    dx.reshape(n)[:] = wide(dy.reshape(n)) * (1 - v * v)


def gelu_forward(x, y, n):
    """y = x * P(x), P(x) = (1 + erf(x / sqrt(2))) / 2 the normal distribution (Hendrycks and Gimpel 2016)."""
    v = wide(x.reshape(n))
    y.reshape(n)[:] = v * _normal(v)


def gelu_backward(dy, x, dx, n):
    """dx = dy * (P(x) + x * p(x)) with the normal density p(x) = exp(-x*x/2) / sqrt(2 pi)."""
    v = wide(x.reshape(n))
    density = np.exp(-v * v / 2) * (1 / math.sqrt(2 * math.pi))
    dx.reshape(n)[:] = wide(dy.reshape(n)) * (_normal(v) + v * density)


def silu_forward(x, y, n):
    """y = x * sigmoid(x)."""
    v = wide(x.reshape(n))
    y.reshape(n)[:] = v * _sigmoid(v)


def silu_backward(dy, x, dx, n):
    """dx = dy * s * (1 + x * (1 - s)) with s = sigmoid(x)."""
    v = wide(x.reshape(n))
    s = _sigmoid(v)
    dx.reshape(n)[:] = wide(dy.reshape(n)) * s * (1 + v * (1 - s))


def _sigmoid(v):
    small = np.exp(-np.abs(v))  # at most 1: no overflow on either side
    return np.where(v < 0, small, 1) / (1 + small)


def _normal(v):
    return (1 + erf(v * math.sqrt(0.5))) / 2
