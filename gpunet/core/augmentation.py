"""What may be done to a training image: the description of it, checked here once, and the table that kernels read.

Knows nothing of how a transform is computed: that is kernels/transforms.cu and kernels/augment.cu.
"""

import math
import sys
from dataclasses import dataclass, fields
from numbers import Integral, Real

import numpy as np

from gpunet.core.random import AUGMENT_SITE
from gpunet.errors import GpunetError

# Who draws, in the order of their sites. A draw is keyed by (seed, site, epoch, place in the epoch).
DRAWS = (
    "crop", "alternate", "warp", "rescale", "rotate", "shear", "stretch", "zoom", "lens", "interpolation", "elastic",
    "color", "brightness", "contrast", "saturation", "hue", "lighting", "cutout", "mix", "cutmix",
)  # fmt: skip
SITES = {name: AUGMENT_SITE + i for i, name in enumerate(DRAWS)}

# The table that transforms_draw reads: {what: (first place, how many)}; probabilities are multiples of 2^-24.
WIDTHS = {
    **dict.fromkeys(("flip", "flip_vertical", "alternate", "crop", "warp_probability", "interpolation", "elastic"), 1),
    **dict.fromkeys(("color_probability", "cutout", "cutout_probability", "mixup", "cutmix", "mix_probability"), 1),
    **dict.fromkeys(("rescale", "rotate", "shear", "stretch", "zoom", "lens"), 2),
    **dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 2),
    "lighting": 9,
}
QUANTILES = 1024  # intervals of the table of a Beta distribution
SETTINGS = {name: (sum(list(WIDTHS.values())[:i]), width) for i, (name, width) in enumerate(WIDTHS.items())}
COUNT = sum(WIDTHS.values()) + 2 * (QUANTILES + 1)

# What is drawn for an image: whole numbers (a warp is computed in them) and colours.
GEOMETRY = ("image", "m00", "m01", "m10", "m11", "x", "y", "lens", "interpolation", "elastic",
            "cut_top", "cut_bottom", "cut_left", "cut_right", "top", "bottom", "left", "right")  # fmt: skip
COLOR = ("brightness", "contrast", "saturation", "hue", "light0", "light1", "light2", "share", "inside")

INTERPOLATIONS = ("bilinear", "nearest", "area", "cubic", "random")
LARGEST = sys.float_info.max
UNIT = 1 << 24  # of uniform draws
ONE = 1 << 15  # what the weights of the Gaussian that smooths an elastic field add up to, nearly


class Transform:
    """A transform that users know by name; its docstring says what it does. example: keys of an Augmentation."""

    def __init__(self, doc, **example):
        self.__doc__ = doc
        self.example = example


