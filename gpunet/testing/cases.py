"""Arguments to try every kernel with: sizes, odd ones first, flags, tails; never expected values.

CASES[kernel](rng, size_index, real, wide) returns the kernel's arguments by name and in order, for size_index
0 .. SIZES-1: arrays in the shape a definition expects, ints, floats. Values are of order one. Arrays that a
kernel overwrites come full of NaN (or of another impossible value), so that what it leaves out shows.
"""

import numpy as np

from gpunet.backends.numpy.transforms import transforms_draw
from gpunet.core.augmentation import COLOR, GEOMETRY, Augmentation
from gpunet.core.random import lanes
from gpunet.core.state import new_state

SIZES = 8
CASES = {}


def case(*kernels):
    """Enter a function(rng, size_index, real, wide) for these kernels."""

    def enter(function):
        CASES.update(dict.fromkeys(kernels, function))
        return function

    return enter


def random(rng, shape, dtype, scale=1.0):
    """Normal values of this deviation; one in seven is 0, for ties and kinks."""
    return (rng.normal(0, scale, shape) * (rng.random(shape) > 1 / 7)).astype(dtype)


def positive(rng, shape, dtype):
    """Values in 0.5 .. 2."""
    return rng.uniform(0.5, 2, shape).astype(dtype)


def blank(shape, dtype):
    """An array to be overwritten: NaN, or 99."""
    return np.full(shape, np.nan if np.dtype(dtype).kind not in "iu" else 99, dtype)


def total(rng, shape, dtype, accumulate):
    """An array to be added to, or to be overwritten."""
    return random(rng, shape, dtype) if accumulate else blank(shape, dtype)


def state(**fields):
    """The first state, with these fields changed."""
    changed = new_state()
    for name, value in fields.items():
        changed[name] = value
    return changed


# activation, elementwise

COUNTS = [1, 31, 256, 257, 1009, 4099, 3, 64]
MATRICES = [(1, 1), (31, 3), (256, 5), (257, 31), (2, 7), (1009, 4), (64, 33), (100, 130)]  # rows, c
PARTS = [1, 3, 3, 1, 3, 3, 1, 3]  # with two rows in three parts, one is empty


@case("relu_forward", "sigmoid_forward", "tanh_forward", "gelu_forward", "silu_forward")
def _forward(rng, size, real, wide):
    n = COUNTS[size]
    x = random(rng, n, real, 3)
    if size == 4:
        x[:5] = np.nan, 100, -100, 20, -20
    return {"x": x, "y": blank(n, real), "n": n}


@case("relu_backward", "sigmoid_backward", "tanh_backward")
def _backward_from_y(rng, size, real, wide):
    n = COUNTS[size]
    return {"dy": random(rng, n, real), "y": random(rng, n, real), "dx": blank(n, real), "n": n}


@case("gelu_backward", "silu_backward")
def _backward_from_x(rng, size, real, wide):
    n = COUNTS[size]
    return {"dy": random(rng, n, real), "x": random(rng, n, real, 3), "dx": blank(n, real), "n": n}


@case("leaky_relu_forward")
def _leaky_relu_forward(rng, size, real, wide):
    n = COUNTS[size]
    return {"x": random(rng, n, real), "y": blank(n, real), "slope": [0.0, 0.01, 0.3][size % 3], "n": n}


@case("leaky_relu_backward")
def _leaky_relu_backward(rng, size, real, wide):
    n = COUNTS[size]
    arrays = {"dy": random(rng, n, real), "y": random(rng, n, real), "dx": blank(n, real)}
    return {**arrays, "slope": [0.0, 0.01, 0.3][size % 3], "n": n}


@case("add_forward")
def _add_forward(rng, size, real, wide):
    n = COUNTS[size]
    return {"a": random(rng, n, real), "b": random(rng, n, real), "y": blank(n, real), "n": n}


@case("scale_forward")
def _scale_forward(rng, size, real, wide):
    n = COUNTS[size]
    return {"x": random(rng, n, real), "y": blank(n, real), "factor": [1 / 9, -3.0, 1.0][size % 3], "n": n}


@case("concat_forward")
def _concat_forward(rng, size, real, wide):
    rows, c = MATRICES[size]
    offset = [0, 1, 4, 16][size % 4]
    width = c + offset + size % 3
    arrays = {"x": random(rng, (rows, c), real), "y": random(rng, (rows, width), real)}
    return {**arrays, "rows": rows, "c": c, "width": width, "offset": offset}


@case("concat_backward")
def _concat_backward(rng, size, real, wide):
    rows, c = MATRICES[size]
    offset = [0, 1, 4, 16][size % 4]
    width = c + offset + size % 3
    arrays = {"dy": random(rng, (rows, width), real), "dx": blank((rows, c), real)}
    return {**arrays, "rows": rows, "c": c, "width": width, "offset": offset}


@case("bias_forward")
def _bias_forward(rng, size, real, wide):
    rows, c = MATRICES[size]
    return {"b": random(rng, c, wide), "y": random(rng, (rows, c), real), "rows": rows, "c": c}


@case("column_sum")
def _column_sum(rng, size, real, wide):
    (rows, c), parts = MATRICES[size], PARTS[size]
    return {
        "x": random(rng, (rows, c), real),
        "sums": blank((parts, c), wide),
        "rows": rows,
        "c": c,
        "parts": parts,
    }


@case("sum_parts")
def _sum_parts(rng, size, real, wide):
    n, parts, accumulate = COUNTS[size], [1, 3, 2, 31, 3, 5, 300, 1][size], size % 2
    arrays = {"x": random(rng, (parts, n), wide), "y": total(rng, n, wide, accumulate)}
    return {**arrays, "accumulate": accumulate, "parts": parts, "n": n}


@case("cast_forward")
def _cast_forward(rng, size, real, wide):
    n = COUNTS[size]
    x = random(rng, n, wide, 3)
    if size == 4:
        x[:5] = np.nan, np.inf, -np.inf, 60000, -60000
    return {"x": x, "y": blank(n, real), "n": n}


# conv, pool

WINDOW = ("n", "h", "w", "c", "oh", "ow", "kh", "kw", "stride_y", "stride_x", "pad_y", "pad_x")
CONVOLUTIONS = [  # n, h, w, c, kh, kw, strides, pads, dilations, groups
    (1, 1, 1, 1, 1, 1, (1, 1), (0, 0), (1, 1), 1),
    (2, 5, 7, 3, 3, 3, (1, 1), (1, 1), (1, 1), 1),
    (1, 8, 6, 4, 2, 3, (2, 1), (0, 1), (1, 1), 2),
    (3, 7, 7, 6, 3, 3, (2, 2), (1, 1), (1, 1), 6),
    (2, 9, 8, 10, 3, 2, (1, 2), (2, 1), (2, 3), 5),
    (1, 11, 5, 31, 5, 1, (3, 1), (2, 0), (1, 1), 1),
    (2, 5, 4, 8, 1, 1, (2, 2), (0, 0), (1, 1), 1),
    (1, 6, 3, 12, 4, 5, (1, 1), (3, 4), (1, 1), 3),
]


def _convolution(size):
    n, h, w, c, kh, kw, stride, pad, dilation, groups = CONVOLUTIONS[size]
    oh, ow = (
        (extent + 2 * p - d * (k - 1) - 1) // s + 1
        for extent, k, s, p, d in zip((h, w), (kh, kw), stride, pad, dilation, strict=True)
    )
    names = (*WINDOW, "dilation_y", "dilation_x", "groups")
    return dict(zip(names, (n, h, w, c, oh, ow, kh, kw, *stride, *pad, *dilation, groups), strict=True))


