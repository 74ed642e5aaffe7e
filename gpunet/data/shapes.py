"""`shapes`: ten classes of 32 x 32 colour pictures that gpunet draws itself, for the first run and for tests.

A shape is {d < 0} for a distance-like d(x, y); a pixel's cover is clip(1/2 - d * pixels a unit, 0, 1). Pose, size,
stretch, colours, polarity (light on dark or dark on light), background and noise are random, so that the mean pictures
of the classes are nearly the same: a linear classifier on pixels stays below 25 %, a small convolutional network does
not.

Only + - * /, square root and comparisons of float32 on draws of core.random: the same bits on every machine. Picture i
of a split is the same whatever the number of pictures.
"""

import numpy as np

from gpunet.core.random import philox, site_of
from gpunet.data.dataset import DataSet, Split
from gpunet.errors import GpunetError

SIDE = 32
DRAWS = 44  # numbers a picture draws, a multiple of 4
CHUNK = 64  # pictures of a class drawn at a time: what fits the cache


def _circle(x, y):
    return _length(x, y) - 0.85


def _ring(x, y):
    return np.abs(_length(x, y) - 0.72) - 0.2


def _square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - 0.75


def _triangle(x, y):
    y = y + 0.15
    return np.maximum(0.866 * np.abs(x) + 0.5 * y, -y) - 0.5


def _star(x, y):
    """Five points: folded twice into the wedge of one half point, bounded by the line from tip (0, 1) to notch."""
    x = np.abs(x)
    for nx, ny in ((0.80901699, -0.58778525), (-0.80901699, -0.58778525)):
        beyond = 2 * np.maximum(nx * x + ny * y, 0)
        x, y = x - beyond * nx, y - beyond * ny
    x = np.abs(x)
    return 0.9135 * x + 0.4067 * (y - 1.05)


def _cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - 0.27, np.maximum(x, y) - 0.92)


def _moon(x, y):
    return np.maximum(_length(x + 0.2, y) - 0.92, 0.78 - _length(x - 0.3, y))


def _heart(x, y):
    """A square on its corner and two half circles on its upper sides."""
    u, v = 0.7071 * (x + y) + 0.22, 0.7071 * (y - x) + 0.22
    square = np.maximum(np.abs(u), np.abs(v)) - 0.55
    return np.minimum(square, np.minimum(_length(u - 0.55, v), _length(u, v - 0.55)) - 0.55)


def _arrow(x, y):
    x = np.abs(x)
    head = np.maximum(0.7071 * (x + y - 0.98), 0.1 - y)
    return np.minimum(head, np.maximum(x - 0.25, np.abs(y + 0.4) - 0.55))


def _bars(x, y):
    return np.maximum(np.abs(np.abs(y) - 0.52) - 0.25, np.abs(x) - 0.85)


def _length(x, y):
    return np.sqrt(x * x + y * y)


SHAPES = {f.__name__[1:]: f for f in (_circle, _ring, _square, _triangle, _star, _cross, _moon, _heart, _arrow, _bars)}


def load_shapes(*, train=10_000, test=2_000, seed=0):
    """Return the DataSet `shapes`; picture i has class i % 10, so that splits are balanced."""
    if not 0 <= seed < 2**64:
        raise GpunetError(f"shapes: seed: expected 0 to 2**64 - 1, got {seed}")
    if min(train, test) < len(SHAPES):
        raise GpunetError(f"shapes: train and test: expected at least 10 pictures each, got {train} and {test}")
    note = "synthetic pictures drawn by gpunet: accuracies on them say nothing about photographs"
    splits = [_draw(seed, split, n) for split, n in enumerate((train, test))]
    return DataSet("shapes", tuple(SHAPES), splits[0], test=splits[1], note=note)


