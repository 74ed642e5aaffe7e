"""Augmentation: each transform against another formula, the launches together."""

import colorsys
import math
import platform
import shutil
import subprocess
import sys
import tomllib
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage, stats
from small_run import Killed, last_run, left, new, on, recipe, stop_after

from gpunet import data, nn
from gpunet.backends.numpy import Backend
from gpunet.backends.numpy.transforms import transforms_draw
from gpunet.core import random
from gpunet.core.augmentation import (
    AUGMENTATIONS,
    COLOR,
    GEOMETRY,
    INTERPOLATIONS,
    SITES,
    Augmentation,
    beta_quantiles,
    pixel_axes,
)  # fmt: skip
from gpunet.core.batches import Batches
from gpunet.core.source import Source
from gpunet.core.state import new_state
from gpunet.core.step import METRICS, Step
from gpunet.data import Split
from gpunet.errors import GpunetError
from gpunet.optim import SGD
from gpunet.train import config as configs
from gpunet.train import trainer
from gpunet.train.augmented import augmentation_sheet, shown
from gpunet.train.build import build_source

SEED = 11
H, W = 20, 26
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (40, H, W, 3), np.uint8)
SMOOTH = np.stack([ndimage.gaussian_filter(i.astype(float), (2, 2, 0)) for i in NOISE])
SMOOTH = ((SMOOTH - SMOOTH.min()) / (SMOOTH.max() - SMOOTH.min()) * 255).astype(np.uint8)
LABELS = (np.arange(40) % 7).astype(np.int32)
needs_emulator = pytest.mark.skipif(
    not shutil.which("g++") or platform.machine() != "x86_64", reason="the emulator: no g++, or not x86-64"
)
EVERYTHING = {
    "flip": True, "flip_vertical": 0.3, "crop": 3, "rescale": [0.8, 1.3], "rotate": 20.0, "shear": 10.0, "stretch": 1.2,
    "zoom": 1.2, "lens": 0.2, "elastic": 20.0, "interpolation": "random", "warp_probability": 0.8, "brightness": 0.4,
    "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "lighting": 0.2, "color_probability": 0.8, "cutout": 5,
    "cutout_probability": 0.7, "mixup": 0.4, "cutmix": 1.0, "mix_probability": 0.8,
}  # fmt: skip


def source_of(images=SMOOTH, labels=LABELS, mean=0.0, scale=1.0, order="stored", **keys):
    """A source of these images with an augmentation of these keys."""
    what = Augmentation(**keys)
    return Source(Split(images, labels), mean, scale, classes=7, order=order, augmentation=what)


def batch_of(number=0, batch=40, backend=None, dtype="float64", replicas=1, **keys):
    """(x, targets) of one batch: pixels as they are unless told."""
    with closing(Batches(source_of(**keys), batch, seed=SEED, backend=backend, dtype=dtype, replicas=replicas)) as b:
        return b.read(number)


def draws(places=4000, epoch=3, h=H, w=W, axes=None, **keys):
    """{column: values} of what so many places of an epoch draw."""
    what, now = Augmentation(**keys), new_state()
    now["batch"], now["epoch"] = epoch, epoch
    mix, slots = int(what.mixes), places * (1 + what.mixes)
    geometry, color = np.zeros((slots, len(GEOMETRY)), np.int64), np.zeros((slots, len(COLOR)))
    field = np.zeros(1, np.int32)
    transforms_draw(np.arange(places, dtype=np.int32), now, what.table(axes), what.gaussian, geometry, color, field,
                    field, SEED, mix, 0, len(what.gaussian) - 1, places, 1, 0, places, places, h, w)  # fmt: skip
    return {**dict(zip(GEOMETRY, geometry.T, strict=True)), **dict(zip(COLOR, color.T, strict=True))}


def words(name, place, epoch=0):
    """The four words that a place draws for a transform."""
    return [int(word) for word in random.philox(SEED, SITES[name], epoch, place, 1)]


def fixed(value):
    """A range of one value."""
    return [value, value]


# One transform at a time, at a known strength, against another formula


def centred(matrix, image, order, mode):
    """SciPy's warp by an inverse matrix over (y, x) about the middle."""
    middle = (np.array(image.shape[:2]) - 1) / 2
    planes = [
        ndimage.affine_transform(image[..., c].astype(float), matrix, middle - matrix @ middle, order=order, mode=mode)
        for c in range(image.shape[2])
    ]
    return np.stack(planes, axis=2)


