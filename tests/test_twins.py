"""The NumPy definitions against straight-line loops, finite differences and adjoints."""

import inspect
import itertools
import math
from importlib import import_module

import augment_oracles
import numpy as np
import pytest
import rule_oracles
from layer_oracles import ORACLES as LAYERS
from test_random import feistel, words

from gpunet.backends.numpy import (
    augment,
    batchnorm,
    conv,
    dropout,
    elementwise,
    loss,
    optim,
    order,
    pool,
)
from gpunet.backends.numpy.erf import erf
from gpunet.core import random, sources
from gpunet.core.backend import Types, dtypes_of, evaluate
from gpunet.core.state import new_state
from gpunet.testing.cases import CASES, SIZES, state
from gpunet.testing.tolerance import TOLERANCE, assert_close

TWINS = {k.name: getattr(import_module(f"gpunet.backends.numpy.{k.stem}"), k.name) for k in sources.kernels().values()}
TYPES = {name: Types.of(name) for name in ("float32", "float64", "float16", "bfloat16")}
ORACLES = {**LAYERS, **{name: (function, name) for name, function in rule_oracles.ORACLES.items()}}


def oracle(*kernels):
    """Enter the straight-line function(name, **arguments in float64) -> {output: expected} of these kernels."""

    def enter(function):
        ORACLES.update({name: (function, name) for name in kernels})
        return function

    return enter


def copied(arguments):
    return {name: v.copy() if isinstance(v, np.ndarray) else v for name, v in arguments.items()}


def in_double(arguments):
    return {
        name: v.astype(np.float64) if isinstance(v, np.ndarray) and v.dtype.kind in "fV" and not v.dtype.names else v
        for name, v in copied(arguments).items()
    }


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", sorted(TWINS))
def test_a_twin_computes_what_loops_compute(name, types):
    real, wide = TYPES[types].real, TYPES[types].wide
    for size in range(SIZES):
        arguments = CASES[name](np.random.default_rng(size), size, real, wide)
        before = copied(arguments)
        function, kernel = ORACLES[name]
        expected = function(kernel, **in_double(arguments))
        assert TWINS[name](**arguments) is None
        for argument, array in arguments.items():
            if argument in expected:
                value = np.reshape(expected[argument], array.shape)
                assert_close(f"{name}[{size}] {argument}", array, value, array.dtype)
            elif isinstance(array, np.ndarray):
                assert array.tobytes() == before[argument].tobytes(), f"{name}[{size}] wrote to {argument}"


def test_every_twin_has_a_case_and_an_oracle():
    assert TWINS.keys() == CASES.keys() == ORACLES.keys()


@pytest.mark.parametrize("name", sorted(TWINS))
def test_cases_and_twins_fit_the_declaration(name):
    """Names, order, types and extents of kernel, twin and case are the same; outputs are what the kernel may write."""
    kernel = sources.kernels()[name]
    names = [a.name for a in kernel.arguments]
    assert list(inspect.signature(TWINS[name]).parameters) == names
    assert TWINS[name].__module__.endswith(f".{kernel.stem}")
    for types, size in itertools.product(TYPES.values(), range(SIZES)):
        arguments = CASES[name](np.random.default_rng(0), size, types.real, types.wide)
        assert list(arguments) == names
        for argument in kernel.arguments:
            value = arguments[argument.name]
            if argument.pointer:
                assert value.dtype in dtypes_of(argument.type, types), argument.name
                assert value.size == evaluate(argument.extent, arguments), argument.name
                assert value.flags.c_contiguous
            else:
                assert type(value) is (float if argument.type in ("wide", "float", "double") else int), argument.name


@pytest.mark.parametrize("name", sorted(TWINS))
def test_a_twin_takes_flat_arrays(name):
    """Only the number of elements counts, as in a kernel."""
    arguments = CASES[name](np.random.default_rng(3), 3, np.dtype("f8"), np.dtype("f8"))
    flat = {key: v.reshape(-1) if isinstance(v, np.ndarray) and v.shape else v for key, v in copied(arguments).items()}
    TWINS[name](**arguments)
    TWINS[name](**flat)
    for key, value in arguments.items():
        if isinstance(value, np.ndarray):
            assert flat[key].tobytes() == value.tobytes(), key


# Oracles: activation, elementwise


def normal(x):
    return math.erfc(-x / math.sqrt(2)) / 2


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


FORWARD = {
    "relu": lambda x: x if x > 0 or x != x else 0,
    "sigmoid": sigmoid,
    "tanh": math.tanh,
    "gelu": lambda x: x * normal(x),
    "silu": lambda x: x * sigmoid(x),
}
DERIVATIVE = {  # by y, or for the last two by x
    "relu": lambda y: y > 0,
    "sigmoid": lambda y: y - y * y,
    "tanh": lambda y: 1 - y * y,
    "gelu": lambda x: normal(x) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    "silu": lambda x: sigmoid(x) + x * sigmoid(x) * (1 - sigmoid(x)),
}


@oracle(*(f"{op}_forward" for op in FORWARD))
def _(name, x, y, n):
    return {"y": [FORWARD[name.removesuffix("_forward")](v) for v in x]}


@oracle(*(f"{op}_backward" for op in DERIVATIVE))
def _(name, dy, dx, n, y=None, x=None):
    f = DERIVATIVE[name.removesuffix("_backward")]
    return {"dx": [d * f(v) for d, v in zip(dy, x if y is None else y, strict=True)]}


@oracle("leaky_relu_forward")
def _(name, x, y, slope, n):
    return {"y": [max(v, 0) + slope * min(v, 0) for v in x]}


