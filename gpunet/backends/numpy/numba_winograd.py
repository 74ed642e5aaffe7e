"""The passes of `engine_winograd` compiled by numba: transforms in registers, products by register tiles.

Tiles are taken in order, whatever image they belong to, a block at a time: transformed, multiplied by the transformed
weights at each of the size^2 places, transformed back.
"""

from collections import namedtuple
from functools import cache

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpunet.backends.numpy.engine_winograd import FORMS, TILE, turned_geometry
from gpunet.backends.numpy.jit import jit
from gpunet.backends.numpy.simd import LANES, REGISTERS, load, multiply_add, store, zeros

GAP = 16  # elements between two planes, which would else be a power of two apart and share lines of the cache
KINDS = "input", "weight", "output", "dy", "gradient"
INPUT, WEIGHT, OUTPUT, DY, GRADIENT = range(5)
BLOCK = 1 << 12  # channels x tiles of a block
DEEP = 3  # groups of tiles at least, where each block reads and writes all of a gradient
MOST = 6 << 20  # bytes of scratch that a pass takes


def forward(x, weight, *rest, geometry, scratch):
    """y = the output transform of (transformed x) . (transformed W), + b."""
    *bias, y, transformed = rest
    return _convolution(geometry, x, weight, *(bias or (None,)), y, transformed, scratch)


def backward_input(dy, weight, dx, turned, transformed, *, geometry, scratch):
    """dx = the same of dy with W turned by 180 degrees, its channels swapped."""
    back = turned_geometry(geometry)
    call = _convolution(back, dy, turned, None, dx, transformed, scratch)
    if call is None:
        return None
    source = weight[::-1, ::-1].transpose(0, 1, 3, 2)

    def run():
        np.copyto(turned, source)
        call()

    return run