def forward(zoom=1.0, stretch=1.0, rotate=0.0, shear=0.0):
    """The matrix over (x, y) that moves what is seen: sheared, turned counter-clockwise, stretched, enlarged."""
    turn, lean = math.radians(rotate), math.tan(math.radians(shear))
    turned = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return zoom * np.diag([stretch**0.5, stretch**-0.5]) @ turned @ np.array([[1, -lean], [0, 1]])


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("reflect", "mode"), [(False, "grid-constant"), (True, "mirror")])
@pytest.mark.parametrize(
    "strength",
    [
        {"rotate": 30.0},
        {"rotate": -75.0},
        {"shear": 25.0},
        {"stretch": 1.7},
        {"zoom": 1.6},
        {"zoom": 0.45},
        {"zoom": 1.2, "rotate": 100.0, "stretch": 0.6, "shear": -30.0},
    ],
)
def test_an_affine_warp_is_scipys(strength, reflect, mode, fast):
    keys = {name: fixed(value) for name, value in strength.items()}
    x, _ = batch_of(reflect=reflect, images=NOISE, backend=Backend(fast), **keys)
    inverse = np.linalg.inv(forward(**strength))[::-1, ::-1]  # over (y, x)
    for i in range(5):
        assert np.abs(x[i] - centred(inverse, NOISE[i], 1, mode)).max() < 0.3  # 2^-16 of a pixel, times the image


@pytest.mark.parametrize("degrees", [30.0, -75.0])
def test_a_rotation_is_pillows(degrees):
    x, _ = batch_of(rotate=fixed(degrees), dtype="float32")
    for image, got in zip(SMOOTH[:5], x, strict=False):
        turned = Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR)
        inside = np.asarray(Image.new("L", (W, H), 255).rotate(degrees)) == 255
        inside = ndimage.binary_erosion(inside, iterations=2)
        assert inside.sum() > 100
        assert np.abs(got - np.asarray(turned))[inside].max() < 1.5


def test_rescale_enlarges_and_crops_anywhere():
    x, _ = batch_of(images=NOISE, rescale=fixed(1.5))
    moved = set()
    for place in range(40):
        _, down, right, _ = words("rescale", place)
        shift = [((word >> 40) / 2**24 - 0.5) * 0.5 * size for word, size in ((down, H), (right, W))]
        middle = (np.array([H, W]) - 1) / 2
        grid = np.indices((H, W)).transpose(1, 2, 0)
        at = ((grid - middle + shift) / 1.5 + middle).transpose(2, 0, 1)
        assert at.min() > -0.5 and at[0].max() < H - 0.5 and at[1].max() < W - 0.5  # never beyond the image
        expected = ndimage.map_coordinates(NOISE[place, ..., 0].astype(float), at, order=1, mode="grid-constant")
        assert np.abs(x[place, ..., 0] - expected).max() < 0.05
        moved.add(round(shift[0]))
    assert len(moved) > 7


@pytest.mark.parametrize("k", [0.3, -0.25, 0.9])
@pytest.mark.parametrize("fast", [True, False])
def test_a_lens_shows_what_was_further_out(k, fast):
    x, _ = batch_of(lens=fixed(k), images=NOISE, backend=Backend(fast))
    grid = np.indices((H, W)) - (np.array([H, W])[:, None, None] - 1) / 2
    radius = np.hypot(*grid) / np.hypot(H / 2, W / 2)
    at = grid * (1 + k * radius**2) + (np.array([H, W])[:, None, None] - 1) / 2
    expected = ndimage.map_coordinates(NOISE[0, ..., 1].astype(float), at, order=1, mode="grid-constant")
    assert np.abs(x[0, ..., 1] - expected).max() < 0.3


