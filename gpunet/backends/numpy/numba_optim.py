"""The optimizer compiled by numba: each arena is read and written once.

An arena is read in units of 256 elements that share a row of multipliers. What a program may change between replays
(table, rates, multipliers, state) is read at each.
Figures are ns an element at 0.28, 1.15 and 6.7 million elements in float32: fast twin -> this; numba 0.68 and
NumPy 2.4, one thread (BLAS's too) of an AMD EPYC (Zen 4) that others used too, the best of 21.
"""

from functools import cache, partial

import numpy as np

from gpunet.backends.numpy.jit import jit
from gpunet.backends.numpy.scratch import plain

UNIT = 256


def gradient_norm(g, norms, n, parts, *, scratch):
    """norms[p] = sum of g*g, in double: 0.29 0.28 0.57 -> 0.07 0.06 0.11."""
    if not plain(g):
        return None
    return partial(_norm, g.reshape(-1), norms.reshape(-1), parts)


def penalty_sum(w, table, decay, l1, penalties, decoupled, rows, n, parts, *, scratch):
    """penalties[p] = sum of decay / 2 * w^2 + l1 * |w|, in double, of whole units: 0.82 0.79 1.1 -> 0.12 0.11 0.13."""
    if parts != 1 or not plain(w, decay, l1):
        return None
    w, *rest = (a.reshape(-1) for a in (w, table, decay, l1, penalties))
    return partial(_penalty, w, *rest, 0.0 if decoupled else 0.5)


def sgd_update(
    w, g, velocity, table, rate, decay, group, rates, state, momentum, nesterov, caffe, decoupled, rows, steps, n,
    *, scratch,
):  # fmt: skip
    """The formulas of the definition: 1.1 1.1 1.6 -> 0.19 0.19 0.39."""
    if not plain(w, g, velocity, rate, decay, rates):
        return None
    kernel = _sgd_kernel(bool(nesterov), bool(caffe), bool(decoupled))
    w, g, velocity, table, rate, decay, group, rates = (
        a.reshape(-1) for a in (w, g, velocity, table, rate, decay, group, rates)
    )
    real = w.dtype.type

    def run():
        if state["apply"]:
            lr = rates[min(int(state["update"]), steps - 1)] * state["lr_scale"].astype(real)[group] * rate
            kernel(w, g, velocity, table, lr, decay, real(state["gradient_scale"]), real(momentum))

    return run


@jit
def _norm(g, norms, parts):
    for p in range(parts):
        part = g[p * g.size // parts : (p + 1) * g.size // parts]
        total = 0.0
        for i in range(part.size):
            d = np.float64(part[i])
            total += d * d
        norms[p] = total


@jit
def _penalty(w, table, decay, l1, penalties, half):
    total = 0.0
    for unit in range(table.size):
        part = w[unit * UNIT : (unit + 1) * UNIT]
        squares, sizes = 0.0, 0.0
        for i in range(part.size):
            d = np.float64(part[i])
            squares += d * d
            sizes += abs(d)
        row = table[unit]
        total += l1[row] * sizes
        if half != 0:
            total += half * decay[row] * squares
    penalties[0] = total


@cache
def _sgd_kernel(nesterov, caffe, decoupled):
    @jit
    def update(w, g, velocity, table, rates, decay, scale, momentum):
        one = w.dtype.type(1)
        for unit in range(table.size):
            first, stop = unit * UNIT, (unit + 1) * UNIT
            weight, gradient, v = w[first:stop], g[first:stop], velocity[first:stop]
            lr, pull = rates[table[unit]], decay[table[unit]]
            for i in range(weight.size):
                old = weight[i]
                d = scale * gradient[i]
                if decoupled:
                    old *= one - lr * pull
                else:
                    d += pull * old
                if caffe:
                    d *= lr
                before = momentum * v[i]
                new = before + d
                v[i] = new
                if caffe:
                    step = new + momentum * new - before if nesterov else new
                else:
                    step = lr * (d + momentum * new if nesterov else new)
                weight[i] = old - step

    return update
