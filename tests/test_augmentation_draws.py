"""What augmentation draws, each parameter by chi-square at a fixed seed: its range, its distribution, its share."""

import numpy as np
import pytest
from chi_square import kept_p_value, p_value
from scipy import stats
from test_augmentation import SEED, H, W, draws, fixed

from gpunet.backends.numpy.transforms import transforms_draw
from gpunet.core import random
from gpunet.core.augmentation import AUGMENTATIONS, COLOR, GEOMETRY, SITES, Augmentation
from gpunet.core.state import new_state

N, CELLS = 8000, 20
PIXEL = 1 << 19  # of the columns x and y


# P values, which are below 0.001 once in a thousand tests


def even(values, low, high):
    """Of values being uniform on a range, which all of them lie in, but for the roundings of a map."""
    slack = 1e-3 * (high - low)
    assert low - slack <= values.min() and values.max() <= high + slack
    counts, _ = np.histogram(values.clip(low, high), CELLS, (low, high))
    return p_value(counts, [1 / CELLS] * CELLS)


def whole(values, count):
    """Of whole numbers being uniform on 0 .. count-1."""
    counts = np.bincount(values, minlength=count)
    assert len(counts) == count
    return p_value(counts, [1 / count] * count)


def spread(values, distribution):
    """Of values of a SciPy distribution: between its quantiles they are even."""
    return even(distribution.cdf(values), 0, 1)


# What is drawn for each transform


def drawn(name, column, low, high):
    """One number a picture that is a column of the tables."""
    return even(draws(N, **{name: [low, high]})[column], low, high)


def mirrored(column, **keys):
    return draws(N, **keys)[column] < 0


