"""Batch normalisation compiled by numba: each kernel reads its inputs once and writes its output once.

Figures are ns an element at 50 images of 32x32x16, 32x32x64, 16x16x32 in float32: fast twin (the fused ones: the
definition) -> this; numba 0.68 and NumPy 2.4, one thread (BLAS's too) of an AMD EPYC (Zen 4) that others used,
the best of 21. What is measured beside a definition finds the cache swept by its arrays, as in a step.
Lost: rows of one array for lines (scalar code), results straight into an output that is an input (the same), one line
at a time for sums (+50 %).
"""

from functools import cache, partial

import numpy as np

from gpunet.backends.numpy.jit import jit
from gpunet.backends.numpy.numba_lines import DEPTH, copy, fold, length, repeat
from gpunet.backends.numpy.scratch import plain


def batchnorm_moments(x, moments, rows, c, parts, *, scratch):
    """Moments about a pilot, the mean so far, block by block: 0.35 0.39 0.39 -> 0.08 0.10 0.07.

    With t = x - pilot in a block of n rows after N, e = mean - pilot (a rounding) and s = N*e + sum(t):
    M2 += N*e^2 + sum(t^2) - s^2/(N + n), mean = pilot + s/(N + n). From the second block on s^2/(N + n) is at most half
    of sum(t^2), and the first has its own mean for a pilot: nothing cancels, wherever the mean is.
    """
    if not plain(x, moments) or (room := _room(scratch, x, c, lines=3, sums=4)) is None:
        return None
    return partial(_moments, x.reshape(-1), moments.reshape(-1), *room, rows, parts)


def batchnorm_combine(moments, total, parts, c, *, scratch):
    """The definition's formula, channel by channel; 64 channels: 7.9 -> 1.0 us a call."""
    if not plain(moments, total):
        return None
    return partial(_combine, moments.reshape(-1), total.reshape(-1), parts, c)


def batchnorm_forward(x, mean, inverse, gamma, beta, y, rows, c, *, scratch):
    """y = (x - mean) * a + beta, a = gamma * inverse: 0.24 0.35 0.25 -> 0.14 0.20 0.14."""
    return _affine(False, False, x, mean, inverse, gamma, beta, x, y, c, scratch)


def batchnorm_relu_forward(x, mean, inverse, gamma, beta, y, rows, c, *, scratch):
    """y = max((x - mean) * a + beta, 0): 2.2 2.0 1.6 -> 0.20 0.32 0.15."""
    return _affine(False, True, x, mean, inverse, gamma, beta, x, y, c, scratch)


def batchnorm_add_relu_forward(x, mean, inverse, gamma, beta, residual, y, rows, c, *, scratch):
    """y = max((x - mean) * a + beta + residual, 0): 2.4 2.3 1.7 -> 0.20 0.36 0.18."""
    return _affine(True, True, x, mean, inverse, gamma, beta, residual, y, c, scratch)


def batchnorm_backward_sums(dy, x, mean, inverse, sums, rows, c, parts, *, scratch):
    """Sums of dy and of dy * (x - mean), the latter times inverse at the end: 0.37 0.76 0.39 -> 0.12 0.39 0.13."""
    return _sums(False, dy, x, mean, inverse, inverse, inverse, sums, rows, c, parts, scratch)


def batchnorm_relu_backward_sums(dy, x, mean, inverse, gamma, beta, sums, rows, c, parts, *, scratch):
    """The same of dy where (x - mean) * a + beta > 0: 9.2 8.0 7.0 -> 0.55 0.46 0.40."""
    return _sums(True, dy, x, mean, inverse, gamma, beta, sums, rows, c, parts, scratch)


def batchnorm_backward(dy, x, mean, inverse, gamma, sums, dx, total, rows, c, *, scratch):
    """dx = a * dy + b * (x - mean) + s: 0.56 0.97 0.58 -> 0.19 0.36 0.20.

    b = -a * inverse * sums[1]/total, s = -a * sums[0]/total.
    """
    return _gradient(False, dy, x, mean, inverse, gamma, gamma, sums, dx, total, c, scratch)


def batchnorm_relu_backward(dy, x, mean, inverse, gamma, beta, sums, dx, total, rows, c, *, scratch):
    """The same of dy where (x - mean) * a + beta > 0: 8.6 8.2 7.6 -> 0.49 0.53 0.37."""
    return _gradient(True, dy, x, mean, inverse, gamma, beta, sums, dx, total, c, scratch)