@pytest.mark.parametrize(("alpha", "sigma"), [(34.0, 4.0), (8.0, 1.5)])
def test_an_elastic_field_is_smoothed_noise(alpha, sigma):
    x, _ = batch_of(images=NOISE, elastic=alpha, elastic_sigma=sigma)
    blocks = -(-2 * H * W // 16)
    for place in range(3):
        lanes = random.lanes(SEED, SITES["elastic"], 0, place * blocks * 16, 2 * H * W)
        noise = (lanes / 65535.0 * 2 - 1).reshape(2, H, W)
        right, down = (
            alpha * ndimage.gaussian_filter(n, sigma, mode="constant", radius=math.ceil(3 * sigma)) for n in noise
        )
        assert 0.2 < right.std() < 5
        at = np.indices((H, W)) + np.stack([down, right])
        expected = ndimage.map_coordinates(NOISE[place, ..., 2].astype(float), at, order=1, mode="grid-constant")
        assert np.abs(x[place, ..., 2] - expected).max() < 0.5


@pytest.mark.parametrize("fast", [True, False])
def test_nearest_takes_the_pixel_that_a_place_lies_in(fast):
    x, _ = batch_of(images=NOISE, rotate=fixed(33.0), interpolation="nearest", backend=Backend(fast))
    inverse, middle = np.linalg.inv(forward(rotate=33.0))[::-1, ::-1], (np.array([H, W]) - 1) / 2
    at = np.einsum("ij,jyx->iyx", inverse, np.indices((H, W)) - middle[:, None, None]) + middle[:, None, None]
    sure = (np.abs(at % 1 - 0.5) > 1e-3).all(axis=0)
    y, x_ = np.floor(at + 0.5).astype(int)
    inside = (y >= 0) & (y < H) & (x_ >= 0) & (x_ < W)
    expected = np.where(inside[..., None], NOISE[0][y.clip(0, H - 1), x_.clip(0, W - 1)], 0)
    np.testing.assert_array_equal(x[0][sure], expected[sure])
    assert sure.mean() > 0.98 and 0.5 < inside.mean() < 1


@pytest.mark.parametrize("fast", [True, False])
def test_area_is_the_mean_of_the_pixels_below(fast):
    """At half the size each pixel is a mean of four, those of Pillow's box."""
    images = NOISE[:, :, :24].copy()
    x, _ = batch_of(images=images, zoom=fixed(0.5), interpolation="area", backend=Backend(fast))
    means = images[0].reshape(H // 2, 2, 12, 2, 3).mean(axis=(1, 3))
    box = np.asarray(Image.fromarray(images[0]).resize((12, H // 2), Image.Resampling.BOX))
    assert np.abs(box - means).max() <= 1  # Pillow rounds twice
    np.testing.assert_allclose(x[0, H // 4 : 3 * H // 4, 6:18], means, atol=1e-9)


def keys_kernel(t):
    """Keys' cubic with a = -1/2, by the distance of a pixel (Keys 1981, equation 15)."""
    t = abs(t)
    if t < 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


@pytest.mark.parametrize("fast", [True, False])
def test_cubic_weighs_sixteen_pixels_by_their_distance(fast):
    x, _ = batch_of(images=NOISE, rotate=fixed(33.0), interpolation="cubic", backend=Backend(fast))
    inverse, middle = np.linalg.inv(forward(rotate=33.0))[::-1, ::-1], (np.array([H, W]) - 1) / 2
    for oy, ox in ((0, 0), (3, 5), (10, 10), (10, 25), (19, 1), (7, 20)):
        sy, sx = inverse @ (np.array([oy, ox]) - middle) + middle
        total = np.zeros(3)
        for iy in range(math.floor(sy) - 1, math.floor(sy) + 3):
            for ix in range(math.floor(sx) - 1, math.floor(sx) + 3):
                if 0 <= iy < H and 0 <= ix < W:
                    total += keys_kernel(sy - iy) * keys_kernel(sx - ix) * NOISE[0, iy, ix]
        np.testing.assert_allclose(x[0, oy, ox], total.clip(0, 255), atol=0.05)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_random_interpolation_is_one_of_the_four(interpolation):
    x, _ = batch_of(images=NOISE, rotate=fixed(33.0), interpolation="random")
    if interpolation == "random":
        return
    one, _ = batch_of(images=NOISE, rotate=fixed(33.0), interpolation=interpolation)
    number = INTERPOLATIONS.index(interpolation)
    same = [(a == b).all() for a, b in zip(x, one, strict=True)]
    assert same == [words("interpolation", place)[0] >> 62 == number for place in range(40)]
    assert 3 < sum(same) < 25


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("factor", [0.5, 1.4])
@pytest.mark.parametrize(
    ("name", "enhance"),
    [("brightness", "Brightness"), ("contrast", "Contrast"), ("saturation", "Color")],
)
def test_colours_are_pillows(name, enhance, factor, fast):
    x, _ = batch_of(images=NOISE, dtype="float32", backend=Backend(fast), **{name: fixed(factor)})
    for image, got in zip(NOISE[:5], x, strict=False):
        expected = np.asarray(getattr(ImageEnhance, enhance)(Image.fromarray(image)).enhance(factor))
        assert np.abs(got - expected).max() <= 1.5  # Pillow rounds greys, and down at the end
        assert np.abs(got - image).max() > 20


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("turns", [0.1, -0.3, 0.5])
def test_hue_is_that_of_hsv(turns, fast):
    x, _ = batch_of(images=NOISE, hue=fixed(turns), backend=Backend(fast))
    for pixel, got in zip(NOISE[0].reshape(-1, 3), x[0].reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*pixel / 255)
        np.testing.assert_allclose(got, 255 * np.array(colorsys.hsv_to_rgb((h + turns) % 1, s, v)), atol=1e-9)


def test_grey_pixels_have_no_hue_and_stay():
    grey = np.repeat(NOISE[..., :1], 3, axis=3)
    x, _ = batch_of(images=grey, hue=fixed(0.3), saturation=fixed(1.7))
    np.testing.assert_allclose(x, grey, atol=1e-9)


def test_colours_come_in_a_fixed_order_and_stay_in_range():
    """Brightness, contrast, saturation, hue, each clamped: as torchvision's adjust functions one after another."""
    values = {"brightness": 1.5, "contrast": 1.5, "saturation": 1.5, "hue": 0.25}
    x, _ = batch_of(images=NOISE, **{name: fixed(value) for name, value in values.items()})
    step = NOISE
    for name, value in values.items():
        step, _ = batch_of(images=np.asarray(step, np.uint8), **{name: fixed(value)}) if name == "brightness" else (
            by_hand(name, value, step), None)  # fmt: skip
    assert np.abs(x - step).max() < 1e-9 and x.min() == 0 and x.max() == 255


def by_hand(name, value, images):
    """Contrast, saturation and hue of float images, in words."""
    grey = images @ [0.299, 0.587, 0.114]
    if name == "hue":
        found = [colorsys.rgb_to_hsv(*p) for p in (images / 255).reshape(-1, 3)]
        turned = [colorsys.hsv_to_rgb((h + value) % 1, s, v) for h, s, v in found]
        return 255 * np.array(turned).reshape(images.shape)
    other = grey.mean(axis=(1, 2))[:, None, None, None] if name == "contrast" else grey[..., None]
    return (other + value * (images - other)).clip(0, 255)


def test_lighting_moves_all_pixels_along_the_axes_of_the_training_pixels():
    x, _ = batch_of(images=SMOOTH // 2 + 60, lighting=0.1)
    images = SMOOTH // 2 + 60
    added = x - images
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], added.shape), atol=1e-9)
    pixels = images.reshape(-1, 3)
    values, vectors = np.linalg.eigh(np.cov(pixels.T, bias=True))
    np.testing.assert_allclose(pixel_axes(images, 7) @ pixel_axes(images, 7).T, np.cov(pixels.T, bias=True))
    along = added[:, 0, 0] @ vectors / np.sqrt(values) / 0.1
    assert stats.kstest(along.ravel(), "norm").pvalue > 0.01


def test_cutout_clears_a_square_after_normalisation():
    x, _ = batch_of(mean=100.0, scale=0.02, cutout=6)
    plain, _ = batch_of(mean=100.0, scale=0.02)
    whole = 0
    for place in range(40):
        cy, cx, *_ = words("cutout", place)
        top, first = (cy >> 32) * H // 2**32 - 3, (cx >> 32) * W // 2**32 - 3
        expected = plain[place].copy()
        expected[max(top, 0) : top + 6, max(first, 0) : first + 6] = 0
        np.testing.assert_array_equal(x[place], expected)
        whole += (expected == 0).all(axis=2).sum() == 36
    assert 10 < whole < 35


def test_normalisation_comes_after_colours_and_takes_a_mean_image_at_the_output():
    mean = SMOOTH.mean(axis=0)
    x, _ = batch_of(mean=mean, scale=0.5, brightness=fixed(0.5), rotate=fixed(180.0))
    np.testing.assert_allclose(x[0], (SMOOTH[0][::-1, ::-1] * 0.5 - mean) * 0.5, atol=0.05)


# Flips


@pytest.mark.parametrize("probability", [0.3, 1, 0.0])
def test_flips_have_their_probabilities(probability):
    x, _ = batch_of(flip=float(probability), flip_vertical=float(probability))
    found = {(0, 0): 0, (0, 1): 0, (1, 0): 0, (1, 1): 0}
    for image, got in zip(SMOOTH, x, strict=True):
        found[next((v, h) for v, h in found if (got == image[:: 1 - 2 * v, :: 1 - 2 * h]).all())] += 1
    if probability in (0, 1):
        assert found[int(probability), int(probability)] == 40
    else:
        assert min(found.values()) > 0


def test_a_flip_draws_the_same_whatever_else_is_asked_for():
    plain, _ = batch_of(flip=True, crop=3)
    more, _ = batch_of(flip=0.5, crop=3, cutout_probability=0.0, cutout=4)
    np.testing.assert_array_equal(more, plain)


@pytest.mark.parametrize("more", [{}, {"cutout": 3, "cutout_probability": 0.0}], ids=["plain", "warped"])
@pytest.mark.parametrize("fast", [True, False])
def test_alternating_flips_show_each_image_both_ways_in_turn(more, fast):
    seen = []
    with closing(Batches(source_of(order="shuffled", alternate=True, images=NOISE, **more), 16, seed=SEED,
                         dtype="float64", backend=Backend(fast))) as batches:  # fmt: skip
        for epoch in range(4):
            x = np.concatenate([batches.read(epoch * 3 + i)[0] for i in range(3)])
            order = random.permutation(SEED, epoch, 40)
            mirrored = np.zeros(40, bool)
            for image, got in zip(order, x, strict=True):
                mirrored[image] = (got == NOISE[image, :, ::-1]).all()
                assert mirrored[image] or (got == NOISE[image]).all()
            seen.append(mirrored)
    assert (seen[0] ^ seen[1]).all() and (seen[0] == seen[2]).all() and (seen[1] == seen[3]).all()
    assert 10 < seen[0].sum() < 30


# Mixing


def test_quantiles_are_those_of_the_beta_distribution():
    for alpha in (0.01, 0.1, 0.2, 0.5, 1.0, 1.5, 4.0, 100.0):
        expected = stats.beta(alpha, alpha).ppf(np.arange(1025) / 1024)
        np.testing.assert_allclose(beta_quantiles(alpha), expected, atol=2e-4)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_mixed_image_is_made_of_two_as_its_target_says(name, fast):
    x, targets = batch_of(images=NOISE, backend=Backend(fast), **{name: 1.0})
    shares = []
    for place in range(40):
        partner = (words("mix", place)[1] >> 32) * 40 >> 32
        a, b = NOISE[place].astype(float), NOISE[partner].astype(float)
        if name == "mixup":
            share = ((x[place] - b) * (a - b)).sum() / max(((a - b) ** 2).sum(), 1)
            np.testing.assert_allclose(x[place], share * a + (1 - share) * b, atol=1e-6)
        else:
            own = (x[place] == a).all(axis=2)
            assert (own | (x[place] == b).all(axis=2)).all()
            ys, xs = np.nonzero(~own)
            assert (~own).sum() == (np.ptp(ys) + 1) * (np.ptp(xs) + 1) if len(ys) else True  # a box
            share = own.mean()
        if partner != place:
            expected = share * np.eye(7)[LABELS[place]] + (1 - share) * np.eye(7)[LABELS[partner]]
            np.testing.assert_allclose(targets[place], expected, atol=2e-3 if name == "cutmix" else 1e-6)
        shares.append(share)
    np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-12)
    assert np.std(shares) > 0.15


def test_mixed_targets_are_smoothed():
    source = Source(Split(NOISE, LABELS), classes=7, smoothing=0.1, augmentation=Augmentation(mixup=1.0))
    with closing(Batches(source, 40, dtype="float64")) as batches:
        _, targets = batches.read(0)
    np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(targets.min(axis=1), 0.1 / 7)


def test_a_partner_looks_as_it_does_at_its_own_place():
    keys = {"rotate": 40.0, "brightness": 0.5, "cutout": 4, "images": NOISE}
    alone, _ = batch_of(**keys)
    mixed, _ = batch_of(**keys, mixup=1.0)
    drawn = draws(40, epoch=0, mixup=1.0)
    for place in range(40):
        partner, share = (words("mix", place)[1] >> 32) * 40 >> 32, drawn["share"][place]
        np.testing.assert_allclose(mixed[place], share * alone[place] + (1 - share) * alone[partner], atol=1e-9)


# The launches together


def epoch_of(batch, replicas, number=1, **keys):
    """x and targets of a whole epoch, in order."""
    with closing(Batches(source_of(images=NOISE, mean=100.0, scale=0.02, order="shuffled", **keys), batch, seed=SEED,
                         replicas=replicas)) as batches:  # fmt: skip
        parts = [batches.read(number * len(batches) + i) for i in range(len(batches))]
        return [np.concatenate(p) for p in zip(*parts, strict=True)]


@pytest.mark.parametrize(("batch", "replicas"), [(7, 1), (16, 3), (40, 2), (9, 4)])
def test_neither_batch_size_nor_replicas_change_anything(batch, replicas):
    x, targets = epoch_of(batch, replicas, **EVERYTHING)
    whole, all_targets = epoch_of(40, 1, **EVERYTHING)
    np.testing.assert_array_equal(x, whole)
    np.testing.assert_array_equal(targets, all_targets)
    other, _ = epoch_of(40, 1, 2, **EVERYTHING)
    assert (other != whole).mean() > 0.9


@needs_emulator
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_the_emulator_makes_the_same_batches(dtype, pixels):
    from gpunet.backends.emulator import Backend as Emulator

    keys = dict(EVERYTHING)
    if pixels == "float32":
        for name in ("brightness", "contrast", "saturation", "hue", "lighting"):
            keys.pop(name)
    images = NOISE[..., :3].astype(pixels)
    got, expected = (batch_of(3, 12, images=images, dtype=dtype, backend=b, **keys) for b in (Emulator(), Backend()))
    assert np.abs(got[0] - expected[0]).max() < (1e-9 if dtype == "float64" else 0.01)  # of 255
    np.testing.assert_allclose(got[1], expected[1], atol=1e-6)


@needs_emulator
def test_a_training_on_the_emulator_has_the_same_losses():
    from gpunet.backends.emulator import Backend as Emulator

    def losses(backend):
        image = nn.Input((H, W, 3))
        layers = nn.Sequential(nn.Conv2d(4, 3), nn.ReLU(), nn.Linear(7), name="net")
        source = source_of(images=NOISE, mean=100.0, scale=0.01, order="shuffled", **EVERYTHING)
        with closing(Step(nn.Graph(image, layers(image)), nn.SoftmaxCrossEntropy(), SGD(0.01, 0.9), batch=9, seed=SEED,
                          source=source, replicas=1, backend=backend, dtype="float64")) as step:  # fmt: skip
            for _ in range(12):
                step()
            return step.metrics()[:, METRICS.index("loss")]

    expected = losses(Backend())
    np.testing.assert_allclose(losses(Emulator()), expected, rtol=1e-9)
    assert len(set(expected)) == 12


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_what_changes_nothing_gives_the_plain_image_exactly(interpolation, fast):
    idle = {
        "rotate": 40.0, "elastic": 30.0, "warp_probability": 0.0, "brightness": 0.5, "hue": 0.3, "lighting": 1.0,
        "color_probability": 0.0, "cutout": 9, "cutout_probability": 0.0, "mixup": 1.0, "mix_probability": 0.0,
    }  # fmt: skip
    keys = {"images": NOISE, "mean": [100.0, 90, 110], "scale": 0.02, "flip": True, "crop": 4, "dtype": "float32"}
    for reflect in (False, True):
        plain = batch_of(2, 9, reflect=reflect, backend=Backend(fast), **keys)
        got = batch_of(2, 9, reflect=reflect, backend=Backend(fast), interpolation=interpolation, **keys, **idle)
        np.testing.assert_array_equal(got[0], plain[0])
        np.testing.assert_array_equal(got[1], plain[1])


def test_an_identity_warp_is_exact_in_every_interpolation():
    """By the definition, which samples; the fast twin copies whole pixels."""
    for interpolation in INTERPOLATIONS:
        keys = {"cutout": 1, "cutout_probability": 0.0, "interpolation": interpolation}
        x, _ = batch_of(images=NOISE, backend=Backend(False), **keys)
        np.testing.assert_array_equal(x, NOISE)


def test_evaluation_never_augments():
    plain = batch_of(1, 16, images=NOISE)
    with closing(Batches(source_of(images=NOISE, **EVERYTHING), 16, seed=SEED, dtype="float64", augment=False)) as b:
        np.testing.assert_array_equal(b.read(1)[0], plain[0])
        np.testing.assert_array_equal(b.read(1)[1], plain[1])


def test_only_the_training_split_is_augmented(tmp_path):
    dataset = data.Arrays(NOISE, LABELS, validation=8)
    config = configs.parse_config({"model": {"name": "mlp"}, "data": {"name": "shapes"}, "augment": {"rotate": 10.0}})
    assert build_source(config, "train", dataset, 0.0, 1.0).augmentation.rotate == 10.0
    assert build_source(config, "validation", dataset, 0.0, 1.0).augmentation == Augmentation()


def test_a_recipe_that_crops_and_flips_takes_the_one_fast_launch():
    for keys in ({}, {"flip": True}, {"flip": 0.5, "crop": 2}, {"alternate": True, "crop": 4, "reflect": True}):
        assert Augmentation(**keys).plain
    for keys in ({"flip": 0.4}, {"flip_vertical": True}, {"zoom": 1.01}, {"cutout": 1}, {"hue": 0.1}):
        assert not Augmentation(**keys).plain


@pytest.mark.parametrize("more", [{}, {"images": NOISE.astype(np.float32)}], ids=["uint8", "float32"])
def test_float_images_are_warped_and_cut_as_bytes_are(more):
    keys = {"rotate": 30.0, "cutout": 4, "mixup": 1.0, "interpolation": "bilinear", "mean": 10.0, "scale": 0.1}
    x, _ = batch_of(**{"images": NOISE, **keys, **more})
    expected, _ = batch_of(images=NOISE, **keys)
    np.testing.assert_allclose(x, expected, atol=1e-9)


def test_float_images_are_not_clamped():
    images = (NOISE.astype(np.float32) - 128) / 10
    x, _ = batch_of(images=images, rotate=fixed(20.0), interpolation="cubic")
    assert x.min() < -13 and x.max() > 13


def test_a_window_gives_the_same_warps():
    def losses(window):
        image = nn.Input((H, W, 3))
        source = Source(Split(NOISE, LABELS), 100.0, 0.01, classes=7, window=window,
                        augmentation=Augmentation(rotate=20.0, elastic=9.0, hue=0.1, cutout=4))  # fmt: skip
        graph = nn.Graph(image, nn.Linear(7, name="head")(image))
        with closing(Step(graph, nn.MeanSquaredError(), batch=10, source=source, replicas=1)) as step:
            found = []
            for _ in range(6):
                step.gradient()
                found.append(step.losses()["loss"])
                step.advance()
            return found

    assert losses(20) == losses(None)
    assert len(set(losses(20))) == 6


def test_a_training_with_everything_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "write_report", lambda result: None)
    config = recipe(tmp_path, augment={**EVERYTHING, "crop": 1, "cutout": 2})
    whole = left(new(config).fit().run.path)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Killed):
            new(config).fit()
    assert left(on(last_run(config)).fit().run.path) == whole
    assert left(new(recipe(tmp_path)).fit().run.path) != whole


# What a user gets wrong


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rotate", -3, "a number from 0 to 180, or [low, high] with -180 <= low <= high <= 180"),
        ("rotate", [5, 2], "or [low, high]"),
        ("rotate", [5], "or [low, high]"),
        ("rotate", [1, float("nan")], "or [low, high]"),
        ("rotate", 10**400, "or [low, high]"),
        ("rotate", True, "a number from 0"),
        ("zoom", 0.5, "a number from 1 to 10, or [low, high] with 0.1 <= low"),
        ("zoom", [0, 1], "0.1 <= low"),
        ("hue", 0.7, "a number from 0 to 0.5"),
        ("lens", 2, "a number from 0 to 0.3"),
        ("brightness", [], "or [low, high] with 0 <= low"),
        ("flip", 1.5, "true, false or a probability from 0 to 1"),
        ("flip", "yes", "true, false or"),
        ("crop", 2.5, "a whole number of pixels from 0 to 4096"),
        ("crop", -1, "a whole number"),
        ("cutout", True, "a whole number"),
        ("mixup", -1, "0 or a number from 0.001 to 100"),
        ("cutmix", 1e-9, "0 or a number from 0.001 to 100"),
        ("elastic", float("inf"), "a number from 0 to 1000"),
        ("elastic_sigma", 0, "a number of pixels from 0.25 to 32"),
        ("interpolation", "lanczos", "one of bilinear, nearest, area, cubic, random"),
        ("mix_probability", 2, "a probability from 0 to 1"),
        ("reflect", 1, "true or false"),
    ],
)
def test_a_wrong_value_is_one_clear_error(key, value, expected):
    with pytest.raises(GpunetError) as raised:
        Augmentation(**{key: value})
    said = str(raised.value)
    assert said.startswith(f"augmentation: {key}: expected ") and expected in said and said.endswith(f"got {value!r}")


