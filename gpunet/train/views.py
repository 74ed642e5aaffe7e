"""Views of an image at test time: mirrored, shifted, cropped; a prediction is then the mean over them.

    predictor.predict(images, views="flip")
    predictor.evaluate(dataset, "test", views="flip+shift:2")

Knows arrays, not networks.
"""

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gpunet.errors import GpunetError

FORMS = {  # as a user writes them, and how many numbers there may be
    "flip": ("flip", 0),
    "shift": ("shift[:PIXELS,zero|reflect]", 1),
    "five-crop": ("five-crop[:SIZE,SIZE...|padPIXELS,zero|reflect]", 99),
    "ten-crop": ("ten-crop[:SIZE,SIZE...|padPIXELS,zero|reflect]", 99),
}
SHIFT, PAD = 1, 4  # pixels, unless told


@dataclass(frozen=True)
class _Part:
    """One part of a text: numbers of pixels, the number after "pad", and whether what lies outside is mirrored."""

    numbers: tuple
    pad: int | None
    reflect: bool


class Views:
    """A fixed set of views of each image: all combinations of the parts of a text such as "flip+shift:2,zero".

    flip: the image and its mirror image. shift: as it is, and moved by PIXELS (1) up and left, down and right; with
    flip, the six views of airbench (Jordan 2024), here of equal weight. five-crop: four corners and the centre, as
    large as the network's input, of the image padded by PIXELS (4), or scaled until its shorter side is SIZE, for each
    size; an image larger than the input is cropped as it is, unless told. ten-crop: these and their mirror images
    (Krizhevsky et al. 2012; at several sizes He et al. 2016). Outside, the image is mirrored, or pixels are 0 ("zero").
    """

    def __init__(self, text):
        self.text, self.parts = text, {}
        for part in text.split("+") if isinstance(text, str) else [""]:
            name, colon, arguments = part.partition(":")
            if name not in FORMS or name in self.parts:
                raise GpunetError(f"views: expected {', '.join(FORMS)}, each once, joined by +; got {text!r}")
            self.parts[name] = _part(name, arguments.split(",") if colon else [])
        if "ten-crop" in self.parts and {"flip", "five-crop"} & self.parts.keys():
            raise GpunetError(f"views: ten-crop has five-crop and flip in it: expected it without these, got {text!r}")

    def of(self, x, size, outside=0.0):
        """Yield the views of images x (n, h, w, c), each (n, *size, c); `outside` is a pixel of 0, as x has it."""
        shift, mirror = self.parts.get("shift"), {"flip", "ten-crop"} & self.parts.keys()
        for crop in self._crops(x, size, outside):
            for moved in _shifts(crop, shift, outside) if shift else [crop]:
                yield moved
                if mirror:
                    yield moved[:, :, ::-1]

    def _crops(self, x, size, outside):
        """Yield the corners and the centre of x at each size, or x itself where it is not cropped."""
        name = next((name for name in self.parts if name.endswith("crop")), None)
        if name is None:
            yield x
            return
        part = self.parts[name]
        pad = part.pad if part.pad or part.numbers or x.shape[1:3] != size else PAD
        larger = [_scaled(x, side) for side in part.numbers] or [_padded(x, pad or 0, part.reflect, outside)]
        for images in larger:
            (h, w), (oh, ow) = images.shape[1:3], size
            if h < oh or w < ow:
                raise GpunetError(f"views: {name}: expected images of at least {oh} x {ow} pixels, got {h} x {w}")
            bottom, right = h - oh, w - ow
            for top, left in ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)):
                yield images[:, top : top + oh, left : left + ow]


def _part(name, arguments):
    """Return the _Part of a name and the texts behind its colon."""
    form, most = FORMS[name]
    numbers = tuple(int(a) for a in arguments if re.fullmatch(r"[1-9]\d{0,3}", a))
    pads = [int(a[3:]) for a in arguments if re.fullmatch(r"pad[1-9]\d{0,3}", a) and most > 1]
    fills = [a for a in arguments if a in ("zero", "reflect") and most]
    known = len(numbers) + len(pads) + len(fills) == len(arguments)
    if not known or len(numbers) > most or len(fills) > 1 or len(pads) + bool(numbers) > 1:
        raise GpunetError(f"views: expected {form}, got '{name}:{','.join(arguments)}'")
    return _Part(numbers, pads[0] if pads else None, fills != ["zero"])


def _shifts(x, part, outside):
    """Return x, and x moved up and left, and down and right."""
    by, (h, w) = part.numbers[0] if part.numbers else SHIFT, x.shape[1:3]
    larger = _padded(x, by, part.reflect, outside)
    return [larger[:, top : top + h, top : top + w] for top in (by, 2 * by, 0)]


def _padded(x, by, reflect, outside):
    """Return images with `by` more pixels on each side: mirrored without repeating the edge, or `outside`."""
    h, w = x.shape[1:3]
    if reflect and by >= min(h, w):
        raise GpunetError(f"views: expected fewer pixels than the image has ({h} x {w}), got {by}")
    if reflect:
        return np.pad(x, ((0, 0), (by, by), (by, by), (0, 0)), "reflect")
    larger = np.empty((len(x), h + 2 * by, w + 2 * by, x.shape[3]), x.dtype)
    larger[:] = outside
    larger[:, by : by + h, by : by + w] = x
    return larger


def _scaled(x, side):
    """Return images scaled until their shorter side is `side`, bilinear, averaging where they shrink."""
    n, h, w, c = x.shape
    oh, ow = (round(s * side / min(h, w)) for s in (h, w))
    planes = np.moveaxis(x, 3, 1).reshape(n * c, h, w).astype(np.float32)
    scaled = [np.asarray(Image.fromarray(p).resize((ow, oh), Image.Resampling.BILINEAR)) for p in planes]
    return np.moveaxis(np.reshape(scaled, (n, c, oh, ow)), 1, 3)
