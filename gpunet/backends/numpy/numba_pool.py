"""Pooling compiled by numba: flat loops over rows of pixels, as if the stride along a row were 1.

A row of places is what a window can meet along x, the padding and what hangs over the edge included. The maximum or
sum goes down the window's rows, then along them, at every place; last the outputs' places are picked out. Backward is
the same the other way round. Half of the work at stride 2 is for nothing, but all of it is vectors, for any number of
channels; a loop a window over 16 channels is none.
Figures are ns an element of x at 50 images of 32x32x64 by 2x2/2, 32x32x16 by 2x2/2, 32x32x32 by 3x3/2 and 16x16x32 by
3x3/2 in float32: fast twin -> this; numba 0.68 and NumPy 2.4, one thread of an AMD EPYC (Zen 4) that others used too,
the best of 21.
"""

from collections import namedtuple
from functools import partial

import numpy as np

from gpunet.backends.numpy.jit import jit
from gpunet.backends.numpy.scratch import plain

OUTSIDE = 1 << 20  # the tap of a place outside of the image: where values are equal the smaller tap wins

Sizes = namedtuple("Sizes", "n h w c oh ow kh kw stride_y stride_x pad_y pad_x")


def maxpool_forward(x, y, index, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, *, scratch):
    """Maxima down, then along: 0.69 0.41 0.84 0.84 -> 0.52 0.27 0.41 0.35.

    Which of several NaN the index names is left open.
    """
    s = Sizes(n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x)
    if not plain(x, y) or not (room := _room(scratch, s, x.dtype, x.dtype, np.int32, np.int32)):
        return None
    return partial(_max_forward, *(v.reshape(-1) for v in (x, y, index)), *room, s)


def maxpool_backward(dy, index, dx, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, *, scratch):
    """Each place of a window takes dy where the index names it: 0.79 0.43 1.3 1.1 -> 0.36 0.25 0.41 0.46."""
    s = Sizes(n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x)
    if not plain(dy, dx) or not (room := _room(scratch, s, dx.dtype, np.int32)):
        return None
    return partial(_max_backward, *(v.reshape(-1) for v in (dy, index, dx)), *room, s)


def avgpool_forward(x, y, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, include_pad, *, scratch):
    """Sums down, then along, then the division: 0.66 0.33 0.57 0.62 -> 0.28 0.18 0.19 0.19."""
    s = Sizes(n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x)
    if not plain(x, y) or not (room := _room(scratch, s, x.dtype, x.dtype)):
        return None
    return partial(_average_forward, x.reshape(-1), y.reshape(-1), *room, s, bool(include_pad))


def avgpool_backward(dy, dx, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, include_pad, *, scratch):
    """dy is divided, summed along, then added to the window's rows: 0.47 0.23 0.37 0.37 -> 0.32 0.23 0.23 0.24."""
    s = Sizes(n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x)
    if not plain(dy, dx) or not (room := _room(scratch, s, dx.dtype, dx.dtype)):
        return None
    return partial(_average_backward, dy.reshape(-1), dx.reshape(-1), *room, s, bool(include_pad))


def _room(scratch, s, *types):
    """Return a row of places of each type, or None where half of the scratch does not hold them."""
    size = max((s.ow - 1) * s.stride_x + s.kw, s.pad_x + s.w) * s.c
    if sum(np.dtype(t).itemsize for t in types) * size > scratch.nbytes // 2:
        return None
    return [scratch((size,), t) for t in types]


@jit
def _inside(start, k, size):
    """Return which places of a window from `start` on lie on 0 .. size - 1: first, stop."""
    first = max(0, -start)
    return first, max(first, min(k, size - start))


@jit
def _area(oy, ox, s, include_pad):
    """Return what a window's sum is divided by."""
    top, left = oy * s.stride_y - s.pad_y, ox * s.stride_x - s.pad_x
    down, across = (s.pad_y, s.pad_x) if include_pad else (0, 0)
    height = min(top + s.kh, s.h + down) - max(top, -down)
    return height * (min(left + s.kw, s.w + across) - max(left, -across))


