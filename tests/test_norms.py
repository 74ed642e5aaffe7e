"""GroupNorm and LayerNorm: PyTorch's values, central differences, moments without cancellation, independence."""

from contextlib import closing
from itertools import product

import numpy as np
import pytest
from golden.make_more import CASES
from test_activations_more import emulated, golden, hold_golden, launched  # noqa: F401 - a fixture

from gpunet.backends import backend
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import (
    Conv2d,
    Flatten,
    Graph,
    GroupNorm,
    Input,
    LayerNorm,
    Linear,
    MeanSquaredError,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
)  # fmt: skip
from gpunet.optim.sgd import SGD
from gpunet.testing import check_gradients


@pytest.mark.parametrize("name", [name for name in CASES if "norm" in name])
def test_golden(name, golden):  # noqa: F811
    for dtype, replicas in product(("float64", "float32", "float16", "bfloat16"), (1, 2)):
        hold_golden(name, golden, dtype, replicas)


LAYERS = {
    "group": GroupNorm(2),
    "group, eps": GroupNorm(3, eps=0.1),
    "group, no scale": GroupNorm(2, scale=False),
    "group, frozen": GroupNorm(2, scale=False, shift=False),
    "instance": GroupNorm(6),
    "channels": LayerNorm(),
    "image": LayerNorm("image"),
    "image, no shift": LayerNorm("image", shift=False),
    "chain": Sequential(Conv2d(6, 3), GroupNorm(2), ReLU(), LayerNorm(), Linear(5), LayerNorm(), GroupNorm(1)),
}


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_against_differences(name, replicas):
    assert check_gradients(LAYERS[name], (5, 7, 6), samples=10, replicas=replicas) < 1e-6


def test_weights_of_two_calls_get_both_gradients():
    layer = LayerNorm(name="layer")
    assert check_gradients(Sequential(layer, Conv2d(4, 1), layer), (3, 5, 4), samples=8) < 1e-6


