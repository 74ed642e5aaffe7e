"""Stochastic pooling: how often each place is drawn, where the gradient goes, what inference gives, edges, replicas."""

import itertools
from contextlib import closing

import numpy as np
import pytest
from chi_square import p_value

from gpunet.backends import problem
from gpunet.core.random import philox, site_of, uniforms
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import Conv2d, Flatten, Graph, Input, Linear, MaxPool, MeanSquaredError, ReLU, Sequential, StochasticPool
from gpunet.testing import check_gradients

emulated = pytest.param("emulator", marks=pytest.mark.skipif(bool(problem("emulator")), reason="no emulator here"))
POOLS = [
    StochasticPool(2, name="pool"),
    StochasticPool(3, 2, name="pool"),
    StochasticPool(3, 2, ceil=True, name="pool"),
    StochasticPool((3, 2), (2, 3), (1, 1), ceil=True, name="pool"),
    StochasticPool((2, 5), 1, (1, 2), name="pool"),
]


def step_of(layer, shape, batch, **options):
    image = Input(shape)
    keep = ("pool:output", "pool:output_gradient", "input:gradient")
    options = {"dtype": "float64", "replicas": 1, "seed": 5, **options}
    return Step(Graph(image, Flatten()(layer(image))), MeanSquaredError(), batch=batch, keep=keep, **options)


def run(step, x, batch=0):
    """Return y, its gradient and dx of training in this batch."""
    state = step.state
    state["batch"] = batch
    step.state = state
    width = int(np.prod(step.graph.output_shape))
    step.gradient(x, np.random.default_rng(1).uniform(20, 30, (len(x), width)))
    return [step.read(name) for name in ("pool:output", "pool:output_gradient", "input:gradient")]


def windows(layer, shape):
    """Yield (oy, ox, slice of rows, slice of columns) of each window, cut to the image."""
    h, w, _ = shape
    oh, ow, _ = layer.setup(shape)
    for oy, ox in itertools.product(range(oh), range(ow)):
        top, left = oy * layer.stride[0] - layer.padding[0], ox * layer.stride[1] - layer.padding[1]
        yield oy, ox, slice(max(top, 0), min(top + layer.size[0], h)), slice(max(left, 0), min(left + layer.size[1], w))


@pytest.mark.parametrize("layer", POOLS, ids=lambda layer: f"{layer.size}/{layer.stride} {layer.padding}")
@pytest.mark.parametrize("backend", ["numpy", emulated])
def test_what_is_drawn_is_of_the_window_and_gets_the_gradient(layer, backend):
    """Values differ all over the batch, so that a value tells its place."""
    shape = 7, 9, 3
    x = np.random.default_rng(0).permutation(4 * 7 * 9 * 3).reshape(4, *shape) - 200.0
    with closing(step_of(layer, shape, 4, backend=backend)) as step:
        y, dy, dx = run(step, x)
    expected = np.zeros_like(x)
    for n, c in itertools.product(range(4), range(3)):
        for oy, ox, rows, columns in windows(layer, shape):
            value, window = y[n, oy, ox, c], x[n, rows, columns, c]
            if (window <= 0).all():
                assert value == 0
                continue
            assert value > 0 and (window == value).sum() == 1
            expected[n, :, :, c][x[n, :, :, c] == value] += dy[n, oy, ox, c]
    np.testing.assert_allclose(dx, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", POOLS, ids=lambda layer: f"{layer.size}/{layer.stride} {layer.padding}")
@pytest.mark.parametrize("backend", ["numpy", emulated])
def test_inference_weights_by_probability(layer, backend):
    shape = 7, 9, 3
    x = np.random.default_rng(0).normal(0.3, 1, (4, *shape))
    x[0, :4] = -1  # windows without anything to draw
    x[1, :, :, 0] = 0
    with closing(step_of(layer, shape, 4, backend=backend)) as step:
        got = step.predict(x).reshape(4, *layer.setup(shape))
    empty = 0
    for n, c in itertools.product(range(4), range(3)):
        for oy, ox, rows, columns in windows(layer, shape):
            a = np.maximum(x[n, rows, columns, c], 0)
            empty += not a.any()
            expected = (a / a.sum() * a).sum() if a.any() else 0
            assert got[n, oy, ox, c] == pytest.approx(expected, rel=1e-12)
    assert empty > 3


FREQUENCIES = [
    [1, 1, 1, 1],
    [0.5, 3, 0, 2.5],
    [7, 1, 1, -5],
    [-1, -2, 3, 0.015625],
]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("values", FREQUENCIES)
def test_places_are_drawn_as_often_as_they_are_active(values, dtype):
    """65,536 windows of the same four values; one image has 16 of them."""
    layer, n = StochasticPool(2, name="pool"), 1024
    tile = np.array(values).reshape(2, 2)
    x = np.tile(tile, (4, 4))[None, :, :, None] * np.ones((n, 1, 1, 4))
    with closing(step_of(layer, (8, 8, 4), n, dtype=dtype)) as step:
        dx = run(step, x)[2] != 0  # y tells no equals apart
    counts = dx.reshape(n, 4, 2, 4, 2, 4).sum(axis=(0, 1, 3, 5)).ravel()
    assert counts.sum() == n * 64
    a = np.maximum(values, 0)
    assert counts[a == 0].sum() == 0
    assert p_value(counts[a > 0], a[a > 0] / a.sum()) > 1e-3


def test_the_test_of_frequencies_can_fail():
    assert p_value([1000, 1100, 1000, 900], [0.25] * 4) < 1e-3


def test_draws_by_hand():
    """The 24 upper bits of the 32 of a place, against running sums: all four thresholds of one window."""
    layer = StochasticPool(2, name="pool")
    with closing(step_of(layer, (2, 2, 1), 200)) as step:
        x = np.tile(np.array([1.0, 0, 2, 5]).reshape(1, 2, 2, 1), (200, 1, 1, 1))
        y = run(step, x, 7)[0].ravel()
    u = uniforms(5, site_of("pool"), 7, 0, 200).astype(np.float64)
    np.testing.assert_array_equal(y, np.where(u * 8 < 1, 1, np.where(u * 8 < 3, 2, 5)))
    assert set(y) == {1, 2, 5}


@pytest.mark.parametrize("backend", ["numpy", emulated])
def test_a_draw_on_a_running_sum_takes_the_next(backend):
    """Windows (u, 1 - u) with the very u that is drawn for each: half-open intervals, as [0, 1) of the draws."""
    with closing(step_of(StochasticPool((1, 2), name="pool"), (1, 2, 1), 50, dtype="float32", backend=backend)) as step:
        u = uniforms(5, site_of("pool"), 0, 0, 50)
        x = np.stack([u, 1 - u], axis=1).reshape(50, 1, 2, 1)
        np.testing.assert_array_equal(run(step, x)[0].ravel(), 1 - u)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_draws_depend_on_neither_replicas_nor_backend(dtype):
    """Bit for bit, values of every size, windows that overlap."""
    layer, shape = StochasticPool(3, 2, 1, ceil=True, name="pool"), (9, 8, 5)
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 1, (7, *shape)) * 10 ** rng.uniform(-3, 3, (7, 1, 1, 5))
    found = []
    for options in [{"replicas": k} for k in (1, 2, 3)] + [{"backend": "emulator"}] * (not problem("emulator")):
        with closing(step_of(layer, shape, 7, dtype=dtype, **options)) as step:
            found.append((run(step, x, 3)[0], run(step, x, 4)[0]))
    for got in found[1:]:
        np.testing.assert_array_equal(got[0], found[0][0])
        np.testing.assert_array_equal(got[1], found[0][1])
    assert (found[0][0] != found[0][1]).mean() > 0.3


