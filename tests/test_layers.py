"""Every layer and loss against PyTorch's values and against central differences, by every engine and twin."""

from contextlib import closing
from itertools import product

import numpy as np
import pytest
from golden.make_golden import (
    CASES,
    FOLDER,
    IMAGES,
    INFERENCE,
    LABELS,
    LOGITS,
    LOSSES,
    dense_targets,
    graph_of,
    images_of,
    logits_of,
    starting,
    targets_of,
)  # fmt: skip

from gpunet.backends.numpy import Backend
from gpunet.core.params import Parameter
from gpunet.core.random import lanes, site_of
from gpunet.core.source import Source
from gpunet.core.step import Step
from gpunet.data import Split
from gpunet.nn import (
    GELU,
    Add,
    AvgPool,
    BatchNorm,
    Concat,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    Graph,
    Input,
    Layer,
    LeakyReLU,
    Linear,
    MaxPool,
    MeanSquaredError,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    SoftmaxCrossEntropy,
    Tanh,
)  # fmt: skip
from gpunet.optim.sgd import SGD
from gpunet.testing import check_gradients

TOLERANCE = {"float64": 1e-10, "float32": 1e-4}  # of the largest expected value
VARIANTS = list(product(TOLERANCE, (True, False), (1, 2)))  # dtype, fast twins, replicas
# Input, weight, output and its gradient are rounded, by half an epsilon each; sums that cancel make that four times.
TOLERANCE |= {"float16": 8 * 2**-10, "bfloat16": 8 * 2**-7}


def close(got, expected, dtype, where):
    """Hold a tensor to its golden values by the one policy above."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected)
    assert got.shape == expected.shape, where
    error, allowed = np.abs(got - expected).max(), TOLERANCE[dtype] * np.abs(expected).max()
    assert error <= allowed, f"{where}: largest error {error:.3g}, allowed {allowed:.3g}"


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "layers.npz") as layers, np.load(FOLDER / "losses.npz") as losses:
        return {**layers, **losses}


def step_of(graph, loss, *, dtype="float64", fast=True, replicas=1, engine="blocked", batch=IMAGES, **options):
    backend = Backend(fast=fast)
    backend.engine = lambda types: engine
    step = Step(graph, loss, SGD(0.0), batch=batch, dtype=dtype, backend=backend, replicas=replicas,
                keep=("input:gradient",), **options)  # fmt: skip
    for tensors in (step.weights, step.statistics):
        for name, value in tensors.items():
            tensors[name] = starting(name, value.shape)
    return step


@pytest.mark.parametrize("engine", ["blocked", "unfold"])
@pytest.mark.parametrize("name", CASES)
def test_golden_layer(name, engine, golden):
    graph = graph_of(CASES[name])
    if engine == "unfold" and not any(isinstance(node.layer, Conv2d) for node in graph.nodes):
        return
    x, targets = images_of(name, graph.input_shape), targets_of(name, graph.output_shape[0])
    for dtype, fast, replicas in VARIANTS:
        where = f"{name} {engine} {dtype} fast={fast} replicas={replicas}"
        options = {"dtype": dtype, "fast": fast, "replicas": replicas, "engine": engine}
        with closing(step_of(graph, MeanSquaredError(), **options)) as step:
            hold(step, name, x, targets, golden, dtype, where)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_golden_layer_in_sixteen_bits(name, dtype, golden):
    graph = graph_of(CASES[name])
    x, targets = images_of(name, graph.input_shape), targets_of(name, graph.output_shape[0])
    for replicas in (1, 2):
        with closing(step_of(graph, MeanSquaredError(), dtype=dtype, replicas=replicas, engine="unfold")) as step:
            hold(step, name, x, targets, golden, dtype, f"{name} {dtype} replicas={replicas}")


def hold(step, name, x, targets, golden, dtype, where):
    """Hold a layer's prediction, loss, gradients and statistics to the golden values."""
    if name in INFERENCE:
        close(step.predict(x), golden[f"{name}/inference"], dtype, f"{where}: inference")
    step.gradient(x, targets)
    losses, scale = step.losses(), step.state["loss_scale"]
    close(losses["loss"] * losses["count"], golden[f"{name}/loss"], dtype, f"{where}: loss")
    close(step.read("prediction"), golden[f"{name}/output"], dtype, f"{where}: output")
    close(step.read("input:gradient") / scale, golden[f"{name}/input"], dtype, f"{where}: input gradient")
    for weight in step.weights:
        close(step.read(f"{weight}:gradient") / scale, golden[f"{name}/{weight}"], dtype, f"{where}: {weight}")
    step.update()
    for statistic, value in step.statistics.items():
        close(value, golden[f"{name}/{statistic}"], dtype, f"{where}: {statistic}")


