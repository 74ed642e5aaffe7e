"""What pixels are normalised by: mean and standard deviation a channel, or the mean image, in float64."""

import numpy as np

CHUNK = 1 << 20  # pixel values that are held as float64 at a time


def channel_statistics(dataset):
    """Return (mean, sd), each float64 (channels,), of the training images in pixel units (uint8: 0 to 255).

    sd is that of all pixels (divided by their number, not one less); 0 for a channel that never changes. Two passes,
    and some 25 MB beside the images.
    """
    images = dataset.train.images
    n, h, w, c = images.shape
    mean = mean_image(dataset).reshape(-1, c).mean(axis=0)
    centre = np.tile(mean, h * w)
    squares = _sum(images, lambda x: np.square(x - centre))
    return mean, np.sqrt(squares.reshape(-1, c).sum(axis=0) / (n * h * w))


def mean_image(dataset):
    """Return the mean of the training images, float64 (h, w, c), in the units of the pixels."""
    images = dataset.train.images
    return (_sum(images, lambda x: x) / len(images)).reshape(images.shape[1:])


def _sum(images, f):
    """sum over images of f(image), float64 (h * w * c,); f takes and returns float64 (chunk, h * w * c)."""
    flat = images.reshape(len(images), -1)
    step = max(1, CHUNK // flat.shape[1])
    total = np.zeros(flat.shape[1])
    for start in range(0, len(flat), step):
        total += f(flat[start : start + step].astype(np.float64)).sum(axis=0)
    return total