@pytest.mark.parametrize("replicas", [1, 3])
def test_against_differences(replicas):
    """Of training, whose draws stay while values move a little; away from where a draw changes."""
    net = Sequential(Conv2d(3, 3), ReLU(), StochasticPool(3, 2, 1, ceil=True), Linear(3))
    assert check_gradients(net, (6, 7, 2), samples=12, replicas=replicas) < 1e-6


def test_the_mean_of_training_is_inference():
    x = np.random.default_rng(0).uniform(0, 1, (3, 4, 4, 2))
    with closing(step_of(StochasticPool(2, name="pool"), (4, 4, 2), 3)) as step:
        seen = np.array([run(step, x, batch)[0] for batch in range(600)])
        expected = step.predict(x).reshape(seen.shape[1:])
    assert (np.abs(seen.mean(0) - expected) < 5 * seen.std(0) / np.sqrt(600)).all()


@pytest.mark.parametrize("backend", ["numpy", emulated])
def test_what_is_not_finite_is_drawn(backend):
    x = np.array([[1, 2, np.nan, 3], [np.inf, 1, -np.inf, 2], [3e38, 3e38, 3e38, 3e38], [0, -np.inf, 0, -0.0]])
    with closing(step_of(StochasticPool(2, name="pool"), (2, 2, 1), 4, dtype="float32", backend=backend)) as step:
        for batch in range(20):
            y = run(step, x.reshape(4, 2, 2, 1), batch)[0].ravel()
            np.testing.assert_array_equal(y[:2], [np.nan, np.inf])
            np.testing.assert_array_equal(y[2:], np.float32([3e38, 0]))
        inference = step.predict(x.reshape(4, 2, 2, 1)).ravel()
        assert np.isnan(inference[0]) and np.isnan(inference[1]) and inference[3] == 0


def test_shapes_are_those_of_max_pooling():
    for size, stride, padding, ceil in itertools.product((1, 2, 3, (3, 2)), (1, 2, (3, 1)), (0, (1, 1)), (False, True)):
        if padding and size == 1:
            continue
        arguments = size, stride, padding, ceil
        assert StochasticPool(*arguments).setup((8, 9, 3)) == MaxPool(*arguments).setup((8, 9, 3))


def test_the_most_places_that_a_byte_counts():
    """255 of them: the last one is told from none."""
    layer = StochasticPool((15, 17), name="pool")
    x = np.zeros((2, 15, 17, 1))
    x[0, 14, 16] = 4
    with closing(step_of(layer, (15, 17, 1), 2)) as step:
        y, dy, dx = run(step, x)
    np.testing.assert_array_equal(y.ravel(), [4, 0])
    expected = np.zeros_like(x)
    expected[0, 14, 16] = dy[0].item()
    np.testing.assert_array_equal(dx, expected)
    with pytest.raises(
        GpunetError, match=r"^StochasticPool: size: expected a window of at most 255 pixels, got \(16, 16\)"
    ):
        StochasticPool(16)


def test_uniforms_are_the_words_of_the_stream():
    words = philox(3, 4, 5, 0, 3)
    bits = np.array([word >> shift & 0xFFFFFFFF for word in words.tolist() for shift in (0, 32)])
    expected = (bits >> 8) / 2**24
    np.testing.assert_array_equal(uniforms(3, 4, 5, 0, 24), expected)
    np.testing.assert_array_equal(uniforms(3, 4, 5, 5, 14), expected[5:19])
    assert uniforms(3, 4, 5, 0, 1).dtype == np.float32
    counts = np.bincount((uniforms(0, 0, 0, 0, 1 << 16) * 64).astype(int), minlength=64)
    assert p_value(counts, [1 / 64] * 64) > 1e-3