def _columns_shape(g):
    return g["groups"], g["n"] * g["oh"] * g["ow"], g["kh"] * g["kw"] * (g["c"] // g["groups"])


def _image_shape(g):
    return g["n"], g["h"], g["w"], g["c"]


@case("unfold")
def _unfold(rng, size, real, wide):
    g = _convolution(size)
    return {"x": random(rng, _image_shape(g), real), "columns": blank(_columns_shape(g), real), **g}


@case("fold")
def _fold(rng, size, real, wide):
    g = _convolution(size)
    return {"columns": random(rng, _columns_shape(g), real), "x": blank(_image_shape(g), real), **g}


# depthwise

MULTIPLIERS = [1, 1, 2, 1, 3, 1, 2, 4]


def _depthwise(size):
    g = _convolution(size)
    return {name: value for name, value in g.items() if name != "groups"} | {"multiplier": MULTIPLIERS[size]}


def _depthwise_shapes(g):
    """Return the shapes of x, y and the weight."""
    outputs = g["c"] * g["multiplier"]
    return _image_shape(g), (g["n"], g["oh"], g["ow"], outputs), (g["kh"], g["kw"], outputs)


@case("depthwise_forward")
def _depthwise_forward(rng, size, real, wide):
    g = _depthwise(size)
    x, y, weight = _depthwise_shapes(g)
    return {"x": random(rng, x, real), "weight": random(rng, weight, wide), "y": blank(y, real), **g}


@case("depthwise_backward")
def _depthwise_backward(rng, size, real, wide):
    g = _depthwise(size)
    x, y, weight = _depthwise_shapes(g)
    return {"dy": random(rng, y, real), "weight": random(rng, weight, wide), "dx": blank(x, real), **g}


@case("depthwise_weight")
def _depthwise_weight(rng, size, real, wide):
    g, parts = _depthwise(size), PARTS[size]
    x, y, weight = _depthwise_shapes(g)
    arrays = {"x": random(rng, x, real), "dy": random(rng, y, real), "sums": blank((parts, *weight), wide)}
    return {**arrays, **g, "parts": parts}


POOLINGS = [  # n, h, w, c, kh, kw, strides, pads, whether oh and ow round up, include_pad
    (1, 1, 1, 1, 1, 1, (1, 1), (0, 0), False, 0),
    (2, 6, 6, 5, 2, 2, (2, 2), (0, 0), False, 1),
    (2, 8, 6, 3, 3, 3, (2, 2), (0, 0), True, 1),
    (1, 8, 8, 4, 3, 3, (2, 2), (1, 1), True, 1),
    (1, 8, 8, 6, 3, 3, (2, 2), (1, 1), True, 0),
    (2, 10, 7, 8, 2, 3, (3, 2), (1, 1), True, 1),
    (1, 5, 9, 31, 5, 3, (1, 2), (2, 1), False, 0),
    (3, 4, 13, 1, 4, 2, (4, 3), (0, 1), False, 1),
]


def _pooled(extent, k, stride, pad, up):
    """Windows along an axis; rounding up, the last one must still begin in the image or its left padding."""
    out = (extent + 2 * pad - k + (stride - 1) * up) // stride + 1
    return out - ((out - 1) * stride >= extent + pad)


def _pooling(size):
    n, h, w, c, kh, kw, stride, pad, up, _ = POOLINGS[size]
    oh, ow = _pooled(h, kh, stride[0], pad[0], up), _pooled(w, kw, stride[1], pad[1], up)
    return dict(zip(WINDOW, (n, h, w, c, oh, ow, kh, kw, *stride, *pad), strict=True))


def _pooled_shape(g):
    return g["n"], g["oh"], g["ow"], g["c"]


@case("maxpool_forward")
def _maxpool_forward(rng, size, real, wide):
    g = _pooling(size)
    x = random(rng, _image_shape(g), real)
    if size % 2:
        x = np.minimum(x, real.type(-1))  # all below a padding of zeros, with many ties
    return {"x": x, "y": blank(_pooled_shape(g), real), "index": blank(_pooled_shape(g), np.uint8), **g}


@case("maxpool_backward")
def _maxpool_backward(rng, size, real, wide):
    g = _pooling(size)
    index = rng.integers(0, g["kh"] * g["kw"], _pooled_shape(g), np.uint8)  # some point at padding: lost
    return {"dy": random(rng, index.shape, real), "index": index, "dx": blank(_image_shape(g), real), **g}


@case("avgpool_forward")
def _avgpool_forward(rng, size, real, wide):
    g = _pooling(size)
    arrays = {"x": random(rng, _image_shape(g), real), "y": blank(_pooled_shape(g), real)}
    return {**arrays, **g, "include_pad": POOLINGS[size][-1]}


@case("avgpool_backward")
def _avgpool_backward(rng, size, real, wide):
    g = _pooling(size)
    arrays = {"dy": random(rng, _pooled_shape(g), real), "dx": blank(_image_shape(g), real)}
    return {**arrays, **g, "include_pad": POOLINGS[size][-1]}


IMAGES = [(1, 1, 1), (2, 31, 3), (3, 64, 5), (2, 49, 31), (1, 1009, 2), (5, 16, 64), (31, 1, 10), (2, 9, 33)]


@case("global_average_forward")
def _global_average_forward(rng, size, real, wide):
    n, pixels, c = IMAGES[size]
    x = random(rng, (n, pixels, c), real)
    return {"x": x, "y": blank((n, c), real), "n": n, "pixels": pixels, "c": c}


@case("global_average_backward")
def _global_average_backward(rng, size, real, wide):
    n, pixels, c = IMAGES[size]
    dy = random(rng, (n, c), real)
    return {"dy": dy, "dx": blank((n, pixels, c), real), "n": n, "pixels": pixels, "c": c}


# batchnorm


@case("batchnorm_moments")
def _batchnorm_moments(rng, size, real, wide):
    (rows, c), parts = MATRICES[size], PARTS[size]
    x = random(rng, (rows, c), real) + real.type(3 * (size % 2))
    return {"x": x, "moments": blank((parts, 3, c), wide), "rows": rows, "c": c, "parts": parts}


@case("batchnorm_combine")
def _batchnorm_combine(rng, size, real, wide):
    c, parts = COUNTS[size], [1, 3, 3, 2, 1, 3, 31, 300][size]
    moments = random(rng, (parts, 3, c), wide)
    moments[:, 0] = rng.integers(0, 4, (parts, 1))  # some parts are empty
    moments[-1, 0] = 5
    moments[:, 2] = np.abs(moments[:, 2]) * (moments[:, 0] > 1)
    moments[moments[:, 0, 0] == 0] = 0
    return {"moments": moments, "total": blank((3, c), wide), "parts": parts, "c": c}


@case("batchnorm_statistics")
def _batchnorm_statistics(rng, size, real, wide):
    c, accumulate = COUNTS[size], size % 2
    moments = np.stack([np.full(c, [1, 2, 31, 1009][size // 2]), rng.normal(size=c), rng.uniform(0, 9, c)])
    arrays = {"total": moments.astype(wide), "mean": blank(c, wide), "inverse": blank(c, wide)}
    arrays["batch_mean"], arrays["batch_variance"] = (total(rng, c, wide, accumulate) for _ in range(2))
    return {**arrays, "eps": [1e-5, 1e-3][size % 2], "accumulate": accumulate, "c": c}


@case("batchnorm_inverse")
def _batchnorm_inverse(rng, size, real, wide):
    c = COUNTS[size]
    return {"variance": positive(rng, c, wide), "inverse": blank(c, wide), "eps": 1e-5, "c": c}


def _statistics(rng, c, wide):
    return {"mean": random(rng, c, wide), "inverse": positive(rng, c, wide)}


def _affine(rng, c, wide):
    return {"gamma": random(rng, c, wide), "beta": random(rng, c, wide)}


@case("batchnorm_forward", "batchnorm_relu_forward")
def _batchnorm_forward(rng, size, real, wide):
    rows, c = MATRICES[size]
    arrays = {"x": random(rng, (rows, c), real), **_statistics(rng, c, wide), **_affine(rng, c, wide)}
    if size == 4:
        arrays["x"][0, 0] = np.nan
    return {**arrays, "y": blank((rows, c), real), "rows": rows, "c": c}


@case("batchnorm_add_relu_forward")
def _batchnorm_add_relu_forward(rng, size, real, wide):
    rows, c = MATRICES[size]
    arrays = {"x": random(rng, (rows, c), real), **_statistics(rng, c, wide), **_affine(rng, c, wide)}
    arrays["residual"] = random(rng, (rows, c), real)
    if size == 4:
        arrays["x"][0, 0] = arrays["residual"][1, 1] = np.nan
    return {**arrays, "y": blank((rows, c), real), "rows": rows, "c": c}


@case("batchnorm_backward_sums")
def _batchnorm_backward_sums(rng, size, real, wide):
    (rows, c), parts = MATRICES[size], PARTS[size]
    arrays = {"dy": random(rng, (rows, c), real), "x": random(rng, (rows, c), real)}
    arrays |= {**_statistics(rng, c, wide), "sums": blank((parts, 2, c), wide)}
    return {**arrays, "rows": rows, "c": c, "parts": parts}


@case("batchnorm_relu_backward_sums")
def _batchnorm_relu_backward_sums(rng, size, real, wide):
    (rows, c), parts = MATRICES[size], PARTS[size]
    arrays = {"dy": random(rng, (rows, c), real), "x": random(rng, (rows, c), real)}
    arrays |= {**_statistics(rng, c, wide), **_affine(rng, c, wide), "sums": blank((parts, 2, c), wide)}
    return {**arrays, "rows": rows, "c": c, "parts": parts}


@case("batchnorm_gradient")
def _batchnorm_gradient(rng, size, real, wide):
    c, accumulate = COUNTS[size], size % 2
    dgamma, dbeta = (total(rng, c, wide, accumulate) for _ in range(2))
    sums = random(rng, (2, c), wide)
    return {"sums": sums, "dgamma": dgamma, "dbeta": dbeta, "accumulate": accumulate, "c": c}


@case("batchnorm_backward")
def _batchnorm_backward(rng, size, real, wide):
    rows, c = MATRICES[size]
    arrays = {"dy": random(rng, (rows, c), real), "x": random(rng, (rows, c), real)}
    arrays |= {**_statistics(rng, c, wide), "gamma": random(rng, c, wide)}
    arrays |= {"sums": random(rng, (2, c), wide), "dx": blank((rows, c), real)}
    return {**arrays, "total": rows * (1 + size % 3), "rows": rows, "c": c}


@case("batchnorm_relu_backward")
def _batchnorm_relu_backward(rng, size, real, wide):
    rows, c = MATRICES[size]
    arrays = {"dy": random(rng, (rows, c), real), "x": random(rng, (rows, c), real)}
    arrays |= {**_statistics(rng, c, wide), **_affine(rng, c, wide)}
    arrays |= {"sums": random(rng, (2, c), wide), "dx": blank((rows, c), real)}
    return {**arrays, "total": rows * (1 + size % 3), "rows": rows, "c": c}


# local response normalisation

LRN_SIZES = [1, 3, 5, 3, 7, 3, 5, 9]  # windows, some wider than what they slide over
LRN_IMAGES = [  # n, h, w, c
    (1, 1, 1, 1),
    (2, 3, 5, 3),
    (1, 2, 9, 6),
    (3, 7, 4, 4),
    (1, 5, 5, 31),
    (2, 1, 8, 8),
    (1, 9, 2, 5),
    (2, 6, 6, 13),
]


def _lrn(rng, size, shape, real, wide, backward):
    window = LRN_SIZES[size]
    x = random(rng, shape, real, 3)
    given = {"share": [0.3, 2e-5, 1.0][size % 3], "beta": [0.75, 0.5, 1.3][size % 3]}
    if not backward:
        return {
            "x": x,
            "y": blank(shape, real),
            "scale": blank(shape, wide),
            **given,
            "k": [1.0, 2.0][size % 2],
        }, window
    scale = positive(rng, shape, wide)
    arrays = {"dy": random(rng, shape, real), "x": x, "y": random(rng, shape, real), "scale": scale}
    return {**arrays, "dx": blank(shape, real), **given}, window


@case("lrn_across_forward")
def _lrn_across_forward(rng, size, real, wide, backward=False):
    rows, c = MATRICES[size]
    arguments, window = _lrn(rng, size, (rows, c), real, wide, backward)
    if size == 4 and not backward:
        arguments["x"][0, 0] = np.nan
    return {**arguments, "rows": rows, "c": c, "size": window}


@case("lrn_across_backward")
def _lrn_across_backward(rng, size, real, wide):
    return _lrn_across_forward(rng, size, real, wide, backward=True)


@case("lrn_within_forward")
def _lrn_within_forward(rng, size, real, wide, backward=False):
    n, h, w, c = LRN_IMAGES[size]
    arguments, window = _lrn(rng, size, (n, h, w, c), real, wide, backward)
    if size == 4 and not backward:
        arguments["x"][0, 0, 0, 0] = np.nan
    return {**arguments, "n": n, "h": h, "w": w, "c": c, "size": window}


@case("lrn_within_backward")
def _lrn_within_backward(rng, size, real, wide):
    return _lrn_within_forward(rng, size, real, wide, backward=True)


# dropout, order, augment

SEEDS = [0, 1, 2**64 - 1, 0x123456789ABCDEF0]


@case("dropout_apply")
def _dropout_apply(rng, size, real, wide):
    n = COUNTS[size]
    rate = [0.5, 0.2, 0.0, 0.1, 0.5, 0.8, 1.0, 0.05][size]
    seed, site, batch = SEEDS[size % 4], [1, 2**32 - 1, 0xABCDEF][size % 3], [0, 7, 2**40][size % 3]
    first, threshold = [0, 5, 16, 31, 2**33 + 7, 4096, 15, 1000003][size], round(rate * 65536)
    if size == 1:
        threshold = int(lanes(seed, site, batch, first, n)[3])  # a draw on the threshold keeps
    return {
        "x": positive(rng, n, real),
        "y": blank(n, real),
        "state": state(batch=batch),
        "seed": seed,
        "site": site,
        "threshold": threshold,
        "scale": 1 / (1 - rate) if rate < 1 else 0.0,
        "first": first,
        "n": n,
    }


@case("order_draw", "order_replacement")
def _order_draw(rng, size, real, wide):
    n = [1, 2, 3, 10, 255, 256, 257, 1009][size]
    return {"order": blank(n, np.int32), "state": state(epoch=size), "seed": SEEDS[size % 4], "n": n}


@case("order_balanced")
def _order_balanced(rng, size, real, wide):
    n, k = [(1, 1), (3, 3), (5, 3), (10, 1), (256, 2), (255, 7), (1009, 100), (257, 10)][size]
    starts = np.sort(np.append(rng.choice(np.arange(1, n), k - 1, replace=False), [0, n])).astype(np.int32)
    return {
        "members": rng.permutation(n).astype(np.int32),
        "starts": starts,
        "order": blank(n, np.int32),
        "state": state(epoch=[0, 1, 2**31 - 1][size % 3]),
        "seed": SEEDS[size % 4],
        "n": n,
        "k": k,
    }


@case("order_stored")
def _order_stored(rng, size, real, wide):
    n = COUNTS[size]
    return {"order": blank(n, np.int32), "n": n}


BATCHES = [  # batch, batches, the epoch's batch, first, places, set, n: the range first .. first + n of a batch
    (1, 1, 0, 0, 1, 1, 1),
    (8, 4, 1, 0, 31, 31, 8),
    (8, 4, 3, 0, 31, 31, 8),  # one image short
    (8, 4, 3, 4, 26, 31, 4),  # the last replica has nothing left
    (5, 3, 2, 2, 13, 40, 3),  # one of three left, places fewer than the set
    (16, 2, 1, 5, 32, 32, 6),
    (7, 5, 0, 0, 33, 33, 7),
    (31, 1, 0, 0, 31, 31, 31),
]


def _batch(rng, size):
    """Return (order, state, sizes) of a batch somewhere in an epoch."""
    batch, batches, now, first, places, count, n = BATCHES[size]
    epoch = [0, 3, 1000][size % 3]
    order = rng.permutation(count)[:places].astype(np.int32)
    sizes = {"batch": batch, "batches": batches, "first": first, "places": places, "set": count, "n": n}
    return order, state(batch=epoch * batches + now, epoch=epoch), sizes


CROPS = [  # h, w, c, oh, ow, pad, reflect, flip, mean image
    (1, 1, 2, 1, 1, 0, 0, 0, False),
    (8, 6, 3, 8, 6, 2, 0, 1, False),
    (7, 7, 1, 7, 7, 3, 1, 1, False),
    (5, 9, 3, 5, 9, 0, 0, 1, True),
    (6, 5, 3, 6, 5, 4, 0, 1, True),
    (6, 5, 4, 6, 5, 4, 1, 0, True),
    (8, 8, 3, 5, 7, 1, 0, 0, False),
    (5, 4, 31, 5, 4, 1, 0, 2, False),
]


@case("batch_crop_flip")
def _batch_crop_flip(rng, size, real, wide):
    order, now, s = _batch(rng, size)
    h, w, c, oh, ow, pad, reflect, flip, mean_image = CROPS[size]
    shape = (s["set"], h, w, c)
    images = rng.integers(0, 256, shape, np.uint8) if size % 2 else random(rng, shape, np.float32, 99)
    channels = h * w * c if mean_image else c
    return {
        "images": images,
        "order": order,
        "state": now,
        "mean": rng.uniform(90, 140, channels).astype(wide),
        "scale": rng.uniform(0.01, 0.02, channels).astype(wide),
        "x": blank((s["n"], oh, ow, c), real),
        "seed": SEEDS[size % 4],
        "flip": flip,
        "pad": pad,
        "reflect": reflect,
        **{name: s[name] for name in ("batch", "batches", "first", "places", "set")},
        "channels": channels,
        **{"n": s["n"], "h": h, "w": w, "c": c, "oh": oh, "ow": ow},
    }


@case("batch_targets")
def _batch_targets(rng, size, real, wide):
    order, now, sizes = _batch(rng, size)
    k, n = [1, 10, 3, 100, 2, 31, 10, 7][size], sizes.pop("n")
    labels = rng.integers(0, k, sizes["set"]).astype(np.int32)
    arrays = {"labels": labels, "order": order, "state": now, "targets": blank((n, k), real)}
    return {**arrays, "smoothing": [0.0, 0.1][size % 2], **sizes, "n": n, "k": k}


@case("batch_values")
def _batch_values(rng, size, real, wide):
    order, now, sizes = _batch(rng, size)
    k, n = [1, 10, 3, 1, 2, 31, 10, 7][size], sizes.pop("n")
    values = random(rng, (sizes["set"], k), wide)
    targets = np.zeros((n, k), real)
    return {"values": values, "order": order, "state": now, "targets": targets, **sizes, "n": n, "k": k}


# more activations, groupnorm, dropout by channels, stochastic pooling, dropconnect


@case("elu_forward")
def _elu_forward(rng, size, real, wide):
    n = COUNTS[size]
    x = random(rng, n, real, 3)
    if size == 4:
        x[:5] = np.nan, 100, -100, 20, -20
    return {"x": x, "y": blank(n, real), "alpha": [1.0, 0.0, 0.3][size % 3], "n": n}


@case("elu_backward")
def _elu_backward(rng, size, real, wide):
    n, alpha = COUNTS[size], [1.0, 0.0, 0.3][size % 3]
    y = np.maximum(random(rng, n, real), real.type(-alpha))
    return {"dy": random(rng, n, real), "y": y, "dx": blank(n, real), "alpha": alpha, "n": n}


@case("softplus_forward", "hardswish_forward")
def _softplus_forward(rng, size, real, wide):
    n = COUNTS[size]
    x = random(rng, n, real, 3)
    if size == 4:
        x[:8] = np.nan, 1000, -1000, np.inf, -np.inf, 3, -3, 20
    return {"x": x, "y": blank(n, real), "n": n}


@case("softplus_backward")
def _softplus_backward(rng, size, real, wide):
    n = COUNTS[size]
    y = np.abs(random(rng, n, real, 3))
    if size == 4:
        y[:4] = np.nan, np.inf, 1000, 0
    return {"dy": random(rng, n, real), "y": y, "dx": blank(n, real), "n": n}


@case("hardswish_backward")
def _hardswish_backward(rng, size, real, wide):
    n = COUNTS[size]
    x = random(rng, n, real, 3)
    if size == 4:
        x[:5] = np.nan, np.inf, -np.inf, 3, -3
    return {"dy": random(rng, n, real), "x": x, "dx": blank(n, real), "n": n}


@case("softmax_forward")
def _softmax_forward(rng, size, real, wide):
    rows, c = MATRICES[size]
    x = random(rng, (rows, c), real, [1, 3, 20][size % 3])
    if size == 3:
        x[:3, :2] = [[np.nan, 1], [1000, -1000], [-np.inf, 1]]
    return {"x": x, "y": blank((rows, c), real), "rows": rows, "c": c}


@case("softmax_backward")
def _softmax_backward(rng, size, real, wide):
    rows, c = MATRICES[size]
    y = rng.dirichlet(np.ones(c), rows).astype(real)
    return {"dy": random(rng, (rows, c), real), "y": y, "dx": blank((rows, c), real), "rows": rows, "c": c}


@case("prelu_forward")
def _prelu_forward(rng, size, real, wide):
    rows, c = MATRICES[size]
    x = random(rng, (rows, c), real)
    if size == 4:
        x[0, :2] = np.nan, np.inf
    return {"x": x, "slope": random(rng, c, wide), "y": blank((rows, c), real), "rows": rows, "c": c}


@case("prelu_backward")
def _prelu_backward(rng, size, real, wide):
    rows, c = MATRICES[size]
    arrays = {"dy": random(rng, (rows, c), real), "x": random(rng, (rows, c), real), "slope": random(rng, c, wide)}
    return {**arrays, "dx": blank((rows, c), real), "rows": rows, "c": c}


@case("prelu_backward_sums")
def _prelu_backward_sums(rng, size, real, wide):
    (rows, c), parts = MATRICES[size], PARTS[size]
    arrays = {"dy": random(rng, (rows, c), real), "x": random(rng, (rows, c), real), "sums": blank((parts, c), wide)}
    return {**arrays, "rows": rows, "c": c, "parts": parts}


PIECES = [1, 2, 3, 5, 256, 4, 7, 2]


@case("maxout_forward")
def _maxout_forward(rng, size, real, wide):
    n, k = COUNTS[size], PIECES[size]
    x = np.round(random(rng, (n, k), real), 1).astype(real)  # with many ties
    if size == 3:
        x[:4, 1:3] = [[np.nan, np.inf], [np.inf, np.nan], [np.nan, np.nan], [-np.inf, -np.inf]]
    return {"x": x, "y": blank(n, real), "index": blank(n, np.uint8), "n": n, "k": k}


@case("maxout_backward")
def _maxout_backward(rng, size, real, wide):
    n, k = COUNTS[size], PIECES[size]
    index = rng.integers(0, k, n, np.uint8)
    return {"dy": random(rng, n, real), "index": index, "dx": blank((n, k), real), "n": n, "k": k}


GROUPS = [  # n, pixels, c, groups, width
    (1, 1, 1, 1, 32),
    (2, 31, 6, 3, 32),
    (3, 9, 8, 1, 256),
    (5, 7, 10, 5, 32),
    (2, 1, 257, 1, 256),
    (2, 49, 32, 2, 32),
    (9, 4, 31, 31, 32),
    (3, 64, 33, 3, 256),
]


def _groups(size):
    return dict(zip(("n", "pixels", "c", "groups", "width"), GROUPS[size], strict=True))


@case("groupnorm_forward")
def _groupnorm_forward(rng, size, real, wide):
    g = _groups(size)
    shape, n_groups = (g["n"], g["pixels"], g["c"]), (g["n"], g["groups"])
    x = random(rng, shape, real) + real.type(3 * (size % 2))
    if size == 3:
        x[0, 0, 0] = np.nan
    arrays = {"x": x, **_affine(rng, g["c"], wide), "y": blank(shape, real)}
    arrays |= {"mean": blank(n_groups, wide), "inverse": blank(n_groups, wide)}
    return {**arrays, "eps": [1e-5, 1e-2][size % 2], **g}


def _group_statistics(rng, g, wide):
    return {"mean": random(rng, (g["n"], g["groups"]), wide), "inverse": positive(rng, (g["n"], g["groups"]), wide)}


@case("groupnorm_backward")
def _groupnorm_backward(rng, size, real, wide):
    g = _groups(size)
    shape = g["n"], g["pixels"], g["c"]
    arrays = {"dy": random(rng, shape, real), "x": random(rng, shape, real), **_group_statistics(rng, g, wide)}
    return {**arrays, "gamma": random(rng, g["c"], wide), "dx": blank(shape, real), **g}


@case("groupnorm_backward_sums")
def _groupnorm_backward_sums(rng, size, real, wide):
    g, parts = _groups(size), PARTS[size]
    del g["width"]
    shape, sums = (g["n"], g["pixels"], g["c"]), (parts, g["c"])
    arrays = {"dy": random(rng, shape, real), "x": random(rng, shape, real), **_group_statistics(rng, g, wide)}
    return {**arrays, "dgamma": blank(sums, wide), "dbeta": blank(sums, wide), **g, "parts": parts}


def _draw(size, n):
    """Return the arguments of a draw for n places, `first` of them before; a draw on the threshold is among them."""
    seed, site, batch = SEEDS[size % 4], [1, 2**32 - 1, 0xABCDEF][size % 3], [0, 7, 2**40][size % 3]
    threshold = round([0.5, 0.2, 0.0, 0.1, 0.5, 0.8, 1.0, 0.05][size] * 65536)
    if size == 1:
        threshold = int(lanes(seed, site, batch, 0, n)[n // 2])
    return {"state": state(batch=batch), "seed": seed, "site": site, "threshold": threshold}


@case("dropout_channels")
def _dropout_channels(rng, size, real, wide):
    n, pixels, c = IMAGES[size]
    first = [0, 0, 16, 31, 2**33 + 7, 4096, 15, 1000003][size]
    arrays = {"x": positive(rng, (n, pixels, c), real), "y": blank((n, pixels, c), real)}
    return {**arrays, **_draw(size, n * c), "scale": 1.25, "first": first, "n": n, "pixels": pixels, "c": c}


@case("dropout_scale")
def _dropout_scale(rng, size, real, wide):
    n = COUNTS[size]
    return {"x": random(rng, n, real), "y": blank(n, real), "scale": 0.75, "n": n}


def _activity(rng, size, shape, real, broken):
    """Values of which some windows have none above 0, some one that is not finite."""
    x = random(rng, shape, real)
    if size % 2:
        x = np.abs(x)
    x[:, : shape[1] // 2, :, 0] = -1
    if size in (2, 5):
        x.flat[:: 2 * x.size // 3] = broken
    return x


@case("stochastic_pool_forward")
def _stochastic_pool_forward(rng, size, real, wide):
    g = _pooling(size)
    draw = _draw(size, 1)
    del draw["threshold"]
    x = _activity(rng, size, _image_shape(g), real, (np.nan, np.inf))
    arrays = {"x": x, "y": blank(_pooled_shape(g), real), "index": blank(_pooled_shape(g), np.uint8)}
    return {**arrays, **draw, "first": [0, 1, 5, 2**33][size % 4], **g}


@case("stochastic_pool_expected")
def _stochastic_pool_expected(rng, size, real, wide):
    g = _pooling(size)
    x = _activity(rng, size, _image_shape(g), real, np.nan)
    return {"x": x, "y": blank(_pooled_shape(g), real), **g}


CONNECTIONS = [(1, 1, 1), (2, 31, 16), (3, 5, 17), (2, 300, 3), (5, 7, 31), (1, 257, 10), (4, 3, 32), (2, 16, 40)]


@case("dropconnect_weights")
def _dropconnect_weights(rng, size, real, wide):
    _, inputs, outputs = CONNECTIONS[size]
    arrays = {"w": positive(rng, (inputs, outputs), wide), "masked": blank((inputs, outputs), real)}
    return {**arrays, **_draw(size, inputs * 16), "inputs": inputs, "outputs": outputs}


@case("dropconnect_gradient")
def _dropconnect_gradient(rng, size, real, wide):
    _, inputs, outputs = CONNECTIONS[size]
    accumulate, shape = size % 2, (inputs, outputs)
    arrays = {"d": positive(rng, shape, wide), "dw": total(rng, shape, wide, accumulate)}
    return {**arrays, **_draw(size, inputs * 16), "accumulate": accumulate, "inputs": inputs, "outputs": outputs}


def _connections(rng, size, given, result):
    """Return the arguments of a pass over examples: arrays, draws, sizes."""
    n, inputs, outputs = CONNECTIONS[size]
    first = {"first": [0, 0, 3, 2**33][size % 4]}
    if "dw" in result:
        first["accumulate"] = size % 2
    return {**given, **result, **_draw(size, inputs * 16), **first, "n": n, "inputs": inputs, "outputs": outputs}


@case("dropconnect_forward")
def _dropconnect_forward(rng, size, real, wide):
    n, inputs, outputs = CONNECTIONS[size]
    w = rng.normal(0, inputs**-0.5, (inputs, outputs)).astype(wide)
    given = {"x": random(rng, (n, inputs), real), "w": w}
    return _connections(rng, size, given, {"y": blank((n, outputs), real)})


@case("dropconnect_backward_input")
def _dropconnect_backward_input(rng, size, real, wide):
    n, inputs, outputs = CONNECTIONS[size]
    given = {"dy": random(rng, (n, outputs), real), "w": random(rng, (inputs, outputs), wide)}
    return _connections(rng, size, given, {"dx": blank((n, inputs), real)})


@case("dropconnect_backward_weight")
def _dropconnect_backward_weight(rng, size, real, wide):
    n, inputs, outputs = CONNECTIONS[size]
    given = {"x": random(rng, (n, inputs), real), "dy": random(rng, (n, outputs), real)}
    return _connections(rng, size, given, {"dw": total(rng, (inputs, outputs), wide, size % 2)})


@case("dropconnect_relu")
def _dropconnect_relu(rng, size, real, wide):
    n, inputs, outputs = CONNECTIONS[size]
    x = random(rng, (n, inputs), real)
    if size == 4:
        x[0] = 0  # no spread: max(mean, 0)
    arrays = {"x": x, "w": rng.normal(0, inputs**-0.5, (inputs, outputs)).astype(wide)}
    arrays |= {"mean": random(rng, (n, outputs), real, [1, 5][size % 2]), "y": blank((n, outputs), real)}
    return {**arrays, "keep": [0.5, 1.0, 0.9][size % 3], "n": n, "inputs": inputs, "outputs": outputs}
# transforms, and the launches of augment that follow them

WARPS = {"rescale": [0.6, 1.6], "rotate": 180.0, "shear": 30.0, "stretch": 1.5, "zoom": 1.5, "lens": [-0.3, 1.0]}
COLORS = {"brightness": [0, 2], "contrast": 1.0, "saturation": [0, 3], "hue": 0.5, "lighting": 0.5}
SOME = {"warp_probability": 0.5, "color_probability": 0.5, "cutout_probability": 0.5, "mix_probability": 0.5}
DESCRIPTIONS = [
    {},
    {"alternate": True, "crop": 2, "rotate": [10, 10], **COLORS, "cutout": 3, "cutmix": 1.0},
    {**WARPS, **COLORS, **SOME, "flip_vertical": 0.25, "interpolation": "random", "mixup": 0.2, "cutmix": 1.0},
    {"crop": 4, "elastic": 34.0, "mixup": 0.5, "cutout": 1},  # of no image: BATCHES
    {**WARPS, **SOME, "elastic": 10.0, "elastic_sigma": 1.5, "interpolation": "cubic"},
    {"rescale": 2.0, "interpolation": "area", "cutmix": 3.0, "mix_probability": 0.7, "flip": 0.9},
    {"stretch": [2, 2], "zoom": [0.5, 0.5], "interpolation": "nearest", **COLORS, "mixup": 100.0, "elastic": 34.0},
    {"lens": 0.3, "elastic": 3.0, "elastic_sigma": 0.25, "flip": True, "mixup": 1.0, **SOME},
]
PICTURES = [(1, 1, 2), (8, 6, 3), (7, 7, 1), (5, 9, 3), (16, 11, 4), (6, 5, 3), (9, 9, 3), (5, 40, 1)]  # h, w, c


def _drawn(rng, size, real, wide):
    """Return ({n, h, w, ...}, arguments of transforms_draw with its outputs filled in)."""
    arguments = _transforms_draw(rng, size, real, wide)
    transforms_draw(**arguments)
    return arguments


@case("transforms_draw")
def _transforms_draw(rng, size, real, wide):
    order, now, s = _batch(rng, size)
    h, w, _ = PICTURES[size]
    what = Augmentation(**DESCRIPTIONS[size])
    mix, elastic = int(what.mixes), int(what.elastic > 0)
    slots = s["n"] * (1 + mix)
    moves = (slots * 2 * h * w - 1) * elastic + 1
    return {
        "order": order,
        "state": now,
        "settings": what.table(rng.normal(0, 30, (3, 3))),
        "weights": what.gaussian,
        "geometry": blank((slots, len(GEOMETRY)), np.int64),
        "color": blank((slots, len(COLOR)), wide),
        "rows": blank(moves, np.int32),
        "field": blank(moves, np.int32),
        "seed": SEEDS[size % 4],
        "mix": mix,
        "elastic": elastic,
        "radius": len(what.gaussian) - 1,
        **{name: s[name] for name in ("batch", "batches", "first", "places", "n")},
        **{"h": h, "w": w},
    }


@case("batch_warp")
def _batch_warp(rng, size, real, wide):
    drawn, (h, w, c), count = _drawn(rng, size, real, wide), PICTURES[size], BATCHES[size][5]
    shape = (count, h, w, c)
    images = rng.integers(0, 256, shape, np.uint8) if size % 2 else random(rng, shape, np.float32, 99)
    slots = len(drawn["geometry"])
    return {
        "images": images,
        **{name: drawn[name] for name in ("geometry", "field")},
        "warped": blank((slots, h, w, c), wide),
        **{name: drawn[name] for name in ("mix", "elastic")},
        "reflect": size // 2 % 2,
        **{"set": count, "n": drawn["n"], "h": h, "w": w, "c": c},
    }


@case("batch_finish")
def _batch_finish(rng, size, real, wide):
    drawn, (h, w, c) = _drawn(rng, size, real, wide), PICTURES[size]
    photometric = int(Augmentation(**DESCRIPTIONS[size]).colors)
    shape = (len(drawn["geometry"]), h, w, c)
    warped = rng.integers(0, 256, shape).astype(wide) if photometric else random(rng, shape, wide, 99)
    channels = h * w * c if size in (3, 6) else c
    return {
        "warped": warped,
        **{name: drawn[name] for name in ("geometry", "color")},
        "mean": rng.uniform(90, 140, channels).astype(wide),
        "scale": rng.uniform(0.01, 0.02, channels).astype(wide),
        "x": blank((drawn["n"], h, w, c), real),
        "photometric": photometric,
        "mix": drawn["mix"],
        **{"channels": channels, "n": drawn["n"], "h": h, "w": w, "c": c},
    }


@case("batch_targets_mixed")
def _batch_targets_mixed(rng, size, real, wide):
    mixing = [1, 2, 3, 5, 6, 7][size % 6]
    drawn, count = _drawn(rng, mixing, real, wide), BATCHES[mixing][5]
    k, n = [1, 10, 3, 100, 2, 31, 10, 7][size], drawn["n"]
    return {
        "labels": rng.integers(0, k, count).astype(np.int32),
        **{name: drawn[name] for name in ("geometry", "color")},
        "targets": blank((n, k), real),
        "smoothing": [0.0, 0.1][size % 2],
        **{"set": count, "n": n, "k": k},
    }


# loss

TABLES = [(1, 1), (31, 2), (3, 10), (256, 10), (7, 31), (2, 257), (5, 100), (33, 3)]  # n, k


def _padding(size, n):
    """The rows of a tail that hold no image."""
    return slice(max(n - [0, 5, 0, 31][size % 4], 1), n)


@case("softmax_cross_entropy")
def _softmax_cross_entropy(rng, size, real, wide):
    n, k = TABLES[size]
    targets = np.eye(k)[rng.integers(0, k, n)]
    if size % 3 == 1:
        targets = targets * 0.9 + 0.1 / k
    if size % 3 == 2:
        targets = rng.uniform(0, 2 / k, (n, k))  # mixed: sums other than 1
    targets[_padding(size, n)] = 0
    return {
        "logits": random(rng, (n, k), real, [1, 3, 20][size % 3]),
        "targets": targets.astype(real),
        "dlogits": blank((n, k), real),
        "losses": blank(n, wide),
        "hits": blank(n, np.int32),
        "state": state(loss_scale=[1, 8][size % 2]),
        "n": n,
        "k": k,
    }


@case("mean_squared_error")
def _mean_squared_error(rng, size, real, wide):
    n, k = TABLES[size]
    targets = random(rng, (n, k), real)
    targets[_padding(size, n)] = np.nan
    if size == 1:
        targets[::2, 1] = np.nan  # in a part of a row, which is no padding
    return {
        "prediction": random(rng, (n, k), real),
        "targets": targets,
        "dprediction": blank((n, k), real),
        "losses": blank(n, wide),
        "hits": blank(n, np.int32),
        "state": state(loss_scale=[1, 8][size % 2]),
        "n": n,
        "k": k,
    }


@case("sigmoid_cross_entropy")
def _sigmoid_cross_entropy(rng, size, real, wide):
    n, k = TABLES[size]
    targets = np.eye(k)[rng.integers(0, k, n)]
    if size % 3 == 1:
        targets = rng.integers(0, 2, (n, k)) * 1.0  # several at once, or none
    if size % 3 == 2:
        targets = rng.uniform(0, 1, (n, k))
    targets[_padding(size, n)] = np.nan
    if size == 1:
        targets[::2, 1] = np.nan  # in a part of a row, which is no padding
    positive, negative, gamma = [(1 / k, 1 / k, 0.0), (0.25, 0.75, 2.0), (0.5, 0.5, 0.5)][size % 3]
    return {
        "logits": random(rng, (n, k), real, [1, 3, 20][size % 3]),
        "targets": targets.astype(real),
        "dlogits": blank((n, k), real),
        "losses": blank(n, wide),
        "hits": blank(n, np.int32),
        "state": state(loss_scale=[1, 8][size % 2]),
        "positive": positive,
        "negative": negative,
        "gamma": gamma,
        "n": n,
        "k": k,
    }


@case("multiclass_hinge")
def _multiclass_hinge(rng, size, real, wide):
    n, k = TABLES[size]
    targets = np.eye(k)[rng.integers(0, k, n)]
    if size % 3 == 2:
        targets = rng.uniform(0, 2 / k, (n, k))
    targets[_padding(size, n)] = [0, np.nan][size % 2]
    return {
        "scores": random(rng, (n, k), real, [1, 3][size % 2]),
        "targets": targets.astype(real),
        "dscores": blank((n, k), real),
        "losses": blank(n, wide),
        "hits": blank(n, np.int32),
        "state": state(loss_scale=[1, 0.125][size % 2]),
        "margin": [1.0, 0.5, 0.1][size % 3],
        "squared": size // 2 % 2,
        "single": size // 4,
        "n": n,
        "k": k,
    }


@case("metrics_sum")
def _metrics_sum(rng, size, real, wide):
    n, accumulate = COUNTS[size], size % 2
    hits = rng.integers(-1, 2, n).astype(np.int32)
    arrays = {"losses": positive(rng, n, wide), "hits": hits}
    return {**arrays, "sums": total(rng, 4, np.float64, accumulate), "accumulate": accumulate, "n": n}


# optim

ARENAS = [(1, 1), (2, 2), (3, 1), (5, 3), (7, 7), (16, 4), (4, 2), (31, 5)]  # blocks of 256, rows of the table
RATES = [1, 3, 10, 5]  # steps of a schedule


@case("gradient_norm")
def _gradient_norm(rng, size, real, wide):
    n, parts = 256 * ARENAS[size][0], PARTS[size]
    g = random(rng, n, wide)
    if size > 4:
        g[n // 2] = [np.inf, -np.inf, np.nan][size - 5]
    return {"g": g, "norms": blank(parts, np.float64), "n": n, "parts": parts}


FINISHES = [  # what happens, clip, dynamic, and the state before
    (None, 0.0, 0, {}),
    (None, 0.25, 0, {"update": 7, "batch": 9, "good": 5, "lr_scale": 0.5}),  # clipped
    (None, 1e9, 1, {"update": 2, "batch": 2, "good": 1999, "loss_scale": 8}),  # not clipped; doubles
    ("norm", 0.25, 1, {"update": 3, "batch": 5, "good": 1999, "loss_scale": 1.5, "gradient_scale": 0.5}),  # to 1
    ("norm", 0.0, 1, {"update": 30, "batch": 40, "good": 1, "loss_scale": 1}),  # nothing left to halve: halts
    ("norm", 0.0, 0, {"update": 11, "batch": 2**33, "gradient_scale": 0.5, "apply": 1}),  # halts
    ("loss", 1.0, 0, {"update": 11, "batch": 12}),
    (None, 0.0, 1, {"batch": 6, "good": 3, "loss_scale": 1024, "halt": 2}),  # what comes after a halt is not applied
]


@case("gradient_finish")
def _gradient_finish(rng, size, real, wide):
    broken, clip, dynamic, fields = FINISHES[size]
    parts, steps, rows = [1, 3, 300, 2][size % 4], RATES[size % 4], [1, 4, 7][size % 3]
    norms = rng.uniform(10, 20, parts)
    sums = np.array([30.5, 17, 31, 1 + size % 2])
    if broken == "norm":
        norms[-1] = [np.inf, np.nan][size % 2]
    if broken == "loss":
        sums[0] = [np.inf, np.nan][size % 2]
    terms = [0, 1, 300][size % 3]
    return {
        "norms": norms,
        "penalties": rng.uniform(0, 1, terms),
        "sums": sums,
        "rates": positive(rng, steps, wide),
        "table": rng.normal(size=(rows, 10)),
        "state": state(**fields),
        "clip": clip,
        "dynamic": dynamic,
        "parts": parts,
        "terms": terms,
        "steps": steps,
        "rows": rows,
    }


def _arena(rng, size):
    """Return (n, rows, table): each row at least one block where there are enough, in no order."""
    blocks, rows = ARENAS[size]
    return 256 * blocks, rows, rng.permutation(np.arange(blocks) % rows).astype(np.int32)


@case("sgd_update")
def _sgd_update(rng, size, real, wide):
    n, rows, table = _arena(rng, size)
    steps = RATES[size % 4]
    now = state(update=[0, 2, 400][size % 3], apply=size != 4, gradient_scale=0.3)
    now["lr_scale"] = rng.uniform(0.1, 1, 16)
    return {
        "w": random(rng, n, wide),
        "g": random(rng, n, wide),
        "velocity": random(rng, n, wide),
        "table": table,
        "rate": positive(rng, rows, wide),
        "decay": rng.uniform(0, 0.1, rows).astype(wide),
        "group": rng.integers(0, 16, rows).astype(np.int32),
        "rates": rng.uniform(0.01, 0.5, steps).astype(wide),
        "state": now,
        "momentum": [0.9, 0.0][size == 2],
        "nesterov": size % 2,
        "caffe": size // 2 % 2,
        "decoupled": size // 4 % 2,
        "rows": rows,
        "steps": steps,
        "n": n,
    }


@case("penalty_sum")
def _penalty_sum(rng, size, real, wide):
    (n, rows, table), parts = _arena(rng, size), PARTS[size]
    arrays = {"w": random(rng, n, wide), "table": table, "decay": positive(rng, rows, wide)}
    arrays |= {"l1": rng.uniform(0, 0.1, rows).astype(wide), "penalties": blank(parts, np.float64)}
    return {**arrays, "decoupled": size // 2 % 2, "rows": rows, "n": n, "parts": parts}


@case("bias_correction")
def _bias_correction(rng, size, real, wide):
    factors, beta1 = blank(2, wide), [0.9, 0.0, 0.95][size % 3]
    return {"state": state(update=[0, 1, 6, 1000, 2**33][size % 5]), "factors": factors, "beta1": beta1, "beta2": 0.999}


@case("statistics_update")
def _statistics_update(rng, size, real, wide):
    n, rows, table = _arena(rng, size)
    return {
        "running": random(rng, n, wide),
        "batch": random(rng, n, wide),
        "table": table,
        "momentum": rng.uniform(0, 1, rows).astype(wide),
        "sums": np.array([2.5, 17, 31, 1 + size % 3]),
        "state": state(apply=size != 4),
        "rows": rows,
        "n": n,
    }


@case("state_update")
def _state_update(rng, size, real, wide):
    return {"state": state(update=[0, 2**33][size % 2], apply=size // 2 % 2, good=3)}


@case("state_advance")
def _state_advance(rng, size, real, wide):
    batches = [1, 2, 3, 7][size % 4]
    batch = [0, 5, 2**31 - 2, 12][size // 2]
    return {"state": state(batch=batch, epoch=batch // batches), "batches": batches}


# rules

SLOTS = {  # kernel: what it keeps, and which of that is never negative
    "adagrad_update": {"square": True},
    "window_update": {"total": True},
    "adadelta_update": {"square": True, "change": True},
    "rmsprop_update": {"square": True, "velocity": False, "mean": False},
    "rprop_update": {"step": True, "before": False},
    "adam_update": {"mean": False, "square": True},
    "sign_update": {"velocity": False},
    "lion_update": {"mean": False},
    "asgd_update": {"average": False},
    "fisher_update": {"fisher": True},
}


def _rule(kernel, settings, counts=False):
    """Enter the case of a rule; settings: what size gives of its own scalars. counts: it takes corrections, too."""

    @case(kernel)
    def arguments(rng, size, real, wide):
        n, rows, table = _arena(rng, size)
        steps = RATES[size % 4]
        now = state(update=[0, 2, 400][size % 3], apply=size != 4, gradient_scale=0.3, count=[1, 31][size % 2])
        now["lr_scale"] = rng.uniform(0.1, 1, 16)
        slots = {
            name: rng.uniform(0.01, 2, n).astype(wide) if above else random(rng, n, wide)
            for name, above in SLOTS[kernel].items()
        }
        return {
            "w": random(rng, n, wide),
            "g": random(rng, n, wide),
            **slots,
            "table": table,
            "rate": positive(rng, rows, wide),
            "decay": rng.uniform(0, 0.1, rows).astype(wide),
            "group": rng.integers(0, 16, rows).astype(np.int32),
            "rates": rng.uniform(0.01, 0.5, steps).astype(wide),
            "state": now,
            **({"correction": rng.uniform(0.1, 1, 2).astype(wide)} if counts else {}),
            **settings(size),
            "decoupled": size // 2 % 2,
            "rows": rows,
            "steps": steps,
            "n": n,
        }


_rule("adagrad_update", lambda size: {"eps": 1e-3})
_rule("window_update", lambda size: {"eps": 1e-3})
_rule("adadelta_update", lambda size: {"rho": 0.9, "eps": 1e-2})
_rule(
    "rmsprop_update",
    lambda size: {"alpha": 0.9, "eps": 1e-2, "momentum": [0.0, 0.9][size % 2], "centered": size // 2 % 2,
                  "inside": size // 4 % 2},
)  # fmt: skip
_rule("rprop_update", lambda size: {"up": 1.2, "down": 0.5, "low": 0.05, "high": 1.5})
_rule("adam_update", lambda size: {"beta1": 0.9, "beta2": 0.99, "eps": 1e-2}, counts=True)
_rule("sign_update", lambda size: {"momentum": [0.9, 0.0][size == 2]})
_rule("lion_update", lambda size: {"beta1": 0.9, "beta2": 0.99})
_rule("asgd_update", lambda size: {"lambd": 0.1, "alpha": 0.75, "t0": [0.0, 1e6][size // 4]})
_rule("fisher_update", lambda size: {"rho": 0.9, "damping": 0.1}, counts=True)


@case("gradient_adjust")
def _gradient_adjust(rng, size, real, wide):
    n, rows, table = _arena(rng, size)
    now, limit = state(apply=size != 4, gradient_scale=0.3), [0.0, 0.1, 0.3][size % 3]
    arrays = {"w": random(rng, n, wide), "g": random(rng, n, wide), "table": table}
    l1 = rng.uniform(0, 0.1, rows).astype(wide)
    return {**arrays, "l1": l1, "state": now, "limit": limit, "rows": rows, "n": n}


@case("window_square")
def _window_square(rng, size, real, wide):
    n, rows, table = _arena(rng, size)
    now = state(apply=size != 4, gradient_scale=0.3, update=[0, 5, 2**33][size % 3])
    arrays = {name: random(rng, n, wide) for name in ("w", "g", "square")}
    arrays |= {"total": total(rng, n, wide, size % 2), "table": table}
    return {
        **arrays,
        "decay": rng.uniform(0, 0.1, rows).astype(wide),
        "state": now,
        "place": [0, 1][size // 2 % 2],
        "window": [1, 4][size // 2 % 2],
        "accumulate": size % 2,
        "decoupled": size // 4,
        "rows": rows,
        "n": n,
    }


AVERAGINGS = [(0, 0, 0), (5, 0, 0), (5, 7, 1), (9, 7, 3), (9, 0, 0), (15, 7, 3), (16, 7, 3), (2, 0, 1)]


@case("average_update")
def _average_update(rng, size, real, wide):
    n, _, _ = _arena(rng, size)
    update, start, every = AVERAGINGS[size]
    arrays = {"w": random(rng, n, wide), "average": random(rng, n, wide)}
    return {
        **arrays,
        "state": state(update=update, apply=size != 4),
        "decay": [0.99, 0.5][size % 2],
        "start": start,
        "every": every,
        "n": n,
    }


@case("max_norm_limit")
def _max_norm_limit(rng, size, real, wide):
    rows, c = MATRICES[size]
    return {"w": random(rng, (rows, c), wide), "state": state(apply=size != 4), "limit": [0.5, 2.0, 10.0][size % 3],
            "rows": rows, "c": c}  # fmt: skip


@case("probe_shift")
def _probe_shift(rng, size, real, wide):
    n, (parts, radius) = 256 * ARENAS[size][0], [(1, 0.0), (3, 0.05), (300, 2.0), (2, 1.0)][size % 4]
    arrays = {"w": random(rng, n, wide), "g": random(rng, n, wide)}
    arrays |= {"norms": rng.uniform(1, 2, parts) * (size != 3), "sums": np.array([2.5, 17, 31, 1])}
    return {**arrays, "state": state(loss_scale=8), "probe": blank(n, wide), "radius": radius, "n": n, "parts": parts}


# layerwise


@case("layer_squares")
def _layer_squares(rng, size, real, wide):
    n = 256 * ARENAS[size][0]
    arrays = {"w": random(rng, n, wide), "g": random(rng, n, wide), "state": state(gradient_scale=0.3)}
    return {**arrays, "sums": blank((n // 256, 2), wide), "n": n}


@case("lars_rates")
def _lars_rates(rng, size, real, wide):
    n, rows, table = _arena(rng, size)
    sums = rng.uniform(1, 30, (n // 256, 2)).astype(wide)
    sums[table == 0] *= np.array([size != 5, size != 6], wide)  # a layer without weights, or without gradient
    arrays = {"sums": sums, "table": table, "rate": positive(rng, rows, wide), "decay": positive(rng, rows, wide)}
    arrays |= {"scaled": (np.arange(rows) % 3 != 2).astype(np.int32), "ratios": blank(rows, wide)}
    return {**arrays, "trust": 0.5, "rows": rows, "n": n}


@case("vsgd_averages")
def _vsgd_averages(rng, size, real, wide):
    n = 256 * ARENAS[size][0]
    arrays = {name: random(rng, n, wide) for name in ("g", "shifted")} | {"memory": rng.uniform(0, 9, n).astype(wide)}
    now = state(apply=size != 4, gradient_scale=0.3, update=size % 3)
    averages = {name: random(rng, n, wide) for name in ("mean", "square", "bend")}
    return {**arrays, "state": now, **averages, "sums": blank((n // 256, 3), wide), "caution": 3.0, "n": n}


@case("vsgd_fold")
def _vsgd_fold(rng, size, real, wide):
    n, rows, table = _arena(rng, size)
    sums = positive(rng, (n // 256, 3), wide)
    return {"sums": sums, "table": table, "totals": blank((rows, 3), wide), "rows": rows, "n": n}


@case("vsgd_total")
def _vsgd_total(rng, size, real, wide):
    m, rows = COUNTS[size], [1, 3, 300][size % 3]
    return {"triples": positive(rng, (m, 3), wide), "total": blank((rows, 3), wide), "rows": rows, "m": m}


@case("vsgd_update")
def _vsgd_update(rng, size, real, wide):
    n, rows, table = _arena(rng, size)
    steps = RATES[size % 4]
    now = state(update=[0, 2, 400][size % 3], apply=size != 4, gradient_scale=0.3)
    now["lr_scale"] = rng.uniform(0.1, 1, 16)
    mean, totals = rng.uniform(-0.5, 0.5, n).astype(wide), positive(rng, (rows, 3), wide)
    square = (mean * mean + rng.uniform(0.1, 1, n)).astype(wide)
    if size == 7:
        totals[0, 1] = 0
        square[:9] = 0
    arrays = {"w": random(rng, n, wide), "g": random(rng, n, wide), "mean": mean, "square": square}
    arrays |= {"bend": random(rng, n, wide), "memory": positive(rng, n, wide), "totals": totals, "table": table}
    arrays |= {"rate": positive(rng, rows, wide), "group": rng.integers(0, 16, rows).astype(np.int32)}
    arrays |= {"rates": rng.uniform(0.01, 0.5, steps).astype(wide), "state": now}
    return {**arrays, "floor": 0.7, "single": size // 2 % 2, "rows": rows, "steps": steps, "n": n}


@case("muon_momentum")
def _muon_momentum(rng, size, real, wide):
    n, parts = COUNTS[size], PARTS[size]
    arrays = {name: random(rng, n, wide) for name in ("w", "g", "velocity")}
    arrays |= {"state": state(apply=size != 4, gradient_scale=0.3)}
    arrays |= {"direction": blank(n, wide), "norms": blank((parts, 2), wide)}
    return {**arrays, "momentum": 0.9, "nesterov": size % 2, "n": n, "parts": parts}


@case("muon_normalize")
def _muon_normalize(rng, size, real, wide):
    n, parts = COUNTS[size], [1, 3, 300][size % 3]
    arrays = {"direction": random(rng, n, wide), "norms": positive(rng, (parts, 2), wide) * wide.type(size != 3)}
    if size == 3:
        arrays["direction"][:] = 0
    return {**arrays, "x": blank(n, real), "n": n, "parts": parts}


@case("muon_polynomial")
def _muon_polynomial(rng, size, real, wide):
    matrices, side = [(1, 1), (2, 3), (1, 16), (3, 31), (1, 33), (5, 2), (2, 17), (1, 64)][size]
    arrays = {name: random(rng, (matrices, side, side), real) for name in ("z", "y")}
    return {**arrays, "a": 3.4445, "b": -4.775, "c": 2.0315, "matrices": matrices, "side": side}


@case("muon_update")
def _muon_update(rng, size, real, wide):
    n, parts, rows, steps = COUNTS[size], [1, 3, 300][size % 3], [1, 4][size % 2], RATES[size % 4]
    now = state(update=[0, 2, 400][size % 3], apply=size != 4)
    now["lr_scale"] = rng.uniform(0.1, 1, 16)
    arrays = {"w": random(rng, n, wide), "x": random(rng, n, real), "norms": positive(rng, (parts, 2), wide)}
    arrays |= {"rate": positive(rng, rows, wide), "decay": rng.uniform(0, 0.1, rows).astype(wide)}
    arrays |= {"group": rng.integers(0, 16, rows).astype(np.int32)}
    arrays |= {"rates": rng.uniform(0.01, 0.5, steps).astype(wide), "state": now}
    settings = {"scale": 1.5, "length": [0.0, 3.0][size // 2 % 2], "row": rows - 1}
    return {**arrays, **settings, "rows": rows, "steps": steps, "n": n, "parts": parts}