@oracle("leaky_relu_backward")
def _(name, dy, y, dx, slope, n):
    return {"dx": [d if v > 0 else slope * d for d, v in zip(dy, y, strict=True)]}


@oracle("add_forward")
def _(name, a, b, y, n):
    return {"y": [a[i] + b[i] for i in range(n)]}


@oracle("scale_forward")
def _(name, x, y, factor, n):
    return {"y": [v * factor for v in x.tolist()]}


@oracle("concat_forward")
def _(name, x, y, rows, c, width, offset):
    for r, j in itertools.product(range(rows), range(c)):
        y[r, offset + j] = x[r, j]
    return {"y": y}


@oracle("concat_backward")
def _(name, dy, dx, rows, c, width, offset):
    for r, j in itertools.product(range(rows), range(c)):
        dx[r, j] = dy[r, offset + j]
    return {"dx": dx}


@oracle("bias_forward")
def _(name, b, y, rows, c):
    return {"y": [[y[r, j] + b[j] for j in range(c)] for r in range(rows)]}


def part_of(row, rows, parts):
    (part,) = (p for p in range(parts) if p * rows // parts <= row < (p + 1) * rows // parts)
    return part


@oracle("column_sum")
def _(name, x, sums, rows, c, parts):
    sums[:] = 0
    for r in range(rows):
        sums[part_of(r, rows, parts)] += x[r]
    return {"sums": sums}


@oracle("sum_parts")
def _(name, x, y, accumulate, parts, n):
    return {"y": [math.fsum(x[:, i]) + (y[i] if accumulate else 0) for i in range(n)]}


@oracle("cast_forward")
def _(name, x, y, n):
    return {"y": list(x)}


# conv, pool


def convolution_taps(g):
    """Yield (image, oy, ox, ky, kx, iy, ix) for each place of a window inside of the image."""
    ranges = (range(g[s]) for s in ("n", "oh", "ow", "kh", "kw"))
    for i, oy, ox, ky, kx in itertools.product(*ranges):
        iy = oy * g["stride_y"] - g["pad_y"] + ky * g.get("dilation_y", 1)
        ix = ox * g["stride_x"] - g["pad_x"] + kx * g.get("dilation_x", 1)
        if 0 <= iy < g["h"] and 0 <= ix < g["w"]:
            yield i, oy, ox, ky, kx, iy, ix


@oracle("unfold", "fold")
def _(name, x, columns, **g):
    deep = g["c"] // g["groups"]
    to = columns if name == "unfold" else x
    to[...] = 0
    for i, oy, ox, ky, kx, iy, ix in convolution_taps(g):
        for channel in range(g["c"]):
            group, j = divmod(channel, deep)
            at = group, (i * g["oh"] + oy) * g["ow"] + ox, (ky * g["kw"] + kx) * deep + j
            if name == "unfold":
                columns[at] = x[i, iy, ix, channel]
            else:
                x[i, iy, ix, channel] += columns[at]
    return {"columns": columns} if name == "unfold" else {"x": x}


@oracle("depthwise_forward", "depthwise_backward", "depthwise_weight")
def _(name, x=None, weight=None, y=None, dy=None, dx=None, sums=None, parts=None, **g):
    outputs = {"depthwise_forward": ("y", y), "depthwise_backward": ("dx", dx), "depthwise_weight": ("sums", sums)}
    written, values = outputs[name]
    values[...] = 0
    for i, oy, ox, ky, kx, iy, ix in convolution_taps(g):
        for o in range(g["c"] * g["multiplier"]):
            channel = o // g["multiplier"]
            if name == "depthwise_forward":
                y[i, oy, ox, o] += x[i, iy, ix, channel] * weight[ky, kx, o]
            elif name == "depthwise_backward":
                dx[i, iy, ix, channel] += dy[i, oy, ox, o] * weight[ky, kx, o]
            else:
                part = part_of(i * g["oh"] + oy, g["n"] * g["oh"], parts)
                sums[part, ky, kx, o] += x[i, iy, ix, channel] * dy[i, oy, ox, o]
    return {written: values}


@oracle("maxpool_forward")
def _(name, x, y, index, **g):
    y[...] = -np.inf
    for i, oy, ox, ky, kx, iy, ix in convolution_taps(g):
        for channel in range(g["c"]):
            at = i, oy, ox, channel
            if x[i, iy, ix, channel] > y[at]:
                y[at], index[at] = x[i, iy, ix, channel], ky * g["kw"] + kx
    return {"y": y, "index": index}


@oracle("maxpool_backward")
def _(name, dy, index, dx, **g):
    dx[...] = 0
    for i, oy, ox, ky, kx, iy, ix in convolution_taps(g):
        for channel in range(g["c"]):
            if index[i, oy, ox, channel] == ky * g["kw"] + kx:
                dx[i, iy, ix, channel] += dy[i, oy, ox, channel]
    return {"dx": dx}


def window_size(oy, ox, g, include_pad):
    """Count the pixels, or the pixels and the padding, under a window."""
    count = 0
    for ky, kx in itertools.product(range(g["kh"]), range(g["kw"])):
        iy, ix = oy * g["stride_y"] - g["pad_y"] + ky, ox * g["stride_x"] - g["pad_x"] + kx
        by, bx = (g["pad_y"], g["pad_x"]) if include_pad else (0, 0)
        count += -by <= iy < g["h"] + by and -bx <= ix < g["w"] + bx
    return count


@oracle("avgpool_forward")
def _(name, x, y, include_pad, **g):
    y[...] = 0
    for i, oy, ox, _ky, _kx, iy, ix in convolution_taps(g):
        y[i, oy, ox] += x[i, iy, ix] / window_size(oy, ox, g, include_pad)
    return {"y": y}


@oracle("avgpool_backward")
def _(name, dy, dx, include_pad, **g):
    dx[...] = 0
    for i, oy, ox, _ky, _kx, iy, ix in convolution_taps(g):
        dx[i, iy, ix] += dy[i, oy, ox] / window_size(oy, ox, g, include_pad)
    return {"dx": dx}


@oracle("global_average_forward")
def _(name, x, y, n, pixels, c):
    return {"y": [[math.fsum(x[i, :, j]) / pixels for j in range(c)] for i in range(n)]}


@oracle("global_average_backward")
def _(name, dy, dx, n, pixels, c):
    return {"dx": [[[dy[i, j] / pixels for j in range(c)] for _ in range(pixels)] for i in range(n)]}


# batchnorm


@oracle("batchnorm_moments")
def _(name, x, moments, rows, c, parts):
    moments[:] = 0
    for p in range(parts):
        mine = [r for r in range(rows) if part_of(r, rows, parts) == p]
        for j in range(c if mine else 0):
            mean = math.fsum(x[mine, j]) / len(mine)
            moments[p, :, j] = len(mine), mean, math.fsum((x[r, j] - mean) ** 2 for r in mine)
    return {"moments": moments}


@oracle("batchnorm_combine")
def _(name, moments, total, parts, c):
    """By raw moments: in double their cancellation does no harm."""
    for j in range(c):
        count, mean, m2 = moments[:, :, j].T
        n = math.fsum(count)
        average = math.fsum(count * mean) / n
        total[:, j] = n, average, math.fsum(m2 + count * mean * mean) - n * average**2
    return {"total": total}


@oracle("batchnorm_statistics")
def _(name, total, mean, inverse, batch_mean, batch_variance, eps, accumulate, c):
    for j in range(c):
        count, mean[j], m2 = total[:, j]
        inverse[j] = (m2 / count + eps) ** -0.5
        unbiased = m2 / (count - 1) if count > 1 else m2
        batch_mean[j] = mean[j] + (batch_mean[j] if accumulate else 0)
        batch_variance[j] = unbiased + (batch_variance[j] if accumulate else 0)
    return {"mean": mean, "inverse": inverse, "batch_mean": batch_mean, "batch_variance": batch_variance}


@oracle("batchnorm_inverse")
def _(name, variance, inverse, eps, c):
    return {"inverse": [(v + eps) ** -0.5 for v in variance]}


@oracle("batchnorm_forward")
def _(name, x, mean, inverse, gamma, beta, y, rows, c):
    for r, j in itertools.product(range(rows), range(c)):
        y[r, j] = gamma[j] * ((x[r, j] - mean[j]) * inverse[j]) + beta[j]
    return {"y": y}


@oracle("batchnorm_relu_forward", "batchnorm_add_relu_forward")
def _(name, x, mean, inverse, gamma, beta, y, rows, c, residual=None):
    for r, j in itertools.product(range(rows), range(c)):
        v = gamma[j] * ((x[r, j] - mean[j]) * inverse[j]) + beta[j]
        y[r, j] = FORWARD["relu"](v if residual is None else v + residual[r, j])
    return {"y": y}


@oracle("batchnorm_backward_sums", "batchnorm_relu_backward_sums")
def _(name, dy, x, mean, inverse, sums, rows, c, parts, gamma=None, beta=None):
    sums[:] = 0
    for r, j in itertools.product(range(rows), range(c)):
        part, xhat = sums[part_of(r, rows, parts)], (x[r, j] - mean[j]) * inverse[j]
        if gamma is None or gamma[j] * xhat + beta[j] > 0:
            part[:, j] += dy[r, j], dy[r, j] * xhat
    return {"sums": sums}


@oracle("batchnorm_gradient")
def _(name, sums, dgamma, dbeta, accumulate, c):
    before = accumulate and 1
    dbeta, dgamma = (np.nan_to_num(v) * before for v in (dbeta, dgamma))
    return {
        "dbeta": [dbeta[j] + sums[0, j] for j in range(c)],
        "dgamma": [dgamma[j] + sums[1, j] for j in range(c)],
    }


@oracle("batchnorm_backward", "batchnorm_relu_backward")
def _(name, dy, x, mean, inverse, gamma, sums, dx, total, rows, c, beta=None):
    for r, j in itertools.product(range(rows), range(c)):
        xhat = (x[r, j] - mean[j]) * inverse[j]
        d = dy[r, j] if beta is None or gamma[j] * xhat + beta[j] > 0 else 0
        dx[r, j] = gamma[j] * inverse[j] / total * (total * d - sums[0, j] - xhat * sums[1, j])
    return {"dx": dx}


# local response normalisation


def neighbours(index, shape, axes, reach):
    """The places within `reach` of one, along these axes, that there are."""
    for step in itertools.product(range(-reach, reach + 1), repeat=len(axes)):
        place = list(index)
        for axis, distance in zip(axes, step, strict=True):
            place[axis] += distance
        if all(0 <= p < s for p, s in zip(place, shape, strict=True)):
            yield tuple(place)


@oracle("lrn_across_forward", "lrn_within_forward")
def _(name, x, y, scale, share, beta, k, size, **_):
    axes = (1,) if "across" in name else (1, 2)
    for i in np.ndindex(x.shape):
        scale[i] = k + share * math.fsum(x[j] ** 2 for j in neighbours(i, x.shape, axes, size // 2))
        y[i] = x[i] / scale[i] ** beta
    return {"y": y, "scale": scale}


@oracle("lrn_across_backward", "lrn_within_backward")
def _(name, dy, x, y, scale, dx, share, beta, size, **_):
    """Scattered: each dy to its own x, and through the scale to all around it."""
    axes = (1,) if "across" in name else (1, 2)
    dx[...] = 0
    for i in np.ndindex(x.shape):
        dx[i] += dy[i] / scale[i] ** beta
        for j in neighbours(i, x.shape, axes, size // 2):
            dx[j] -= dy[i] * beta * y[i] / scale[i] * share * 2 * x[j]
    return {"dx": dx}


# dropout, order, augment


@oracle("dropout_apply")
def _(name, x, y, state, seed, site, threshold, scale, first, n):
    for i in range(n):
        block, lane = divmod(first + i, 16)
        word = int(random.philox(seed, site, int(state["batch"]), block, 1)[lane // 4])
        y[i] = x[i] * scale if word >> 16 * (lane % 4) & 0xFFFF >= threshold else 0
    return {"y": y}


@oracle("order_draw")
def _(name, order, state, seed, n):
    return {"order": random.permutation(seed, int(state["epoch"]), n)}  # which test_random holds to integers


@oracle("order_replacement")
def _(name, order, state, seed, n):
    return {"order": [words(seed, 0x73616D70, int(state["epoch"]), i // 4)[i % 4] * n >> 64 for i in range(n)]}


@oracle("order_balanced")
def _(name, members, starts, order, state, seed, n, k):
    epoch, found = int(state["epoch"]), []
    for i in range(n):
        turn, c = divmod(feistel(i, seed, epoch, n), k)
        c = (c + epoch * (n % k)) % k
        own = members[starts[c] : starts[c + 1]]
        found.append(own[feistel(turn % len(own), seed, epoch, len(own), 0x73616D70, 2 * c)])
    return {"order": found}


@oracle("order_stored")
def _(name, order, n):
    return {"order": list(range(n))}


def batch_places(state, batch, batches, first, places, n):
    """Yield (i, place in the epoch) of the images that there are."""
    for i in range(n):
        place = (int(state["batch"]) - int(state["epoch"]) * batches) * batch + first + i
        if place < places:
            yield i, place


def mirrored(i, size):
    while not 0 <= i < size:
        i = -i if i < 0 else 2 * (size - 1) - i
    return i


@oracle("batch_crop_flip")
def _(
    name, images, order, state, mean, scale, x, seed, flip, pad, reflect, batch, batches, first, places, set, channels,
    n, h, w, c, oh, ow,
):  # fmt: skip
    """Pad and normalise the whole image, cut the crop out of it, turn it."""
    x[:] = 0
    one_mean = channels == c
    mean, scale = (
        np.broadcast_to(v.reshape(1, 1, c) if one_mean else v.reshape(h, w, c), (h, w, c)) for v in (mean, scale)
    )
    for i, place in batch_places(state, batch, batches, first, places, n):
        image = images[order[place]].astype(np.float64)
        padded = np.zeros((h + 2 * pad, w + 2 * pad, c))
        for py, px, ch in itertools.product(range(h + 2 * pad), range(w + 2 * pad), range(c)):
            iy, ix = py - pad, px - pad
            if reflect:
                iy, ix = mirrored(iy, h), mirrored(ix, w)
            if 0 <= iy < h and 0 <= ix < w:
                padded[py, px, ch] = (image[iy, ix, ch] - mean[iy, ix, ch]) * scale[iy, ix, ch]
            elif one_mean:
                padded[py, px, ch] = -mean[0, 0, ch] * scale[0, 0, ch]
        words = [int(word) for word in random.philox(seed, random.AUGMENT_SITE, int(state["epoch"]), place, 1)]
        top, left = ((word >> 32) * (2 * pad + 1) >> 32 for word in words[:2])
        crop = padded[top : top + oh, left : left + ow]
        if flip == 2:
            words[2] = int(random.philox(seed, random.AUGMENT_SITE + 1, 0, int(order[place]), 1)[0])
            words[2] ^= int(state["epoch"]) % 2 << 63
        x[i] = crop[:, ::-1] if flip and words[2] >> 63 else crop
    return {"x": x}


for _name in ("transforms_draw", "batch_warp", "batch_finish", "batch_targets_mixed"):
    oracle(_name)(getattr(augment_oracles, _name))


@oracle("batch_targets")
def _(name, labels, order, state, targets, smoothing, batch, batches, first, places, set, n, k):
    targets[:] = np.nan
    for i, place in batch_places(state, batch, batches, first, places, n):
        targets[i] = smoothing / k
        targets[i, labels[order[place]]] += 1 - smoothing
    return {"targets": targets}


@oracle("batch_values")
def _(name, values, order, state, targets, batch, batches, first, places, set, n, k):
    targets[:] = np.nan
    for i, place in batch_places(state, batch, batches, first, places, n):
        targets[i] = values[order[place]]
    return {"targets": targets}


# loss


@oracle("softmax_cross_entropy")
def _(name, logits, targets, dlogits, losses, hits, state, n, k):
    dlogits[:], losses[:], hits[:] = 0, 0, -1
    for i in range(n):
        z, t = logits[i].tolist(), targets[i].tolist()
        if any(t):
            total = math.fsum(math.exp(v - max(z)) for v in z)
            losses[i] = math.fsum(t[j] * (max(z) + math.log(total) - z[j]) for j in range(k))
            hits[i] = z.index(max(z)) == t.index(max(t))
            for j in range(k):
                dlogits[i, j] = (math.exp(z[j] - max(z)) / total * math.fsum(t) - t[j]) * state["loss_scale"]
    return {"dlogits": dlogits, "losses": losses, "hits": hits}


@oracle("mean_squared_error")
def _(name, prediction, targets, dprediction, losses, hits, state, n, k):
    dprediction[:], losses[:], hits[:] = 0, 0, -1
    for i in range(n):
        p, t = prediction[i].tolist(), targets[i].tolist()
        if not all(math.isnan(v) for v in t):
            losses[i] = math.fsum((p[j] - t[j]) ** 2 for j in range(k)) / k
            largest = next((j for j, v in enumerate(t) if math.isnan(v)), t.index(max(t)))  # a NaN counts as one
            hits[i] = k > 1 and p.index(max(p)) == largest
            dprediction[i] = [2 * (p[j] - t[j]) / k * state["loss_scale"] for j in range(k)]
    return {"dprediction": dprediction, "losses": losses, "hits": hits}


@oracle("sigmoid_cross_entropy")
def _(name, logits, targets, dlogits, losses, hits, state, positive, negative, gamma, n, k):
    dlogits[:], losses[:], hits[:] = 0, 0, -1
    for i in range(n):
        z, t = logits[i].tolist(), targets[i].tolist()
        if all(math.isnan(v) for v in t):
            continue
        terms = []
        for j in range(k):
            p, q = sigmoid(z[j]), sigmoid(-z[j])
            terms += [-positive * t[j] * q**gamma * math.log(p), -negative * (1 - t[j]) * p**gamma * math.log(q)]
            here = positive * t[j] * q**gamma * (gamma * p * math.log(p) - q)
            away = negative * (1 - t[j]) * p**gamma * (p - gamma * q * math.log(q))
            dlogits[i, j] = (here + away) * state["loss_scale"]
        losses[i] = math.fsum(terms)
        if any(math.isnan(v) for v in t):
            hits[i] = 0
        elif not any(t):
            hits[i] = all(v <= 0 for v in z)
        else:
            hits[i] = (z[0] > 0) == (t[0] > 0.5) if k == 1 else t[z.index(max(z))] == max(t)
    return {"dlogits": dlogits, "losses": losses, "hits": hits}


@oracle("multiclass_hinge")
def _(name, scores, targets, dscores, losses, hits, state, margin, squared, single, n, k):
    dscores[:], losses[:], hits[:] = 0, 0, -1
    for i in range(n):
        z, t = scores[i].tolist(), targets[i].tolist()
        if t[0] != t[0] or not any(t):
            continue
        y = t.index(max(t))
        hits[i] = z.index(max(z)) == y
        others = [j for j in range(k) if j != y]
        if single:
            others = sorted(others, key=lambda j: -z[j])[:1]  # stable: of equal ones the first
        for j in others:
            short = z[j] - z[y] + margin
            if short > 0:
                losses[i] += short**2 if squared else short
                slope = (2 * short if squared else 1) * state["loss_scale"]
                dscores[i, j] += slope
                dscores[i, y] -= slope
    return {"dscores": dscores, "losses": losses, "hits": hits}


@oracle("metrics_sum")
def _(name, losses, hits, sums, accumulate, n):
    hits = hits.tolist()
    new = math.fsum(losses), hits.count(1), hits.count(0) + hits.count(1), 1
    return {"sums": [b + a if accumulate else a for a, b in zip(new, sums, strict=True)]}


# optim


@oracle("gradient_norm")
def _(name, g, norms, n, parts):
    norms[:] = 0
    for i in range(n):
        norms[part_of(i, n, parts)] += g[i] * g[i]
    return {"norms": norms}


@oracle("gradient_finish")
def _(name, norms, penalties, sums, rates, table, state, clip, dynamic, parts, terms, steps, rows):
    loss_sum, hits, count, _ = sums.tolist()
    scale, batch, update = float(state["loss_scale"]), int(state["batch"]), int(state["update"])
    norm = math.sqrt(sum(norms.tolist())) / count / scale
    halted = state["halt"] != -1
    finite = math.isfinite(norm) and math.isfinite(loss_sum) and not halted
    state["count"] = count
    if finite:
        state["apply"] = 1
        state["gradient_scale"] = 1 / count / scale
        if clip and norm > clip:
            state["gradient_scale"] = clip / norm / count / scale
        state["good"] += 1
        if dynamic and state["good"] == 2000:
            state["loss_scale"] = 2 * scale
            state["good"] = 0
    else:
        state["apply"] = 0
        state["good"] = 0
        if dynamic and scale > 1 and not halted:
            state["loss_scale"] = max(scale / 2, 1)
        elif not halted:
            state["halt"] = batch
    rate = rates[min(update, steps - 1)] * state["lr_scale"][0]
    table[update % rows] = (
        loss_sum / count, hits / count, count, norm, rate, state["gradient_scale"], math.fsum(penalties),
        float(finite) if state["halt"] == -1 else -1, batch, update + 1,
    )  # fmt: skip
    return {"table": table, "state": state}


@oracle("sgd_update")
def _(
    name, w, g, velocity, table, rate, decay, group, rates, state, momentum, nesterov, caffe, decoupled, rows, steps, n
):
    for i in range(n if state["apply"] else 0):
        row = table[i // 256]
        lr = rates[min(int(state["update"]), steps - 1)] * state["lr_scale"][group[row]] * rate[row]
        d = g[i] * state["gradient_scale"] + (0 if decoupled else decay[row] * w[i])
        w[i] -= lr * decay[row] * w[i] if decoupled else 0
        old = velocity[i]
        if caffe:  # as Caffe's solver: the history holds whole steps
            velocity[i] = momentum * old + lr * d
            w[i] -= velocity[i] + momentum * (velocity[i] - old) if nesterov else velocity[i]
        else:
            velocity[i] = momentum * old + d
            w[i] -= lr * (d + momentum * velocity[i]) if nesterov else lr * velocity[i]
    return {"w": w, "velocity": velocity}


@oracle("statistics_update")
def _(name, running, batch, table, momentum, sums, state, rows, n):
    for i in range(n if state["apply"] else 0):
        m = momentum[table[i // 256]]
        running[i] = (1 - m) * running[i] + m * batch[i] / sums[3]
    return {"running": running}


@oracle("state_update")
def _(name, state):
    if state["apply"]:
        state["update"] += 1
    return {"state": state}


@oracle("state_advance")
def _(name, state, batches):
    batch = int(state["batch"]) + 1
    state["batch"], state["epoch"] = batch, batch // batches
    return {"state": state}


# Mathematics: derivatives and adjoints in double


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def slope(f, x, h=1e-6):
    """df/dx of a function of an array, all entries by central differences."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = h
        gradient[i] = (f(x + step) - f(x - step)) / (2 * h)
    return gradient


@pytest.mark.parametrize("op", ["relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu"])
def test_activation_backward_is_the_derivative(op, rng):
    x = rng.normal(0, 2, 40)
    extra = (0.1,) if op == "leaky_relu" else ()

    def forward(v):
        y = np.empty_like(v)
        TWINS[f"{op}_forward"](v, y, *extra, v.size)
        return y

    dy, dx = rng.normal(size=40), np.empty(40)
    TWINS[f"{op}_backward"](dy, x if op in ("gelu", "silu") else forward(x), dx, *extra, 40)
    numeric = (forward(x + 1e-6) - forward(x - 1e-6)) / 2e-6
    assert np.allclose(dx, dy * numeric, atol=1e-8)


def test_in_place(rng):
    """Elementwise outputs may lie over an input."""
    over = {"relu_forward": ("y", "x"), "tanh_backward": ("dx", "dy"), "gelu_backward": ("dx", "x")}
    over |= {"add_forward": ("y", "b"), "dropout_apply": ("y", "x"), "batchnorm_forward": ("y", "x")}
    over |= {"batchnorm_relu_forward": ("y", "x"), "batchnorm_add_relu_forward": ("y", "residual")}
    over |= {"batchnorm_relu_backward": ("dx", "x")}
    over |= {"batchnorm_backward": ("dx", "dy"), "softmax_cross_entropy": ("dlogits", "logits")}
    for name, (output, under) in over.items():
        arguments = CASES[name](rng, 3, np.dtype("f8"), np.dtype("f8"))
        aliased = copied(arguments)
        aliased[output] = aliased[under]
        TWINS[name](**arguments)
        TWINS[name](**aliased)
        assert np.array_equal(aliased[under], arguments[output]), name


@pytest.mark.parametrize("size", range(SIZES))
@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        ("unfold", "fold"),
        ("avgpool_forward", "avgpool_backward"),
        ("global_average_forward", "global_average_backward"),
        ("concat_forward", "concat_backward"),
    ],
)
def test_linear_backward_is_the_adjoint(forward, backward, size, rng):
    """<A x, y> = <x, A^T y> for any x and y."""
    a, b = (CASES[name](rng, size, np.dtype("f8"), np.dtype("f8")) for name in (forward, backward))
    (x, ax), (y, aty) = list(a.values())[:2], list(b.values())[:2]
    ax[:] = 0  # concat leaves other columns alone
    TWINS[forward](**a)
    TWINS[backward](**b)
    assert (ax * y).sum() == pytest.approx((x * aty).sum(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("size", range(SIZES))
def test_unfold_makes_a_convolution(size, rng):
    """columns[g] @ W[..., outputs of g] is the convolution with W (kh, kw, c/groups, outputs)."""
    g = CASES["unfold"](rng, size, np.dtype("f8"), np.dtype("f8"))
    conv.unfold(**g)
    groups, deep, outputs = g["groups"], g["c"] // g["groups"], 2 * g["groups"]
    weight = rng.normal(size=(g["kh"], g["kw"], deep, outputs))
    matrix = weight.reshape(-1, groups, 2).swapaxes(0, 1)
    y = (g["columns"] @ matrix).transpose(1, 0, 2).reshape(g["n"], g["oh"], g["ow"], outputs)
    expected = np.zeros_like(y)
    for i, oy, ox, ky, kx, iy, ix in convolution_taps(g):
        for o in range(outputs):
            inputs = g["x"][i, iy, ix, o // 2 * deep :][:deep]
            expected[i, oy, ox, o] += (inputs * weight[ky, kx, :, o]).sum()
    assert np.allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_maxpool_backward_is_the_derivative(rng):
    g = CASES["maxpool_forward"](rng, 3, np.dtype("f8"), np.dtype("f8"))
    shape, sizes = g["y"].shape, {k: v for k, v in g.items() if isinstance(v, int)}
    x, dy = rng.permutation(g["x"].size).reshape(g["x"].shape) * 1.0, rng.normal(size=shape)
    index = np.empty(shape, np.uint8)

    def weighted(v):
        y = np.empty(shape)
        pool.maxpool_forward(v, y, index, **sizes)
        return (y * dy).sum()

    expected = slope(weighted, x, 0.25)
    weighted(x)
    dx = np.empty_like(x)
    pool.maxpool_backward(dy, index, dx, **sizes)
    assert np.allclose(dx, expected, atol=1e-9)


def test_maxpool_lets_nan_win():
    x = np.array([[1, np.nan], [np.nan, -np.inf]]).reshape(1, 2, 2, 1)
    y, index = np.zeros((1, 3, 3, 1)), np.zeros((1, 3, 3, 1), np.uint8)
    pool.maxpool_forward(x, y, index, 1, 2, 2, 1, 3, 3, 2, 2, 1, 1, 1, 1)
    assert np.isnan(y.ravel()).tolist() == [False, True, True, True, True, True, True, True, False]
    assert index.ravel().tolist() == [3, 3, 2, 3, 1, 0, 1, 0, 0]
    assert y[0, 2, 2, 0] == -np.inf


def normalise(op, x, gamma, beta, eps, parts):
    """y, and what backward needs, of two replicas that hold half of the rows each."""
    rows, c = x.shape
    halves = x[: rows // 3], x[rows // 3 :]
    moments = np.empty((2, parts, 3, c))
    for half, part in zip(halves, moments, strict=True):
        batchnorm.batchnorm_moments(half, part, len(half), c, parts)
    total, mean, inverse, batch_mean, batch_variance = np.empty((3, c)), *np.empty((4, c))
    batchnorm.batchnorm_combine(moments, total, 2 * parts, c)
    batchnorm.batchnorm_statistics(total, mean, inverse, batch_mean, batch_variance, eps, 0, c)
    y = np.empty_like(x)
    TWINS[f"{op}_forward"](x, mean, inverse, gamma, beta, y, rows, c)
    return y, halves, mean, inverse, batch_mean, batch_variance


@pytest.mark.parametrize("op", ["batchnorm", "batchnorm_relu"])
@pytest.mark.parametrize("parts", [1, 3])
def test_batchnorm_over_replicas(parts, op, rng):
    """Forward normalises the whole batch; backward is the derivative by x, gamma and beta."""
    rows, c, eps = 7, 3, 1e-3
    x, dy = rng.normal(2, 3, (rows, c)), rng.normal(size=(rows, c))
    gamma, beta = rng.normal(size=(2, c))
    y, halves, mean, inverse, batch_mean, batch_variance = normalise(op, x, gamma, beta, eps, parts)
    z = (x - x.mean(0)) / np.sqrt(x.var(0) + eps) * gamma + beta
    assert np.abs(z).min() > 1e-3 and z.min() < 0  # no kink within reach, and some elements below it
    assert np.allclose(y, np.maximum(z, 0) if op == "batchnorm_relu" else z, rtol=1e-12)
    assert np.allclose(batch_mean, x.mean(0), rtol=1e-12)
    assert np.allclose(batch_variance, x.var(0, ddof=1), rtol=1e-12)

    sums = np.empty((2, parts, 2, c))
    known = (gamma, beta) if op == "batchnorm_relu" else ()
    for half, d, part in zip(halves, (dy[: rows // 3], dy[rows // 3 :]), sums, strict=True):
        TWINS[f"{op}_backward_sums"](d, half, mean, inverse, *known, part, len(half), c, parts)
    whole, dx, dgamma, dbeta = np.empty((2, c)), np.empty_like(x), np.empty(c), np.empty(c)
    elementwise.sum_parts(sums, whole, 0, 2 * parts, 2 * c)
    batchnorm.batchnorm_gradient(whole, dgamma, dbeta, 0, c)
    TWINS[f"{op}_backward"](dy, x, mean, inverse, *(known or [gamma]), whole, dx, rows, rows, c)

    def loss(x, gamma, beta):
        return (normalise(op, x, gamma, beta, eps, parts)[0] * dy).sum()

    assert np.allclose(dx, slope(lambda v: loss(v, gamma, beta), x), atol=1e-8)
    assert np.allclose(dgamma, slope(lambda v: loss(x, v, beta), gamma), atol=1e-8)
    assert np.allclose(dbeta, slope(lambda v: loss(x, gamma, v), beta), atol=1e-8)


def test_moments_do_not_cancel(rng):
    """A mean of 1e4 and a deviation of 0.1 in float32: squares minus squared means would leave nothing."""
    x = (1e4 + rng.normal(0, 0.1, (999, 2))).astype(np.float32)
    moments, total = np.empty((3, 3, 2), np.float32), np.empty((3, 2), np.float32)
    batchnorm.batchnorm_moments(x, moments, 999, 2, 3)
    batchnorm.batchnorm_combine(moments, total, 3, 2)
    assert np.allclose(total[2], x.astype(np.float64).var(0) * 999, rtol=1e-3)


@pytest.mark.parametrize("name", ["softmax_cross_entropy", "mean_squared_error"])
@pytest.mark.parametrize("size", [0, 2, 3, 4])
def test_loss_gradient_is_the_derivative(name, size):
    arguments = CASES[name](np.random.default_rng(5), size, np.dtype("f8"), np.dtype("f8"))
    n, k = arguments["n"], arguments["k"]
    x, targets = (a[:7] for a in list(arguments.values())[:2])
    n = len(x)
    targets[5:6] = 0 if name == "softmax_cross_entropy" else np.nan  # a row of padding

    def total(v):
        gradient, losses, hits = np.empty((n, k)), np.empty(n), np.empty(n, np.int32)
        TWINS[name](v, targets, gradient, losses, hits, state(loss_scale=4), n, k)
        return losses.sum(), gradient

    assert np.allclose(total(x)[1], 4 * slope(lambda v: total(v)[0], x), atol=1e-7)


def test_the_softmax_of_large_logits():
    logits = np.array([[1e4, 0, -1e4], [-np.inf, 0, 0], [np.inf, 0, 0]], np.float32)
    targets = np.array([[1, 0, 0], [0, 0.5, 0.5], [1, 0, 0]], np.float32)
    gradient, losses, hits = np.empty_like(logits), np.empty(3, np.float32), np.empty(3, np.int32)
    loss.softmax_cross_entropy(logits, targets, gradient, losses, hits, new_state(), 3, 3)
    assert losses[:2].tolist() == pytest.approx([0, math.log(2)])
    assert np.isnan(losses[2])  # diverged: seen, not hidden
    assert hits.tolist() == [1, 1, 1]


def test_dropout_keeps_its_share_and_its_sum():
    n, rate = 1 << 18, 0.3
    x, y, threshold = np.ones(n, np.float32), np.empty(n, np.float32), round(rate * 65536)
    dropout.dropout_apply(x, y, new_state(), 1, 2, threshold, 1 / (1 - rate), 0, n)
    kept = y != 0
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / n)
    again = np.empty(n // 2, np.float32)
    dropout.dropout_apply(x[: n // 2], again, new_state(), 1, 2, threshold, 1 / (1 - rate), n // 4, n // 2)
    assert np.array_equal(again, y[n // 4 : n // 4 + n // 2])  # a replica's range
    other = np.empty(n, np.float32)
    dropout.dropout_apply(x, other, state(batch=1), 1, 2, threshold, 1 / (1 - rate), 0, n)
    assert 0.3 < (other != y).mean() < 0.6  # 2 * 0.3 * 0.7 differ between batches


def test_both_forms_of_sgd_agree_while_the_rate_stays():
    """Caffe's velocity is lr times PyTorch's, so at one rate both walk the same way; after a change they part."""

    def walk(caffe, nesterov, lr):
        w, velocity = np.full(256, 2.0), np.zeros(256)
        one = np.ones(1)
        for update, g in enumerate(np.linspace(-1, 1, 7)):
            now = state(update=update, apply=1)
            optim.sgd_update(
                w, np.full(256, g), velocity, np.zeros(1, np.int32), one, one / 10, np.zeros(1, np.int32),
                np.array(lr), now, 0.9, nesterov, caffe, 0, 1, len(lr), 256,
            )  # fmt: skip
        return w[0]

    for nesterov in (0, 1):
        assert walk(0, nesterov, [0.1]) == pytest.approx(walk(1, nesterov, [0.1]), rel=1e-12)
        assert abs(walk(0, nesterov, [0.1, 0.1, 0.01]) - walk(1, nesterov, [0.1, 0.1, 0.01])) > 1e-2


def test_a_gradient_of_nothing_is_not_finite():
    """A count of 0 divides to NaN: no update, no warning."""
    now, table, none = new_state(), np.zeros((1, 10)), np.zeros(0)
    optim.gradient_finish(np.zeros(1), none, np.zeros(4), np.ones(1), table, now, 1.0, 0, 1, 0, 1, 1)
    assert (now["apply"], now["halt"], now["update"]) == (0, 0, 0)
    now["apply"], now["halt"] = 1, -1
    optim.gradient_finish(np.zeros(1), none, np.array([3, 1, 2, 1.0]), np.ones(1), table, now, 1.0, 0, 1, 0, 1, 1)
    assert (now["apply"], now["gradient_scale"]) == (1, 0.5)  # and a norm of 0 is not clipped


def test_an_epoch_sees_every_image_once():
    """Over all batches and two replicas, the tail included, the labels are those of the set."""
    count, batch, batches = 23, 5, 5
    visits, now = [], new_state()
    values, visited = np.arange(count, dtype=np.float64), np.empty((batch, 1))
    places = np.empty(count, np.int32)
    order.order_draw(places, now, 3, count)
    for _ in range(batches):
        for first, n in ((0, 2), (2, 3)):
            augment.batch_values(values, places, now, visited[:n], batch, batches, first, count, count, n, 1)
            visits += visited[:n, 0].tolist()
        optim.state_advance(now, batches)
    assert sorted(visits[:count]) == values.tolist()
    assert np.isnan(visits[count:]).all()
    assert (now["batch"], now["epoch"]) == (5, 1)


# erf and the tolerance itself


def test_erf():
    x = np.concatenate([np.linspace(-7, 7, 20001), np.geomspace(1e-300, 1, 500), [0.0, 1.5, np.inf, -np.inf]])
    expected = np.array([math.erf(v) for v in x])
    assert (np.abs(erf(x) - expected) <= 1e-15 * np.abs(expected)).all()
    single = erf(x.astype(np.float32))
    assert single.dtype == np.float32
    assert np.allclose(single, [math.erf(v) for v in x.astype(np.float32)], rtol=1e-7)
    assert np.isnan(erf(np.array([np.nan])))[0]
    assert math.copysign(1, erf(np.array([-0.0]))[0]) == -1


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_tolerance_tells_apart(dtype):
    expected = np.array([0, 1, -100, np.nan, np.inf])
    assert_close("x", expected * (1 + TOLERANCE[dtype] / 2), expected, dtype)
    for i, value in (
        (0, 1.1 * TOLERANCE[dtype]),
        (2, -100 - 110 * TOLERANCE[dtype]),
        (3, 0),
        (4, -np.inf),
        (1, np.nan),
    ):
        got = expected.copy()
        got[i] = value
        with pytest.raises(AssertionError, match=rf"x: 1 of 5 elements differ, the first at \({i},\)"):
            assert_close("x", got, expected, dtype)


def test_the_tolerance_of_integers_shapes_and_records():
    assert_close("n", np.arange(3), np.arange(3), "float32")
    for got, expected in (
        (np.arange(3), np.arange(3) + 1),
        (np.zeros(3), np.zeros((3, 1))),
        (new_state(), state(good=1)),
        (new_state(), state(lr_scale=1 + 1e-11)),
    ):
        with pytest.raises(AssertionError):
            assert_close("n", got, expected, "float32")
