"""Definitions of kernels/augment.cu: from resident images and labels to a batch.

Image i of a range is at place (state.batch - state.epoch * batches) * batch + first + i of the epoch and is
image order[place] of the set. Draws are keyed by epoch and place: batch size and replicas do not change them.
"""

import numpy as np

from gpunet.backends.numpy.values import place
from gpunet.core.augmentation import COLOR, GEOMETRY
from gpunet.core.random import alternating, crops


def batch_crop_flip(
    images, order, state, mean, scale, x, seed, flip, pad, reflect, batch, batches, first, places, set,
    channels, n, h, w, c, oh, ow,
):  # fmt: skip
    """x = (pixel - mean) * scale over a crop of oh x ow of the padded image, then flipped; 0 past places.

    The crop's corner is uniform on 0 .. 2*pad, a flip (flip = 1) has probability 1/2, or goes by turns (flip = 2).
    Padding reflects (the edge once) or is a raw 0, so -mean * scale with one mean a channel. With a mean image
    (channels = h*w*c), which is taken at the source pixel, a padded pixel gives 0.
    """
    start, m = place(state, batch, batches, first, places, n)
    drawn = order.reshape(places)[start : start + m]
    y0, x0, flips = crops(seed, int(state["epoch"]), start, m, pad)
    flips = alternating(seed, int(state["epoch"]), drawn) if flip == 2 else flips & bool(flip)
    flips = flips[:, None]
    rows = y0[:, None] - pad + np.arange(oh)
    columns = x0[:, None] - pad + np.where(flips, np.arange(ow)[::-1], np.arange(ow))
    if reflect:
        rows, columns = _reflected(rows, h), _reflected(columns, w)
    inside = ((rows >= 0) & (rows < h))[:, :, None, None] & ((columns >= 0) & (columns < w))[:, None, :, None]
    source = rows.clip(0, h - 1)[:, :, None], columns.clip(0, w - 1)[:, None, :]
    pixels = images.reshape(set, h, w, c)[drawn[:, None, None], *source]
    if channels == c:
        values = (np.where(inside, pixels, 0) - mean) * scale
    else:
        mean, scale = mean.reshape(h, w, c)[source], scale.reshape(h, w, c)[source]
        values = np.where(inside, (pixels - mean) * scale, 0)
    x = x.reshape(n, oh, ow, c)
    x[:m], x[m:] = values, 0


def batch_warp(images, geometry, field, warped, mix, elastic, reflect, set, n, h, w, c):
    """warped = pixels at their sources, by the interpolation of each image; outside 0, or mirrored; 0 for no image."""
    images, warped = images.reshape(set, h, w, c), warped.reshape(-1, h, w, c)
    moves = field.reshape(-1, 2, h, w) if elastic else np.zeros((len(warped), 2, 1, 1), np.int64)
    warped[:] = 0
    for row, move, target in zip(geometry.reshape(-1, len(GEOMETRY)), moves, warped, strict=True):
        drawn = dict(zip(GEOMETRY, row.tolist(), strict=True))
        if drawn["image"] >= 0:
            sample = _Sample(images[drawn["image"]], drawn, move[::-1] * drawn["elastic"], reflect, warped.dtype)
            target[:] = sample.methods[drawn["interpolation"]]()


