"""Unfold and fold tap by tap: for each place of the window one copy, or one addition, of all the pixels it falls on.

The definitions build a padded copy and index it; this writes straight into the columns and allocates nothing.
"""

import numpy as np

from gpunet.backends.numpy.scratch import plain
from gpunet.backends.numpy.values import reached


def unfold(
    x, columns, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, groups, *, scratch
):
    """columns[group, pixel, tap] = the input pixel that the tap falls on, 0 outside the image."""
    taps = _taps(h, w, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x)
    pieces = list(_pieces(x, columns, taps, n, h, w, c, oh, ow, kh, kw, groups))
    clear = columns if pad_y or pad_x else columns[:0]
    zero, copyto = np.zeros((), columns.dtype), np.copyto

    def run():
        copyto(clear, zero)
        for pixels, products in pieces:
            copyto(products, pixels)

    return run


def fold(
    columns, x, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, groups, *, scratch
):
    """x[pixel] = the sum of columns[group, output, tap] over the taps that fall on the pixel."""
    if not plain(columns, x):
        return None
    taps = _taps(h, w, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x)
    pieces = list(_pieces(x, columns, taps, n, h, w, c, oh, ow, kh, kw, groups))
    zero, copyto, add = np.zeros((), x.dtype), np.copyto, np.add

    def run():
        copyto(x, zero)
        for pixels, products in pieces:
            add(pixels, products, pixels)

    return run


def _taps(h, w, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x):
    """Yield (ky, kx, outputs, pixels) for the taps that fall on the image at all, each a pair of slices."""
    for ky in range(kh):
        ys, to_y = reached(oh, h, stride_y, ky * dilation_y - pad_y)
        for kx in range(kw):
            xs, to_x = reached(ow, w, stride_x, kx * dilation_x - pad_x)
            if ys.stop and xs.stop:
                yield ky, kx, (ys, xs), (to_y, to_x)


def _pieces(x, columns, taps, n, h, w, c, oh, ow, kh, kw, groups):
    """Yield pairs of views: the pixels of a tap in x, and its place in the columns."""
    taps = list(taps)
    pixels = x.reshape(n, h, w, groups, c // groups)
    columns = columns.reshape(groups, n, oh, ow, kh, kw, c // groups)
    for group in range(groups):
        for ky, kx, outputs, image in taps:
            yield pixels[:, *image, group], columns[group, :, *outputs, ky, kx]
