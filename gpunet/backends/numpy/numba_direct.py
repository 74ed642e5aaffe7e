"""Convolution by tiles of registers: no patch is ever unfolded. Needs numba.

Each image is copied into a frame with zeros around it. There a row of the kernel meets kw * c numbers that follow each
other, and those of the next output pixel begin stride * c further. So forward is a product of matrices whose left one
overlaps itself, the gradient by weights its transpose, and the gradient by input forward again: of dy, with the kernel
turned, for each remainder of the pixels modulo the stride by the taps that fall on them.
"""

import math
from collections import namedtuple
from functools import cache

import numpy as np

from gpunet.backends.numpy import engine_blocked
from gpunet.backends.numpy.jit import jit
from gpunet.backends.numpy.simd import LANES, REGISTERS, load, multiply_add, store

FRAME = 4 << 20  # bytes of a frame at most: half of the scratch
NARROW = 3  # rows of a gradient's tile at least: fewer leave the processor waiting


def covers(g):
    """Whether all three passes of a convolution run well: whole registers, images that the scratch holds."""
    pairs = [(_forward_axes(g), g.c), *((axes, g.outputs) for axes in _backward_axes(g))]
    frame = max(down.frame * across.frame * c for (down, across), c in pairs)
    whole = g.outputs % 8 == 0 and (g.c % 8 == 0 or g.c < 8)  # a first layer's input gets no gradient, as a rule
    return g.groups == 1 and whole and 4 * frame <= FRAME and _gradient_rows(g) >= NARROW


def forward(x, weight, *rest, geometry, scratch):
    """y[pixel] = b + sum over the kernel's rows of frame[pixel + row] @ W[row]."""
    *bias, y = rest
    return _convolution(x, weight, *(bias or (None,)), y, *_forward_axes(geometry), scratch)


def backward_input(dy, weight, dx, turned, *, geometry, scratch):
    """dx[pixel] = sum over the taps that fall on it of dy @ W^T; of a few channels by the blocked engine."""
    if geometry.c % 8:
        return engine_blocked.backward_input(dy, weight, dx, turned, geometry=geometry, scratch=scratch)
    calls, rest = [], turned.reshape(-1)
    for down, across in _backward_axes(geometry):
        source = weight[down.slice, across.slice].transpose(0, 1, 3, 2)
        matrix, rest = rest[: source.size].reshape(source.shape), rest[source.size :]
        calls.append((np.copyto, (matrix, source)))
        calls.append((_convolution(dy, matrix, None, dx, down, across, scratch), ()))

    def run():
        for call, arguments in calls:
            call(*arguments)

    return run


