"""Batch normalisation in blocks of 128 KB with flat operands: 3 to 13 times as fast as the definitions.

Channel rows are repeated to whole blocks (a broadcast row costs a loop a pixel), sums over pixels are `ones @ X`.
Figures are ns an element, definition -> twin, 50 images of 32x32x64 in float32, NumPy 2.4 on one core of an AMD EPYC
(Zen 3) that others used too, the best of many. Lost: two passes for the moments (+15 %), np.einsum for squares (+10 %),
sums and squares side by side for one product (+60 %), rows broadcast over lines of 512 to 4096 (+30 %).
"""

import numpy as np

from gpunet.backends.numpy.scratch import BLOCK, ColumnSums, RepeatedRow, blocks, plain


def batchnorm_moments(x, moments, rows, c, parts, *, scratch):
    """Moments about a pilot, the mean of a block, in one pass over x: 7.9 -> 0.6.

    With t = x - pilot: mean = pilot + sum(t)/n, M2 = sum(t*t) - sum(t)**2/n. What cancels is at most (blocks) times
    M2, since that block is part of the data: no precision is lost where the mean is large.
    """
    if not plain(x, moments) or not (sums := ColumnSums.fit(scratch, x, rows, c, parts, 2)):
        return None
    flat, moments = x.reshape(-1), moments.reshape(parts, 3, c)
    pilot = RepeatedRow(scratch, c, x)
    t, guess = scratch(pilot.flat.shape, x.dtype), scratch((c,), x.dtype)
    groups = [([_piece(flat, t, pilot.flat, c, *e) for e in entries], close) for entries, close in sums.groups]
    entry = sums.groups[0][0][:2][-1]  # of the first two the last: a ragged one comes first
    start, stop, shape, ones, (first_sum, _) = entry
    first = ones, flat[start * c : stop * c].reshape(shape), first_sum
    counts = np.diff([p * rows // parts for p in range(parts + 1)]).astype(x.dtype)[:, None]
    dot, subtract, square = np.dot, np.subtract, np.square

    def run():
        sums.begin()
        dot(*first)
        np.add.reduce(first_sum.reshape(-1, c), axis=0, out=guess)
        np.divide(guess, stop - start, guess)
        pilot.fill(guess)
        for entries, close in groups:
            for part, row, shifted, lines, ones, plain_sum, square_sum in entries:
                subtract(part, row, shifted)
                dot(ones, lines, plain_sum)
                square(shifted, shifted)
                dot(ones, lines, square_sum)
            dot(*close)
        total = sums.finish()
        offset = total[:, 0] / counts
        moments[:, 0] = counts
        np.add(guess, offset, moments[:, 1])
        np.maximum(total[:, 1] - total[:, 0] * offset, 0, out=moments[:, 2])

    return run


def _piece(flat, t, row, c, start, stop, shape, ones, targets):
    """Return an entry's views: of x, the row, the temporary flat and in lines, its ones and targets."""
    size = (stop - start) * c
    shifted = t[:size]
    return flat[start * c : stop * c], row[:size], shifted, shifted.reshape(shape), ones, *targets


def batchnorm_forward(x, mean, inverse, gamma, beta, y, rows, c, *, scratch):
    """y = x * scale + shift, scale = gamma * inverse, shift = beta - mean * scale: 3.1 -> 0.6."""
    if not plain(x, mean, y) or c * x.itemsize > BLOCK:
        return None
    scale, shift = RepeatedRow(scratch, c, x), RepeatedRow(scratch, c, x)
    pieces = list(blocks((x, y), (scale.flat, shift.flat), scale.flat.size))
    multiply, add = np.multiply, np.add

    def run():
        slope = gamma * inverse
        scale.fill(slope)
        shift.fill(beta - mean * slope)
        for part, out, factor, offset in pieces:
            multiply(part, factor, out)
            add(out, offset, out)

    return run


def batchnorm_backward_sums(dy, x, mean, inverse, sums, rows, c, parts, *, scratch):
    """Sums of dy and of dy * (x - mean), the latter times inverse at the end: 3.7 -> 0.7."""
    if not plain(x, dy, mean, sums) or not (columns := ColumnSums.fit(scratch, x, rows, c, parts, 2)):
        return None
    out = sums.reshape(parts, 2, c)
    centre = RepeatedRow(scratch, c, x)
    t = scratch(centre.flat.shape, x.dtype)
    flat, gradient, groups = x.reshape(-1), dy.reshape(-1), []
    for entries, close in columns.groups:
        parts_of_dy = [gradient[start * c : stop * c] for start, stop, *_ in entries]
        views = [
            (part.reshape(entry[2]), part, *_piece(flat, t, centre.flat, c, *entry))
            for part, entry in zip(parts_of_dy, entries, strict=True)
        ]
        groups.append((views, close))
    dot, subtract, multiply = np.dot, np.subtract, np.multiply

    def run():
        columns.begin()
        centre.fill(mean)
        for entries, close in groups:
            for dy_lines, dy_part, part, row, product, lines, ones, dy_sum, weighted_sum in entries:
                dot(ones, dy_lines, dy_sum)
                subtract(part, row, product)
                multiply(product, dy_part, product)
                dot(ones, lines, weighted_sum)
            dot(*close)
        total = columns.finish()
        np.copyto(out[:, 0], total[:, 0])
        multiply(total[:, 1], inverse, out[:, 1])

    return run


def batchnorm_backward(dy, x, mean, inverse, gamma, sums, dx, total, rows, c, *, scratch):
    """dx = a * dy + b * x + s with rows a = gamma * inverse, b = -a * inverse * sums[1]/total: 5.0 -> 1.1."""
    if not plain(dy, x, mean, dx) or c * x.itemsize > BLOCK:
        return None
    slope, pull, shift = (RepeatedRow(scratch, c, x) for _ in range(3))
    size = slope.flat.size
    temporaries = scratch((size,), x.dtype), scratch((size,), x.dtype)
    pieces = list(blocks((dy, x, dx), (slope.flat, pull.flat, shift.flat, *temporaries), size))
    sum_dy, sum_weighted = sums.reshape(2, c)
    multiply, add = np.multiply, np.add

    def run():
        a = gamma * inverse
        b = a * inverse * sum_weighted / -total
        slope.fill(a)
        pull.fill(b)
        shift.fill(a * sum_dy / -total - b * mean)
        for dy_part, x_part, out, a_row, b_row, s_row, t, u in pieces:
            multiply(x_part, b_row, t)
            multiply(dy_part, a_row, u)
            add(t, s_row, t)
            add(t, u, out)

    return run
