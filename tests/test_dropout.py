"""Dropout in both forms, of single values and of whole channels: masks, rates, replicas, gradients."""

from contextlib import closing

import numpy as np
import pytest
from chi_square import kept_p_value, p_value

from gpunet.backends import problem
from gpunet.core.random import lanes, site_of
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import Conv2d, Dropout, Dropout2d, Flatten, Graph, Input, Linear, MeanSquaredError, Sequential
from gpunet.testing import check_gradients

emulated = pytest.param("emulator", marks=pytest.mark.skipif(bool(problem("emulator")), reason="no emulator here"))
SHAPE = 5, 7, 3  # channels that are no multiple of what a thread takes


def step_of(layer, batch=4, shape=SHAPE, **options):
    image = Input(shape)
    keep = ("drop:output_gradient", "input:gradient")
    options = {"dtype": "float64", "replicas": 1, "seed": 9, **options}
    return Step(Graph(image, Flatten()(layer(image))), MeanSquaredError(), batch=batch, keep=keep, **options)


def outputs(step, x, batch=0):
    """Return what training gives of x, and what backward makes of a gradient without zeros, as 0 or a factor."""
    state = step.state
    state["batch"] = batch
    step.state = state
    step.gradient(x, np.full((len(x), x[0].size), 1e3))
    return step.read("prediction").reshape(x.shape), step.read("input:gradient") / step.read("drop:output_gradient")


def mask_of(layer, batch, n, shape=SHAPE):
    """Return the mask by the contract: place in the whole batch, 16 bits a place, the path's site."""
    h, w, c = shape
    whole = isinstance(layer, Dropout2d)
    size = n * c if whole else n * h * w * c
    kept = lanes(9, site_of("drop"), batch, 0, size) >= round(layer.rate * 65536)
    return np.broadcast_to(kept.reshape((n, 1, 1, c) if whole else (n, *shape)), (n, *shape))


@pytest.mark.parametrize("backend", ["numpy", emulated])
@pytest.mark.parametrize("kind", [Dropout, Dropout2d])
@pytest.mark.parametrize("form", ["inverted", "plain"])
def test_masks_and_factors_are_those_of_the_form(form, kind, backend):
    layer = kind(0.25, form, name="drop")
    x = np.random.default_rng(0).uniform(1, 2, (4, *SHAPE))
    with closing(step_of(layer, backend=backend)) as step:
        for batch in (0, 5):
            kept = mask_of(layer, batch, 4)
            assert 0 < kept.mean() < 1
            factor = kept * (4 / 3 if form == "inverted" else 1)
            y, back = outputs(step, x, batch)
            np.testing.assert_array_equal(y, x * factor)
            np.testing.assert_allclose(back, factor, rtol=1e-15)
        inference = step.predict(x).reshape(x.shape)
        np.testing.assert_array_equal(inference, x * (1 if form == "inverted" else 0.75))


@pytest.mark.parametrize("kind", [Dropout, Dropout2d])
def test_draws_do_not_depend_on_replicas(kind):
    x = np.random.default_rng(0).uniform(1, 2, (7, *SHAPE)).astype(np.float32)
    found = []
    for replicas in (1, 2, 3):
        with closing(step_of(kind(0.5, name="drop"), 7, replicas=replicas, dtype="float32")) as step:
            found.append(outputs(step, x, 3))
    for got in found[1:]:
        np.testing.assert_array_equal(got[0], found[0][0])
        np.testing.assert_array_equal(got[1], found[0][1])


@pytest.mark.parametrize("form", ["inverted", "plain"])
@pytest.mark.parametrize("rate", [0.5, 0.2, 0.05])
def test_the_rate_of_single_values(rate, form):
    with closing(step_of(Dropout(rate, form, name="drop"), 64, (32, 32, 3))) as step:
        kept = outputs(step, np.ones((64, 32, 32, 3)))[0] != 0
    assert kept_p_value(kept, 1 - rate) > 1e-3
    pairs = 2 * kept.ravel()[:-1:2] + kept.ravel()[1::2]  # neighbours are independent
    keep = np.array([rate, 1 - rate])
    assert p_value(np.bincount(pairs, minlength=4), np.outer(keep, keep)) > 1e-3