@jit
def _max_forward(x, y, index, value, best, tap, place, s):
    row, at = s.w * s.c, 0
    value[:] = -np.inf
    tap[:] = OUTSIDE
    middle, taps = value[s.pad_x * s.c :][:row], tap[s.pad_x * s.c :][:row]
    starts = ((s.ow - 1) * s.stride_x + 1) * s.c
    best, place = best[:starts], place[:starts]
    for image in range(s.n):
        for oy in range(s.oh):
            top = oy * s.stride_y - s.pad_y
            first, stop = _inside(top, s.kh, s.h)
            part = x[(image * s.h + top + first) * row :][:row]
            number = np.int32(first * s.kw)
            for i in range(row):
                middle[i] = part[i]
                taps[i] = number
            for ky in range(first + 1, stop):
                part = x[(image * s.h + top + ky) * row :][:row]
                number = np.int32(ky * s.kw)
                for i in range(row):
                    wins = (not part[i] <= middle[i]) & (middle[i] == middle[i])  # a NaN does
                    middle[i] = part[i] if wins else middle[i]
                    taps[i] = number if wins else taps[i]
            for i in range(starts):
                best[i] = value[i]
                place[i] = tap[i]
            for kx in range(1, s.kw):
                moved, moved_tap = value[kx * s.c :][:starts], tap[kx * s.c :][:starts]
                number = np.int32(kx)
                for i in range(starts):
                    v, t = moved[i], moved_tap[i] + number
                    wins = ((not v <= best[i]) & (best[i] == best[i])) | ((v == best[i]) & (t < place[i]))
                    best[i] = v if wins else best[i]
                    place[i] = t if wins else place[i]
            for ox in range(s.ow):
                source, chosen = best[ox * s.stride_x * s.c :], place[ox * s.stride_x * s.c :]
                out, out_index = y[at : at + s.c], index[at : at + s.c]
                for i in range(s.c):
                    out[i] = source[i]
                for i in range(s.c):
                    out_index[i] = chosen[i]
                at += s.c


@jit
def _max_backward(dy, index, dx, value, chosen, s):
    row, image_size, at = s.w * s.c, s.h * s.w * s.c, 0
    zero = dx.dtype.type(0)
    value[:] = 0
    chosen[:] = -1
    places = (s.ow - 1) * s.stride_x + 1
    for image in range(s.n):
        whole = dx[image * image_size : (image + 1) * image_size]
        for i in range(whole.size):
            whole[i] = 0
        for oy in range(s.oh):
            for ox in range(s.ow):
                start = ox * s.stride_x * s.c
                given, given_index = dy[at : at + s.c], index[at : at + s.c]
                target, target_index = value[start : start + s.c], chosen[start : start + s.c]
                for i in range(s.c):
                    target[i] = given[i]
                for i in range(s.c):
                    target_index[i] = given_index[i]
                at += s.c
            top = oy * s.stride_y - s.pad_y
            for ky in range(*_inside(top, s.kh, s.h)):
                for kx in range(s.kw):
                    first, stop = _inside(kx - s.pad_x, places, s.w)
                    part = whole[(top + ky) * row + (first + kx - s.pad_x) * s.c :][: (stop - first) * s.c]
                    v, t = value[first * s.c :], chosen[first * s.c :]
                    number = np.int32(ky * s.kw + kx)
                    for i in range(part.size):
                        part[i] += v[i] if t[i] == number else zero


@jit
def _average_forward(x, y, value, total, s, include_pad):
    row, at = s.w * s.c, 0
    value[:] = 0
    middle = value[s.pad_x * s.c :][:row]
    starts = ((s.ow - 1) * s.stride_x + 1) * s.c
    total = total[:starts]
    for image in range(s.n):
        for oy in range(s.oh):
            top = oy * s.stride_y - s.pad_y
            for i in range(row):
                middle[i] = 0
            for ky in range(*_inside(top, s.kh, s.h)):
                part = x[(image * s.h + top + ky) * row :][:row]
                for i in range(row):
                    middle[i] += part[i]
            for i in range(starts):
                total[i] = value[i]
            for kx in range(1, s.kw):
                moved = value[kx * s.c :][:starts]
                for i in range(starts):
                    total[i] += moved[i]
            for ox in range(s.ow):
                share = x.dtype.type(1 / _area(oy, ox, s, include_pad))
                source, out = total[ox * s.stride_x * s.c :], y[at : at + s.c]
                for i in range(s.c):
                    out[i] = source[i] * share
                at += s.c


@jit
def _average_backward(dy, dx, value, total, s, include_pad):
    row, image_size, at = s.w * s.c, s.h * s.w * s.c, 0
    value[:] = 0
    starts = ((s.ow - 1) * s.stride_x + 1) * s.c
    middle = total[s.pad_x * s.c :][:row]
    for image in range(s.n):
        whole = dx[image * image_size : (image + 1) * image_size]
        for i in range(whole.size):
            whole[i] = 0
        for oy in range(s.oh):
            for ox in range(s.ow):
                share = dx.dtype.type(1 / _area(oy, ox, s, include_pad))
                given, target = dy[at : at + s.c], value[ox * s.stride_x * s.c :]
                for i in range(s.c):
                    target[i] = given[i] * share
                at += s.c
            for i in range(total.size):
                total[i] = 0
            for kx in range(s.kw):
                moved = total[kx * s.c :][:starts]
                for i in range(moved.size):
                    moved[i] += value[i]
            top = oy * s.stride_y - s.pad_y
            for ky in range(*_inside(top, s.kh, s.h)):
                part = whole[(top + ky) * row :][:row]
                for i in range(row):
                    part[i] += middle[i]
