"""One picture file into pixels: every kind of file Pillow reads safely, always turned upright, 8 bits, 1 or 3 channels.

Training and prediction use the same function, so that they see the same pixels.
"""

import numpy as np
from PIL import Image, ImageOps

from gpunet.errors import GpunetError

# By content, not by name. EPS and others are left out: they start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
PIXEL_LIMIT = 64_000_000  # of a picture as it is stored; 64 megapixels are 256 MB while it is opened


def open_image(path, channels=3):
    """Return a Pillow image in mode RGB (channels 3) or L (1), in its own size.

    Turned as its EXIF says; transparent parts on white; of 16 bits the upper 8; of an animation the first frame; CMYK
    and palettes converted. Raises GpunetError for what cannot be read or has more than 64 million pixels.
    """
    if channels not in (1, 3):
        raise GpunetError(f"{path}: channels: expected 1 or 3, got {channels}")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise GpunetError(
                    f"{path}: refused: {image.width} x {image.height} pixels, at most {PIXEL_LIMIT} expected"
                )
            return _plain(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
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
    image = open_image(path, channels)
    pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels.reshape(height, width, channels))


def _plain(image, mode):
    """Return the image in 8 bits without transparency."""
    if image.mode == "F":
        raise ValueError("floating point pixels, whose range is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
