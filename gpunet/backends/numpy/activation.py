"""Definitions of kernels/activation.cu. Every y and dx is overwritten and may be an input."""

import numpy as np

from gpunet.backends.numpy.erf import normal_density, normal_distribution
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
    y.reshape(n)[:] = v * normal_distribution(v)


def gelu_backward(dy, x, dx, n):
    """dx = dy * (P(x) + x * p(x)) with the normal density p(x) = exp(-x*x/2) / sqrt(2 pi)."""
    v = wide(x.reshape(n))
    dx.reshape(n)[:] = wide(dy.reshape(n)) * (normal_distribution(v) + v * normal_density(v))


def silu_forward(x, y, n):
    """y = x * sigmoid(x)."""
    v = wide(x.reshape(n))
    y.reshape(n)[:] = v * _sigmoid(v)


def silu_backward(dy, x, dx, n):
    """dx = dy * s * (1 + x * (1 - s)) with s = sigmoid(x)."""
    v = wide(x.reshape(n))
    s = _sigmoid(v)
    dx.reshape(n)[:] = wide(dy.reshape(n)) * s * (1 + v * (1 - s))


def elu_forward(x, y, alpha, n):
    """y = x where x > 0, else alpha * (exp(x) - 1)."""
    v = wide(x.reshape(n))
    y.reshape(n)[:] = np.where(v > 0, v, alpha * np.expm1(np.minimum(v, 0)))


def elu_backward(dy, y, dx, alpha, n):
    """dx = dy where y > 0, else dy * (y + alpha); right for alpha >= 0, where y has the sign of x."""
    d, v = wide(dy.reshape(n)), wide(y.reshape(n))
    dx.reshape(n)[:] = np.where(v > 0, d, d * (v + alpha))


def softplus_forward(x, y, n):
    """y = log(1 + exp(x))."""
    v = wide(x.reshape(n))
    y.reshape(n)[:] = np.maximum(v, 0) + np.log1p(np.exp(-np.abs(v)))  # exp of at most 0: no overflow


def softplus_backward(dy, y, dx, n):
    """dx = dy * (1 - exp(-y)), which is dy * sigmoid(x)."""
    dx.reshape(n)[:] = wide(dy.reshape(n)) * -np.expm1(-wide(y.reshape(n)))


def hardswish_forward(x, y, n):
    """y = x * min(max(x + 3, 0), 6) / 6 (Howard et al. 2019)."""
    v = wide(x.reshape(n))
    y.reshape(n)[:] = np.where(v <= -3, 0, np.where(v >= 3, v, v * (v + 3) / 6))


def hardswish_backward(dy, x, dx, n):
    """dx = 0 up to x = -3, dy from x = 3 on, dy * (2 * x + 3) / 6 between."""
    d, v = wide(dy.reshape(n)), wide(x.reshape(n))
    dx.reshape(n)[:] = np.where(v <= -3, 0, np.where(v >= 3, d, d * (2 * v + 3) / 6))


def _sigmoid(v):
    small = np.exp(-np.abs(v))  # at most 1: no overflow on either side
    return np.where(v < 0, small, 1) / (1 + small)