def test_flips_that_alternate_have_no_probability():
    assert Augmentation(flip=True, alternate=True).mirrors == 2
    with pytest.raises(GpunetError, match="alternate: expected false, or flip = true beside it"):
        Augmentation(flip=0.3, alternate=True)


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        ({"rotate": "x"}, "a.toml: 'rotate' in [augment]: expected a number or a list, got \"x\""),
        ({"rotate": [3]}, "a.toml: 'rotate' in [augment]: expected a number from 0 to 180, or [low, high] with"),
        ({"zoom": 0.2}, "a.toml: 'zoom' in [augment]: expected a number from 1 to 10, or [low, high] with 0.1 <="),
        ({"flip": 3}, "a.toml: 'flip' in [augment]: expected true, false or a probability from 0 to 1, got 3"),
        ({"interpolation": 1}, "a.toml: 'interpolation' in [augment]: expected 'bilinear', 'nearest', 'area'"),
        ({"mixup": -1}, "a.toml: 'mixup' in [augment]: expected 0 or a number from 0.001 to 100, got -1"),
        ({"flip": 0.3, "alternate": True}, "a.toml: 'alternate' in [augment]: expected false, or flip = true beside"),
        ({"rotat": 1}, "a.toml: unknown key 'rotat' in [augment]; did you mean 'rotate'? known: flip, "),
    ],
)
def test_a_wrong_value_in_a_recipe_names_file_and_key(augment, said):
    with pytest.raises(GpunetError) as raised:
        configs.parse_config({"model": {"name": "mlp"}, "data": {"name": "shapes"}, "augment": augment}, "a.toml")
    assert str(raised.value).startswith(said)


