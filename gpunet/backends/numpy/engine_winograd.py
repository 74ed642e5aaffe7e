"""Convolution of 3 x 3 or 5 x 5 taps at stride 1 by Winograd's minimal filtering, F(4x4, 3x3) and F(4x4, 5x5).

A tile of 4 x 4 outputs is a product of polynomials: taken at size = taps + 3 points, multiplied there, interpolated.
Per channel that is size^2 products in place of 16 taps^2, 4 and 6.25 times fewer, and the products of all tiles are
size^2 plain GEMMs (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016). dx is a convolution of dy
with the weights turned; dW is the adjoint: the same transforms, transposed. Tiles at the edge may be partial.

Results are rounded otherwise than plain sums: float32 loses about one decimal digit (tests/test_conv_engines.py).
`numba_winograd` has the same passes, compiled, where that extra is there.
"""

from fractions import Fraction

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpunet.backends.numpy.engine_blocked import bias_steps
from gpunet.backends.numpy.scratch import runner

TILE = 4  # outputs of a tile in each direction
BLOCK = 1 << 12  # channels x tiles of a block, which then lies in the second-level cache
ROWS = 64  # tiles of a block at least: the rows of each GEMM
PLANES = 5 << 20  # bytes of a block: the rest of the scratch is for the two below
PRODUCT = 1 << 20  # bytes of partial gradients at least: one plane
PIECE = 1 << 11  # weights that are transformed at a time


class Form:
    """The matrices of F(4, taps) by evaluation points and infinity; each transform is M X M^T.

    Points near 1, with their negatives and reciprocals, keep powers and factors, and so the rounding errors, small:
    0, +-2/3, +-3/2 has half the error of the usual 0, +-1, +-2.
    """

    def __init__(self, taps, points):
        self.taps, self.size = taps, TILE + taps - 1
        points = [Fraction(p) for p in points]
        others = [[q for q in points if q != p] for p in points]
        degree = self.size - 1
        infinity = [0] * degree + [1]
        evaluate = [[p**i for i in range(TILE)] for p in points] + [infinity[-TILE:]]
        weight = [
            [p**i / _product(p - q for q in rest) for i in range(taps)] for p, rest in zip(points, others, strict=True)
        ]
        self.input = _array([_expanded(rest, self.size) for rest in others] + [_expanded(points, self.size)])
        self.weight = _array([*weight, infinity[-taps:]])
        self.output = np.ascontiguousarray(_array(evaluate).T)
        self.dy, self.gradient = _array(evaluate), np.ascontiguousarray(self.weight.T)


def _product(numbers):
    total = Fraction(1)
    for number in numbers:
        total *= number
    return total


def _expanded(roots, length):
    """Return the coefficients of the product of (x - root), lowest first."""
    found = [Fraction(1)]
    for root in roots:
        found = [a - root * b for a, b in zip([0, *found], [*found, 0], strict=True)]
    return [*found, *[Fraction(0)] * (length - len(found))]


def _array(rows):
    return np.array([[float(v) for v in row] for row in rows])


FORMS = {3: Form(3, (0, "2/3", "-2/3", "3/2", "-3/2")), 5: Form(5, (0, 1, -1, 2, -2, "1/2", "-1/2"))}


def covers(g, itemsize=4):
    """Whether this engine computes a convolution: square windows of 3 or 5, stride 1, a row of tiles in the scratch."""
    square = g.kh == g.kw and g.kh in FORMS and g.pad_y < g.kh and g.pad_x < g.kw
    if not square or not g.groups == g.stride_y == g.stride_x == g.dilation_y == g.dilation_x == 1:
        return False
    if g.c * g.outputs * itemsize > PLANES // 4:  # one plane of a partial gradient
        return False
    return min(_most(v, itemsize) for v in (g, turned_geometry(g))) >= 1


def turned_geometry(g):
    """Return the geometry of the convolution of dy that gives dx."""
    pads = g.kh - 1 - g.pad_y, g.kw - 1 - g.pad_x
    return type(g)(g.n, g.oh, g.ow, g.outputs, g.h, g.w, g.kh, g.kw, 1, 1, *pads, 1, 1, 1, g.c)


