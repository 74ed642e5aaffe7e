"""Definitions of kernels/augment.cu: from resident images and labels to a batch.

Image i of a range is at place (state.batch - state.epoch * batches) * batch + first + i of the epoch and is
image order[place] of the set. Draws are keyed by epoch and place: batch size and replicas do not change them.
"""

import numpy as np

from gpunet.backends.numpy.values import place
from gpunet.core.random import crops


def batch_crop_flip(
    images, order, state, mean, scale, x, seed, flip, pad, reflect, batch, batches, first, places, set,
    channels, n, h, w, c, oh, ow,
):  # fmt: skip
    """x = (pixel - mean) * scale over a crop of oh x ow of the padded image, then flipped; 0 past places.

    The crop's corner is uniform on 0 .. 2*pad, a flip (flip = 1) has probability 1/2. Padding reflects
    (the edge once) or is a raw 0, so -mean * scale with one mean a channel. With a mean image
    (channels = h*w*c), which is taken at the source pixel, a padded pixel gives 0.
    """
    start, m = place(state, batch, batches, first, places, n)
    y0, x0, flips = crops(seed, int(state["epoch"]), start, m, pad)
    flips = (flips & bool(flip))[:, None]
    rows = y0[:, None] - pad + np.arange(oh)
    columns = x0[:, None] - pad + np.where(flips, np.arange(ow)[::-1], np.arange(ow))
    if reflect:
        rows, columns = _reflected(rows, h), _reflected(columns, w)
    inside = ((rows >= 0) & (rows < h))[:, :, None, None] & ((columns >= 0) & (columns < w))[:, None, :, None]
    source = rows.clip(0, h - 1)[:, :, None], columns.clip(0, w - 1)[:, None, :]
    pixels = images.reshape(set, h, w, c)[order.reshape(places)[start : start + m, None, None], *source]
    if channels == c:
        values = (np.where(inside, pixels, 0) - mean) * scale
    else:
        mean, scale = mean.reshape(h, w, c)[source], scale.reshape(h, w, c)[source]
        values = np.where(inside, (pixels - mean) * scale, 0)
    x = x.reshape(n, oh, ow, c)
    x[:m], x[m:] = values, 0


def batch_targets(labels, order, state, targets, smoothing, batch, batches, first, places, set, n, k):
    """targets[i, j] = (label == j) * (1 - smoothing) + smoothing / k; NaN rows past places."""
    start, m = place(state, batch, batches, first, places, n)
    mine = labels.reshape(set)[order.reshape(places)[start : start + m]]
    targets = targets.reshape(n, k)
    targets[:m], targets[m:] = (mine[:, None] == np.arange(k)) * (1 - smoothing) + smoothing / k, np.nan


def batch_values(values, order, state, targets, batch, batches, first, places, set, n, k):
    """targets[i] = values[order[place]]; NaN rows past places."""
    start, m = place(state, batch, batches, first, places, n)
    targets = targets.reshape(n, k)
    targets[:m], targets[m:] = values.reshape(set, k)[order.reshape(places)[start : start + m]], np.nan


def _reflected(index, size):
    """Return indices folded back at 0 and size - 1, for less than one size outside."""
    return size - 1 - np.abs(size - 1 - np.abs(index))