@pytest.mark.parametrize("form", ["inverted", "plain"])
def test_the_rate_of_channels(form):
    """A channel is whole or gone, and channels and images are independent."""
    with closing(step_of(Dropout2d(0.3, form, name="drop"), 512, (2, 2, 37))) as step:
        y = outputs(step, np.ones((512, 2, 2, 37)))[0]
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
    kept = y[:, 0, 0] != 0
    assert kept_p_value(kept, 0.7) > 1e-3
    for other in (kept[1:] != kept[:-1], kept[:, 1:] != kept[:, :-1]):
        assert kept_p_value(other.ravel()[::2], 0.42) > 1e-3  # 2 * 0.3 * 0.7 differ


def test_the_test_of_the_rate_can_fail():
    """By the draws of another rate, 0.51 in place of 0.5, and by the same draws twice."""
    with closing(step_of(Dropout(0.51, name="drop"), 64, (32, 32, 3))) as step:
        kept = outputs(step, np.ones((64, 32, 32, 3)))[0] != 0
    assert kept_p_value(kept, 0.5) < 1e-6
    assert p_value([9000, 1000, 1000, 9000], [0.25] * 4) < 1e-9


@pytest.mark.parametrize("layer", [Dropout(0.3), Dropout(0.3, "plain"), Dropout2d(0.3), Dropout2d(0.3, "plain")])
@pytest.mark.parametrize("replicas", [1, 3])
def test_against_differences(layer, replicas):
    net = Sequential(Conv2d(5, 3), layer, Linear(3))
    assert check_gradients(net, (5, 4, 2), samples=10, replicas=replicas) < 1e-6


def test_both_forms_predict_the_mean_of_what_they_train():
    """E[training] is inference: the means of 400 batches within five standard errors."""
    x = np.random.default_rng(1).uniform(1, 2, (2, *SHAPE))
    for layer in (Dropout(0.4, "plain", name="drop"), Dropout2d(0.4, name="drop")):
        with closing(step_of(layer, 2)) as step:
            seen = np.array([outputs(step, x, batch)[0] for batch in range(400)])
            expected = step.predict(x).reshape(x.shape)
        assert (np.abs(seen.mean(0) - expected) < 5 * seen.std(0) / 20).all()


@pytest.mark.parametrize("form", ["inverted", "plain"])
def test_extreme_rates(form):
    """0 keeps all; the largest below 1 still keeps some places, by a finite factor."""
    x = np.ones((64, 32, 32, 3))
    with closing(step_of(Dropout(0, form, name="drop"), 64, (32, 32, 3))) as step:
        np.testing.assert_array_equal(outputs(step, x)[0], x)
        np.testing.assert_array_equal(step.predict(x).reshape(x.shape), x)
    layer = Dropout(np.nextafter(1, 0), form, name="drop")
    with closing(step_of(layer, 64, (32, 32, 3))) as step:
        y = outputs(step, x)[0]
        assert np.isfinite(y).all() and 0 < (y != 0).sum() < 30
        assert layer.keep == 2**-16


@pytest.mark.parametrize("kind", [Dropout, Dropout2d])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0,), "rate: expected 0 <= rate < 1, got 1.0"),
        ((-0.1,), "rate: expected 0 <= rate < 1, got -0.1"),
        ((np.nan,), "rate: expected 0 <= rate < 1, got nan"),
        (("half",), "rate: expected 0 <= rate < 1, got 'half'"),
        ((0.5, "spatial"), "form: expected 'inverted' or 'plain', got 'spatial'"),
    ],
)
def test_mistakes(kind, arguments, message):
    with pytest.raises(GpunetError, match=f"^{kind.__name__}: {message}$"):
        kind(*arguments)


def test_channels_are_an_images():
    image = Input((2, 2, 3))
    with pytest.raises(GpunetError, match=r"^dropout2d1: expected an input of shape \(height, width, channels\), got"):
        Graph(image, Dropout2d()(Flatten()(image)))
