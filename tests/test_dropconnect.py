"""DropConnect: masks of the batch and of each example, gradients, and inference against the mean of many masks."""

from contextlib import closing

import numpy as np
import pytest
from chi_square import kept_p_value, p_value

from gpunet.backends import problem
from gpunet.core.random import lanes, site_of
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import Conv2d, DropConnect, Flatten, Graph, Input, Linear, MeanSquaredError, ReLU, Sequential
from gpunet.testing import check_gradients

emulated = pytest.param("emulator", marks=pytest.mark.skipif(bool(problem("emulator")), reason="no emulator here"))
MASKS = "example", "batch"


def step_of(layer, inputs, batch, **options):
    image = Input((1, 1, inputs))
    keep = ("drop:output", "drop:output_gradient", "drop.weight:gradient", "input:gradient")
    options = {"dtype": "float64", "replicas": 1, "seed": 9, **options}
    step = Step(Graph(image, layer(Flatten()(image))), MeanSquaredError(), batch=batch, keep=keep, **options)
    if "drop.bias" in step.weights:
        step.weights["drop.bias"] = np.random.default_rng(3).normal(0, 0.3, layer.outputs)
    return step


def images(batch, inputs, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, 1, 1, inputs))


def train(step, x, batch=0):
    state = step.state
    state["batch"] = batch
    step.state = state
    step.gradient(x, np.random.default_rng(1).normal(size=(len(x), step.graph.output_shape[0])))
    return step.read("drop:output")


