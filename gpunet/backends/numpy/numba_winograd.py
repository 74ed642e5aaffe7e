"""Convolution by Winograd's minimal filtering on tiles of registers: a quarter of the products. Needs numba.

Six points 0, 1, -1, 2, -2, infinity serve kernels of 3x3 (tiles of 4x4 outputs) and 5x5 (2x2) at stride 1 (Lavin and
Gray 2016, https://arxiv.org/abs/1509.09308). Of each tile's 6x6 inputs, and of each kernel, the values of a polynomial
at 36 points are taken; there a convolution is a product of numbers, over channels one of matrices; the outputs are
interpolated from those. The gradient by weights is the adjoint: products of the same values, summed over tiles.
"""

from collections import namedtuple
from functools import cache

import numpy as np

from gpunet.backends.numpy.jit import jit
from gpunet.backends.numpy.simd import LANES, combination, load, multiply_add, store, zeros

POINTS = (0, 1, -1, 2, -2)
SIDE = len(POINTS) + 1  # of a tile of inputs
ROWS = 8 if LANES == 16 else 4  # of a register tile
CHUNK = 1 << 21  # bytes of values of tiles at a time: a third-level cache's, and enough rows for each product


def _matrices(taps):
    """Return (inputs, kernel, outputs): B^T (6, 6), G (6, taps), A^T (7 - taps, 6) of Winograd's algorithm.

    G evaluates a kernel at the points, each over the product of its differences to the others; A^T evaluates outputs;
    B^T is the inverse of evaluation, which holds the polynomials with a root at all points but one.
    """
    outputs = SIDE + 1 - taps
    norm = [np.prod([p - q for q in POINTS if q != p], dtype=float) for p in POINTS]
    kernel = [[p**t / n for t in range(taps)] for p, n in zip(POINTS, norm, strict=True)]
    kernel.append([0.0] * (taps - 1) + [1.0])
    inputs = [[*np.poly([q for q in POINTS if q != p])[::-1].tolist(), 0.0] for p in POINTS]
    inputs.append(np.poly(POINTS)[::-1].tolist())
    back = [[float(p) ** o for p in POINTS] + [float(o == outputs - 1)] for o in range(outputs)]
    return inputs, kernel, back


def _transposed(matrix):
    return [list(column) for column in zip(*matrix, strict=True)]


def covers(g):
    """Whether a convolution has the form: 3x3 or 5x5 at stride 1, channels in whole registers, enough of them."""
    plain = g.stride_y == g.stride_x == g.dilation_y == g.dilation_x == g.groups == 1
    size = g.kh == g.kw in (3, 5) and max(g.pad_y, g.pad_x) < g.kh
    frame = (g.h + 16) * (g.w + 16) * max(g.c, g.outputs) * 4
    return plain and size and min(g.c, g.outputs) >= 16 and g.c % LANES == g.outputs % LANES == 0 and frame < CHUNK


Sizes = namedtuple(
    "Sizes", "rows width inside frame_width c outputs oh ow out_width down across side units"
)  # in elements where they are places; side: of a tile of outputs; down, across: tiles; units: rows of tiles a chunk