def test_a_recipe_writes_and_reads_all_of_it(tmp_path):
    table = {"model": {"name": "mlp"}, "data": {"name": "shapes"}, "augment": EVERYTHING}
    config = configs.parse_config(table)
    assert config.augment.augmentation == Augmentation(**EVERYTHING)
    again = configs.parse_config(tomllib.loads(configs.to_toml(config)))
    assert again.augment.augmentation == config.augment.augmentation
    assert configs.parse_config({**table, "augment": {}}).augment.augmentation == Augmentation()


@pytest.mark.parametrize(
    ("keys", "options", "said"),
    [
        ({"hue": 0.1}, {"images": NOISE.astype(np.float32)}, "expected pixels 0 to 255 in uint8, got float32 images"),
        ({"brightness": 0.1}, {"images": NOISE.astype(np.float32)}, "brightness, contrast, saturation, hue, lighting"),
        ({"hue": 0.1}, {"images": NOISE[..., :1].copy()}, "hue: expected images of 3 channels, got 1"),
        ({"lighting": 0.1}, {"images": NOISE[..., :2].copy()}, "lighting: expected images of 3 channels, got 2"),
        ({"crop": 20, "reflect": True}, {}, "crop: expected at most 19 with reflect, as the images have 20 pixels"),
        ({"mixup": 1.0}, {"window": 20}, "expected the whole set on the device, got a window of 20 of 40 images"),
        ({"alternate": True}, {"window": 20}, "expected the whole set on the device"),
        ({"cutmix": 1.0}, {"values": np.zeros((40, 2), np.float32)}, "mixup, cutmix: expected labels, got values"),
        ({"crop": 1}, {"flip": True}, "flip, pad and reflect: expected none beside an augmentation"),
    ],
)
def test_what_these_images_cannot_have_is_refused(keys, options, said):
    options = dict(options)
    images, values = options.pop("images", NOISE), options.pop("values", None)
    split = Split(images, None if values is not None else LABELS, values)
    with pytest.raises(GpunetError, match="source train: ") as raised:
        Source(split, augmentation=Augmentation(**keys), **options)
    assert said in str(raised.value)


