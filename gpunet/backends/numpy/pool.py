"""Definitions of kernels/pool.cu. Outputs are overwritten.

Windows may hang over the right and lower edge (Caffe's rounding up); each must touch the image.
"""

import numpy as np

from gpunet.backends.numpy.values import wide, windows


def maxpool_forward(x, y, index, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x):
    """y = max over the window, index = ky*kw + kx of the first one in scan order.

    Padding never wins, a NaN does.
    """
    size = n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x
    image, taps = windows(x.dtype, *size)
    everywhere, insides = windows(bool, *size)
    image[:], everywhere[:] = x.reshape(n, h, w, c), True
    best, first = np.zeros((n, oh, ow, c), x.dtype), np.full((n, oh, ow, c), -1)
    for i, (tap, inside) in enumerate(zip(taps, insides, strict=True)):
        wins = inside & ((first < 0) | (tap > best) | (np.isnan(tap) & ~np.isnan(best)))
        best[wins], first[wins] = tap[wins], i
    y.reshape(n, oh, ow, c)[:], index.reshape(n, oh, ow, c)[:] = best, first


def maxpool_backward(dy, index, dx, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x):
    """dx[pixel] = sum of dy over the windows whose index points at it."""
    image, taps = windows(np.float64, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x)
    dy, index = wide(dy.reshape(n, oh, ow, c)), index.reshape(n, oh, ow, c)
    for i, tap in enumerate(taps):
        tap += np.where(index == i, dy, 0)
    dx.reshape(n, h, w, c)[:] = image


def avgpool_forward(x, y, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, include_pad):
    """y = sum over the window / its size, clipped to the padded image (include_pad 1) or the image (0)."""
    image, taps = windows(np.float64, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x)
    image[:] = x.reshape(n, h, w, c)
    areas = _areas(h, w, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, include_pad)
    y.reshape(n, oh, ow, c)[:] = sum(taps) / areas


def avgpool_backward(dy, dx, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, include_pad):
    """dx[pixel] = sum over the windows it lies in of dy / the window's size."""
    image, taps = windows(np.float64, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x)
    areas = _areas(h, w, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, include_pad)
    for tap in taps:
        tap += wide(dy.reshape(n, oh, ow, c)) / areas
    dx.reshape(n, h, w, c)[:] = image


def global_average_forward(x, y, n, pixels, c):
    """y[i] = mean of x[i] over its pixels."""
    y.reshape(n, c)[:] = x.reshape(n, pixels, c).sum(axis=1, dtype=np.float64) / pixels


def global_average_backward(dy, dx, n, pixels, c):
    """dx[i, pixel] = dy[i] / pixels."""
    dx.reshape(n, pixels, c)[:] = wide(dy.reshape(n, 1, c)) / pixels


def _areas(h, w, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, include_pad):
    """Return (oh, ow, 1): what each window's sum is divided by."""
    height = _extents(h, oh, kh, stride_y, pad_y, include_pad)
    width = _extents(w, ow, kw, stride_x, pad_x, include_pad)
    return (height[:, None] * width)[:, :, None]


def _extents(size, out, k, stride, pad, include_pad):
    """Return the windows' lengths along one axis, clipped to -border .. size + border."""
    border = pad if include_pad else 0
    start = np.arange(out) * stride - pad
    return np.minimum(start + k, size + border) - np.maximum(start, -border)