class _Sample:
    """One image and its inverse map, in whole numbers: 2^16 is a pixel of the source."""

    def __init__(self, image, drawn, move, reflect, dtype):
        self.image, self.drawn, self.move, self.reflect, self.dtype = image, drawn, move, reflect, dtype
        self.methods = self.bilinear, self.nearest, self.area, self.cubic

    def source(self, right=0, down=0):
        """Return (y, x) of all pixels, moved within a pixel of the output by eighths."""
        (h, w, _), d = self.image.shape, self.drawn
        x, y = 4 * (2 * np.arange(w) + 1 - w) + right, 4 * (2 * np.arange(h)[:, None] + 1 - h) + down
        far = max(h, w) << 22  # eight images away
        x, y = ((d[f"m{i}0"] * x + d[f"m{i}1"] * y + d["xy"[i]]).clip(-far, far) for i in (0, 1))
        if d["lens"]:
            factor = d["lens"] * ((x >> 10) ** 2 + (y >> 10) ** 2) >> 32
            x, y = x + (x * factor >> 16), y + (y * factor >> 16)
        y, x = (((v >> 3) + ((size - 1) << 15)).clip(-(1 << 30), 1 << 30) for v, size in ((y, h), (x, w)))
        return y + self.move[0], x + self.move[1]

    def pixels(self, y, x):
        h, w, _ = self.image.shape
        inside = (y >= 0) & (y < h) & (x >= 0) & (x < w) | bool(self.reflect)
        y, x = (_folded(y, h), _folded(x, w)) if self.reflect else (y.clip(0, h - 1), x.clip(0, w - 1))
        return np.where(inside[..., None], self.image[y, x], 0).astype(self.dtype)

    def weighted(self, y, x, weights_y, weights_x):
        """Return the sum over taps of weights times pixels, from y and x on."""
        lines = [sum(self.pixels(y + i, x + j) * b for j, b in enumerate(weights_x)) for i in range(len(weights_y))]
        return sum(line * a for line, a in zip(lines, weights_y, strict=True))

    def fractions(self, *places):
        return [((place & 65535) / 65536).astype(self.dtype)[..., None] for place in places]

    def bilinear(self):
        y, x = self.source()
        return self.weighted(y >> 16, x >> 16, *([1 - f, f] for f in self.fractions(y, x)))

    def nearest(self, right=0, down=0):
        y, x = self.source(right, down)
        return self.pixels((y + 32768) >> 16, (x + 32768) >> 16)

    def area(self):
        return sum(self.nearest(right, down) for down in (-3, -1, 1, 3) for right in (-3, -1, 1, 3)) / 16

    def cubic(self):
        y, x = self.source()
        values = self.weighted((y >> 16) - 1, (x >> 16) - 1, *map(_keys, self.fractions(y, x)))
        return values.clip(0, 255) if self.image.dtype == np.uint8 else values


def _keys(f):
    """Return the weights of the four pixels around a place that is f behind the second (Keys 1981, a = -1/2)."""
    return [
        ((-0.5 * f + 1) * f - 0.5) * f,
        (1.5 * f - 2.5) * f * f + 1,
        ((-1.5 * f + 2) * f + 0.5) * f,
        (0.5 * f - 0.5) * f * f,
    ]


def _folded(index, size):
    """Return indices mirrored at 0 and size - 1 as often as needed."""
    period = max(2 * (size - 1), 1)
    index = index % period
    return np.where(index < size, index, period - index)


def batch_finish(warped, geometry, color, mean, scale, x, photometric, mix, channels, n, h, w, c):
    """x = (colour(warped) - mean) * scale, cut and mixed with its partner."""
    geometry, color = geometry.reshape(-1, len(GEOMETRY)), color.reshape(-1, len(COLOR))
    warped, x = warped.reshape(-1, h, w, c), x.reshape(n, h, w, c)
    shape = (c,) if channels == c else (h, w, c)
    if photometric:
        warped = _coloured(warped, dict(zip(COLOR, color.T[:, :, None, None, None], strict=True)))
    values = (warped - mean.reshape(shape)) * scale.reshape(shape)
    values[_box(geometry, "cut_top", h, w)] = 0
    if mix:
        inside = np.where(_box(geometry[:n], "top", h, w), color[:n, COLOR.index("inside"), None, None], 1)[..., None]
        partner = np.where(inside < 1, values[n:], 0)
        values = values[:n] * inside + partner * (1 - inside)
    x[:] = np.where(geometry[:n, 0, None, None, None] >= 0, values, 0)


