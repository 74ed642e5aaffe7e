"""Definitions of kernels/transforms.cu: what happens to each image of a batch, drawn by (seed, epoch, place).

Doubles are rounded in the same order there, so that whole numbers are the same on every backend.
"""

import numpy as np

from gpunet.backends.numpy.values import place
from gpunet.core.augmentation import COLOR, COUNT, GEOMETRY, QUANTILES, SETTINGS, SITES, UNIT
from gpunet.core.random import alternating, blocks


def transforms_draw(
    order, state, settings, weights, geometry, color, rows, field, seed, mix, elastic, radius, batch, batches,
    first, places, n, h, w,
):  # fmt: skip
    """geometry and color = what is drawn for n images, with mix for their partners too; field = elastic moves."""
    start, m = place(state, batch, batches, first, places, n)
    geometry, color = geometry.reshape(-1, len(GEOMETRY)), color.reshape(-1, len(COLOR))
    order = order.reshape(places)
    geometry[:], color[:], rows[:], field[:] = 0, 0, 0, 0
    geometry[:, GEOMETRY.index("image")] = -1
    who = [(np.arange(m), np.arange(start, start + m))]  # rows, and the places that draw for them
    if mix:
        draws = _Draws(seed, state, settings, who[0][1])
        mixed = np.flatnonzero(draws.chosen(draws("mix")[:, 0], "mix_probability"))
        who.append((n + mixed, _below(draws("mix")[mixed, 1], places)))
    for slots, mine in who:
        if not len(slots):
            continue
        draws = _Draws(seed, state, settings, mine)
        _put(geometry, GEOMETRY, slots, _geometry(draws, order[mine], h, w))
        _put(color, COLOR, slots, _color(draws))
        if elastic:
            _elastic(draws, weights, rows.reshape(-1, 2, h, w), field.reshape(-1, 2, h, w), slots)
    if mix and m:
        box, shares = _mix(_Draws(seed, state, settings, who[0][1]), h, w)
        _put(geometry, GEOMETRY, np.arange(m), box)
        _put(color, COLOR, np.arange(m), shares)


class _Draws:
    """What some places of an epoch draw: called with a transform's name, their words (places, 4)."""

    def __init__(self, seed, state, settings, places):
        self.seed, self.epoch, self.places = seed, int(state["epoch"]), places
        self.settings = settings.reshape(COUNT)

    def __call__(self, name, width=1):
        return blocks(self.seed, SITES[name], self.epoch, self.places, width)

    def one(self, setting):
        """Return a setting of one number."""
        return self.settings[SETTINGS[setting][0]]

    def uniform(self, bits, setting):
        low, high = self.settings[SETTINGS[setting][0] :][:2]
        return low + (high - low) * _share(bits)

    def within(self, name):
        """Return a uniform draw on a transform's range; nothing is drawn where it is one value."""
        low, high = self.settings[SETTINGS[name][0] :][:2]
        return np.full(len(self.places), low) if low == high else self.uniform(self(name)[:, 0], name)

    def chosen(self, bits, setting):
        return bits >> 40 < int(self.one(setting))


def _share(bits):
    """Return uniforms on [0, 1): multiples of 2^-24."""
    return (bits >> 40).astype(np.float64) * (1 / UNIT)


def _below(bits, count):
    """Return whole numbers, uniform on 0 .. count-1."""
    return ((bits >> 32) * count >> 32).astype(np.int64)


def _sine(t):
    """sin(2 pi t) by its series up to a quarter turn."""
    t = t - np.floor(t + 0.5)
    t = np.where(t > 0.25, 0.5 - t, np.where(t < -0.25, -0.5 - t, t))
    x = t * 6.283185307179586
    square, series = x * x, 0.0
    for k in range(21, 1, -2):
        series = (1 - series) * square / (k * (k - 1))
    return x * (1 - series)


def _cosine(t):
    return _sine(t + 0.25)


def _whole(x):
    return np.rint(x).astype(np.int64)


def _put(table, names, rows, columns):
    for name, values in columns.items():
        table[rows, names.index(name)] = values


def _geometry(draws, images, h, w):
    """Return the columns of `geometry` up to the cleared box."""
    crop, pad = draws("crop"), int(draws.one("crop"))
    x, y = ((_below(crop[:, i], 2 * pad + 1) - pad) << 16 for i in (1, 0))
    warped = draws.chosen(draws("warp")[:, 0], "warp_probability")
    rescale, shift_x, shift_y = _rescale(draws, h, w)
    x, y = x + np.where(warped, shift_x, 0), y + np.where(warped, shift_y, 0)
    drawn = _inverse_map(draws, rescale)
    xx, xy, yx, yy = (_whole(np.where(warped, a, b) * 65536) for a, b in zip(drawn, (1, 0, 0, 1), strict=True))
    flipped = (crop[:, 2] >> 40).astype(np.int64) >= UNIT - int(draws.one("flip"))
    if draws.one("alternate"):
        flipped = alternating(draws.seed, draws.epoch, images)
    mirror, tilt = np.where(flipped, -1, 1), np.where(draws.chosen(crop[:, 3], "flip_vertical"), -1, 1)
    lens = _whole(draws.within("lens") * (4294967296.0 / (float(w) * w + float(h) * h)))
    interpolation = int(draws.one("interpolation"))
    return {
        "image": images,
        **{"m00": xx * mirror, "m01": xy * tilt, "m10": yx * mirror, "m11": yy * tilt},
        **{"x": (xx * x + xy * y) >> 13, "y": (yx * x + yy * y) >> 13},
        "lens": np.where(warped, lens, 0),
        "interpolation": interpolation if interpolation < 4 else draws("interpolation")[:, 0] >> 62,
        "elastic": warped & (draws.one("elastic") > 0),
        **_cutout(draws, h, w),
    }