def backward_weight(x, dy, gradient, *, geometry, accumulate, scratch):
    """dW[row] (+)= sum over pixels of frame[pixel + row]^T dy[pixel]."""
    g = geometry
    down, across = _forward_axes(g)
    frame = scratch((down.frame * across.frame * g.c,), x.dtype)
    rows, lanes = _gradient_rows(g), _lanes(g.outputs)
    vectors = max(v for v in _divisors(g.outputs // lanes) if v == 1 or v * rows <= REGISTERS)
    add, sizes = _gradient(rows, vectors, lanes), _sizes(x, dy, down, across)
    views = x.reshape(-1), frame, dy.reshape(-1), gradient.reshape(-1)

    def run():
        frame.fill(0)
        if not accumulate:
            gradient.fill(0)
        add(*views, g.n, sizes)

    return run


class _Axis:
    """One direction of a convolution: output i takes tap t from input place i * stride + offset + t * step.

    It stands at place first + i * every of the output array. taps: which of the kernel's those are, a range. In the
    frame `lead` zeros come before the input, and tap 0 of output 0 is at place `at`.
    """

    def __init__(self, size, count, taps, *, stride=1, offset=0, step=1, first=0, every=1):
        self.count, self.taps, self.stride, self.step, self.first, self.every = count, taps, stride, step, first, every
        self.lead = max(0, -offset)
        self.at = self.lead + offset
        self.frame = max(self.lead + size, self.at + (count - 1) * stride + (len(taps) - 1) * step + 1)

    @property
    def slice(self):
        """The taps, as an index."""
        return slice(self.taps.start, self.taps.stop if self.taps.stop >= 0 else None, self.taps.step)


def _forward_axes(g):
    """Return the axes, down and across, of the convolution itself."""
    return (
        _Axis(g.h, g.oh, range(g.kh), stride=g.stride_y, offset=-g.pad_y, step=g.dilation_y),
        _Axis(g.w, g.ow, range(g.kw), stride=g.stride_x, offset=-g.pad_x, step=g.dilation_x),
    )


def _backward_axes(g):
    """Return the pairs of axes of the convolutions that make dx, one for each remainder of its pixels."""
    downs = _remainders(g.oh, g.h, g.kh, g.stride_y, g.pad_y, g.dilation_y)
    acrosses = _remainders(g.ow, g.w, g.kw, g.stride_x, g.pad_x, g.dilation_x)
    return [(down, across) for down in downs for across in acrosses]


def _remainders(size, count, taps, stride, pad, dilation):
    """Return an axis a remainder: pixel p takes tap t from place (p + pad - t * dilation) / stride if that is whole."""
    axes, common = [], math.gcd(stride, dilation)
    for first in range(min(stride, count)):
        fall = [t for t in range(taps) if (first + pad - t * dilation) % stride == 0]
        turned = range(fall[-1], fall[0] - 1, -stride // common) if fall else range(0)
        offset = (first + pad - turned[0] * dilation) // stride if fall else 0
        pixels = len(range(first, count, stride))
        axes.append(_Axis(size, pixels, turned, offset=offset, step=dilation // common, first=first, every=stride))
    return axes


Sizes = namedtuple(
    "Sizes",
    "rows width inside frame_width"  # the source's rows, and where they lie in the frame
    " start down across taps tap groups group run"  # in the frame: the outputs' first taps, and what a kernel reads
    " image first out_down out_across oh ow outputs",  # in the output array
)


def _sizes(x, y, down, across):
    """Return the Sizes, in elements, of a convolution from images x to images y."""
    _, rows, width, c = x.shape
    _, height, columns, outputs = y.shape
    row = across.frame * c
    joined = across.step == 1 or len(across.taps) < 2
    return Sizes(
        rows, width * c, (down.lead * across.frame + across.lead) * c, row,
        (down.at * across.frame + across.at) * c, down.stride * row, across.stride * c,
        len(down.taps), down.step * row, 1 if joined else len(across.taps), across.step * c,
        len(across.taps) * c if joined else c,
        height * columns * outputs, (down.first * columns + across.first) * outputs, down.every * columns * outputs,
        across.every * outputs, down.count, across.count, outputs,
    )  # fmt: skip


def _convolution(x, weight, bias, y, down, across, scratch):
    """Return the call for a convolution of images x to those places of y that the axes say."""
    frame = scratch((down.frame * across.frame * x.shape[-1],), x.dtype)
    start = bias if bias is not None else scratch((y.shape[-1],), x.dtype)
    rows, vectors, lanes = _tile(across.count, y.shape[-1])
    convolve, sizes = _product(rows, vectors, lanes), _sizes(x, y, down, across)
    views = x.reshape(-1), frame, weight.reshape(-1), start, y.reshape(-1)

    def run():
        frame.fill(0)
        if bias is None:
            start.fill(0)
        convolve(*views, len(x), sizes)

    return run


def _lanes(outputs):
    return LANES if outputs % LANES == 0 else 8


def _divisors(number, most=4):
    return [d for d in range(1, most + 1) if number % d == 0]


def _tile(pixels, outputs):
    """Return (rows, vectors, lanes): of rows of pixels the least is done twice, and enough sums are under way."""
    lanes, best = _lanes(outputs), (0, 0, 0)
    for rows in range(1, min(pixels, REGISTERS) + 1):
        for vectors in _divisors(outputs // lanes):
            if rows * vectors <= REGISTERS:
                used = pixels / (-(-pixels // rows) * rows)
                reads = min(1, rows * vectors / (rows + vectors))  # a sum needs a read, and so do the operands
                best = max(best, (round(used * min(1, rows * vectors / 8) * reads, 3), -abs(rows - 8), rows, vectors))
    return (*best[2:], lanes)


def _gradient_rows(g):
    """Return how many rows of dW a tile has: a divisor of those that lie together."""
    run = g.kw * g.c if g.dilation_x == 1 else g.c
    return max(_divisors(run, 16 if LANES == 16 else 6))


@jit
def _enter(x, at, frame, s):
    """Copy an image into the frame."""
    for row in range(s.rows):
        source, target = at + row * s.width, s.inside + row * s.frame_width
        frame[target : target + s.width] = x[source : source + s.width]


@cache
def _product(rows, vectors, lanes):
    """Return the kernel y = b + frame @ W, tiles of so many pixels by vectors of outputs."""
    wide = vectors * lanes

    @jit
    def convolve(x, frame, w, b, y, n, s):
        for image in range(n):
            _enter(x, image * s.rows * s.width, frame, s)
            for oy in range(s.oh):
                for column in range(0, s.outputs, wide):
                    for tile in range(0, s.ow, rows):
                        ox = min(tile, s.ow - rows)  # the last one covers pixels of the one before again
                        acc = load(rows, vectors, lanes, b, column, 0)
                        place = column
                        for ky in range(s.taps):
                            for kx in range(s.groups):
                                at = s.start + oy * s.down + ox * s.across + ky * s.tap + kx * s.group
                                for k in range(s.run):
                                    acc = multiply_add(acc, frame, at + k, s.across, w, place)
                                    place += s.outputs
                        out = image * s.image + s.first + oy * s.out_down + ox * s.out_across + column
                        store(acc, y, out, s.out_across)

    return convolve


@cache
def _gradient(rows, vectors, lanes):
    """Return the kernel dW += frame^T @ dy, tiles of so many rows of dW by vectors of outputs."""
    wide = vectors * lanes

    @jit
    def add(x, frame, dy, dw, n, s):
        for image in range(n):
            _enter(x, image * s.rows * s.width, frame, s)
            place = 0
            for ky in range(s.taps):
                for kx in range(s.groups):
                    for k in range(0, s.run, rows):
                        for column in range(0, s.outputs, wide):
                            acc = load(rows, vectors, lanes, dw, place + column, s.outputs)
                            for oy in range(s.oh):
                                at = s.start + oy * s.down + ky * s.tap + kx * s.group + k
                                out = image * s.image + oy * s.out_down + column
                                for ox in range(s.ow):
                                    acc = multiply_add(acc, frame, at + ox * s.across, 1, dy, out + ox * s.outputs)
                            store(acc, dw, place + column, s.outputs)
                        place += rows * s.outputs

    return add
