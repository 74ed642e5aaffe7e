"""Convolution on NumPy by blocks: patches of a few hundred output pixels are unfolded and multiplied in the cache.

Each function is called once with the real arrays, lays out its blocks and returns the call to replay. One layer
(50 images of 32x32x64 to 64 channels, 3x3) unfolds 118 MB; in blocks of 1 MB it never leaves the second-level cache.
"""

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpunet.backends.numpy.scratch import runner
from gpunet.backends.numpy.values import reached

COLUMNS = 1 << 20  # bytes of patches a block
DEEP_COLUMNS = 4 << 20  # and where the weights' gradient is summed over blocks: fewer sums
PRODUCT = 1 << 19  # bytes of a partial gradient
TILE = 4096  # elements of the bias row repeated, so that an addition runs over long rows


def forward(x, weight, *rest, geometry, scratch):
    """y = patches @ W + b."""
    g = geometry
    *bias, y = rest
    matrix, out = weight.reshape(g.depth, g.outputs), y.reshape(g.rows, g.outputs)
    add_bias = bias_steps(bias[0], out, scratch) if bias else None
    return _multiply(g, x, matrix, out, add_bias, scratch)


def backward_input(dy, weight, dx, turned, *, geometry, scratch):
    """dx = patches of dy @ turned W at stride 1; elsewhere dy @ W^T, added back to the pixels each product read."""
    g = geometry
    if g.pointwise:
        matrix, a, out = weight.reshape(g.depth, g.outputs).T, dy.reshape(g.rows, g.outputs), dx.reshape(g.rows, g.c)
        return lambda: np.matmul(a, matrix, out=out)
    pad_y = g.dilation_y * (g.kh - 1) - g.pad_y
    pad_x = g.dilation_x * (g.kw - 1) - g.pad_x
    if g.stride_y == g.stride_x == 1 and pad_y >= 0 and pad_x >= 0:
        return _rotated(g, dy, weight, dx, turned, pad_y, pad_x, scratch)
    return _folded(g, dy, weight, dx, scratch)