def test_grey_images_can_be_brightened():
    grey = NOISE[..., :1].copy()
    x, _ = batch_of(images=grey, brightness=fixed(0.5), contrast=fixed(0.5))
    half = grey / 2
    np.testing.assert_allclose(x, half / 2 + half.mean(axis=(1, 2, 3), keepdims=True) / 2, atol=1e-9)


def test_batches_need_a_size_that_the_source_has():
    for batch in (0, 41):
        with pytest.raises(GpunetError, match=f"batch: expected 1 to 40, the images of train, got {batch}"):
            Batches(source_of(), batch)


# What is known of each transform, and the sheet


def test_every_transform_says_what_it_does_and_has_an_example():
    fields = set(Augmentation.__dataclass_fields__)
    for name, transform in AUGMENTATIONS.items():
        assert transform.__doc__.endswith(".") and len(transform.__doc__) < 120, name
        assert name in fields and name in Augmentation(**transform.example).active, name


def test_the_sheet_has_a_row_for_each_transform_and_leaves_out_what_cannot_be():
    recipe = Augmentation(rotate=10.0, mixup=1.0)
    sheet, left_out = augmentation_sheet(Split(NOISE, LABELS), recipe, 7)
    assert left_out == [] and sheet.height > 50 * (len(AUGMENTATIONS) + 1)
    pixels = np.asarray(sheet)
    assert (pixels[-60:, -100:] != 255).mean() > 0.5  # the last row has pictures to its end
    _, left_out = augmentation_sheet(Split(NOISE.astype(np.float32), LABELS), recipe, 7)
    assert [line.split()[0] for line in left_out] == ["brightness", "contrast", "saturation", "hue", "lighting"]