AUGMENTATIONS = {
    "flip": Transform(
        "Mirror left and right. flip: true for probability 0.5, or a probability.",
        flip=True,
    ),
    "alternate": Transform(
        "Mirror every image in every other epoch, the first time drawn. alternate = true (Jordan 2024, airbench).",
        alternate=True,
    ),
    "flip_vertical": Transform(
        "Mirror top and bottom. flip_vertical: true for probability 0.5, or a probability.",
        flip_vertical=True,
    ),
    "crop": Transform(
        "Move by whole pixels: a random crop of the image, padded by `crop` with zeros or (reflect) mirrored.",
        crop=4,
    ),
    "rescale": Transform(
        "Resize by a factor in rescale = [low, high], then crop to the old size anywhere.",
        rescale=[0.75, 1.5],
    ),
    "rotate": Transform(
        "Turn about the middle by degrees in rotate = [low, high]; a number d is [-d, d].",
        rotate=25.0,
    ),
    "shear": Transform(
        "Move rows sideways by their height times the tangent of degrees in shear; a number d is [-d, d].",
        shear=20.0,
    ),
    "stretch": Transform(
        "Change width over height by a factor in stretch, the area kept; a number f is [1/f, f].",
        stretch=1.5,
    ),
    "zoom": Transform(
        "Enlarge about the middle by a factor in zoom; a number f is [1/f, f].",
        zoom=1.4,
    ),
    "lens": Transform(
        "Distort as a lens: show at radius r what was at r(1 + k r^2), r = 1 in a corner; a number k is [-k, k].",
        lens=0.3,
    ),
    "elastic": Transform(
        "Move each pixel by `elastic` times noise smoothed by a Gaussian of elastic_sigma (Simard 2003: 34 and 4).",
        elastic=34.0,
    ),
    "interpolation": Transform(
        "How pixels between pixels are made: bilinear, nearest, area, cubic (Keys 1981), or random, drawn per image.",
        interpolation="random",
        rotate=25.0,
    ),
    "brightness": Transform(
        "Multiply pixels by a factor in brightness = [low, high]; a number d is [1 - d, 1 + d].",
        brightness=[0.5, 1.5],
    ),
    "contrast": Transform(
        "Multiply the distance to the image's mean grey by a factor in contrast; a number d is [1 - d, 1 + d].",
        contrast=[0.5, 1.5],
    ),
    "saturation": Transform(
        "Multiply the distance to the pixel's own grey by a factor in saturation; a number d is [1 - d, 1 + d].",
        saturation=[0.5, 1.5],
    ),
    "hue": Transform(
        "Turn the hue (of HSV) by a share of the circle in hue; a number d is [-d, d], at most 0.5.",
        hue=0.1,
    ),
    "lighting": Transform(
        "Add N(0, lighting) times each principal axis of the training pixels, as long as its deviation (AlexNet 2012).",
        lighting=0.1,
    ),
    "cutout": Transform(
        "Clear a square of `cutout` pixels anywhere, cut off at the edges, after normalisation (DeVries 2017).",
        cutout=16,
    ),
    "mixup": Transform(
        "Average with another image and its target, weights by Beta(mixup, mixup) (Zhang 2018).",
        mixup=1.0,
    ),
    "cutmix": Transform(
        "Paste a box of another image, area by Beta(cutmix, cutmix), target by area (Yun 2019); beside mixup, either.",
        cutmix=1.0,
    ),
}

# {key: (least, most, what a single number stands for)} of a range.
_RANGES = {
    "rescale": (0.1, 10, "factor"),
    "rotate": (-180, 180, "symmetric"),
    "shear": (-80, 80, "symmetric"),
    "stretch": (0.1, 10, "factor"),
    "zoom": (0.1, 10, "factor"),
    "lens": (-0.3, 1, "symmetric"),
    "brightness": (0, 10, "around one"),
    "contrast": (0, 10, "around one"),
    "saturation": (0, 10, "around one"),
    "hue": (-0.5, 0.5, "symmetric"),
}
_PROBABILITIES = ("warp_probability", "color_probability", "cutout_probability", "mix_probability")
_AT_LEAST_0 = {"elastic": 1000, "lighting": 10}
_WHOLE = {"crop": 4096, "cutout": 4096}


def check(name, value, others=None):
    """Return a valid value of a key of Augmentation; raise ValueError that says what was expected.

    others: keys that were checked before.
    """
    numeric = _is_number(value)
    if name in ("flip", "flip_vertical"):
        if not isinstance(value, bool) and not (numeric and 0 <= value <= 1):
            raise ValueError("true, false or a probability from 0 to 1")
    elif name in ("alternate", "reflect"):
        if not isinstance(value, bool):
            raise ValueError("true or false")
        flip = (others or {}).get("flip", False)
        if name == "alternate" and value and not (flip is True or flip in (0, 0.5)):
            raise ValueError("false, or flip = true beside it: what alternates has no probability")
    elif name in _PROBABILITIES:
        if not (numeric and 0 <= value <= 1):
            raise ValueError("a probability from 0 to 1")
    elif name in _WHOLE:
        if not (numeric and isinstance(value, Integral) and 0 <= value <= _WHOLE[name]):
            raise ValueError(f"a whole number of pixels from 0 to {_WHOLE[name]}")
    elif name in _AT_LEAST_0:
        if not (numeric and 0 <= value <= _AT_LEAST_0[name]):
            raise ValueError(f"a number from 0 to {_AT_LEAST_0[name]}")
    elif name in ("mixup", "cutmix"):
        if not (numeric and (value == 0 or 0.001 <= value <= 100)):
            raise ValueError("0 or a number from 0.001 to 100")
    elif name == "elastic_sigma":
        if not (numeric and 0.25 <= value <= 32):
            raise ValueError("a number of pixels from 0.25 to 32")
    elif name == "interpolation":
        if value not in INTERPOLATIONS:
            raise ValueError(f"one of {', '.join(INTERPOLATIONS)}")
    else:
        _check_range(name, value, numeric)
    return value


