"""Scaling, bias and column sums compiled by numba: one pass, lines of 512 elements.

An addition is left to NumPy, which is as fast.

Figures are ns an element at 50 images of 32x32x16, 32x32x64, 16x16x32 in float32: fast twin (scale: the definition)
-> this; numba 0.68 and NumPy 2.4, one thread of an AMD EPYC (Zen 4) that others used too, the best of 21.
"""

from functools import partial

import numpy as np

from gpunet.backends.numpy.jit import jit
from gpunet.backends.numpy.numba_lines import DEPTH, copy, fold, length, repeat
from gpunet.backends.numpy.scratch import LINE, plain


def scale_forward(x, y, factor, n, *, scratch):
    """y = factor * x: 0.18 0.45 0.18 -> 0.10 0.31 0.10."""
    if not plain(x, y):
        return None
    return partial(_scale, x.reshape(-1), y.reshape(-1), scratch((LINE,), y.dtype), x.dtype.type(factor))


def bias_forward(b, y, rows, c, *, scratch):
    """y += b for every row: 0.11 0.14 0.16 -> 0.07 0.07 0.09."""
    if not plain(y, b) or length(c) * y.itemsize > scratch.nbytes // 2:
        return None
    return partial(_bias, b.reshape(-1), y.reshape(-1), scratch((length(c),), y.dtype))


def column_sum(x, sums, rows, c, parts, *, scratch):
    """sums[p] = sum of the rows of part p, summed by lines, then in double: 0.08 0.08 0.08 -> 0.06 0.07 0.05."""
    if not plain(x, sums) or length(c) * x.itemsize + c * 8 > scratch.nbytes // 2:
        return None
    line, total = scratch((length(c),), x.dtype), scratch((c,), np.float64)
    return partial(_column_sum, x.reshape(-1), sums.reshape(-1), line, total, rows, parts)


def sum_parts(x, y, accumulate, parts, n, *, scratch):
    """y (+)= the parts, one after the other; 128 sums: 2.2 -> 1.0 us a call."""
    if not plain(x, y) or np.may_share_memory(x, y):
        return None
    return partial(_sum_parts, x.reshape(-1), y.reshape(-1), bool(accumulate), parts)


@jit
def _scale(x, y, out, factor):
    for start in range(0, y.size, out.size):
        part = x[start : start + out.size]
        for i in range(part.size):
            out[i] = part[i] * factor
        copy(out, y[start : start + out.size])


@jit
def _bias(b, y, line):
    repeat(b, line)
    for start in range(0, y.size, line.size):
        part = y[start : start + line.size]
        for i in range(part.size):
            part[i] += line[i]


@jit
def _column_sum(x, sums, line, total, rows, parts):
    c = total.size
    line[:] = 0
    for p in range(parts):
        part, step = x[p * rows // parts * c : (p + 1) * rows // parts * c], DEPTH * line.size
        total[:] = 0
        for start in range(0, part.size, step):
            _lines(part[start : start + step], line)
            fold(line, total)
        sums[p * c : (p + 1) * c] = total


@jit
def _lines(x, line):
    """Add x, place by place of a line; four lines at a time."""
    size = line.size
    whole = x.size // (4 * size) * 4 * size
    for start in range(0, whole, 4 * size):
        a, b = x[start : start + size], x[start + size : start + 2 * size]
        c, d = x[start + 2 * size : start + 3 * size], x[start + 3 * size : start + 4 * size]
        for i in range(size):
            line[i] += a[i] + b[i] + c[i] + d[i]
    for start in range(whole, x.size, size):
        a = x[start : start + size]
        for i in range(a.size):
            line[i] += a[i]


@jit
def _sum_parts(x, y, accumulate, parts):
    for p in range(parts):
        part = x[p * y.size : (p + 1) * y.size]
        if p == 0 and not accumulate:
            for i in range(y.size):
                y[i] = part[i]
        else:
            for i in range(y.size):
                y[i] += part[i]
