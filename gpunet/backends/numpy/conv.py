"""Definitions of kernels/conv.cu: a convolution is unfold and one product a group; fold is the way back."""

import numpy as np

from gpunet.backends.numpy.values import windows


def unfold(
    x, columns, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, groups
):
    """columns[g, (i,oy,ox), (ky,kx,j)] = x[i, iy, ix, g*(c/groups) + j], 0 outside of the image.

    iy = oy*stride_y - pad_y + ky*dilation_y, ix alike.
    """
    image, taps = windows(
        x.dtype, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x
    )
    image[:] = x.reshape(n, h, w, c)
    patches = columns.reshape(groups, n, oh, ow, kh * kw, c // groups)
    for i, tap in enumerate(taps):
        patches[..., i, :] = np.moveaxis(tap.reshape(n, oh, ow, groups, c // groups), 3, 0)


def fold(
    columns, x, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, groups
):
    """x[pixel] = sum of the columns that unfold fills from that pixel: its adjoint; x is overwritten."""
    image, taps = windows(
        np.float64, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x
    )
    patches = columns.reshape(groups, n, oh, ow, kh * kw, c // groups)
    for i, tap in enumerate(taps):
        tap += np.moveaxis(patches[..., i, :], 0, 3).reshape(n, oh, ow, c)
    x.reshape(n, h, w, c)[:] = image