def test_a_row_shows_a_transform_as_the_recipe_has_it():
    beside = {"reflect": True, "interpolation": "nearest"}
    recipe = Augmentation(rotate=90.0, elastic=9.0, hue=0.2, color_probability=0.5, **beside)
    assert shown("rotate", recipe) == {"rotate": 90.0, **beside}
    assert shown("elastic", recipe) == {"elastic": 9.0, **beside}
    assert shown("interpolation", recipe) == {"interpolation": "nearest", "rotate": 90.0, "reflect": True}
    assert shown("hue", recipe) == {"hue": 0.2, "color_probability": 0.5}
    assert shown("zoom", recipe) == {"zoom": 1.4}  # an example
    assert shown("interpolation", Augmentation(zoom=2.0)) == {"interpolation": "bilinear", "rotate": 25.0}


def test_the_command_draws_it(tmp_path):
    (tmp_path / "a.toml").write_text('[model]\nname = "mlp"\n[data]\nname = "shapes"\n[augment]\nrotate = 9\n')
    command = [sys.executable, "-m", "gpunet", "data", "show"]
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    done = run([*command, "a.toml", "--augment", "--out", "sheet.png"])
    assert done.returncode == 0 and done.stdout.endswith("sheet.png\n"), done.stderr
    assert Image.open(tmp_path / "sheet.png").height > 1000
    done = run([*command, "shapes", "--augment"])
    assert done.returncode == 2
    assert done.stderr.startswith("gpunet: data show shapes: --preprocess, --augment, --set: expected a recipe, got")
