"""Straight-line loops for transforms.cu and what follows it in augment.cu: an image, a pixel, a formula at a time."""

import math

import numpy as np

from gpunet.core import random
from gpunet.core.augmentation import COLOR, GEOMETRY, QUANTILES, SETTINGS, SITES


class Place:
    """One place of an epoch: its words and uniforms."""

    def __init__(self, seed, state, settings, place):
        self.seed, self.epoch, self.settings, self.place = seed, int(state["epoch"]), settings, place

    def words(self, name):
        return [int(w) for w in random.philox(self.seed, SITES[name], self.epoch, self.place, 1)]

    def setting(self, name):
        start, width = SETTINGS[name]
        return self.settings[start] if width == 1 else self.settings[start : start + width]

    def uniform(self, name, word=0):
        low, high = self.setting(name)
        return low + (high - low) * (self.words(name)[word] >> 40) / 2**24

    def happens(self, name, setting, word=0):
        return self.words(name)[word] >> 40 < self.setting(setting)


def below(word, count):
    return (word >> 32) * count >> 32


def whole(x):
    return math.floor(x + 0.5)


def geometry_of(p, image, h, w):
    """A row of geometry up to the cleared box, with the map as the inverse of what moves the picture."""
    crop, pad = p.words("crop"), int(p.setting("crop"))
    x, y = ((below(crop[i], 2 * pad + 1) - pad) * 65536 for i in (1, 0))
    inverse, lens = np.eye(2), 0
    warped = p.happens("warp", "warp_probability")
    if warped:
        rescale = 1.0 if list(p.setting("rescale")) == [1, 1] else p.uniform("rescale")
        if list(p.setting("rescale")) != [1, 1]:
            _, down, right, _ = p.words("rescale")
            x += whole(abs(rescale - 1) * w * ((right >> 40) / 2**24 - 0.5) * 65536)
            y += whole(abs(rescale - 1) * h * ((down >> 40) / 2**24 - 0.5) * 65536)
        turn, lean = (math.radians(p.uniform(name)) for name in ("rotate", "shear"))
        stretch = p.uniform("stretch")
        forward = rescale * p.uniform("zoom") * np.diag([stretch**0.5, stretch**-0.5])
        forward = forward @ [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
        inverse = np.linalg.inv(forward @ [[1, -math.tan(lean)], [0, 1]])
        lens = whole(p.uniform("lens") * 2**32 / (h * h + w * w))
    (xx, xy), (yx, yy) = ([whole(v * 65536) for v in row] for row in inverse)
    flipped = crop[2] >> 40 >= 2**24 - p.setting("flip")
    if p.setting("alternate"):
        first = int(random.philox(p.seed, SITES["alternate"], 0, image, 1)[0]) >> 63
        flipped = first != p.epoch % 2
    tilted = p.happens("crop", "flip_vertical", 3)
    interpolation = int(p.setting("interpolation"))
    row = [image, -xx if flipped else xx, -xy if tilted else xy, -yx if flipped else yx, -yy if tilted else yy]
    row += [xx * x + xy * y >> 13, yx * x + yy * y >> 13, lens]
    row += [interpolation if interpolation < 4 else p.words("interpolation")[0] >> 62]
    row += [int(warped and p.setting("elastic") > 0)]
    side = int(p.setting("cutout")) if p.happens("cutout", "cutout_probability", 2) else 0
    for word, size in zip(p.words("cutout"), (h, w), strict=False):
        start = below(word, size) - side // 2
        row += [min(max(start, 0), size), min(max(start + side, 0), size)]
    return row


def color_of(p):
    colored = p.happens("color", "color_probability")
    row = [p.uniform(name) if colored else 1 for name in COLOR[:3]] + [p.uniform("hue") if colored else 0]
    u = [(word >> 40) / 2**24 for word in p.words("lighting")]
    r, s = (math.sqrt(-2 * math.log(1 - v)) for v in (u[0], u[2]))
    normal = [r * math.cos(2 * math.pi * u[1]), r * math.sin(2 * math.pi * u[1]), s * math.cos(2 * math.pi * u[3])]
    light = p.setting("lighting").reshape(3, 3) @ normal
    return row + [value if colored else 0 for value in light] + [1, 1]


def mix_of(p, h, w):
    """(box, share, inside) of an image that is mixed."""
    _, _, bits, which = p.words("mix")
    mixup, cutmix = p.setting("mixup"), p.setting("cutmix")
    pastes = bool(cutmix) and (not mixup or which >> 63 == 1)
    table = p.settings[-(QUANTILES + 1) :] if pastes else p.settings[-2 * (QUANTILES + 1) : -(QUANTILES + 1)]
    share = float(np.interp((bits >> 40) / 2**24 * QUANTILES, np.arange(QUANTILES + 1), table))
    if not pastes:
        return [0, h, 0, w], share, share
    box = []
    for word, size in zip(p.words("cutmix"), (h, w), strict=False):
        extent = int(size * math.sqrt(1 - share))
        start = below(word, size) - extent // 2
        box += [min(max(start, 0), size), min(max(start + extent, 0), size)]
    return box, 1 - (box[1] - box[0]) * (box[3] - box[2]) / (h * w), 0


def smoothed(values, weights):
    """Each element with its neighbours, by weights of their distance."""
    return [sum(int(weights[abs(i - j)]) * int(v) for j, v in enumerate(values) if abs(i - j) < len(weights))
            for i in range(len(values))]  # fmt: skip


def transforms_draw(
    name, order, state, settings, weights, geometry, color, rows, field, seed, mix, elastic, radius, batch,
    batches, first, places, n, h, w,
):  # fmt: skip
    slots = n * (1 + mix)
    geometry, color = np.zeros((slots, len(GEOMETRY)), np.int64), np.zeros((slots, len(COLOR)))
    geometry[:, 0] = -1
    along, moves = (np.zeros((slots, 2, h, w) if elastic else 1, np.int64) for _ in range(2))
    for slot in range(slots):
        place = (int(state["batch"]) - int(state["epoch"]) * batches) * batch + first + slot % n
        p, there = Place(seed, state, settings, place), place < places
        mixed = there and mix and p.happens("mix", "mix_probability")
        if slot >= n:
            there, p = mixed, Place(seed, state, settings, below(p.words("mix")[1], places))
        if not there:
            continue
        geometry[slot, :14], color[slot] = geometry_of(p, int(order[p.place]), h, w), color_of(p)
        if mixed and slot < n:
            geometry[slot, 14:], *color[slot, -2:] = mix_of(p, h, w)
        if elastic:
            size = 2 * h * w
            lanes = random.lanes(seed, SITES["elastic"], p.epoch, p.place * 16 * -(-size // 16), size)
            noise = (2 * lanes.astype(np.int64) - 65535).reshape(2, h, w)
            for axis in (0, 1):
                along[slot, axis] = [[v // 256 for v in smoothed(line, weights)] for line in noise[axis]]
                down = np.array([smoothed(line, weights) for line in along[slot, axis].T]).T
                moves[slot, axis] = np.rint(down * p.setting("elastic"))
    return {"geometry": geometry, "color": color, "rows": along, "field": moves}


def pixel(image, y, x, reflect):
    h, w, _ = image.shape
    if reflect:
        while not 0 <= y < h:
            y = -y if y < 0 else 2 * (h - 1) - y
        while not 0 <= x < w:
            x = -x if x < 0 else 2 * (w - 1) - x
    return image[y, x].astype(np.float64) if 0 <= y < h and 0 <= x < w else np.zeros(image.shape[2])


def keys(t):
    """Keys' cubic with a = -1/2 by the distance t."""
    t = abs(t)
    if t < 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


def source(d, x, y, move, h, w):
    """(y, x) in the source in 2^-16 pixels, of a place in eighths of a pixel from the middle of the output."""
    px, py = d["m00"] * x + d["m01"] * y + d["x"], d["m10"] * x + d["m11"] * y + d["y"]
    if d["lens"]:
        factor = d["lens"] * ((px >> 10) ** 2 + (py >> 10) ** 2) >> 32
        px, py = px + (px * factor >> 16), py + (py * factor >> 16)
    return (py >> 3) + ((h - 1) << 15) + move[0], (px >> 3) + ((w - 1) << 15) + move[1]


def batch_warp(name, images, geometry, field, warped, mix, elastic, reflect, set, n, h, w, c):
    warped = np.zeros((len(geometry), h, w, c))
    spread = {0: 1, 2: None, 3: 2}  # how far the taps of a method are
    for slot, row in enumerate(geometry.tolist()):
        d = dict(zip(GEOMETRY, row, strict=True))
        if d["image"] < 0:
            continue
        image, method = images[d["image"]], d["interpolation"]
        for oy in range(h):
            for ox in range(w):
                move = (0, 0)
                if elastic and d["elastic"]:
                    move = tuple(int(m) for m in field.reshape(-1, 2, h, w)[slot, ::-1, oy, ox])
                x8, y8 = 4 * (2 * ox + 1 - w), 4 * (2 * oy + 1 - h)
                if method in (1, 2):
                    steps = (-3, -1, 1, 3) if method == 2 else (0,)
                    places = [source(d, x8 + b, y8 + a, move, h, w) for a in steps for b in steps]
                    taps = [pixel(image, y + 32768 >> 16, x + 32768 >> 16, reflect) for y, x in places]
                    warped[slot, oy, ox] = sum(taps) / len(taps)
                    continue
                sy, sx = (v / 65536 for v in source(d, x8, y8, move, h, w))
                reach, weight = spread[method], keys if method == 3 else lambda t: max(0, 1 - abs(t))
                total = np.zeros(c)
                for y in range(math.floor(sy) + 1 - reach, math.floor(sy) + 1 + reach):
                    for x in range(math.floor(sx) + 1 - reach, math.floor(sx) + 1 + reach):
                        total += weight(sy - y) * weight(sx - x) * pixel(image, y, x, reflect)
                clamp = method == 3 and images.dtype == np.uint8
                warped[slot, oy, ox] = total.clip(0, 255) if clamp else total
    return {"warped": warped}


def coloured(image, d):
    """An image after its colours, by the formulas of torchvision's adjust functions."""

    def mixed(a, b, factor):
        return (factor * a + (1 - factor) * b).clip(0, 255)

    def grey(v):
        return v @ [0.299, 0.587, 0.114] if v.shape[2] == 3 else v.mean(axis=2)

    image = (image * d["brightness"]).clip(0, 255)
    image = mixed(image, grey(image).mean(), d["contrast"])
    if image.shape[2] != 3:
        return image
    image = mixed(image, grey(image)[..., None], d["saturation"])
    if d["hue"]:
        image = np.array([[hue_turned(p, d["hue"]) for p in line] for line in image])
    return (image + np.array([d[f"light{c}"] for c in range(3)])).clip(0, 255)


def hue_turned(pixel, turns):
    """By the six sectors of HSV."""
    high, low = max(pixel), min(pixel)
    if high == low:
        return pixel
    r, g, b = pixel
    i = list(pixel).index(high)
    hue = ([(g - b), (b - r), (r - g)][i] / (high - low) + 2 * i) / 6 + turns
    sector, f = divmod(hue % 1 * 6, 1)
    rising, falling = low + f * (high - low), high - f * (high - low)
    return [(high, rising, low), (falling, high, low), (low, high, rising),
            (low, falling, high), (rising, low, high), (high, low, falling)][int(sector) % 6]  # fmt: skip


def batch_finish(name, warped, geometry, color, mean, scale, x, photometric, mix, channels, n, h, w, c):
    normal = []
    shape = (c,) if channels == c else (h, w, c)
    for image, row, values in zip(warped, geometry, color, strict=True):
        d, g = dict(zip(COLOR, values, strict=True)), dict(zip(GEOMETRY, row.tolist(), strict=True))
        image = ((coloured(image, d) if photometric else image) - mean.reshape(shape)) * scale.reshape(shape)
        image[g["cut_top"] : g["cut_bottom"], g["cut_left"] : g["cut_right"]] = 0
        normal.append(image)
    x = np.zeros((n, h, w, c))
    for i in range(n):
        g = dict(zip(GEOMETRY, geometry[i].tolist(), strict=True))
        if g["image"] < 0:
            continue
        x[i] = normal[i]
        for y in range(g["top"], g["bottom"]):
            for at in range(g["left"], g["right"]):
                share = color[i][-1]
                x[i, y, at] = share * normal[i][y, at] + (1 - share) * normal[n + i][y, at]
    return {"x": x}


def batch_targets_mixed(name, labels, geometry, color, targets, smoothing, set, n, k):
    targets = np.full((n, k), np.nan)
    for i in range(n):
        if geometry[i, 0] >= 0:
            share = color[i, COLOR.index("share")]
            targets[i] = smoothing / k
            targets[i, labels[geometry[i, 0]]] += share * (1 - smoothing)
            if geometry[n + i, 0] >= 0:
                targets[i, labels[geometry[n + i, 0]]] += (1 - share) * (1 - smoothing)
    return {"targets": targets}