def backward_weight(x, dy, gradient, *, geometry, accumulate, scratch):
    """dW = sum over blocks of patches^T @ dy, a few hundred rows of dW at a time."""
    g = geometry
    rows, out = dy.reshape(g.rows, g.outputs), gradient.reshape(g.depth, g.outputs)
    depth = max(1, min(g.depth, PRODUCT // (g.outputs * out.itemsize)))
    product = scratch((depth, g.outputs), out.dtype)
    begin, blocks = _blocks(g, x, scratch, DEEP_COLUMNS)
    steps = []
    for number, (fills, columns, start) in enumerate(blocks):
        part = rows[start : start + len(columns)]
        steps += fills
        for d in range(0, g.depth, depth):
            a, target = columns[:, d : d + depth].T, out[d : d + depth]
            if number == 0 and not accumulate:
                steps.append((np.matmul, a, part, target))
            else:
                some = product[: len(target)]
                steps += [(np.matmul, a, part, some), (np.add, target, some, target)]
    return _replayed(begin, steps)


def _multiply(g, x, matrix, out, finish, scratch):
    """Return the call that computes out = patches(x) @ matrix block by block, then `finish` on each."""
    if g.pointwise:
        begin, blocks = [], [([], x.reshape(g.rows, g.c), 0)]
    else:
        begin, blocks = _blocks(g, x, scratch, COLUMNS)
    steps = []
    for fills, columns, start in blocks:
        part = out[start : start + len(columns)]
        steps += [*fills, (np.matmul, columns, matrix, part)]
        if finish:
            steps += finish[1](part)
    return _replayed([*begin, *(finish[0] if finish else [])], steps)


def _replayed(begin, steps):
    """Return the call that copies the pairs (target, source) of `begin`, then runs steps."""
    return runner([(np.copyto, *pair, None) for pair in begin] + steps)


def _blocks(g, x, scratch, columns_bytes):
    """Return (copies at the start of a replay, [(copies that fill the block's columns, columns, first row)])."""
    band_bytes = g.ow * g.depth * x.itemsize
    image_bytes = g.oh * band_bytes
    images = max(1, min(g.n, columns_bytes // image_bytes))
    bands = g.oh if image_bytes <= columns_bytes else max(1, columns_bytes // band_bytes)
    columns = scratch((images * bands * g.ow, g.depth), x.dtype)
    zero = np.zeros((), x.dtype)
    begin, blocks = [], []
    need = (bands - 1) * g.stride_y + (g.kh - 1) * g.dilation_y + 1  # input rows that a band reads
    padded = None
    if g.pad_y or g.pad_x:
        padded = scratch((images, need, g.w + 2 * g.pad_x, g.c), x.dtype)
        begin.append((padded, zero))
    for i in range(0, g.n, images):
        count = min(images, g.n - i)
        for top in range(0, g.oh, bands):
            band = min(bands, g.oh - top)
            first = top * g.stride_y - g.pad_y
            low, high = (min(max(edge - first, 0), need) for edge in (0, g.h))  # the band's rows in the image
            group, fills = x[i : i + count, first + low : first + high], []
            if padded is not None:
                fills.append((np.copyto, padded[:count, low:high, g.pad_x : g.pad_x + g.w], group, None))
                if bands < g.oh:  # rows beyond the image hold another band's pixels
                    edges = (padded[:count, :low], padded[:count, high:])
                    fills += [(np.copyto, edge, zero, None) for edge in edges if edge.size]
                group = padded[:count]
            rows = count * band * g.ow
            patches = _patches(g, group, band)
            fills.append((np.copyto, columns[:rows].reshape(patches.shape), patches, None))
            blocks.append((fills, columns[:rows], (i * g.oh + top) * g.ow))
    return begin, blocks


def _patches(g, images, band):
    """Return the view (images, band, ow, kh, kw * c) of the first `band` rows of patches."""
    sn, sh, sw, sc = images.strides
    shape = (len(images), band, g.ow, g.kh, g.kw, g.c)
    strides = (sn, sh * g.stride_y, sw * g.stride_x, sh * g.dilation_y, sw * g.dilation_x, sc)
    if g.dilation_x == 1:  # kw pixels in a row: one run of bytes
        shape, strides = (*shape[:4], g.kw * g.c), (*strides[:4], sc)
    return as_strided(images, shape, strides)


def bias_steps(bias, out, scratch):
    """Return (copies that repeat the bias row, block -> steps that add it)."""
    c = out.shape[1]
    repeat = max(1, TILE // c)
    tile = scratch((repeat, c), out.dtype)

    def add(part):
        whole = len(part) // repeat * repeat
        steps = []
        if whole:
            long = part[:whole].reshape(-1, repeat * c)
            steps.append((np.add, long, tile.reshape(-1), long))
        if whole < len(part):
            steps.append((np.add, part[whole:], tile[: len(part) - whole], part[whole:]))
        return steps

    return [(tile, bias)], add


def _rotated(g, dy, weight, dx, turned, pad_y, pad_x, scratch):
    """dx as a stride-1 convolution of dy with W turned by 180 degrees, its channels swapped."""
    back = type(g)(
        g.n, g.oh, g.ow, g.outputs, g.h, g.w, g.kh, g.kw, 1, 1, pad_y, pad_x, g.dilation_y, g.dilation_x, 1, g.c
    )
    turn = (turned, weight[::-1, ::-1].transpose(0, 1, 3, 2))
    matrix, out = turned.reshape(back.depth, g.c), dx.reshape(back.rows, g.c)
    return _multiply(back, dy, matrix, out, ([turn], lambda part: []), scratch)


def _folded(g, dy, weight, dx, scratch):
    """dx by products a patch, each added to its pixel: what a stride above 1 needs."""
    row_bytes = g.ow * g.depth * dy.itemsize
    images = max(1, min(g.n, COLUMNS // (g.oh * row_bytes)))
    bands = min(g.oh, max(1, COLUMNS // row_bytes))
    columns = scratch((images, bands, g.ow, g.kh, g.kw, g.c), dy.dtype)
    transposed = weight.reshape(g.depth, g.outputs).T
    zero = np.zeros((), dy.dtype)
    steps = []
    for i in range(0, g.n, images):
        target = dx[i : i + images]
        steps.append((np.copyto, target, zero, None))
        for top in range(0, g.oh, bands):
            rows = dy[i : i + images, top : top + bands]
            products = columns[: len(rows), : rows.shape[1]]
            steps.append((np.matmul, rows.reshape(-1, g.outputs), transposed, products.reshape(-1, g.depth)))
            first = top * g.stride_y - g.pad_y
            for ky in range(g.kh):
                ys, to_y = reached(rows.shape[1], g.h, g.stride_y, ky * g.dilation_y + first)
                for kx in range(g.kw):
                    xs, to_x = reached(g.ow, g.w, g.stride_x, kx * g.dilation_x - g.pad_x)
                    pixels = target[:, to_y, to_x]
                    if pixels.size:
                        steps.append((np.add, pixels, products[:, ys, xs, ky, kx], pixels))
    return _replayed([], steps)