@pytest.mark.parametrize("size", LOGITS)
@pytest.mark.parametrize("name", LOSSES)
def test_golden_loss(name, size, golden):
    image = Input((1, 1, 7))
    graph, x = Graph(image, Flatten()(image)), logits_of(size).reshape(5, 1, 1, 7)
    loss = MeanSquaredError() if name == "mse" else SoftmaxCrossEntropy()
    split = Split(x.astype(np.float32), LABELS.astype(np.int32))
    for dtype, fast, replicas in VARIANTS:
        where = f"{name} {size} {dtype} fast={fast} replicas={replicas}"
        source = Source(split, smoothing=0.1, classes=7, order="stored") if name == "smoothed" else None
        options = {"dtype": dtype, "fast": fast, "replicas": replicas, "batch": 5, "source": source}
        with closing(step_of(graph, loss, **options)) as step:
            batch = {"labels": (x, LABELS), "smoothed": ()}.get(name, (x, dense_targets()))
            step.gradient(*batch)
            losses = step.losses()
            close(losses["loss"] * 5, golden[f"{name}/{size}/loss"], dtype, f"{where}: loss")
            close(step.read("input:gradient")[:, 0, 0], golden[f"{name}/{size}/gradient"], dtype, f"{where}: gradient")
            right = LABELS if name in ("labels", "smoothed") else dense_targets().argmax(1)
            assert losses["accuracy"] == (logits_of(size).argmax(1) == right).mean(), where
            assert losses["count"] == 5, where