def _room(scratch, x, c, lines, sums):
    """Return lines of x's type and then rows of c doubles, or None where half of the scratch does not hold them.

    Each is an array of its own: of rows of one array LLVM does not see that they lie apart.
    """
    size = length(c)
    if lines * size * x.itemsize + sums * c * 8 > scratch.nbytes // 2:
        return None
    return [scratch((size,), x.dtype) for _ in range(lines)] + [scratch((c,), np.float64) for _ in range(sums)]


def _affine(adds, relu, x, mean, inverse, gamma, beta, residual, y, c, scratch):
    if not plain(x, mean, residual, y) or (room := _room(scratch, x, c, lines=4, sums=0)) is None:
        return None
    views = (v.reshape(-1) for v in (x, mean, inverse, gamma, beta, residual, y))
    return partial(_affine_kernel(adds, relu), *views, *room)


def _sums(relu, dy, x, mean, inverse, gamma, beta, sums, rows, c, parts, scratch):
    if not plain(dy, x, mean, sums) or (room := _room(scratch, x, c, lines=5, sums=2)) is None:
        return None
    views = (v.reshape(-1) for v in (dy, x, mean, inverse, gamma, beta, sums))
    return partial(_sums_kernel(relu), *views, *room, rows, parts)


def _gradient(relu, dy, x, mean, inverse, gamma, beta, sums, dx, total, c, scratch):
    if not plain(dy, x, mean, dx) or (room := _room(scratch, x, c, lines=6, sums=0)) is None:
        return None
    views = (v.reshape(-1) for v in (dy, x, mean, inverse, gamma, beta, sums, dx))
    return partial(_gradient_kernel(relu), *views, *room, total)


@jit
def _moments(x, moments, pilot, plain_sum, square_sum, mean, m2, s, q, rows, parts):
    c = mean.size
    for p in range(parts):
        first, stop = p * rows // parts, (p + 1) * rows // parts
        part, step = x[first * c : stop * c], DEPTH * pilot.size
        count = 0
        pilot[:] = plain_sum[:] = square_sum[:] = 0
        m2[:] = s[:] = 0
        _deviations(part[:step], pilot, plain_sum, square_sum)
        fold(plain_sum, s)
        square_sum[:] = 0
        s *= c / max(part[:step].size, 1)
        mean[:] = s
        for start in range(0, part.size, step):
            block = part[start : start + step]
            n = block.size // c
            repeat(mean, pilot)
            _deviations(block, pilot, plain_sum, square_sum)
            s[:] = q[:] = 0
            fold(plain_sum, s)
            fold(square_sum, q)
            for i in range(c):
                off = mean[i] - pilot[i]
                moved = count * off + s[i]
                m2[i] += count * off * off + q[i] - moved * moved / (count + n)
                mean[i] = pilot[i] + moved / (count + n)
            count += n
        out = moments[p * 3 * c : (p + 1) * 3 * c]
        for i in range(c):
            out[i], out[c + i], out[2 * c + i] = count, mean[i], (0 if m2[i] < 0 else m2[i])


@jit
def _combine(moments, total, parts, c):
    zero, one = total.dtype.type(0), total.dtype.type(1)
    for i in range(c):
        count, mean, m2 = zero, zero, zero
        for p in range(parts):
            part = moments[p * 3 * c + i : (p + 1) * 3 * c]
            delta = part[c] - mean
            share = part[0] / max(count + part[0], one)
            m2 += part[2 * c] + delta * delta * count * share
            mean += delta * share
            count += part[0]
        total[i], total[c + i], total[2 * c + i] = count, mean, m2


@jit
def _deviations(x, pilot, plain_sum, square_sum):
    """Add, place by place of a line, x - pilot and its square; four lines at a time."""
    size = pilot.size
    whole = x.size // (4 * size) * 4 * size
    for start in range(0, whole, 4 * size):
        a, b = x[start : start + size], x[start + size : start + 2 * size]
        c, d = x[start + 2 * size : start + 3 * size], x[start + 3 * size : start + 4 * size]
        for i in range(size):
            ta, tb, tc, td = a[i] - pilot[i], b[i] - pilot[i], c[i] - pilot[i], d[i] - pilot[i]
            plain_sum[i] += ta + tb + tc + td
            square_sum[i] += ta * ta + tb * tb + tc * tc + td * td
    for start in range(whole, x.size, size):
        a = x[start : start + size]
        for i in range(a.size):
            ta = a[i] - pilot[i]
            plain_sum[i] += ta
            square_sum[i] += ta * ta


