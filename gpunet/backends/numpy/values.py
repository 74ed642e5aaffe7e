"""What the definitions share: the type of arithmetic, storing or adding, windows, places in an epoch."""

import numpy as np


def wide(x):
    """Return x in the type it is computed in: float32 for 16-bit floats, else its own."""
    return x.astype(np.float32) if x.itemsize == 2 else x


def put(out, value, accumulate):
    """out (+)= value."""
    if accumulate:
        out += value
    else:
        out[...] = value


def windows(dtype, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dilation_y=1, dilation_x=1):
    """Return (image, taps), views of one array of zeros that holds the image (n, h, w, c) and all around it.

    taps[ky*kw + kx] (n, oh, ow, c) are the pixels that this place of the window falls on.
    """
    rows = max(pad_y + h, (oh - 1) * stride_y + (kh - 1) * dilation_y + 1)
    columns = max(pad_x + w, (ow - 1) * stride_x + (kw - 1) * dilation_x + 1)
    canvas = np.zeros((n, rows, columns, c), dtype)
    taps = []
    for ky in range(kh):
        for kx in range(kw):
            tap = canvas[:, ky * dilation_y :: stride_y, kx * dilation_x :: stride_x]
            taps.append(tap[:, :oh, :ow])
    return canvas[:, pad_y : pad_y + h, pad_x : pad_x + w], taps


def place(state, batch, batches, first, places, n):
    """Return (start, m): the place in the epoch of a range's first image, and how many of its n there are."""
    start = (int(state["batch"]) - int(state["epoch"]) * batches) * batch + first
    return start, min(max(places - start, 0), n)


def reached(outputs, size, stride, offset):
    """Return slices: which outputs i have their pixel i * stride + offset on 0 .. size - 1, and those pixels."""
    first, stop = max(0, -(offset // stride)), min(outputs, (size - 1 - offset) // stride + 1)
    if stop <= first:
        return slice(0), slice(0)
    return slice(first, stop), slice(first * stride + offset, (stop - 1) * stride + offset + 1, stride)
