"""One picture file into pixels: every kind of file Pillow reads safely, always turned upright, 8 bits, 1 or 3 channels.

Training and prediction use the same function, so that they see the same pixels.
"""

import threading
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from gpunet.errors import GpunetError

# By content, not by name. EPS and others are left out: they start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
PIXEL_LIMIT = 64_000_000  # of a picture as it is stored, and of all that are open at a time: 8 bytes each at most
STRIP = 1 << 20  # pixels that are converted at a time, so that no more than two whole pictures are held


def open_image(path, channels=3):
    """Return a Pillow image in mode RGB (channels 3) or L (1), in its own size.

    Turned as its EXIF says; transparent parts on white; of 16 bits the upper 8; of an animation the first frame; CMYK
    and palettes converted. Raises GpunetError for what cannot be read or has more than 64 million pixels.
    """
    return _opened(path, channels, lambda image: image)


def _opened(path, channels, use):
    """Return use(the picture in mode RGB or L)."""
    if channels not in (1, 3):
        raise GpunetError(f"{path}: channels: expected 1 or 3, got {channels}")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise GpunetError(
                    f"{path}: refused: {image.width} x {image.height} pixels, at most {PIXEL_LIMIT} expected"
                )
            with ROOM.taken(image.width * image.height):
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return use(_plain(image, "L" if channels == 1 else "RGB"))
    except GpunetError:
        raise
    except Exception as error:  # damaged files make Pillow raise errors of any kind
        reason = "no picture in a format known here" if type(error).__name__ == "UnidentifiedImageError" else error
        raise GpunetError(f"{path}: cannot be read: {' '.join(str(reason).split())[:120]}") from None


def prepare_image(path, size, channels=3):
    """Return a picture as uint8 (height, width, channels), scaled to cover `size` = (height, width) and cut centrally.

    Nothing is distorted: of the longer side, the ends are lost. Bilinear, averaging where it shrinks.
    """
    height, width = size
    image = _opened(path, channels, lambda image: ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(np.asarray(image).reshape(height, width, channels))


class _Room:
    """Keeps threads from having more pixels open at a time than there is room for; one picture has fewer."""

    def __init__(self, pixels):
        self._free, self._change = pixels, threading.Condition()

    @contextmanager
    def taken(self, pixels):
        """Wait for room and hold it."""
        with self._change:
            self._change.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._change:
                self._free += pixels
                self._change.notify_all()


ROOM = _Room(PIXEL_LIMIT)  # the memory of this process, of which there is one


def _plain(image, mode):
    """Return the image in 8 bits without transparency, converted strip by strip where it is large."""
    if image.mode == mode and not image.has_transparency_data:
        return image
    rows = max(1, STRIP // image.width)
    if rows >= image.height:
        return _converted(image, mode)
    plain = Image.new(mode, image.size)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        plain.paste(_converted(image.crop(box), mode), box)
    return plain


def _converted(image, mode):
    if image.mode == "F":
        raise ValueError("floating point pixels, whose range is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