def _is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= LARGEST


def _check_range(name, value, numeric):
    low, high, kind = _RANGES[name]
    single = {"factor": (1, high), "symmetric": (0, min(-low, high)), "around one": (0, 1)}[kind]
    if numeric and single[0] <= value <= single[1]:
        return
    pair = list(value) if isinstance(value, list | tuple) else []
    if len(pair) != 2 or not all(map(_is_number, pair)) or not low <= pair[0] <= pair[1] <= high:
        raise ValueError(
            f"a number from {single[0]:g} to {single[1]:g}, or [low, high] with {low:g} <= low <= high <= {high:g}"
        )


def limits(name, value):
    """Return (low, high) of a range given as a number or as a pair."""
    if isinstance(value, list | tuple):
        return float(value[0]), float(value[1])
    value, kind = float(value), _RANGES[name][2]
    if kind == "factor":
        return 1 / value, value
    return (-value, value) if kind == "symmetric" else (1 - value, 1 + value)


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, drawn anew for each image and epoch; AUGMENTATIONS describes every key.

    In this order: rescale, zoom, stretch, rotate and shear about the middle, lens, elastic, all in one interpolation;
    crop and flips; brightness, contrast, saturation, hue, lighting; normalisation; cutout; mixup or cutmix. Draws are
    uniform on a range. The last four probabilities are those that an image is warped (all up to `elastic`), coloured
    (up to `lighting`), cut, mixed at all. What lies outside the image is 0, or mirrored with `reflect`.
    """

    flip: bool | float = False
    flip_vertical: bool | float = False
    alternate: bool = False
    crop: int = 0
    reflect: bool = False
    rescale: float | list = 1.0
    rotate: float | list = 0.0
    shear: float | list = 0.0
    stretch: float | list = 1.0
    zoom: float | list = 1.0
    lens: float | list = 0.0
    elastic: float = 0.0
    elastic_sigma: float = 4.0
    interpolation: str = "bilinear"
    warp_probability: float = 1.0
    brightness: float | list = 0.0
    contrast: float | list = 0.0
    saturation: float | list = 0.0
    hue: float | list = 0.0
    lighting: float = 0.0
    color_probability: float = 1.0
    cutout: int = 0
    cutout_probability: float = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0

    def __post_init__(self):
        checked = {}
        for field in fields(self):
            value = getattr(self, field.name)
            try:
                checked[field.name] = check(field.name, value, checked)
            except ValueError as error:
                raise GpunetError(f"augmentation: {field.name}: expected {error}, got {value!r}") from None

    def limits(self, name):
        """Return (low, high) that a key is drawn from."""
        return limits(name, getattr(self, name))

    @property
    def active(self):
        """Names in AUGMENTATIONS of what is done at all; interpolation, where something else needs it."""
        names = [n for n in AUGMENTATIONS if n not in _RANGES and n != "interpolation" and getattr(self, n)]
        names += [n for n in _RANGES if self.limits(n) != _NEUTRAL[n]]
        names += ["interpolation"] * bool(_WARPS & set(names))
        return tuple(n for n in AUGMENTATIONS if n in names)

    @property
    def colors(self):
        """Whether colours change, for which pixels must be from 0 to 255."""
        return bool(_COLORS & set(self.active))

    @property
    def mixes(self):
        """Whether an image is made of two."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def plain(self):
        """Whether batch_crop_flip is enough: it crops, and mirrors half of the images."""
        half = self.alternate or self.flip is True or self.flip in (0, 0.5)
        return half and set(self.active) <= {"flip", "alternate", "crop"}

    @property
    def mirrors(self):
        """How batch_crop_flip mirrors: 0 not at all, 1 half of the images, 2 by turns."""
        return 2 if self.alternate else int(self.flip > 0)

    @property
    def gaussian(self):
        """Whole weights 0 .. 3 sigma of the Gaussian that smooths an elastic field: int32, those of one side."""
        radius = max(1, math.ceil(3 * self.elastic_sigma))
        weights = np.exp(-0.5 * (np.arange(radius + 1) / self.elastic_sigma) ** 2)
        return np.rint(weights / (2 * weights.sum() - 1) * ONE).astype(np.int32)

    def table(self, axes=None):
        """Return what transforms_draw reads: float64 (COUNT). axes: (3, 3), principal axes times deviations."""
        total = int(2 * self.gaussian.sum() - self.gaussian[0])
        values = {name: self.limits(name) for name in _RANGES}
        for name in ("flip", "flip_vertical"):
            value = getattr(self, name)
            values[name] = round((0.5 if value is True else float(value)) * UNIT)
        values |= {name: round(getattr(self, name) * UNIT) for name in _PROBABILITIES}
        values |= {"alternate": self.alternate, "crop": self.crop, "cutout": self.cutout}
        values |= {"interpolation": INTERPOLATIONS.index(self.interpolation)}
        values |= {"mixup": self.mixup > 0, "cutmix": self.cutmix > 0}
        values |= {"elastic": self.elastic * 65536 * 256 / (65535 * total * total)}
        values |= {"lighting": self.lighting * (np.zeros(9) if axes is None else np.asarray(axes).reshape(9))}
        table = np.zeros(COUNT)
        for name, (start, width) in SETTINGS.items():
            table[start : start + width] = values[name]
        start = COUNT - 2 * (QUANTILES + 1)
        table[start:] = np.concatenate([beta_quantiles(self.mixup or 1.0), beta_quantiles(self.cutmix or 1.0)])
        return table