def _rescale(draws, h, w):
    """Return factors, and by how much x and y move, 2^16 a pixel."""
    low, high = draws.settings[SETTINGS["rescale"][0] :][:2]
    if low == high == 1:
        return np.ones(len(draws.places)), 0, 0
    words = draws("rescale")
    factor = draws.uniform(words[:, 0], "rescale")
    room = np.abs(factor - 1) * (65536.0 / UNIT)
    x, y = (room * (((words[:, i] >> 40).astype(np.int64) - UNIT // 2).astype(np.float64) * size)
            for i, size in ((2, w), (1, h)))  # fmt: skip
    return factor, _whole(x), _whole(y)


def _inverse_map(draws, rescale):
    """Return xx, xy, yx, yy: from places around the middle of the output to those of the source."""
    zoom = rescale * draws.within("zoom")
    root = np.sqrt(draws.within("stretch"))
    turn, lean = draws.within("rotate") / 360, draws.within("shear") / 360
    narrow, flat, tangent = 1 / (zoom * root), root / zoom, _sine(lean) / _cosine(lean)
    yx, yy = _sine(turn) * narrow, _cosine(turn) * flat
    return _cosine(turn) * narrow + tangent * yx, -(_sine(turn) * flat) + tangent * yy, yx, yy


def _cutout(draws, h, w):
    words = draws("cutout")
    side = np.where(draws.chosen(words[:, 2], "cutout_probability"), int(draws.one("cutout")), 0)
    top, left = _below(words[:, 0], h) - side // 2, _below(words[:, 1], w) - side // 2
    return {
        **{"cut_top": top.clip(0, h), "cut_bottom": (top + side).clip(0, h)},
        **{"cut_left": left.clip(0, w), "cut_right": (left + side).clip(0, w)},
    }


def _color(draws):
    colored = draws.chosen(draws("color")[:, 0], "color_probability")
    columns = {name: np.where(colored, draws.within(name), 1) for name in COLOR[:3]}
    u = _share(draws("lighting"))  # normal by Box and Muller, two of a pair
    r, s = np.sqrt(-2 * np.log(1 - u[:, 0])), np.sqrt(-2 * np.log(1 - u[:, 2]))
    normal = [r * _cosine(u[:, 1]), r * _sine(u[:, 1]), s * _cosine(u[:, 3])]
    axes = draws.settings[SETTINGS["lighting"][0] :][:9].reshape(3, 3)
    for c in range(3):
        columns[f"light{c}"] = np.where(colored, sum(a * n for a, n in zip(axes[c], normal, strict=True)), 0)
    return {**columns, "hue": np.where(colored, draws.within("hue"), 0), "share": 1, "inside": 1}


def _mix(draws, h, w):
    """Return the columns of `geometry` and of `color` that say what is mixed: a box, and how much of it is its own."""
    words = draws("mix")
    mixed = draws.chosen(words[:, 0], "mix_probability")
    mixup, cutmix = (bool(draws.one(name)) for name in ("mixup", "cutmix"))
    pastes = cutmix & ((words[:, 3] >> 63 != 0) | (not mixup))
    bits, fine = (words[:, 2] >> 40).astype(np.int64), UNIT // QUANTILES
    cell = bits // fine + np.where(pastes, QUANTILES + 1, 0) + COUNT - 2 * (QUANTILES + 1)
    low, high = draws.settings[cell], draws.settings[cell + 1]
    share = low + (high - low) * (bits % fine / fine)
    corner, side = draws("cutmix"), np.sqrt(1 - share)
    rows, columns = (h * side).astype(np.int64), (w * side).astype(np.int64)
    top, left = _below(corner[:, 0], h) - rows // 2, _below(corner[:, 1], w) - columns // 2
    ends = top.clip(0, h), (top + rows).clip(0, h), left.clip(0, w), (left + columns).clip(0, w)
    box = [mixed * np.where(pastes, a, b) for a, b in zip(ends, (0, h, 0, w), strict=True)]
    pasted = 1 - (box[1] - box[0]) * (box[3] - box[2]) / (float(h) * w)
    return dict(zip(GEOMETRY[-4:], box, strict=True)), {
        "share": np.where(mixed, np.where(pastes, pasted, share), 1),
        "inside": np.where(mixed, np.where(pastes, 0, share), 1),
    }


def _elastic(draws, weights, rows, field, slots):
    """Noise smoothed along rows, then along columns: sums of whole numbers below 2^53, so exact in any order."""
    h, w = field.shape[2:]
    size = 2 * h * w
    lanes = draws("elastic", -(-size // 16)).astype("<u8", copy=False).view("<u2")[:, :size]
    noise = (2.0 * lanes - 65535).reshape(-1, 2, h, w)
    rows[slots] = along = np.floor(noise @ _band(weights, w) / 256)
    field[slots] = np.rint(_band(weights, h) @ along * draws.one("elastic"))


def _band(weights, size):
    """Return the matrix (size, size) that smooths by these weights to both sides, nothing outside."""
    away = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    return np.where(away < len(weights), weights[np.minimum(away, len(weights) - 1)], 0).astype(np.float64)