LAYERS = {
    "conv": Conv2d(4, 3),
    "conv stride": Conv2d(4, 3, 2, dilation=(1, 2)),
    "conv groups": Conv2d(4, 3, groups=2, bias=False),
    "linear": Linear(5),
    "maxpool": MaxPool(3, 2, 1, ceil=True),
    "avgpool": AvgPool(3, 2, 1, ceil=True, include_pad=False),
    "global average": GlobalAvgPool(),
    "batchnorm": BatchNorm(),
    "batchnorm, frozen scale": BatchNorm(scale=False),
    "batchnorm, frozen": BatchNorm(scale=False, shift=False),
    "dropout": Dropout(0.3),
    "relu": ReLU(),
    "leaky relu": LeakyReLU(0.1),
    "sigmoid": Sigmoid(),
    "tanh": Tanh(),
    "gelu": GELU(),
    "silu": SiLU(),
    "chain": Sequential(Conv2d(3, 3), BatchNorm(), ReLU(), Dropout(0.2), MaxPool(2), Linear(4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_against_differences(name):
    assert check_gradients(LAYERS[name], (5, 7, 2), samples=10) < 1e-6


@pytest.mark.parametrize("replicas", [2, 3])
def test_chain_against_differences_in_replicas(replicas):
    assert check_gradients(LAYERS["chain"], (5, 7, 2), samples=6, replicas=replicas, loss=SoftmaxCrossEntropy()) < 1e-6


def test_branching_graph_against_differences():
    image = Input((5, 7, 2))
    left, right = Conv2d(3, 3)(image), Conv2d(3, 1)(image)
    joined = Concat()(ReLU()(left), right, Add()(left, right), image)
    assert check_gradients(Graph(image, Linear(4)(joined)), samples=10) < 1e-6


class Doubled(ReLU):
    """A layer whose gradient is twice what it should be."""

    def backward(self, t, dy, saved):
        dx = super().backward(t, dy, saved)
        total = t.empty(dx.shape)
        t.launch("add_forward", dx, dx, total, dx.size)
        return total


class FirstRow(Linear):
    """A layer that takes its bias's gradient from the first image alone."""

    def backward(self, t, dy, saved):
        weight, accumulate = t.gradient(self.parameters["weight"])
        t.matmul(saved.reshape(saved.shape[0], -1).T, dy, weight, accumulate)
        bias, accumulate = t.gradient(self.parameters["bias"])
        t.launch("sum_parts", dy.reshape(-1).slice(0, self.outputs), bias, accumulate, 1, self.outputs)
        dx = t.empty((saved.shape[0], saved.size // saved.shape[0]))
        t.matmul(dy, t.weight(self.parameters["weight"]).T, dx)
        return dx.reshape(*saved.shape)


def test_check_names_layer_tensor_and_element():
    with pytest.raises(AssertionError, match=r"^input\[\d, \d, \d, \d\]: expected gradient -?\d.*, got -?\d"):
        check_gradients(Doubled(), (3, 5, 2))
    wrong = Sequential(Conv2d(3, 3, name="conv"), Linear(4, name="fc"), name="net")
    assert check_gradients(wrong, (3, 5, 2), samples=4) < 1e-6
    wrong = Sequential(Conv2d(3, 3, name="conv"), Doubled(), Linear(4, name="fc"), name="net")
    with pytest.raises(AssertionError, match=r"^net\.conv: (weight|bias)\[\d.*\]: expected"):
        check_gradients(wrong, (3, 5, 2))


def test_check_sees_a_wrong_bias_gradient():
    layer = FirstRow(4, name="fc")
    with pytest.raises(AssertionError, match=r"^fc: bias\[\d\]: expected gradient"):
        check_gradients(layer, (1, 1, 3), batch=2)


class Shift(Layer):
    """x + a constant tensor, images and all."""

    def __init__(self, values):
        super().__init__()
        self.parameters["shift"] = Parameter(values.shape, lambda rng, shape: values, rate=0.0, trainable=False)

    def setup(self, shape):
        return shape

    def forward(self, t, x):
        y = t.empty(x.shape)
        t.launch("add_forward", x, t.weight(self.parameters["shift"]), y, x.size)
        return y, None

    def backward(self, t, dy, saved):
        return dy


def test_check_steps_away_from_kinks():
    x = np.random.default_rng(0).normal(0, 1, (3, 1, 1, 12))  # the batch that the check draws
    distances = np.array([0, 3e-6, 9e-6, 3e-5, -1e-9, 0.5] * 2)
    assert check_gradients(Sequential(Shift(distances - x), ReLU()), (1, 1, 12)) < 1e-6
    nearly_straight = Sequential(Shift(distances - x), ReLU(), Shift(np.full(x.shape, 1e3)))
    assert check_gradients(nearly_straight, (1, 1, 12)) < 1e-6
    with pytest.raises(AssertionError, match="^input: the loss has a kink at every element"):
        check_gradients(Sequential(Shift(-x), ReLU()), (1, 1, 12))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("replicas", [1, 3])
def test_dropout_keeps_by_the_lanes_of_its_path(fast, replicas):
    image = Input((3, 5, 7))
    graph = Graph(image, Flatten()(Dropout(0.25, name="drop")(image)))
    x = images_of("dropout", (3, 5, 7), 4)
    backend = Backend(fast=fast)
    step = Step(graph, MeanSquaredError(), batch=4, dtype="float64", backend=backend, replicas=replicas, seed=9,
                keep=("drop:*", "input:gradient"))  # fmt: skip
    with closing(step):
        for batch in (0, 5):
            state = step.state
            state["batch"] = batch
            step.state = state
            step.gradient(x, np.zeros((4, 105)))
            kept = lanes(9, site_of("drop"), batch, 0, x.size).reshape(x.shape) >= 16384
            np.testing.assert_array_equal(step.read("drop:output"), np.where(kept, x * (4 / 3), 0))
            dy = step.read("drop:output_gradient")
            np.testing.assert_array_equal(step.read("input:gradient"), np.where(kept, dy * (4 / 3), 0))
        np.testing.assert_array_equal(step.predict(x), x.reshape(4, -1))


def test_frozen_scale_and_shift_stay():
    image = Input((3, 5, 2))
    graph = Graph(image, Linear(3)(BatchNorm(scale=False, shift=False, name="norm")(image)))
    with closing(Step(graph, SoftmaxCrossEntropy(), SGD(0.5), batch=4, dtype="float64", replicas=1)) as step:
        assert list(step.weights) == ["linear1.weight", "linear1.bias"]
        step.gradient(images_of("frozen", (3, 5, 2), 4), np.array([0, 1, 2, 0]))
        step.update()
        np.testing.assert_array_equal(step.statistics["norm.gamma"], 1)
        np.testing.assert_array_equal(step.statistics["norm.beta"], 0)
        assert np.abs(step.statistics["norm.mean"]).min() > 0
