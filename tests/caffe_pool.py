"""Caffe's pooling in plain loops, from its own description of sizes and borders: the oracle of what follows it."""

import math

import numpy as np


def caffe_pool(image, size, stride, pad, kind):
    """Return the pooled image (h, w, c), kind "MAX" or "AVE"; sizes are (y, x).

    Output sizes round up; with padding, a last window has to begin in the image or in the padding before it. A mean is
    divided by the window as it is cut to the padded image, and only then the window is cut to the image.
    """
    out = [math.ceil((n + 2 * p - k) / s) + 1 for n, k, s, p in zip(image.shape, size, stride, pad, strict=False)]
    if any(pad):
        out = [o - ((o - 1) * s >= n + p) for o, n, s, p in zip(out, image.shape, stride, pad, strict=False)]
    pooled = np.empty((*out, image.shape[2]))
    for place in np.ndindex(*pooled.shape):
        spans, count = [], 1
        for o, n, k, s, p in zip(place, image.shape, size, stride, pad, strict=False):
            start = o * s - p
            stop = min(start + k, n + p)
            count *= stop - start
            spans.append(range(max(start, 0), min(stop, n)))
        values = [image[y, x, place[2]] for y in spans[0] for x in spans[1]]
        pooled[place] = max(values) if kind == "MAX" else math.fsum(values) / count
    return pooled