def naive(x, groups, eps):
    """The formula on (n, h, w, c) in float64."""
    n, h, w, c = x.shape
    v = x.astype(np.float64).reshape(n, h * w, groups, c // groups)
    mean, variance = v.mean(axis=(1, 3), keepdims=True), v.var(axis=(1, 3), keepdims=True)
    return ((v - mean) / np.sqrt(variance + eps)).reshape(x.shape)


@pytest.mark.parametrize(("shape", "threads"), [((3, 5, 6), 32), ((37, 41, 9), 256)])
@pytest.mark.parametrize("backend", ["numpy", pytest.param("emulator", marks=emulated)])
def test_an_image_far_from_zero(backend, shape, threads):
    """A mean of 1000 deviations, where a mean of squares less a squared mean keeps no digit of float32.

    What float32 holds of the input is the input; a warp takes the small groups, a block the large ones.
    """
    image = Input(shape)
    graph = Graph(image, Flatten()(GroupNorm(3)(image)))
    x = np.random.default_rng(0).normal(1000, 1, (2, *shape)).astype(np.float32)
    with closing(Step(graph, batch=2, backend=backend, replicas=1)) as step:
        np.testing.assert_allclose(step.predict(x).reshape(x.shape), naive(x, 3, 1e-5), atol=2e-4)
        (entry,) = (e for e in step._replay.program(("predict",))[0].plan.entries if e.name == "groupnorm_forward")
        assert entry.arguments[-1] == threads


@pytest.mark.parametrize("width", [32, 256])
@pytest.mark.parametrize("run_on", ["numpy", pytest.param("emulator", marks=emulated)])
def test_moments_of_a_constant_image(run_on, width):
    """No variance: y is beta, inverse is 1 / sqrt(eps), whatever rounding left of the mean."""
    n, pixels, c, groups = 2, 1003, 6, 2
    x = np.full((n, pixels, c), 0.1, np.float32)
    x[1] = 12345.678
    gamma, beta = np.full(c, 2, np.float32), np.arange(c, dtype=np.float32)
    found = launched(backend(run_on), "groupnorm_forward", x, gamma, beta, np.empty_like(x), *np.empty((2, n, groups),
                     np.float32), 1e-3, n, pixels, c, groups, width)  # fmt: skip
    np.testing.assert_allclose(found["mean"], x[:, 0, :groups], rtol=1e-7)
    np.testing.assert_allclose(found["inverse"], 1e-3**-0.5, rtol=1e-5)
    np.testing.assert_allclose(found["y"], np.broadcast_to(beta, x.shape), atol=0.1)  # of an ulp of x, times 63


def test_no_image_changes_another():
    """Neither the batch, nor its order, nor training."""
    image = Input((5, 4, 6))
    graph = Graph(image, Linear(3)(Sequential(Conv2d(6, 3), GroupNorm(2), ReLU(), LayerNorm("image"))(image)))
    x = np.random.default_rng(0).normal(size=(4, 5, 4, 6))
    with closing(Step(graph, SoftmaxCrossEntropy(), batch=4, dtype="float64", replicas=1)) as step:
        all_four = step.predict(x)
        np.testing.assert_allclose(step.predict(x[2:3]), all_four[2:3], rtol=1e-12)
        np.testing.assert_allclose(step.predict(x[::-1]), all_four[::-1], rtol=1e-12)
        step.gradient(x, np.array([0, 1, 2, 0]))
        np.testing.assert_allclose(step.read("prediction"), all_four, rtol=1e-12)


def test_what_does_not_train_stays():
    image = Input((3, 5, 4))
    graph = Graph(image, Linear(3)(GroupNorm(2, scale=False, shift=False, name="norm")(image)))
    with closing(Step(graph, SoftmaxCrossEntropy(), SGD(0.5), batch=4, dtype="float64", replicas=1)) as step:
        assert list(step.weights) == ["linear1.weight", "linear1.bias"]
        step.gradient(np.random.default_rng(0).normal(size=(4, 3, 5, 4)), np.array([0, 1, 2, 0]))
        step.update()
        np.testing.assert_array_equal(step.statistics["norm.gamma"], 1)
        np.testing.assert_array_equal(step.statistics["norm.beta"], 0)


def test_a_scale_is_one_a_channel_or_one_a_value():
    for layer, size in ((GroupNorm(2), 4), (LayerNorm(), 4), (LayerNorm("image"), 60)):
        image = Input((3, 5, 4))
        (gamma, beta) = Graph(image, layer(image)).parameters()
        assert gamma.shape == beta.shape == (size,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupNorm(0), "GroupNorm: groups: expected a whole number of at least 1, got 0"),
        (lambda: GroupNorm("8"), "GroupNorm: groups: expected a whole number of at least 1, got '8'"),
        (lambda: GroupNorm(2, eps=-1e-5), "GroupNorm: eps: expected a finite number of at least 0, got -1e-05"),
        (lambda: LayerNorm(eps=None), "LayerNorm: eps: expected a finite number of at least 0, got None"),
        (lambda: LayerNorm("pixels"), "LayerNorm: over: expected 'channels' or 'image', got 'pixels'"),
        (lambda: LayerNorm([3]), r"LayerNorm: over: expected 'channels' or 'image', got \[3\]"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(GpunetError, match=f"^{message}$"):
        make()


def test_shapes_that_do_not_fit():
    image = Input((2, 2, 6))
    with pytest.raises(
        GpunetError, match=r"^groupnorm1: expected channels that 4 groups divide, got x of shape \(2, 2, 6"
    ):
        Graph(image, GroupNorm(4)(image))
    layer = LayerNorm("image", name="norm")
    with pytest.raises(GpunetError, match="^norm@2: expected 24 values to scale, as at its first call, got x of shape"):
        Graph(image, layer(Conv2d(3, 1)(layer(image))))


def test_the_loss_falls_in_float16_too():
    """With three replicas: gamma and beta, whose gradients are summed over them, learn."""
    image = Input((6, 6, 4))
    graph = Graph(image, Linear(2)(Sequential(Conv2d(8, 3), GroupNorm(4, name="norm"), ReLU(), LayerNorm())(image)))
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(12, 6, 6, 4)), np.arange(12) % 2
    x[labels == 1] += 0.5
    with closing(Step(graph, SoftmaxCrossEntropy(), SGD(0.05), batch=12, dtype="float16", replicas=3)) as step:
        before, losses = step.weights["sequential1.norm.gamma"].copy(), []
        for _ in range(20):
            step.gradient(x, labels)
            losses.append(step.losses()["loss"])
            step.update()
        assert losses[-1] < losses[0] / 2
        assert np.abs(step.weights["sequential1.norm.gamma"] - before).min() > 0


def test_two_values_become_plus_and_minus_one():
    image = Input((1, 2, 1))
    graph = Graph(image, Flatten()(LayerNorm("image", eps=0)(image)))
    with closing(Step(graph, MeanSquaredError(), batch=1, dtype="float64", replicas=1)) as step:
        np.testing.assert_allclose(step.predict(np.array([3.0, 7]).reshape(1, 1, 2, 1)), [[-1, 1]])
