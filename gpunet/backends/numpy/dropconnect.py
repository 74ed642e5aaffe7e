"""Definitions of kernels/dropconnect.cu (Wan et al. 2013): a mask on weights, drawn again wherever it is needed.

An example keeps weight (i, o) where lane((example*inputs + i)*width + o) >= threshold, width the outputs rounded up to
a multiple of 16, the lanes those of the stream (site, state.batch). threshold = round(rate * 65536).
"""

import numpy as np

from gpunet.backends.numpy.erf import normal_density, normal_distribution
from gpunet.backends.numpy.values import put, wide
from gpunet.core.random import LANES, lanes


def dropconnect_weights(w, masked, state, seed, site, threshold, inputs, outputs):
    """masked = W where example 0 keeps it, else 0."""
    kept = _kept(state, seed, site, threshold, 0, inputs, outputs)
    masked.reshape(inputs, outputs)[:] = np.where(kept, w.reshape(inputs, outputs), 0)


def dropconnect_gradient(d, dw, state, seed, site, threshold, accumulate, inputs, outputs):
    """dW (+)= d where example 0 keeps it, else 0."""
    kept = _kept(state, seed, site, threshold, 0, inputs, outputs)
    put(dw.reshape(inputs, outputs), np.where(kept, d.reshape(inputs, outputs), 0), accumulate)


def dropconnect_forward(x, w, y, state, seed, site, threshold, first, n, inputs, outputs):
    """y[e] = x[e] @ (W where example first + e keeps it, else 0)."""
    for e in range(n):
        kept = _kept(state, seed, site, threshold, first + e, inputs, outputs)
        y.reshape(n, outputs)[e] = wide(x.reshape(n, inputs)[e]) @ np.where(kept, w.reshape(inputs, outputs), 0)


def dropconnect_backward_input(dy, w, dx, state, seed, site, threshold, first, n, inputs, outputs):
    """dx[e] = (W where example first + e keeps it, else 0) @ dy[e]."""
    for e in range(n):
        kept = _kept(state, seed, site, threshold, first + e, inputs, outputs)
        dx.reshape(n, inputs)[e] = np.where(kept, w.reshape(inputs, outputs), 0) @ wide(dy.reshape(n, outputs)[e])


def dropconnect_backward_weight(x, dy, dw, state, seed, site, threshold, first, accumulate, n, inputs, outputs):
    """dW (+)= sum over e of x[e] dy[e]^T where example first + e keeps it."""
    total = np.zeros((inputs, outputs))
    for e in range(n):
        kept = _kept(state, seed, site, threshold, first + e, inputs, outputs)
        total += kept * np.outer(wide(x.reshape(n, inputs)[e]), wide(dy.reshape(n, outputs)[e]))
    put(dw.reshape(inputs, outputs), total, accumulate)


def dropconnect_relu(x, w, mean, y, keep, n, inputs, outputs):
    """y = E[max(u, 0)] for u ~ N(mean, s^2), s^2 = keep * (1 - keep) * x^2 @ W^2.

    That is mean * P(z) + s * p(z), z = mean / s, of the normal distribution P and density p.
    Where s is 0 it is max(mean, 0).
    """
    v, weight, m = wide(x.reshape(n, inputs)), w.reshape(inputs, outputs), wide(mean.reshape(n, outputs))
    s = np.sqrt(keep * (1 - keep) * (v * v @ (weight * weight)))
    z = np.divide(m, s, out=np.zeros_like(m), where=s > 0)
    y.reshape(n, outputs)[:] = np.maximum(np.where(s > 0, m * normal_distribution(z) + s * normal_density(z), m), 0)


def _kept(state, seed, site, threshold, example, inputs, outputs):
    """Return bool (inputs, outputs): the mask of an example."""
    width = -(-outputs // LANES) * LANES
    drawn = lanes(seed, site, int(state["batch"]), example * inputs * width, inputs * width)
    return drawn.reshape(inputs, width)[:, :outputs] >= threshold
