"""Activations without exp compiled by numba: one pass, lines of 512 elements.

Figures are ns an element at 50 images of 32x32x16, 32x32x64, 16x16x32 in float32: fast twin (elu, hardswish: the
definition) -> this; numba 0.68 and NumPy 2.4, one thread of an AMD EPYC (Zen 4) that others used too, the best of 21.
"""

from functools import partial

from gpunet.backends.numpy.jit import jit
from gpunet.backends.numpy.numba_lines import copy
from gpunet.backends.numpy.scratch import LINE, plain


def relu_forward(x, y, n, *, scratch):
    """y = x unless x <= 0, which a NaN is not: 0.15 0.34 0.16 -> 0.11 0.23 0.11."""
    return _bind(_relu_forward, scratch, x, y)


def relu_backward(dy, y, dx, n, *, scratch):
    """dx = dy where y > 0, else 0: 0.35 0.67 0.34 -> 0.15 0.40 0.15."""
    return _bind(_relu_backward, scratch, dy, y, dx)


def leaky_relu_forward(x, y, slope, n, *, scratch):
    """y = x where x > 0, else slope * x: 0.33 0.54 0.25 -> 0.15 0.21 0.11."""
    return _bind(_leaky_relu_forward, scratch, x, y, parameter=slope)


def leaky_relu_backward(dy, y, dx, slope, n, *, scratch):
    """dx = dy where y > 0, else slope * dy: 0.44 0.76 0.44 -> 0.16 0.39 0.16."""
    return _bind(_leaky_relu_backward, scratch, dy, y, dx, parameter=slope)


def sigmoid_backward(dy, y, dx, n, *, scratch):
    """dx = dy * y * (1 - y): 0.36 0.78 0.36 -> 0.16 0.57 0.16."""
    return _bind(_sigmoid_backward, scratch, dy, y, dx, parameter=1)


def tanh_backward(dy, y, dx, n, *, scratch):
    """dx = dy * (1 - y*y): 0.34 0.67 0.31 -> 0.17 0.38 0.15."""
    return _bind(_tanh_backward, scratch, dy, y, dx, parameter=1)


def elu_backward(dy, y, dx, alpha, n, *, scratch):
    """dx = dy where y > 0, else dy * (y + alpha): 4.4 4.6 4.9 -> 0.30 0.38 0.25."""
    return _bind(_elu_backward, scratch, dy, y, dx, parameter=alpha)


def hardswish_forward(x, y, n, *, scratch):
    """y = x * min(max(x + 3, 0), 6) / 6: 1.7 2.7 1.7 -> 0.14 0.32 0.12."""
    return _bind(_hardswish_forward, scratch, x, y)


def hardswish_backward(dy, x, dx, n, *, scratch):
    """dx = 0 up to x = -3, dy from x = 3 on, dy * (2 * x + 3) / 6 between: 1.9 2.9 1.8 -> 0.20 0.40 0.15."""
    return _bind(_hardswish_backward, scratch, dy, x, dx)


def _bind(kernel, scratch, *arrays, parameter=0):
    """Return the call kernel(arrays, a line, the parameter in their type)."""
    if not plain(*arrays):
        return None
    kind = arrays[0].dtype
    return partial(kernel, *(a.reshape(-1) for a in arrays), scratch((LINE,), kind), kind.type(parameter))


@jit
def _relu_forward(x, y, out, zero):
    for start in range(0, x.size, out.size):
        part = x[start : start + out.size]
        for i in range(part.size):
            out[i] = zero if part[i] <= 0 else part[i]
        copy(out, y[start : start + out.size])


@jit
def _relu_backward(dy, y, dx, out, zero):
    for start in range(0, y.size, out.size):
        d, part = dy[start : start + out.size], y[start : start + out.size]
        for i in range(part.size):
            out[i] = d[i] if part[i] > 0 else zero
        copy(out, dx[start : start + out.size])


@jit
def _leaky_relu_forward(x, y, out, slope):
    for start in range(0, x.size, out.size):
        part = x[start : start + out.size]
        for i in range(part.size):
            out[i] = part[i] if part[i] > 0 else part[i] * slope
        copy(out, y[start : start + out.size])


@jit
def _leaky_relu_backward(dy, y, dx, out, slope):
    for start in range(0, y.size, out.size):
        d, part = dy[start : start + out.size], y[start : start + out.size]
        for i in range(part.size):
            out[i] = d[i] if part[i] > 0 else d[i] * slope
        copy(out, dx[start : start + out.size])


@jit
def _sigmoid_backward(dy, y, dx, out, one):
    for start in range(0, y.size, out.size):
        d, part = dy[start : start + out.size], y[start : start + out.size]
        for i in range(part.size):
            out[i] = d[i] * (part[i] * (one - part[i]))
        copy(out, dx[start : start + out.size])


@jit
def _tanh_backward(dy, y, dx, out, one):
    for start in range(0, y.size, out.size):
        d, part = dy[start : start + out.size], y[start : start + out.size]
        for i in range(part.size):
            out[i] = d[i] * (one - part[i] * part[i])
        copy(out, dx[start : start + out.size])


@jit
def _elu_backward(dy, y, dx, out, alpha):
    for start in range(0, y.size, out.size):
        d, part = dy[start : start + out.size], y[start : start + out.size]
        for i in range(part.size):
            out[i] = d[i] if part[i] > 0 else d[i] * (part[i] + alpha)
        copy(out, dx[start : start + out.size])


@jit
def _hardswish_forward(x, y, out, zero):
    three, sixth = x.dtype.type(3), x.dtype.type(1 / 6)
    for start in range(0, x.size, out.size):
        part = x[start : start + out.size]
        for i in range(part.size):
            v = part[i]
            inner = v if v >= three else v * (v + three) * sixth
            out[i] = zero if v <= -three else inner
        copy(out, y[start : start + out.size])


@jit
def _hardswish_backward(dy, x, dx, out, zero):
    three, sixth = x.dtype.type(3), x.dtype.type(1 / 6)
    for start in range(0, x.size, out.size):
        d, part = dy[start : start + out.size], x[start : start + out.size]
        for i in range(part.size):
            v = part[i]
            inner = d[i] if v >= three else d[i] * (v + v + three) * sixth
            out[i] = zero if v <= -three else inner
        copy(out, dx[start : start + out.size])