def crop():
    """Both offsets at once: each pair is as likely."""
    found = draws(N, crop=3)
    x, y = ((found[axis] // PIXEL) + 3 for axis in "xy")
    assert min(x.min(), y.min()) == 0
    return whole(7 * y + x, 49)


def rescale_place(axis, side):
    """What a rescaled picture moves by: up to half of what it is larger or smaller by, to both sides."""
    found = draws(N, rescale=[0.5, 3])
    inverse = found["m00"] / 65536
    return even(found[axis] / PIXEL / (np.abs(1 / inverse - 1) * inverse / 2) / side, -1, 1)


def degrees(name, low, high, above, below):
    found = draws(N, **{name: [low, high]})
    return even(np.degrees(np.arctan2(found[above], found[below])), low, high)


def stretch():
    found = draws(N, stretch=[0.5, 2])
    return even(found["m11"] / found["m00"], 0.5, 2)


def elastic(axis):
    """Noise that hardly is smoothed: every pixel's own."""
    what, places = Augmentation(elastic=6.0, elastic_sigma=0.25), 20
    rows, field = (np.zeros((places, 2, H, W), np.int32) for _ in range(2))
    tables = (np.zeros((places, len(names))) for names in (GEOMETRY, COLOR))
    transforms_draw(np.arange(places), new_state(), what.table(), what.gaussian, next(tables).astype(np.int64),
                    next(tables), rows, field, SEED, 0, 1, len(what.gaussian) - 1, places, 1, 0, places, places,
                    H, W)  # fmt: skip
    return even(field[:, axis] / 65536, -6, 6)


def lighting(*channels):
    """Normal shares of three axes, of which two come of one pair of draws."""
    found = draws(N, lighting=1.0, axes=np.eye(3))
    cells = [(stats.norm.cdf(found[f"light{c}"]) * 4).astype(int) for c in channels]
    return whole(4 * cells[0] + cells[1], 16)


def cutout(edge, size):
    """The square of 2 from one before its middle on: at the edge twice as often, for there it is cut off."""
    counts = np.bincount(draws(N, cutout=2)[edge], minlength=size - 1)
    assert len(counts) == size - 1
    return p_value(counts, np.array([2, *[1] * (size - 2)]) / size)


def cut():
    found = draws(N, cutout=3, cutout_probability=0.3)
    return found["cut_bottom"] > found["cut_top"]


def mixed(column, **keys):
    return draws(N, **keys)[column][:N]


def cutmix_share(alpha, size=1 << 20):
    """From the box on a picture so large that its side tells the share, whichever edge cuts it off."""
    found = draws(N, h=size, w=1, cutmix=alpha)
    top, bottom = found["top"][:N], found["bottom"][:N]
    centre = (random.blocks(SEED, SITES["cutmix"], 3, np.arange(N), 1)[:, 0] >> 32).astype(np.int64) * size >> 32
    half = np.where(top > 0, centre - top, bottom - centre)
    return spread(1 - (2 * half / size).clip(0, 1) ** 2, stats.beta(alpha, alpha))


def cutmix_place(edge, size):
    """Of boxes that are too small to have a pixel, half of all here: their middle."""
    found = {name: values[:N] for name, values in draws(N, cutmix=0.01).items()}
    empty = (found["top"] == found["bottom"]) & (found["left"] == found["right"])
    return whole(found[edge][empty], size)


def partner(**keys):
    return whole(draws(N, **keys)["image"][N:] // (N // 50), 50)


DRAWN = {
    "flip": lambda: kept_p_value(mirrored("m00", flip=0.3), 0.3),
    "flip in the one launch": lambda: kept_p_value(random.crops(SEED, 3, 0, N, 4)[2], 0.5),
    "flip_vertical": lambda: kept_p_value(mirrored("m11", flip_vertical=0.2), 0.2),
    "alternate": lambda: kept_p_value(mirrored("m00", alternate=True), 0.5),
    "crop": crop,
    "crop in the one launch": lambda: whole(np.dot([9, 1], random.crops(SEED, 3, 0, N, 4)[:2]), 81),
    "rescale": lambda: even(65536 / draws(N, rescale=[0.5, 3])["m00"], 0.5, 3),
    "rescale: x": lambda: rescale_place("x", W),
    "rescale: y": lambda: rescale_place("y", H),
    "rotate": lambda: degrees("rotate", -10, 35, "m10", "m00"),
    "shear": lambda: degrees("shear", -40, 30, "m01", "m11"),
    "stretch": stretch,
    "zoom": lambda: even(65536 / draws(N, zoom=[0.5, 3])["m00"], 0.5, 3),
    "lens": lambda: even(draws(N, lens=[-0.2, 0.5])["lens"] * (H * H + W * W) / 2**32, -0.2, 0.5),
    "elastic: x": lambda: elastic(0),
    "elastic: y": lambda: elastic(1),
    "interpolation": lambda: whole(draws(N, interpolation="random", rotate=1.0)["interpolation"], 4),
    "warp_probability": lambda: kept_p_value(draws(N, warp_probability=0.3, zoom=fixed(2.0))["m00"] != 65536, 0.3),
    "brightness": lambda: drawn("brightness", "brightness", 0.25, 2),
    "contrast": lambda: drawn("contrast", "contrast", 0.25, 2),
    "saturation": lambda: drawn("saturation", "saturation", 0.25, 2),
    "hue": lambda: drawn("hue", "hue", -0.1, 0.4),
    "lighting": lambda: lighting(0, 1),
    "lighting: the third": lambda: lighting(2, 0),
    "color_probability": lambda: kept_p_value(draws(N, color_probability=0.3, hue=fixed(0.2))["hue"] != 0, 0.3),
    "cutout: top": lambda: cutout("cut_top", H),
    "cutout: left": lambda: cutout("cut_left", W),
    "cutout_probability": lambda: kept_p_value(cut(), 0.3),
    "mixup": lambda: spread(mixed("share", mixup=0.4), stats.beta(0.4, 0.4)),
    "mixup: partner": lambda: partner(mixup=1.0),
    "mix_probability": lambda: kept_p_value(mixed("share", mixup=1.0, mix_probability=0.3) != 1, 0.3),
    "cutmix": lambda: cutmix_share(1.0),
    "cutmix at 0.4": lambda: cutmix_share(0.4),
    "cutmix: top": lambda: cutmix_place("top", H),
    "cutmix: left": lambda: cutmix_place("left", W),
    "cutmix: partner": lambda: partner(cutmix=1.0),
    "mixup or cutmix": lambda: kept_p_value(mixed("inside", mixup=0.4, cutmix=1.0) == 0, 0.5),
}


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_has_its_distribution(name):
    assert DRAWN[name]() > 1e-3


def test_no_transform_is_left_out():
    assert {name.split(":")[0].split()[0] for name in DRAWN} >= set(AUGMENTATIONS)


def test_these_tests_can_fail():
    """By a range a twentieth too small, by one place in ten that is never taken, by another distribution."""
    rng = np.random.default_rng(0)
    assert even(rng.uniform(0, 0.97, N), 0, 1) < 1e-6
    assert whole(rng.integers(0, 9, N), 9) > 1e-3 and p_value(np.bincount(rng.integers(0, 9, N), minlength=10),
                                                            [0.1] * 10) < 1e-6  # fmt: skip
    assert spread(rng.beta(0.45, 0.45, N), stats.beta(0.4, 0.4)) < 1e-3
    with pytest.raises(AssertionError):
        even(np.array([0.5, 1.1]), 0, 1)


# What else is known of them


def test_a_number_is_a_range_to_both_sides():
    for name, value, low, high in (
        ("rotate", 10.0, -10, 10), ("zoom", 2.0, 0.5, 2), ("brightness", 0.3, 0.7, 1.3), ("hue", 0.1, -0.1, 0.1),
        ("lens", 0.2, -0.2, 0.2), ("stretch", 1.25, 0.8, 1.25),
    ):  # fmt: skip
        assert Augmentation(**{name: value}).limits(name) == pytest.approx((low, high))


def test_of_mixup_and_cutmix_each_image_has_one():
    found = {name: values[:N] for name, values in draws(N, mixup=0.4, cutmix=1.0).items()}
    pasted = found["inside"] == 0
    assert (found["bottom"][~pasted] == H).all() and (found["right"][~pasted] == W).all()
    assert spread(found["share"][~pasted], stats.beta(0.4, 0.4)) > 1e-3
    area = (found["bottom"] - found["top"]) * (found["right"] - found["left"])
    np.testing.assert_allclose(found["share"][pasted], 1 - area[pasted] / (H * W))


def test_draws_of_different_transforms_have_nothing_in_common():
    sites = [random.philox(SEED, site, 0, 0, 500)[::4] >> 11 for site in SITES.values()]
    together = np.corrcoef(np.array(sites, np.float64)) - np.eye(len(sites))
    assert np.abs(together).max() < 0.2 and len(set(SITES.values())) == len(SITES)