def _plan(shape, out, taps, pad_y, pad_x, scratch):
    """Return (Sizes, tiles a chunk, frame, values of inputs, of outputs) for images of a shape to those of another."""
    (_, h, w, c), (_, oh, ow, outputs) = shape, out
    side = SIDE + 1 - taps
    down, across = -(-oh // side), -(-ow // side)
    height, width = max(down * side + taps - 1, pad_y + h), max(across * side + taps - 1, pad_x + w)
    tile = SIDE * SIDE * (c + outputs) * 4
    units = max(1, min(shape[0] * down, CHUNK // (tile * across)))
    tiles = -(-units * across // ROWS) * ROWS
    s = Sizes(h, w * c, (pad_y * width + pad_x) * c, width * c, c, outputs, oh, ow, ow * outputs, down, across, side,
              units)  # fmt: skip
    places = height * width * c, SIDE * SIDE * tiles * c, SIDE * SIDE * tiles * outputs
    return s, tiles, *(scratch((n,), np.float32) for n in places)


def forward(x, weight, *rest, geometry, scratch):
    """y = interpolated from values(x) @ values(W), + b."""
    *bias, y, points = rest
    g = geometry
    return _convolution(x, weight, bias[0] if bias else None, y, points, g.kh, g.pad_y, g.pad_x, scratch)


def backward_input(dy, weight, dx, turned, points, *, geometry, scratch):
    """dx = the convolution of dy with the kernel turned by 180 degrees, its channels swapped."""
    g = geometry
    source = weight[::-1, ::-1].transpose(0, 1, 3, 2)
    pads = g.kh - 1 - g.pad_y, g.kh - 1 - g.pad_x
    convolve = _convolution(dy, turned, None, dx, points, g.kh, *pads, scratch)

    def run():
        np.copyto(turned, source)
        convolve()

    return run


def _convolution(x, weight, bias, y, points, taps, pad_y, pad_x, scratch):
    s, tiles, frame, values, products = _plan(x.shape, y.shape, taps, pad_y, pad_x, scratch)
    corner, one = scratch((SIDE * SIDE * LANES,), np.float32), scratch((1,), np.float32)
    start = bias if bias is not None else scratch((s.outputs,), np.float32)
    of_kernel, convolve = _kernel_values(taps), _convolve(taps, _vectors(s))
    views = x.reshape(-1), frame, values, points.reshape(-1), products, corner, start, one, y.reshape(-1)

    def run():
        frame.fill(0)
        one.fill(1)
        if bias is None:
            start.fill(0)
        of_kernel(weight.reshape(-1), points.reshape(-1), corner, s.c * s.outputs)
        convolve(*views, len(x), tiles, s)

    return run


def backward_weight(x, dy, gradient, points, *, geometry, accumulate, scratch):
    """dW (+)= the adjoint of its values: the sum over tiles of values(x)^T @ values of dy."""
    g = geometry
    s, tiles, frame, values, products = _plan(x.shape, dy.shape, g.kh, g.pad_y, g.pad_x, scratch)
    corner = scratch((SIDE * SIDE * LANES,), np.float32)
    add, back = _gradient(g.kh, _vectors(s)), _kernel_gradient(g.kh)
    total = points.reshape(-1)
    views = x.reshape(-1), frame, values, dy.reshape(-1), products, corner, total

    def run():
        frame.fill(0)
        total.fill(0)
        if not accumulate:
            gradient.fill(0)
        add(*views, len(x), tiles, s)
        back(total, gradient.reshape(-1), corner, s.c * s.outputs)

    return run


def _vectors(s):
    return 2 if s.outputs % (2 * LANES) == 0 else 1


@jit
def _enter(x, at, frame, s):
    """Copy an image into the frame."""
    for row in range(s.rows):
        source, target = at + row * s.width, s.inside + row * s.frame_width
        frame[target : target + s.width] = x[source : source + s.width]


@cache
def _input_values():
    """Return the kernel that takes the values of one row of tiles."""
    evaluate = combination(_matrices(3)[0])  # the same for both sizes of kernel

    @jit
    def values_of_row(frame, row, corner, values, place, tiles, s):
        for tile in range(s.across):
            for c in range(0, s.c, LANES):
                at = row * s.side * s.frame_width + tile * s.side * s.c + c
                for j in range(SIDE):
                    column = evaluate(load(SIDE, 1, LANES, frame, at + j * s.c, s.frame_width))
                    store(column, corner, j * LANES, SIDE * LANES)
                for i in range(SIDE):
                    line = evaluate(load(SIDE, 1, LANES, corner, i * SIDE * LANES, LANES))
                    store(line, values, (i * SIDE * tiles + place + tile) * s.c + c, tiles * s.c)

    return values_of_row


@cache
def _kernel_values(taps):
    """Return the kernel that takes the values of a convolution's weights, all channels at once."""
    evaluate = combination(_matrices(taps)[1])

    @jit
    def values_of_kernel(weight, points, corner, size):
        for c in range(0, size, LANES):
            for j in range(taps):
                column = evaluate(load(taps, 1, LANES, weight, j * size + c, taps * size))
                store(column, corner, j * LANES, SIDE * LANES)
            for i in range(SIDE):
                line = evaluate(load(taps, 1, LANES, corner, i * SIDE * LANES, LANES))
                store(line, points, i * SIDE * size + c, size)

    return values_of_kernel


@cache
def _kernel_gradient(taps):
    """Return the kernel that adds what a gradient of values means for the weights."""
    adjoint = combination(_transposed(_matrices(taps)[1]))

    @jit
    def add_gradient(points, gradient, corner, size):
        for c in range(0, size, LANES):
            for j in range(SIDE):
                column = adjoint(load(SIDE, 1, LANES, points, j * size + c, SIDE * size))
                store(column, corner, j * LANES, SIDE * LANES)
            for i in range(taps):
                line = adjoint(load(SIDE, 1, LANES, corner, i * SIDE * LANES, LANES))
                store(line, corner, i * SIDE * LANES, LANES)
            for tap in range(taps * taps):
                at, place = tap * size + c, (tap // taps * SIDE + tap % taps) * LANES
                for k in range(LANES):
                    gradient[at + k] += corner[place + k]

    return add_gradient


@cache
def _convolve(taps, vectors):
    """Return the kernel of a whole convolution, chunk by chunk of rows of tiles."""
    values_of_row, multiply = _input_values(), _multiply(vectors)
    interpolate, side = combination(_matrices(taps)[2]), SIDE + 1 - taps

    @jit
    def convolve(x, frame, values, points, products, corner, bias, one, y, n, tiles, s):
        for first in range(0, n * s.down, s.units):
            units = min(s.units, n * s.down - first)
            for unit in range(units):
                image, row = divmod(first + unit, s.down)
                if row == 0:
                    _enter(x, image * s.rows * s.width, frame, s)
                values_of_row(frame, row, corner, values, unit * s.across, tiles, s)
            multiply(values, points, products, units * s.across, tiles, s.c, s.outputs)
            for unit in range(units):
                image, row = divmod(first + unit, s.down)
                for tile in range(s.across):
                    for c in range(0, s.outputs, LANES):
                        place = (unit * s.across + tile) * s.outputs + c
                        step = tiles * s.outputs
                        for j in range(SIDE):
                            column = interpolate(load(SIDE, 1, LANES, products, place + j * step, SIDE * step))
                            store(column, corner, j * LANES, SIDE * LANES)
                        for i in range(side):
                            line = interpolate(load(SIDE, 1, LANES, corner, i * SIDE * LANES, LANES))
                            line = multiply_add(line, one, 0, 0, bias, c)
                            oy, ox = row * side + i, tile * side
                            out = (image * s.oh + oy) * s.out_width + ox * s.outputs + c
                            if oy < s.oh and ox + side <= s.ow:
                                store(line, y, out, s.outputs)
                            elif oy < s.oh:  # the last tile of a row overhangs
                                store(line, corner, i * SIDE * LANES, LANES)
                                for pixel in range(s.ow - ox):
                                    source = (i * SIDE + pixel) * LANES
                                    target = out + pixel * s.outputs
                                    y[target : target + LANES] = corner[source : source + LANES]

    return convolve


@cache
def _gradient(taps, vectors):
    """Return the kernel total[point] += values(x)^T @ values(dy), chunk by chunk."""
    values_of_row, multiply = _input_values(), _multiply_transposed(vectors)
    spread, side = combination(_transposed(_matrices(taps)[2])), SIDE + 1 - taps

    @jit
    def add(x, frame, values, dy, products, corner, total, n, tiles, s):
        for first in range(0, n * s.down, s.units):
            units = min(s.units, n * s.down - first)
            for unit in range(units):
                image, row = divmod(first + unit, s.down)
                if row == 0:
                    _enter(x, image * s.rows * s.width, frame, s)
                values_of_row(frame, row, corner, values, unit * s.across, tiles, s)
                for tile in range(s.across):
                    for c in range(0, s.outputs, LANES):
                        oy, ox = row * side, tile * side
                        at = (image * s.oh + oy) * s.out_width + ox * s.outputs + c
                        whole = oy + side <= s.oh and ox + side <= s.ow
                        if not whole:
                            for k in range(side * SIDE * LANES):
                                corner[k] = 0
                            for i in range(min(side, s.oh - oy)):
                                for j in range(min(side, s.ow - ox)):
                                    source, target = at + i * s.out_width + j * s.outputs, (i * SIDE + j) * LANES
                                    corner[target : target + LANES] = dy[source : source + LANES]
                        for j in range(side):
                            if whole:
                                column = spread(load(side, 1, LANES, dy, at + j * s.outputs, s.out_width))
                            else:
                                column = spread(load(side, 1, LANES, corner, j * LANES, SIDE * LANES))
                            store(column, corner, j * LANES, SIDE * LANES)
                        place = (unit * s.across + tile) * s.outputs + c
                        for i in range(SIDE):
                            line = spread(load(side, 1, LANES, corner, i * SIDE * LANES, LANES))
                            store(line, products, i * SIDE * tiles * s.outputs + place, tiles * s.outputs)
            multiply(values, products, total, units * s.across, tiles, s.c, s.outputs)

    return add


@cache
def _multiply(vectors):
    """Return the kernel out[point] = a[point] @ b[point].

    Up to ROWS - 1 rows more than asked for are computed, of whatever is there, for which there is room.
    """
    wide = vectors * LANES

    @jit
    def multiply(a, b, out, rows, tiles, depth, width):
        for point in range(SIDE * SIDE):
            for column in range(0, width, wide):
                for row in range(point * tiles, point * tiles + rows, ROWS):
                    acc = zeros(ROWS, vectors, LANES)
                    place = point * depth * width + column
                    for k in range(depth):
                        acc = multiply_add(acc, a, row * depth + k, depth, b, place + k * width)
                    store(acc, out, row * width + column, width)

    return multiply


@cache
def _multiply_transposed(vectors):
    """Return the kernel out[point] += a[point]^T @ b[point]."""
    wide = vectors * LANES

    @jit
    def multiply(a, b, out, rows, tiles, depth, width):
        for point in range(SIDE * SIDE):
            for k in range(0, depth, ROWS):
                for column in range(0, width, wide):
                    acc = load(ROWS, vectors, LANES, out, (point * depth + k) * width + column, width)
                    at, place = point * tiles * depth + k, point * tiles * width + column
                    for row in range(rows):
                        acc = multiply_add(acc, a, at + row * depth, 1, b, place + row * width)
                    store(acc, out, (point * depth + k) * width + column, width)

    return multiply