_NEUTRAL = {name: limits(name, {"factor": 1.0}.get(kind, 0.0)) for name, (_, _, kind) in _RANGES.items()}
_WARPS = {"rescale", "rotate", "shear", "stretch", "zoom", "lens", "elastic"}
_COLORS = {"brightness", "contrast", "saturation", "hue", "lighting"}


def beta_quantiles(alpha, cells=1 << 16):
    """Return the quantiles 0, 1/1024 .. 1 of Beta(alpha, alpha).

    Below 1 its density has no bound at 0; by t = x^alpha it has: x^(alpha-1) dx = dt / alpha.
    """
    power = min(alpha, 1.0)
    t = np.linspace(0, 0.5**power, cells + 1)
    x = t ** (1 / power)
    density = (x * (1 - x) * 4) ** (alpha - 1) if power == 1 else (1 - x) ** (alpha - 1)
    sums = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    wanted = np.arange(QUANTILES // 2 + 1) / QUANTILES
    half = np.interp(wanted, sums / (2 * sums[-1]), t) ** (1 / power)
    half[-1] = 0.5
    return np.concatenate([half, 1 - half[-2::-1]])


def pixel_axes(images, rows=1000):
    """Return (3, 3): columns are the principal axes of the pixels' colours, each times its standard deviation."""
    count, total, squares = 0, np.zeros(3), np.zeros((3, 3))
    for start in range(0, len(images), rows):
        pixels = images[start : start + rows].reshape(-1, 3).astype(np.float64)
        count += len(pixels)
        total += pixels.sum(axis=0)
        squares += pixels.T @ pixels
    mean = total / count
    values, vectors = np.linalg.eigh(squares / count - np.outer(mean, mean))
    return vectors * np.sqrt(np.maximum(values, 0))