def products(g):
    """Return the products of a covered convolution over those of plain sums, partial tiles counted."""
    tiles = -(-g.oh // TILE) * -(-g.ow // TILE)
    return FORMS[g.kh].size ** 2 * tiles / (g.kh * g.kw * g.oh * g.ow)


def forward(x, weight, *rest, geometry, scratch):
    """y = the output transform of (transformed x) . (transformed W), + b."""
    *bias, y, transformed = rest
    begin, add = bias_steps(bias[0], y.reshape(-1, geometry.outputs), scratch) if bias else ([], None)
    begin = [(np.copyto, *pair, None) for pair in begin]
    return runner(begin + _steps(geometry, x, weight, y, transformed, add, scratch))


def backward_input(dy, weight, dx, turned, transformed, *, geometry, scratch):
    """dx = the same of dy with W turned by 180 degrees, its channels swapped."""
    turn = (np.copyto, turned, weight[::-1, ::-1].transpose(0, 1, 3, 2), None)
    return runner([turn, *_steps(turned_geometry(geometry), dy, turned, dx, transformed, None, scratch)])


def backward_weight(x, dy, gradient, transformed, *, geometry, accumulate, scratch):
    """dW (+)= the adjoint of the weights' transform of the sum over tiles of (transformed x)^T (transformed dy)."""
    g, form, dtype = geometry, FORMS[geometry.kh], x.dtype
    total = _planes(transformed, form.size, g).reshape(form.size, form.size, g.c, g.outputs)
    blocks = _Blocks(g, x, scratch)
    some = max(1, min(form.size, PRODUCT // (g.c * g.outputs * dtype.itemsize)))
    product = scratch((some, g.c, g.outputs), dtype)
    steps = blocks.begin()
    for number, block in enumerate(blocks):
        steps += blocks.enter(x, block)
        v = blocks.planes(0, form.size, form.size, g.c, block).transpose(0, 1, 3, 2)
        steps += blocks.enter_outputs(dy, block)
        d = blocks.planes(1, form.size, form.size, g.outputs, block)
        for i in range(form.size):
            for j in range(0, form.size, some):
                a, b, target = v[i, j : j + some], d[i, j : j + some], total[i, j : j + some]
                if number == 0:
                    steps.append((np.matmul, a, b, target))
                else:
                    part = product[: len(a)]
                    steps += [(np.matmul, a, b, part), (np.add, target, part, target)]
    piece = scratch((g.kh, g.kw, PIECE), dtype)
    middle = scratch((form.size, g.kh, PIECE), dtype)
    source, target = (a.reshape(*a.shape[:2], -1) for a in (_planes(transformed, form.size, g), gradient))
    for start in range(0, g.c * g.outputs, PIECE):
        here, there = source[:, :, start : start + PIECE], target[:, :, start : start + PIECE]
        part = piece[:, :, : here.shape[2]]
        steps += _transform(form.gradient, here, middle[:, :, : here.shape[2]], part)
        steps.append((np.add, there, part, there) if accumulate else (np.copyto, there, part, None))
    return runner(steps)


def _steps(g, x, weight, y, transformed, add_bias, scratch):
    """Return the steps of y = the convolution of x."""
    form, dtype = FORMS[g.kh], x.dtype
    u, w = _planes(transformed, form.size, g), weight.reshape(g.kh, g.kw, -1)
    blocks = _Blocks(g, x, scratch)
    middle = scratch((g.kh, form.size, PIECE), dtype)
    steps = blocks.begin()
    for start in range(0, w.shape[2], PIECE):
        here, there = w[:, :, start : start + PIECE], u[:, :, start : start + PIECE]
        steps += _transform(form.weight, here, middle[:, :, : here.shape[2]], there)
    u = u.reshape(form.size, form.size, g.c, g.outputs)
    for block in blocks:
        steps += blocks.enter(x, block)
        v, m = (blocks.planes(k, form.size, form.size, c, block) for k, c in ((0, g.c), (1, g.outputs)))
        steps.append((np.matmul, v, u, m))
        steps += blocks.leave(y, block)
        if add_bias is not None:
            steps += add_bias(blocks.part(y, block).reshape(-1, g.outputs))
    return steps


def _planes(transformed, size, g):
    """View the workspace as (size, size, c * outputs), a gap after each plane."""
    return transformed.reshape(size, size, -1)[:, :, : g.c * g.outputs]


def _transform(matrix, source, middle, target):
    """Return the steps of target[:, :, k] = M source[:, :, k] M^T; middle (source's columns, target's rows, k)."""
    matrix = matrix.astype(source.dtype)
    return [
        (np.matmul, matrix, source.transpose(1, 0, 2), middle),
        (np.matmul, matrix, middle.transpose(1, 0, 2), target),
    ]


def _most(g, itemsize):
    """Return how many rows of tiles a block may have at most."""
    size, across = FORMS[g.kh].size, -(-g.ow // TILE)
    return PLANES // (itemsize * (3 * size * size + TILE * size) * max(g.c, g.outputs) * across)


class _Blocks:
    """Iterates over (first image, images, first row of tiles, rows of tiles); their planes lie in scratch.

    Planes are (size, size, tiles, channels). There are two sets: a step of a transform reads one and writes the other.
    """

    def __init__(self, g, x, scratch):
        self.g, self.form = g, FORMS[g.kh]
        self.down, self.across = -(-g.oh // TILE), -(-g.ow // TILE)
        rows = max(1, min(max(ROWS, BLOCK // g.c) // self.across, _most(g, x.itemsize)))
        self.images, self.rows = max(1, min(rows // self.down, g.n)), min(rows, self.down)
        tiles, size = self.images * self.rows * self.across, self.form.size
        self.padded = scratch((self.images, self.rows * TILE + g.kh - 1, self.across * TILE + g.kw - 1, g.c), x.dtype)
        self.sets = [scratch((size * size * tiles * max(g.c, g.outputs),), x.dtype) for _ in range(2)]
        self.narrow = scratch((TILE * size * tiles * g.outputs,), x.dtype)
        self.zero = np.zeros((), x.dtype)

    def __iter__(self):
        for i in range(0, self.g.n, self.images):
            for top in range(0, self.down, self.rows):
                yield i, min(self.images, self.g.n - i), top, min(self.rows, self.down - top)

    def begin(self):
        """Return the steps before the first block."""
        return [(np.copyto, self.padded, self.zero, None)]

    def planes(self, which, rows, columns, channels, block, memory=None):
        """Return one of the sets as planes for a block."""
        memory = self.sets[which] if memory is None else memory
        tiles = block[1] * block[3] * self.across
        return memory[: rows * columns * tiles * channels].reshape(rows, columns, tiles, channels)

    def part(self, y, block):
        """Return the outputs of a block."""
        i, images, top, rows = block
        return y[i : i + images, top * TILE : (top + rows) * TILE]

    def enter(self, x, block):
        """Return the steps that leave a block of x, transformed, in set 0."""
        (i, images, top, rows), g, size = block, self.g, self.form.size
        first, need = top * TILE - g.pad_y, rows * TILE + g.kh - 1
        low, high = (min(max(edge - first, 0), need) for edge in (0, g.h))
        wide = min(g.w, self.padded.shape[2] - g.pad_x)
        inside = self.padded[:images, low:high, g.pad_x : g.pad_x + wide]
        steps = [(np.copyto, inside, x[i : i + images, first + low : first + high, :wide], None)]
        if self.rows < self.down:  # rows beyond the image hold another block's pixels
            edges = self.padded[:images, :low], self.padded[:images, high:need]
            steps += [(np.copyto, edge, self.zero, None) for edge in edges if edge.size]
        sn, sh, sw, sc = self.padded.strides
        shape = size, size, images, rows, self.across, g.c
        windows = as_strided(self.padded, shape, (sh, sw, sn, TILE * sh, TILE * sw, sc))
        v, middle = (self.planes(k, size, size, g.c, block) for k in (0, 1))
        return [*steps, (np.copyto, v.reshape(shape), windows, None), *self._transformed(self.form.input, v, middle, v)]

    def enter_outputs(self, dy, block):
        """Return the steps that leave a block of dy, transformed, in set 1."""
        size, k = self.form.size, self.g.outputs
        tiles, d = self.planes(1, TILE, TILE, k, block), self.planes(1, size, size, k, block)
        middle = self.planes(None, TILE, size, k, block, self.narrow)
        whole = self.g.oh % TILE == self.g.ow % TILE == 0
        steps = [] if whole else [(np.copyto, tiles, self.zero, None)]
        steps += [(np.copyto, a, b, None) for a, b in self._pixels(tiles, dy, block)]
        return steps + self._transformed(self.form.dy, tiles, middle, d)

    def leave(self, y, block):
        """Return the steps that transform set 1 back and leave its block in y."""
        size, k = self.form.size, self.g.outputs
        m, tiles = self.planes(1, size, size, k, block), self.planes(0, TILE, TILE, k, block)
        steps = self._transformed(self.form.output, m, self.planes(None, size, TILE, k, block, self.narrow), tiles)
        return steps + [(np.copyto, b, a, None) for a, b in self._pixels(tiles, y, block)]

    def _pixels(self, tiles, y, block):
        """Yield (pixel (i, j) of all tiles, where these lie in y), but for those beyond the edge."""
        part = self.part(y, block)
        tiles = tiles.reshape(TILE, TILE, block[1], block[3], self.across, -1)
        for i in range(TILE):
            for j in range(TILE):
                there = part[:, i::TILE, j::TILE]
                if there.size:
                    yield tiles[i, j, :, : there.shape[1], : there.shape[2]], there

    def _transformed(self, matrix, source, middle, target):
        flat = (a.reshape(*a.shape[:2], -1) for a in (source, middle, target))
        return _transform(matrix, *flat)