def masks_of(layer, inputs, n, batch=0):
    """Return the masks (n, inputs, outputs) by the contract: rows of draws begin at a multiple of 16."""
    width = -(-layer.outputs // 16) * 16
    size = inputs * width
    threshold = round(layer.rate * 65536)
    drawn = lanes(9, site_of("drop"), batch, 0, (n if layer.mask == "example" else 1) * size) >= threshold
    kept = drawn.reshape(-1, inputs, width)[:, :, : layer.outputs]
    return np.broadcast_to(kept, (n, inputs, layer.outputs))


@pytest.mark.parametrize("backend", ["numpy", emulated])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("mask", MASKS)
def test_a_step_by_hand(mask, activation, backend):
    """y, dW, db and dx, by masks that the contract gives; in the second batch others."""
    layer = DropConnect(19, 0.4, mask, activation, name="drop")
    x = images(6, 11)
    with closing(step_of(layer, 11, 6, backend=backend)) as step:
        w, b, v = step.weights["drop.weight"], step.weights["drop.bias"], x[:, 0, 0]
        for batch in (0, 4):
            y = train(step, x, batch)
            kept = masks_of(layer, 11, 6, batch)
            assert 0 < kept.mean() < 1
            u = np.einsum("ni,io,nio->no", v, w, kept) + b
            np.testing.assert_allclose(y, np.maximum(u, 0) if activation else u, rtol=1e-12, atol=1e-14)
            dy = step.read("drop:output_gradient") * (u > 0 if activation else 1)
            pairs = {
                "drop.weight:gradient": np.einsum("ni,no,nio->io", v, dy, kept),
                "drop.bias:gradient": dy.sum(axis=0),
                "input:gradient": np.einsum("no,io,nio->ni", dy, w, kept)[:, None, None],
            }
            for name, expected in pairs.items():
                np.testing.assert_allclose(step.read(name), expected, rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_accumulate(mask):
    """Two gradients of one batch, the second added: twice the first."""
    x, y = images(4, 7), np.zeros((4, 5))
    with closing(step_of(DropConnect(5, 0.3, mask, name="drop"), 7, 4)) as step:
        step.gradient(x, y)
        once = step.read("drop.weight:gradient").copy()
        step.gradient(x, y, accumulate=True)
        np.testing.assert_allclose(step.read("drop.weight:gradient"), 2 * once, rtol=1e-12)
        assert np.abs(once).max() > 0


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("replicas", [1, 3])
def test_against_differences(mask, replicas):
    net = Sequential(Conv2d(3, 3), DropConnect(9, 0.3, mask), DropConnect(4, 0.5, mask, None, bias=False))
    assert check_gradients(net, (4, 3, 2), samples=12, replicas=replicas) < 1e-6


@pytest.mark.parametrize("mask", MASKS)
def test_two_calls_of_one_layer_draw_apart_and_share_the_gradient(mask):
    layer = DropConnect(6, 0.3, mask, None, name="drop")
    assert check_gradients(Sequential(Flatten(), layer, layer), (1, 2, 3), samples=12) < 1e-6


@pytest.mark.parametrize("mask", MASKS)
def test_masks_do_not_depend_on_replicas(mask):
    x = images(7, 11)
    found = []
    for replicas in (1, 2, 3):
        with closing(step_of(DropConnect(5, 0.5, mask, None, name="drop"), 11, 7, replicas=replicas)) as step:
            found.append((train(step, x, 2), step.read("drop.weight:gradient"), step.read("input:gradient")))
    for got in found[1:]:
        for a, b in zip(got, found[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def kept_weights(mask, rate, batch=0, examples=40, inputs=64, outputs=50):
    """Return bool (examples, inputs, outputs) as seen in outputs: every weight is its own power of two or nothing."""
    layer = DropConnect(outputs, rate, mask, None, bias=False, name="drop")
    with closing(step_of(layer, inputs, examples)) as step:
        bits = 2.0 ** (np.arange(inputs) % 32)[:, None]
        kept = []
        for half in (0, 32):  # a float64 has 53 bits
            weight = np.zeros((inputs, outputs))
            weight[half : half + 32] = bits[:32]
            step.weights["drop.weight"] = weight
            y = train(step, np.ones((examples, 1, 1, inputs)), batch).astype(np.int64)
            kept.append(y[:, None, :] >> np.arange(32)[:, None] & 1)
    return np.concatenate(kept, axis=1).astype(bool)


@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_the_rate_of_masks_of_examples(rate):
    """All weights of all examples are independent: alone, in pairs of outputs, of inputs, of examples, of batches."""
    kept = kept_weights("example", rate)
    assert kept_p_value(kept, 1 - rate) > 1e-3
    keep = np.outer([rate, 1 - rate], [rate, 1 - rate])
    for a, b in (
        (kept[:, :, 0::2], kept[:, :, 1::2]),
        (kept[:, 0::2], kept[:, 1::2]),
        (kept[0::2], kept[1::2]),
        (kept, kept_weights("example", rate, 1)),
    ):
        assert p_value(np.bincount((2 * a + b).ravel(), minlength=4), keep) > 1e-3


@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_the_rate_of_the_mask_of_a_batch(rate):
    """One mask for all examples, another one in the next batch."""
    kept = np.concatenate([kept_weights("batch", rate, batch) for batch in range(10)])
    kept = kept.reshape(10, 40, 64, 50)
    np.testing.assert_array_equal(kept, np.broadcast_to(kept[:, :1], kept.shape))
    kept = kept[:, 0]
    assert kept_p_value(kept, 1 - rate) > 1e-3
    keep = np.outer([rate, 1 - rate], [rate, 1 - rate])
    assert p_value(np.bincount((2 * kept[0::2] + kept[1::2]).ravel(), minlength=4), keep) > 1e-3


@pytest.mark.parametrize("activation", ["relu", None])
def test_inference_is_the_mean_over_many_masks(activation):
    """Monte Carlo, 6,000 masks of each of two examples: within five standard errors, and by the normal's own error.

    Of None the mean is exact. Of ReLU the sum of 150 terms is taken as normal, which is off by less than 0.002 here.
    """
    inputs, copies, runs = 150, 500, 12
    layer = DropConnect(8, 0.4, "example", activation, name="drop")
    x, seen = images(2, inputs), []
    with closing(step_of(layer, inputs, 2 * copies)) as step:
        w, b = step.weights["drop.weight"], step.weights["drop.bias"]
        for number in range(runs):
            seen.append(train(step, np.repeat(x, copies, axis=0), number).reshape(2, copies, 8))
    seen = np.concatenate(seen, axis=1)
    mean, allowed = seen.mean(axis=1), 5 * seen.std(axis=1) / np.sqrt(runs * copies) + (2e-3 if activation else 0)
    for backend in ("numpy",) if problem("emulator") else ("numpy", "emulator"):
        with closing(step_of(layer, inputs, 2, backend=backend)) as step:
            assert (np.abs(step.predict(x) - mean) <= allowed).all()
    if activation:  # the ReLU of the mean is another value
        assert (np.abs(np.maximum(0.6 * x[:, 0, 0] @ w + b, 0) - mean) > allowed).mean() > 0.5


def test_inference_behind_relu_is_the_closed_form():
    """mean * P(z) + s * p(z), by numbers drawn from the normal that it stands for."""
    layer, inputs = DropConnect(3, 0.3, name="drop"), 9
    x = images(2, inputs)
    x[1] = 0  # no spread: max(bias, 0)
    with closing(step_of(layer, inputs, 2)) as step:
        got = step.predict(x)
        w, b = step.weights["drop.weight"], step.weights["drop.bias"]
    keep = layer.keep
    mean, s = keep * x[0, 0, 0] @ w + b, np.sqrt(keep * (1 - keep) * x[0, 0, 0] ** 2 @ w**2)
    u = np.maximum(np.random.default_rng(0).normal(mean, s, (400_000, 3)), 0)
    assert (np.abs(got[0] - u.mean(0)) < 5 * u.std(0) / np.sqrt(len(u))).all()
    np.testing.assert_allclose(got[1], np.maximum(b, 0))


@pytest.mark.parametrize("mask", MASKS)
def test_without_drops_it_is_linear(mask):
    x, targets = images(5, 7), np.random.default_rng(2).normal(size=(5, 4))
    image = Input((1, 1, 7))
    plain = Graph(image, ReLU()(Linear(4, name="drop")(Flatten()(image))))
    with closing(step_of(DropConnect(4, 0, mask, name="drop"), 7, 5)) as step, closing(
        Step(plain, MeanSquaredError(), batch=5, dtype="float64", replicas=1, seed=9, keep=("input:gradient",))
    ) as other:  # fmt: skip
        for name in other.weights:
            other.weights[name] = step.weights[name]
        np.testing.assert_allclose(step.predict(x), other.predict(x), rtol=1e-12)
        for each in (step, other):
            each.gradient(x, targets)
        for name in ("drop.weight:gradient", "drop.bias:gradient", "input:gradient"):
            np.testing.assert_allclose(step.read(name), other.read(name), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mask", MASKS)
def test_sixteen_bits_draw_the_same_masks(mask, dtype):
    """And large inputs, whose squares float16 does not hold, have a spread all the same."""
    x = images(4, 21) * 300
    found = []
    for kind in ("float64", dtype):
        with closing(step_of(DropConnect(7, 0.5, mask, name="drop"), 21, 4, dtype=kind)) as step:
            found.append((train(step, x), step.predict(x)))
    for got, expected in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-2 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1}, "rate: expected 0 <= rate < 1, got 1"),
        ({"rate": "a"}, "rate: expected 0 <= rate < 1, got 'a'"),
        ({"mask": "image"}, "mask: expected 'example' or 'batch', got 'image'"),
        ({"activation": "tanh"}, "activation: expected 'relu' or None, got 'tanh'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(GpunetError, match=f"^DropConnect: {message}$"):
        DropConnect(4, **arguments)