def _box(geometry, first, h, w):
    """Return (n, h, w): whether a pixel lies in each row's box, whose four columns begin with `first`."""
    start = GEOMETRY.index(first)
    top, bottom, left, right = geometry[:, start : start + 4, None, None].swapaxes(0, 1)
    y, x = np.arange(h)[:, None], np.arange(w)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


GREY = (0.299, 0.587, 0.114)


def _coloured(v, drawn):
    """Return images after brightness, contrast and, of three channels, saturation, hue and lighting."""
    v = (v * drawn["brightness"]).clip(0, 255)
    grey = _grey(v).mean(axis=(1, 2), keepdims=True, dtype=np.float64).astype(v.dtype)
    v = (v * drawn["contrast"] + grey * (1 - drawn["contrast"])).clip(0, 255)
    if v.shape[3] != 3:
        return v
    v = (v * drawn["saturation"] + _grey(v) * (1 - drawn["saturation"])).clip(0, 255)
    v = np.where(drawn["hue"] != 0, _turned(v, drawn["hue"]), v)
    return (v + np.concatenate([drawn[f"light{c}"] for c in range(3)], axis=3)).clip(0, 255)


def _grey(v):
    weights = np.array(GREY if v.shape[3] == 3 else [1 / v.shape[3]] * v.shape[3], v.dtype)
    return (v * weights).sum(axis=3, keepdims=True)


def _turned(v, turns):
    """Return pixels whose hue is turned, value and saturation of HSV kept."""
    high, low = v.max(axis=3, keepdims=True), v.min(axis=3, keepdims=True)
    r, g, b = (v[..., k : k + 1] for k in range(3))
    span = np.where(high > low, high - low, 1)
    hue = np.where(high == r, (g - b) / span, np.where(high == g, 2 + (b - r) / span, 4 + (r - g) / span)) + 6 * turns
    away = hue - np.array([0, 2, 4], v.dtype)
    away = np.abs(away - 6 * np.floor(away / 6 + 0.5))
    return high - np.where(high > low, span, 0) * (away - 1).clip(0, 1)


def batch_targets(labels, order, state, targets, smoothing, batch, batches, first, places, set, n, k):
    """targets[i, j] = (label == j) * (1 - smoothing) + smoothing / k; NaN rows past places."""
    start, m = place(state, batch, batches, first, places, n)
    mine = labels.reshape(set)[order.reshape(places)[start : start + m]]
    targets = targets.reshape(n, k)
    targets[:m], targets[m:] = (mine[:, None] == np.arange(k)) * (1 - smoothing) + smoothing / k, np.nan


def batch_targets_mixed(labels, geometry, color, targets, smoothing, set, n, k):
    """targets = share * one-hot of the image's label + (1 - share) * its partner's, smoothed; NaN rows past places."""
    image, partner = geometry.reshape(2, n, -1)[:, :, 0]
    share = color.reshape(2, n, -1)[0, :, COLOR.index("share"), None]
    labels, classes = labels.reshape(set), np.arange(k)
    rows = share * (labels[image][:, None] == classes)
    rows += (1 - share) * ((labels[partner][:, None] == classes) & (partner[:, None] >= 0))
    targets.reshape(n, k)[:] = np.where(image[:, None] >= 0, rows * (1 - smoothing) + smoothing / k, np.nan)


def batch_values(values, order, state, targets, batch, batches, first, places, set, n, k):
    """targets[i] = values[order[place]]; NaN rows past places."""
    start, m = place(state, batch, batches, first, places, n)
    targets = targets.reshape(n, k)
    targets[:m], targets[m:] = values.reshape(set, k)[order.reshape(places)[start : start + m]], np.nan


def _reflected(index, size):
    """Return indices folded back at 0 and size - 1, for less than one size outside."""
    return size - 1 - np.abs(size - 1 - np.abs(index))