def _draw(seed, split, n):
    """Return pictures 0 to n of a split as a Split."""
    draws = (philox(seed, site_of("data.shapes"), split, 0, n * DRAWS // 4) >> 40).astype(np.float32)
    draws = draws.reshape(n, DRAWS) * np.float32(2**-24)
    noise = philox(seed, site_of("data.shapes.noise"), split, 0, n * SIDE * SIDE * 3 // 32)
    noise = noise.astype("<u8", copy=False).view(np.uint8).reshape(n, SIDE, SIDE, 3)
    images = np.empty((n, SIDE, SIDE, 3), np.uint8)
    for label, shape in enumerate(SHAPES.values()):
        for start in range(label, n, len(SHAPES) * CHUNK):
            chunk = slice(start, start + len(SHAPES) * CHUNK, len(SHAPES))
            images[chunk] = _pictures(shape, draws[chunk], noise[chunk])
    return Split(images, (np.arange(n) % len(SHAPES)).astype(np.int32))


def _pictures(shape, draws, noise):
    """uint8 (n, 32, 32, 3): background + cover * (shape's colour - background) + noise."""
    u = iter(draws.T[:, :, None, None])  # each (n, 1, 1), uniform on [0, 1)
    centre = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2
    column, row = centre[None, None, :], centre[None, :, None]

    radius = 8 + 5 * next(u)
    slack = SIDE / 2 - radius
    dx, dy = column - slack * _signed(u), row - slack * _signed(u)
    cos, sin = _direction(u)
    stretch = 0.85 + 0.3 * next(u)
    x, y = (cos * dx + sin * dy) / (radius * stretch), (cos * dy - sin * dx) * stretch / radius
    cover = np.clip(0.5 - shape(x, y) * radius, 0, 1)[..., None]

    contrast = 0.25 + 0.35 * next(u)
    dark = 0.05 + (0.9 - contrast) * next(u)
    light_on_dark = next(u) < 0.5
    paper = np.where(light_on_dark, dark, dark + contrast)
    ink = np.where(light_on_dark, dark + contrast, dark) + 0.1 * _signed(u) * y
    texture = _texture(u, column, row)
    paper = (paper + 0.3 * contrast * texture)[..., None] + _tint(u) + texture[..., None] * 0.5 * _tint(u)
    ink = ink[..., None] + _tint(u)
    grain = (noise & 15).astype(np.float32) - (noise >> 4)  # triangular on -15 .. 15
    return np.clip(255 * (paper + cover * (ink - paper)) + grain * next(u)[..., None] + 0.5, 0, 255).astype(np.uint8)


def _texture(u, column, row):
    """float32 (n, 32, 32) in about -1 to 1: a slope, soft blobs, and stripes on about a third of the pictures."""
    cos, sin = _direction(u)
    slope = (cos * column + sin * row) * (next(u) / 16)
    grid = np.concatenate([_signed(u) for _ in range(16)], axis=1).reshape(-1, 4, 4)
    place = np.arange(SIDE, dtype=np.float32) * (3 / SIDE)
    low = place.astype(np.intp)
    part = place - np.floor(place)
    rows = grid[:, low] + part[:, None] * (grid[:, low + 1] - grid[:, low])
    blobs = rows[:, :, low] + part * (rows[:, :, low + 1] - rows[:, :, low])
    cos, sin = _direction(u)
    wave = (cos * column + sin * row) / (4 + 5 * next(u)) + next(u)
    stripes = np.abs(wave - np.floor(wave) - 0.5) * 4 - 1
    return 0.6 * slope + 0.7 * blobs + np.float32(0.7) * (next(u) < 0.35) * stripes


def _signed(u):
    """Uniform on [-1, 1)."""
    return 2 * next(u) - 1


def _direction(u):
    """cos and sin of a random angle, by (1 - t^2, 2t) / (1 + t^2), |t| < 0.42 (45 degrees), and quarter turns."""
    t = 0.41421356 * _signed(u)
    quarter = next(u) * 4
    scale = 1 / (1 + t * t)
    cos, sin = (1 - t * t) * scale, 2 * t * scale
    cos, sin = np.where(quarter % 2 < 1, cos, -sin), np.where(quarter % 2 < 1, sin, cos)
    sign = np.where(quarter < 2, np.float32(1), np.float32(-1))
    return cos * sign, sin * sign


def _tint(u):
    """float32 (n, 1, 1, 3): a colour that adds no brightness on average."""
    colour = np.concatenate([next(u) for _ in range(3)], axis=2)[:, :, None, :]
    grey = (colour[..., :1] + colour[..., 1:2] + colour[..., 2:]) / 3
    return 0.6 * (colour - grey)