@cache
def _affine_kernel(adds, relu):
    @jit
    def affine(x, mean, inverse, gamma, beta, residual, y, centre, slope, shift, out):
        repeat(mean, centre)
        repeat(gamma * inverse, slope)
        repeat(beta, shift)
        zero = x.dtype.type(0)
        for start in range(0, x.size, out.size):
            part, also = x[start : start + out.size], residual[start : start + out.size]
            for i in range(part.size):
                z = (part[i] - centre[i]) * slope[i] + shift[i]
                if adds:
                    z += also[i]
                if relu:
                    z = zero if z <= 0 else z  # a NaN is not
                out[i] = z
            copy(out, y[start : start + out.size])

    return affine


@cache
def _sums_kernel(relu):
    @jit
    def add(dy, x, centre, slope, shift, plain_sum, weighted_sum):
        """Add, place by place of a line, dy and dy * (x - mean); two lines at a time."""
        size = centre.size
        whole = x.size // (2 * size) * 2 * size
        zero = x.dtype.type(0)
        for start in range(0, whole, 2 * size):
            a, b = x[start : start + size], x[start + size : start + 2 * size]
            da, db = dy[start : start + size], dy[start + size : start + 2 * size]
            for i in range(size):
                ta, tb, ga, gb = a[i] - centre[i], b[i] - centre[i], da[i], db[i]
                if relu:
                    ga = ga if ta * slope[i] + shift[i] > 0 else zero
                    gb = gb if tb * slope[i] + shift[i] > 0 else zero
                plain_sum[i] += ga + gb
                weighted_sum[i] += ga * ta + gb * tb
        for start in range(whole, x.size, size):
            a, da = x[start : start + size], dy[start : start + size]
            for i in range(a.size):
                ta, ga = a[i] - centre[i], da[i]
                if relu:
                    ga = ga if ta * slope[i] + shift[i] > 0 else zero
                plain_sum[i] += ga
                weighted_sum[i] += ga * ta

    @jit
    def sums(
        dy, x, mean, inverse, gamma, beta, out, centre, slope, shift, plain_sum, weighted_sum, total, total_weighted,
        rows, parts,
    ):  # fmt: skip
        c, step = mean.size, DEPTH * centre.size
        repeat(mean, centre)
        repeat(gamma * inverse, slope)
        repeat(beta, shift)
        plain_sum[:] = weighted_sum[:] = 0
        for p in range(parts):
            first, stop = p * rows // parts * c, (p + 1) * rows // parts * c
            total[:] = total_weighted[:] = 0
            for start in range(first, stop, step):
                end = min(start + step, stop)
                add(dy[start:end], x[start:end], centre, slope, shift, plain_sum, weighted_sum)
                fold(plain_sum, total)
                fold(weighted_sum, total_weighted)
            target = out[p * 2 * c : (p + 1) * 2 * c]
            for i in range(c):
                target[i], target[c + i] = total[i], total_weighted[i] * inverse[i]

    return sums


@cache
def _gradient_kernel(relu):
    @jit
    def gradient(dy, x, mean, inverse, gamma, beta, sums, dx, centre, slope, pull, shift, bias, out, total):
        c = mean.size
        a = gamma * inverse
        count = x.dtype.type(total)
        repeat(mean, centre)
        repeat(a, slope)
        repeat(-a * inverse * sums[c:] / count, pull)
        repeat(-a * sums[:c] / count, shift)
        repeat(beta, bias)
        zero = x.dtype.type(0)
        for start in range(0, x.size, out.size):
            part, given = x[start : start + out.size], dy[start : start + out.size]
            for i in range(part.size):
                t, g = part[i] - centre[i], given[i]
                if relu:
                    g = g if t * slope[i] + bias[i] > 0 else zero
                out[i] = g * slope[i] + t * pull[i] + shift[i]
            copy(out, dx[start : start + out.size])

    return gradient
