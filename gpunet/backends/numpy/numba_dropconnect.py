"""DropConnect compiled by numba: a row of a mask is drawn and used at once, never a whole mask.

Figures are ns a weight (and example) at 50 examples of 256 to 128, 20 of 1024 to 64 in float32: definition -> this;
numba 0.68 and NumPy 2.4, one thread of an AMD EPYC (Zen 4) that others used too, the best of 21.
"""

import numpy as np

from gpunet.backends.numpy.jit import jit
from gpunet.backends.numpy.numba_random import lanes
from gpunet.backends.numpy.scratch import plain
from gpunet.core.random import LANES


def dropconnect_weights(w, masked, state, seed, site, threshold, inputs, outputs, *, scratch):
    """masked = W where example 0 keeps it, else 0: 2.3 4.2 -> 0.88 0.90."""
    return _bind(_weights, (w, masked), (), state, seed, site, threshold, outputs, scratch)


def dropconnect_gradient(d, dw, state, seed, site, threshold, accumulate, inputs, outputs, *, scratch):
    """dW (+)= d where example 0 keeps it, else 0: 2.3 4.3 -> 0.89 0.90."""
    return _bind(_gradient, (d, dw), (accumulate,), state, seed, site, threshold, outputs, scratch)


def dropconnect_forward(x, w, y, state, seed, site, threshold, first, n, inputs, outputs, *, scratch):
    """y[e] += x[e, i] * (row i of W where the example keeps it, else 0), input by input: 5.0 4.8 -> 0.79 0.81."""
    return _bind(_forward, (x, w, y), (first, n, inputs), state, seed, site, threshold, outputs, scratch)


def dropconnect_backward_input(dy, w, dx, state, seed, site, threshold, first, n, inputs, outputs, *, scratch):
    """dx[e, i] = (row i of W where the example keeps it, else 0) @ dy[e]: 5.0 5.9 -> 0.77 0.84."""
    return _bind(_backward_input, (dy, w, dx), (first, n, inputs), state, seed, site, threshold, outputs, scratch)


def dropconnect_backward_weight(
    x, dy, dw, state, seed, site, threshold, first, accumulate, n, inputs, outputs, *, scratch
):
    """Row i of dW += kept * x[e, i] * dy[e], example by example: 2.2 2.1 -> 0.78 0.83."""
    sizes = first, accumulate, n, inputs
    return _bind(_backward_weight, (x, dy, dw), sizes, state, seed, site, threshold, outputs, scratch)


def _bind(kernel, arrays, sizes, state, seed, site, threshold, outputs, scratch):
    """Return the call kernel(arrays, room for a row of draws and of sums, sizes, outputs, the draws' key)."""
    width = -(-outputs // LANES) * LANES
    if not plain(*arrays) or width * (2 + arrays[0].itemsize) > scratch.nbytes // 2:
        return None
    flat, seed = [a.reshape(-1) for a in arrays], np.uint64(seed)
    room = scratch((width,), np.uint16), scratch((outputs,), arrays[0].dtype)

    def run():
        kernel(*flat, *room, *sizes, threshold, seed, site, int(state["batch"]))

    return run


@jit
def _weights(w, masked, drawn, line, threshold, seed, site, time):
    zero, c = w.dtype.type(0), line.size
    for i in range(w.size // c):
        lanes(drawn, seed, site, time, i * drawn.size)
        row, out = w[i * c : (i + 1) * c], masked[i * c : (i + 1) * c]
        for o in range(c):
            line[o] = row[o] if drawn[o] >= threshold else zero
        for o in range(c):
            out[o] = line[o]


@jit
def _gradient(d, dw, drawn, line, accumulate, threshold, seed, site, time):
    zero, c = d.dtype.type(0), line.size
    for i in range(d.size // c):
        lanes(drawn, seed, site, time, i * drawn.size)
        row, out = d[i * c : (i + 1) * c], dw[i * c : (i + 1) * c]
        for o in range(c):
            line[o] = row[o] if drawn[o] >= threshold else zero
        if accumulate:
            for o in range(c):
                line[o] += out[o]
        for o in range(c):
            out[o] = line[o]


@jit
def _forward(x, w, y, drawn, sums, first, n, inputs, threshold, seed, site, time):
    zero, c = x.dtype.type(0), sums.size
    for e in range(n):
        sums[:] = 0
        for i in range(inputs):
            lanes(drawn, seed, site, time, ((first + e) * inputs + i) * drawn.size)
            row, value = w[i * c : (i + 1) * c], x[e * inputs + i]
            for o in range(c):
                sums[o] += value * (row[o] if drawn[o] >= threshold else zero)
        y[e * c : (e + 1) * c] = sums


@jit
def _backward_input(dy, w, dx, drawn, line, first, n, inputs, threshold, seed, site, time):
    zero, c = w.dtype.type(0), line.size
    for e in range(n):
        line[:] = dy[e * c : (e + 1) * c]
        for i in range(inputs):
            lanes(drawn, seed, site, time, ((first + e) * inputs + i) * drawn.size)
            row, total = w[i * c : (i + 1) * c], zero
            for o in range(c):
                total += line[o] * (row[o] if drawn[o] >= threshold else zero)
            dx[e * inputs + i] = total


@jit
def _backward_weight(x, dy, dw, drawn, sums, first, accumulate, n, inputs, threshold, seed, site, time):
    zero, one, c = x.dtype.type(0), x.dtype.type(1), sums.size
    for i in range(inputs):
        out = dw[i * c : (i + 1) * c]
        if accumulate:
            sums[:] = out
        else:
            sums[:] = 0
        for e in range(n):
            lanes(drawn, seed, site, time, ((first + e) * inputs + i) * drawn.size)
            given, value = dy[e * c : (e + 1) * c], x[e * inputs + i]
            for o in range(c):
                kept = one if drawn[o] >= threshold else zero  # times infinity it is NaN, as in the definition
                sums[o] += kept * (value * given[o])
        for o in range(c):
            out[o] = sums[o]
