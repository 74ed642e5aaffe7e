"""Straight-line loops for the kernels of the activations, norms, pools and dropouts that tests/test_twins.py has not.

ORACLES[kernel](name, **arguments in float64) returns {output: expected}.
"""

import itertools
import math

import numpy as np

from gpunet.core.random import philox

ORACLES = {}


def oracle(*kernels):
    """Enter a function for these kernels."""

    def enter(function):
        ORACLES.update({name: (function, name) for name in kernels})
        return function

    return enter


def bits_of(place, width, state, seed, site):
    """Return `width` bits of a place of a stream, cut from its block as one number of 256."""
    per = 256 // width
    block = [int(word) for word in philox(seed, site, int(state["batch"]), place // per, 1)]
    number = sum(word << 64 * i for i, word in enumerate(block))
    return number >> width * (place % per) & (1 << width) - 1


def part_of(row, rows, parts):
    (part,) = (p for p in range(parts) if p * rows // parts <= row < (p + 1) * rows // parts)
    return part


# Activations


def softplus(x):
    return x if x > 700 or x != x else math.log1p(math.exp(x))


def hardswish(x):
    return x if x > 3 or x != x else 0 if x < -3 else x * (x + 3) / 6


def hardswish_slope(x):
    return 1 if x >= 3 else 0 if x <= -3 else x / 3 + 0.5


@oracle("elu_forward")
def _(name, x, y, alpha, n):
    return {"y": [v if v > 0 or v != v else alpha * (math.exp(v) - 1) for v in x]}


@oracle("elu_backward")
def _(name, dy, y, dx, alpha, n):
    return {"dx": [d if v > 0 else d * (v + alpha) for d, v in zip(dy, y, strict=True)]}


@oracle("softplus_forward")
def _(name, x, y, n):
    return {"y": [softplus(v) for v in x]}


@oracle("softplus_backward")
def _(name, dy, y, dx, n):
    return {"dx": [d * (1 - math.exp(-v)) for d, v in zip(dy, y, strict=True)]}


@oracle("hardswish_forward")
def _(name, x, y, n):
    return {"y": [hardswish(v) for v in x]}


@oracle("hardswish_backward")
def _(name, dy, x, dx, n):
    return {"dx": [d * hardswish_slope(v) for d, v in zip(dy, x, strict=True)]}


@oracle("softmax_forward")
def _(name, x, y, rows, c):
    for r in range(rows):
        if np.isnan(x[r]).any() or (x[r] == np.inf).any():
            y[r] = np.nan
            continue
        powers = [math.exp(v - max(x[r])) for v in x[r]]
        y[r] = [p / math.fsum(powers) for p in powers]
    return {"y": y}


@oracle("softmax_backward")
def _(name, dy, y, dx, rows, c):
    """By the whole Jacobian."""
    for r in range(rows):
        dx[r] = (np.diag(y[r]) - np.outer(y[r], y[r])) @ dy[r]
    return {"dx": dx}


@oracle("prelu_forward")
def _(name, x, slope, y, rows, c):
    for r, j in itertools.product(range(rows), range(c)):
        y[r, j] = x[r, j] * (1 if x[r, j] > 0 else slope[j])
    return {"y": y}


@oracle("prelu_backward")
def _(name, dy, x, slope, dx, rows, c):
    for r, j in itertools.product(range(rows), range(c)):
        dx[r, j] = dy[r, j] * (1 if x[r, j] > 0 else slope[j])
    return {"dx": dx}


@oracle("prelu_backward_sums")
def _(name, dy, x, sums, rows, c, parts):
    sums[:] = 0
    for r, j in itertools.product(range(rows), range(c)):
        sums[part_of(r, rows, parts), j] += dy[r, j] * min(x[r, j], 0)
    return {"sums": sums}


@oracle("maxout_forward")
def _(name, x, y, index, n, k):
    for i in range(n):
        missing = [j for j in range(k) if x[i, j] != x[i, j]]
        index[i] = missing[0] if missing else max(range(k), key=lambda j: (x[i, j], -j))
        y[i] = x[i, index[i]]
    return {"y": y, "index": index}


@oracle("maxout_backward")
def _(name, dy, index, dx, n, k):
    dx[:] = 0
    for i in range(n):
        dx[i, index[i]] = dy[i]
    return {"dx": dx}


# Group normalisation


def own(group, c, groups):
    return slice(group * (c // groups), (group + 1) * (c // groups))


@oracle("groupnorm_forward")
def _(name, x, gamma, beta, y, mean, inverse, eps, n, pixels, c, groups, width):
    for i, g in itertools.product(range(n), range(groups)):
        values, at = x[i, :, own(g, c, groups)], own(g, c, groups)
        mean[i, g] = math.fsum(values.flat) / values.size
        variance = math.fsum((v - mean[i, g]) ** 2 for v in values.flat) / values.size
        inverse[i, g] = (variance + eps) ** -0.5
        y[i, :, at] = (values - mean[i, g]) * inverse[i, g] * gamma[at] + beta[at]
    return {"y": y, "mean": mean, "inverse": inverse}


@oracle("groupnorm_backward")
def _(name, dy, x, mean, inverse, gamma, dx, n, pixels, c, groups, width):
    for i, g in itertools.product(range(n), range(groups)):
        at = own(g, c, groups)
        xhat, d = (x[i, :, at] - mean[i, g]) * inverse[i, g], dy[i, :, at] * gamma[at]
        plain, weighted = math.fsum(d.flat) / d.size, math.fsum((d * xhat).flat) / d.size
        dx[i, :, at] = inverse[i, g] * (d - plain - xhat * weighted)
    return {"dx": dx}


@oracle("groupnorm_backward_sums")
def _(name, dy, x, mean, inverse, dgamma, dbeta, n, pixels, c, groups, parts):
    dgamma[:] = dbeta[:] = 0
    for row, j in itertools.product(range(n * pixels), range(c)):
        i, pixel = divmod(row, pixels)
        group, part = j // (c // groups), part_of(row, n * pixels, parts)
        dgamma[part, j] += dy[i, pixel, j] * (x[i, pixel, j] - mean[i, group]) * inverse[i, group]
        dbeta[part, j] += dy[i, pixel, j]
    return {"dgamma": dgamma, "dbeta": dbeta}


# Draws


@oracle("dropout_channels")
def _(name, x, y, state, seed, site, threshold, scale, first, n, pixels, c):
    for i, j in itertools.product(range(n), range(c)):
        kept = bits_of((first + i) * c + j, 16, state, seed, site) >= threshold
        y[i, :, j] = x[i, :, j] * scale if kept else 0
    return {"y": y}


@oracle("dropout_scale")
def _(name, x, y, scale, n):
    return {"y": [v * scale for v in x]}


def window_of(x, image, oy, ox, channel, g):
    """Return [(place in the window, x there, or 0 where it is negative)] of the places inside of the image."""
    found = []
    for ky, kx in itertools.product(range(g["kh"]), range(g["kw"])):
        iy, ix = oy * g["stride_y"] - g["pad_y"] + ky, ox * g["stride_x"] - g["pad_x"] + kx
        if 0 <= iy < g["h"] and 0 <= ix < g["w"]:
            value = x[image, iy, ix, channel]
            found.append((ky * g["kw"] + kx, 0.0 if value < 0 else value))
    return found


def outputs(g):
    return itertools.product(*(range(g[size]) for size in ("n", "oh", "ow", "c")))


@oracle("stochastic_pool_forward")
def _(name, x, y, index, state, seed, site, first, **g):
    for number, at in enumerate(outputs(g)):
        window = [(tap, a) for tap, a in window_of(x, *at, g) if a != 0]
        y[at], index[at] = 0, 255
        broken = [(tap, a) for tap, a in window if not math.isfinite(a)]
        place = first * g["oh"] * g["ow"] * g["c"] + number
        goal = (bits_of(place, 32, state, seed, site) >> 8) / 2**24 * sum(a for _, a in window)
        running = 0.0
        for tap, a in window:
            running += a
            if running > goal or (broken and broken[0][0] == tap):
                y[at], index[at] = a, tap
                break
    return {"y": y, "index": index}


@oracle("stochastic_pool_expected")
def _(name, x, y, **g):
    for at in outputs(g):
        values = [a for _, a in window_of(x, *at, g)]
        total = sum(values)
        y[at] = sum(a / total * a for a in values) if total != 0 else 0
    return {"y": y}


def kept_by(example, state, seed, site, threshold, inputs, outputs):
    """Return bool (inputs, outputs), weight by weight."""
    width = (outputs + 15) // 16 * 16
    kept = np.zeros((inputs, outputs), bool)
    for i, o in np.ndindex(inputs, outputs):
        kept[i, o] = bits_of((example * inputs + i) * width + o, 16, state, seed, site) >= threshold
    return kept


@oracle("dropconnect_weights")
def _(name, w, masked, inputs, outputs, **draw):
    return {"masked": w * kept_by(0, inputs=inputs, outputs=outputs, **draw)}


@oracle("dropconnect_gradient")
def _(name, d, dw, accumulate, inputs, outputs, **draw):
    return {"dw": d * kept_by(0, inputs=inputs, outputs=outputs, **draw) + (dw if accumulate else 0)}


@oracle("dropconnect_forward")
def _(name, x, w, y, first, n, **draw):
    for e in range(n):
        y[e] = (x[e][:, None] * w * kept_by(first + e, **draw)).sum(axis=0)
    return {"y": y}


@oracle("dropconnect_backward_input")
def _(name, dy, w, dx, first, n, **draw):
    for e in range(n):
        dx[e] = (dy[e] * w * kept_by(first + e, **draw)).sum(axis=1)
    return {"dx": dx}


@oracle("dropconnect_backward_weight")
def _(name, x, dy, dw, first, accumulate, n, **draw):
    terms = [x[e][:, None] * dy[e] * kept_by(first + e, **draw) for e in range(n)]
    return {"dw": sum(terms) + (dw if accumulate else 0)}


@oracle("dropconnect_relu")
def _(name, x, w, mean, y, keep, n, inputs, outputs):
    """By the integral of max(u, 0) times the density: Simpson's rule over z from 0 and 12 deviations."""
    for e, o in np.ndindex(n, outputs):
        s = math.sqrt(keep * (1 - keep) * math.fsum((x[e, i] * w[i, o]) ** 2 for i in range(inputs)))
        if s == 0:
            y[e, o] = max(mean[e, o], 0)
            continue
        z = np.linspace(max(-mean[e, o] / s, -12), max(12, -mean[e, o] / s), 4001)
        f = (mean[e, o] + s * z) * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        y[e, o] = (f[0] + f[-1] + 4 * f[1::2].sum() + 2 * f[2:-1:2].sum()) * (z[1] - z[0]) / 3
    return {"y": y}
