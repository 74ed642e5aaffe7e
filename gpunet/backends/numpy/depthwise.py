"""Definitions of kernels/depthwise.cu: output channel o reads input channel o // multiplier by its own filter."""

import numpy as np

from gpunet.backends.numpy.values import wide, windows


def depthwise_forward(
    x, weight, y, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, multiplier
):
    """y[i, oy, ox, o] = sum over ky, kx of x[i, iy, ix, o // multiplier] * weight[ky, kx, o], 0 outside of the image.

    iy = oy*stride_y - pad_y + ky*dilation_y, ix alike.
    """
    image, taps = windows(
        weight.dtype, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x
    )
    image[:] = x.reshape(n, h, w, c)
    filters = weight.reshape(kh * kw, c, multiplier)
    y.reshape(n, oh, ow, c, multiplier)[:] = sum(tap[..., None] * f for tap, f in zip(taps, filters, strict=True))


def depthwise_backward(
    dy, weight, dx, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, multiplier
):
    """dx[pixel] = sum over the windows that hold it, and the channel's filters, of dy * weight: the adjoint."""
    image, taps = windows(
        weight.dtype, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x
    )
    d = wide(dy.reshape(n, oh, ow, c, multiplier))
    for tap, f in zip(taps, weight.reshape(kh * kw, c, multiplier), strict=True):
        tap += (d * f).sum(axis=-1)
    dx.reshape(n, h, w, c)[:] = image


def depthwise_weight(
    x, dy, sums, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, multiplier, parts
):
    """sums[p, ky, kx, o] = sum of x[.., o // multiplier] * dy over lines p*lines//parts to (p+1)*lines//parts.

    A line is a row of output pixels, of which there are n*oh.
    """
    image, taps = windows(
        sums.dtype, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x
    )
    image[:] = x.reshape(n, h, w, c)
    lines, d = n * oh, wide(dy.reshape(n * oh, ow, c, multiplier))
    cuts = [p * lines // parts for p in range(parts + 1)]
    sums = sums.reshape(parts, kh * kw, c, multiplier)
    for t, tap in enumerate(taps):
        rows = tap.reshape(lines, ow, c)
        for p in range(parts):
            part = slice(cuts[p], cuts[p + 1])
            sums[p, t] = np.einsum("lxc,lxcm->cm", rows[part], d[part])