def backward_weight(x, dy, gradient, transformed, *, geometry, accumulate, scratch):
    """dW (+)= the adjoint of the weights' transform of the sum over tiles of (transformed x)^T (transformed dy)."""
    g = geometry
    sizes = _sizes(g, x, transformed, DEEP)
    if sizes is None:
        return None
    size = FORMS[g.kh].size
    frame = scratch((sizes.frame_rows * sizes.frame_width * g.c,), x.dtype)
    other = scratch((sizes.down * sizes.across * TILE * TILE * g.outputs,), x.dtype)
    v, d = (scratch((size * size * plane,), x.dtype) for plane in (sizes.v_plane, sizes.m_plane))
    out = scratch((g.kh * g.kw * LANES,), x.dtype)
    vectors = _divisor(g.outputs // LANES, 4 if REGISTERS >= 16 else 3)
    rows = max(r for r in (1, 2, 4, 8, 16) if r * vectors <= REGISTERS)
    add = _gradient(g.kh, rows, vectors, LANES)
    views = x.reshape(-1), frame, dy.reshape(-1), other, v, d, transformed.reshape(-1), gradient.reshape(-1), out

    def run():
        frame.fill(0)
        other.fill(0)
        transformed.fill(0)
        add(*views, g.n, accumulate, sizes)

    return run


Sizes = namedtuple(
    "Sizes",
    "rows width c oh ow outputs inside frame_rows frame_width down across block v_plane m_plane u_plane",
)


def _sizes(g, x, transformed, least=1):
    """Return the Sizes of a convolution, or None where it is not for this module."""
    if x.dtype != np.float32 or g.c % LANES or g.outputs % LANES:
        return None
    size = FORMS[g.kh].size
    down, across = -(-g.oh // TILE), -(-g.ow // TILE)
    frame_rows, frame_width = down * TILE + g.kh - 1, across * TILE + g.kw - 1
    frame_rows, frame_width = max(frame_rows, g.pad_y + g.h), max(frame_width, g.pad_x + g.w)
    frames = 4 * (frame_rows * frame_width * g.c + down * across * TILE * TILE * g.outputs)
    block = max(BLOCK // min(g.c, g.outputs), least * REGISTERS)
    block = min(block, (MOST - frames) // (4 * size * size * (g.c + g.outputs)))
    block = max(block, REGISTERS) // REGISTERS * REGISTERS
    if frames + 4 * size * size * (g.c + g.outputs) * block > MOST:
        return None
    block = min(block, -(-g.n * down * across // REGISTERS) * REGISTERS)
    return Sizes(
        g.h, g.w, g.c, g.oh, g.ow, g.outputs, (g.pad_y * frame_width + g.pad_x) * g.c, frame_rows, frame_width,
        down, across, block, block * g.c + GAP, block * g.outputs + GAP, transformed.shape[1],
    )  # fmt: skip


def _divisor(number, most):
    return max(d for d in range(1, most + 1) if number % d == 0)


def _convolution(g, x, weight, bias, y, transformed, scratch):
    sizes = _sizes(g, x, transformed)
    if sizes is None:
        return None
    size = FORMS[g.kh].size
    frame = scratch((sizes.frame_rows * sizes.frame_width * g.c,), x.dtype)
    v, m = (scratch((size * size * plane,), x.dtype) for plane in (sizes.v_plane, sizes.m_plane))
    out = scratch((TILE * TILE * LANES,), x.dtype)
    start = bias if bias is not None else scratch((g.outputs,), x.dtype)
    vectors = _divisor(g.outputs // LANES, 4 if REGISTERS >= 16 else 3)
    rows = REGISTERS // vectors
    prepare, convolve = _weights(g.kh, vectors, LANES), _forward(g.kh, rows, vectors, LANES)
    values = transformed.reshape(-1)
    views = x.reshape(-1), frame, values, start, y.reshape(-1), v, m, out
    flat = weight.reshape(-1)

    def run():
        frame.fill(0)
        if bias is None:
            start.fill(0)
        prepare(flat, values, sizes)
        convolve(*views, g.n, sizes)

    return run


@jit
def _enter(x, image, frame, s):
    """Copy an image into the frame of zeros."""
    for row in range(s.rows):
        source = (image * s.rows + row) * s.width * s.c
        target = s.inside + row * s.frame_width * s.c
        frame[target : target + s.width * s.c] = x[source : source + s.width * s.c]


@jit
def _enter_dy(dy, image, frame, s):
    """Copy an image of dy into a frame of whole tiles."""
    for row in range(s.oh):
        source = (image * s.oh + row) * s.ow * s.outputs
        target = row * s.across * TILE * s.outputs
        frame[target : target + s.ow * s.outputs] = dy[source : source + s.ow * s.outputs]


@cache
def _weights(taps, vectors, lanes):
    """Return the kernel that transforms W; of each group of columns that a tile multiplies, the numbers follow."""
    size, wide = taps + TILE - 1, vectors * lanes

    @jit
    def prepare(w, u, s):
        filters = s.c * s.outputs
        for c in range(s.c):
            for column in range(0, s.outputs, lanes):
                group = column // wide * wide
                to = group * s.c + c * wide + column - group
                transform(w, c * s.outputs + column, taps * filters, filters, u, to, size * s.u_plane, s.u_plane,
                          lanes, taps, WEIGHT)  # fmt: skip

    return prepare


@cache
def _forward(taps, rows, vectors, lanes):
    """Return the kernel of a convolution with transformed weights u."""
    size, wide = taps + TILE - 1, vectors * lanes

    @jit
    def convolve(x, frame, u, b, y, v, m, out, n, s):
        tiles = s.down * s.across
        for first in range(0, n * tiles, s.block):
            count = min(s.block, n * tiles - first)
            for t in range(count):
                image, place = divmod(first + t, tiles)
                if place == 0:
                    _enter(x, image, frame, s)
                ty, tx = divmod(place, s.across)
                at = (ty * s.frame_width + tx) * TILE * s.c
                for c in range(0, s.c, lanes):
                    transform(frame, at + c, s.frame_width * s.c, s.c, v, t * s.c + c, size * s.v_plane, s.v_plane,
                              lanes, taps, INPUT)  # fmt: skip
            for k in range(size * size):
                for column in range(0, s.outputs, wide):
                    for t in range(0, count, rows):  # what lies beyond the count is multiplied, and not read
                        acc = zeros(rows, vectors, lanes)
                        at, place = k * s.v_plane + t * s.c, k * s.u_plane + column * s.c
                        for c in range(s.c):
                            acc = multiply_add(acc, v, at + c, s.c, u, place + c * wide)
                        store(acc, m, k * s.m_plane + t * s.outputs + column, s.outputs)
            for t in range(count):
                image, place = divmod(first + t, tiles)
                ty, tx = divmod(place, s.across)
                high, broad = min(TILE, s.oh - ty * TILE), min(TILE, s.ow - tx * TILE)
                corner = ((image * s.oh + ty * TILE) * s.ow + tx * TILE) * s.outputs
                for column in range(0, s.outputs, lanes):
                    transform(m, t * s.outputs + column, size * s.m_plane, s.m_plane, out, 0, TILE * lanes, lanes,
                              lanes, taps, OUTPUT)  # fmt: skip
                    for i in range(high):
                        for j in range(broad):
                            to, at = corner + (i * s.ow + j) * s.outputs + column, (i * TILE + j) * lanes
                            for lane in range(lanes):
                                y[to + lane] = out[at + lane] + b[column + lane]

    return convolve


@cache
def _gradient(taps, rows, vectors, lanes):
    """Return the kernel of dW; u, its transform, begins as zeros."""
    size, wide = taps + TILE - 1, vectors * lanes

    @jit
    def add(x, frame, dy, other, v, d, u, dw, out, n, accumulate, s):
        tiles = s.down * s.across
        for first in range(0, n * tiles, s.block):
            count = min(s.block, n * tiles - first)
            for t in range(count):
                image, place = divmod(first + t, tiles)
                if place == 0:
                    _enter(x, image, frame, s)
                    _enter_dy(dy, image, other, s)
                ty, tx = divmod(place, s.across)
                at = (ty * s.frame_width + tx) * TILE * s.c
                for c in range(0, s.c, lanes):
                    transform(frame, at + c, s.frame_width * s.c, s.c, v, t * s.c + c, size * s.v_plane, s.v_plane,
                              lanes, taps, INPUT)  # fmt: skip
                row = s.across * TILE * s.outputs
                at = ty * TILE * row + tx * TILE * s.outputs
                for column in range(0, s.outputs, lanes):
                    transform(other, at + column, row, s.outputs, d, t * s.outputs + column, size * s.m_plane,
                              s.m_plane, lanes, taps, DY)  # fmt: skip
            for k in range(size * size):
                for column in range(0, s.outputs, wide):
                    for c in range(0, s.c, rows):
                        place = k * s.u_plane + c * s.outputs + column
                        acc = load(rows, vectors, lanes, u, place, s.outputs)
                        for t in range(count):
                            at, to = k * s.v_plane + t * s.c + c, k * s.m_plane + t * s.outputs + column
                            acc = multiply_add(acc, v, at, 1, d, to)
                        store(acc, u, place, s.outputs)
        filters = s.c * s.outputs
        for f in range(0, filters, lanes):
            transform(u, f, size * s.u_plane, s.u_plane, out, 0, taps * lanes, lanes, lanes, taps, GRADIENT)
            for k in range(taps * taps):
                for lane in range(lanes):
                    before = dw[k * filters + f + lane] if accumulate else np.float32(0)
                    dw[k * filters + f + lane] = before + out[k * lanes + lane]

    return add


@intrinsic(prefer_literal=True)
def transform(_, x, at, down, across, y, to, to_down, to_across, lanes, taps, kind):
    """y = M X M^T for M of a form, by lanes: X[i, j] is x[at + i*down + j*across :][:lanes], Y likewise in y."""
    matrix = getattr(FORMS[taps.literal_value], KINDS[kind.literal_value])
    vector, index = ir.VectorType(ir.FloatType(), lanes.literal_value), ir.IntType(64)

    def generate(context, builder, signature, arguments):
        x_value, at, down, across, y_value, to, to_down, to_across, *_ = arguments

        def place(kind, array, start, i, step, j, other):
            """Return the pointer to place (i, j)."""
            moved = builder.add(builder.mul(ir.Constant(index, i), step), builder.mul(ir.Constant(index, j), other))
            data = context.make_array(kind)(context, builder, array).data
            return builder.bitcast(builder.gep(data, [builder.add(start, moved)]), vector.as_pointer())

        columns, number = [], range(matrix.shape[1])
        for j in number:
            column = [builder.load(place(signature.args[0], x_value, at, i, down, j, across)) for i in number]
            for value in column:
                value.align = 4
            columns.append(_apply(builder, vector, matrix, column))
        for i, row in enumerate(zip(*columns, strict=True)):
            for j, value in enumerate(_apply(builder, vector, matrix, list(row))):
                builder.store(value, place(signature.args[4], y_value, to, i, to_down, j, to_across)).align = 4
        return context.get_dummy_value()

    sizes = [types.int64] * 3
    return types.none(x, *sizes, y, *sizes, lanes, taps, kind), generate


def _apply(builder, vector, matrix, values):
    """Return matrix @ values; points p and -p share the work: their rows or columns differ in signs only."""
    matrix, values = matrix.copy(), list(values)
    for a, b in _pairs(matrix.T):
        same = matrix[:, a] == matrix[:, b]
        total, difference = builder.fadd(values[a], values[b]), builder.fsub(values[a], values[b])
        values[a], values[b] = total, difference
        matrix[:, b] = np.where(same, 0, matrix[:, a])
        matrix[:, a] = np.where(same, matrix[:, a], 0)
    found = {}
    for a, b in _pairs(matrix):
        same = matrix[a] == matrix[b]
        even, odd = (_sum(builder, vector, np.where(part, matrix[a], 0), values) for part in (same, ~same))
        found[a], found[b] = builder.fadd(even, odd), builder.fsub(even, odd)
    return [found[i] if i in found else _sum(builder, vector, row, values) for i, row in enumerate(matrix)]


def _pairs(rows):
    """Return (a, b) of the rows that are alike but for some signs."""
    found, taken = [], set()
    for a, first in enumerate(rows):
        for b in range(a + 1, len(rows)):
            same, opposite = (first == rows[b]) & (first != 0), (first == -rows[b]) & (first != 0)
            alike = np.array_equal(abs(first), abs(rows[b])) and same.any() and opposite.any()
            if alike and not taken & {a, b}:
                found.append((a, b))
                taken |= {a, b}
    return found


def _sum(builder, vector, factors, values):
    """Return the sum of factors x values."""
    kind = ir.FunctionType(vector, [vector] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{vector.count}f32")
    total = None
    for j in sorted(np.flatnonzero(factors), key=lambda j: factors[j] != 1):  # a factor of 1 first: it is free
        factor, value = float(factors[j]), values[j]
        constant = ir.Constant(vector, [ir.Constant(vector.element, factor)] * vector.count)
        if total is None:
            total = value if factor == 1 else builder.fmul(value, constant)
        elif abs(factor) == 1:
            total = builder.fadd(total, value) if factor > 0 else builder.fsub(total, value)
        else:
            total = builder.call(fma, [value, constant, total])
    return total
