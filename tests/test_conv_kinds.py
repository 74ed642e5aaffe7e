"""Depthwise, transposed and locally connected convolutions: PyTorch's values, differences, what each is equal to."""

import platform
import shutil
from contextlib import closing
from itertools import product

import numpy as np
import pytest
from golden.make_golden import FOLDER, Case, graph_of, images_of, starting, targets_of
from golden.make_kinds import CASES

from gpunet.backends import emulator
from gpunet.backends.numpy import Backend
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import (
    Conv2d,
    ConvTranspose2d,
    DepthwiseConv2d,
    Graph,
    Hinge,
    Input,
    Linear,
    LocallyConnected2d,
    MeanSquaredError,
    ReLU,
    Scale,
    Sequential,
    SigmoidFocal,
    init,
)  # fmt: skip
from gpunet.optim import SGD
from gpunet.testing import check_gradients

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 8 * 2**-10, "bfloat16": 8 * 2**-7}  # of the largest value


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "kinds.npz") as file:
        return dict(file)


def close(got, expected, dtype, where):
    got, expected = np.asarray(got, np.float64), np.asarray(expected)
    assert got.shape == expected.shape, where
    error, allowed = np.abs(got - expected).max(), TOLERANCE[dtype] * np.abs(expected).max()
    assert error <= allowed, f"{where}: largest error {error:.3g}, allowed {allowed:.3g}"


def step_of(graph, dtype="float64", replicas=1, engine="blocked", batch=3, keep=("input:gradient",)):
    backend = Backend()
    backend.engine = lambda types: engine
    step = Step(graph, MeanSquaredError(), SGD(0.0), batch=batch, dtype=dtype, backend=backend, replicas=replicas,
                keep=keep)  # fmt: skip
    for name, value in step.weights.items():
        step.weights[name] = starting(name, value.shape)
    return step


VARIANTS = [*product(("float64", "float32"), (1, 3), ("blocked", "unfold")),
            *product(("float16", "bfloat16"), (1, 2), ("unfold",))]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_golden_layer(name, golden):
    graph = graph_of(CASES[name])
    x, targets = images_of(name, graph.input_shape), targets_of(name, graph.output_shape[0])
    for dtype, replicas, engine in VARIANTS:
        where = f"{name} {dtype} replicas={replicas} {engine}"
        with closing(step_of(graph, dtype, replicas, engine)) as step:
            step.gradient(x, targets)
            losses, scale = step.losses(), step.state["loss_scale"]
            close(losses["loss"] * losses["count"], golden[f"{name}/loss"], dtype, f"{where}: loss")
            close(step.read("prediction"), golden[f"{name}/output"], dtype, f"{where}: output")
            close(step.read("input:gradient") / scale, golden[f"{name}/input"], dtype, f"{where}: input gradient")
            for weight in step.weights:
                got = step.read(f"{weight}:gradient") / scale
                close(got, golden[f"{name}/{weight}"], dtype, f"{where}: {weight}")


LAYERS = {
    "depthwise": DepthwiseConv2d(3, 2, 2),
    "depthwise dilated": DepthwiseConv2d((3, 2), 1, (1, 2), (1, 0), 2, bias=False),
    "transpose": ConvTranspose2d(4, 3, 2, 1, 1),
    "transpose groups": ConvTranspose2d(4, (3, 2), (1, 3), 0, (0, 2), 2, (1, 2)),
    "local": LocallyConnected2d(3, 3),
    "local stride": LocallyConnected2d(3, (2, 3), 2, (0, 1), (1, 2), bias=False),
    "scale": Scale(-0.3),
    "chain": Sequential(DepthwiseConv2d(3), ConvTranspose2d(3, 2, 2), ReLU(), LocallyConnected2d(2, 3, 3), Scale(2)),
}


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_against_differences(name, replicas):
    assert check_gradients(LAYERS[name], (5, 6, 2), samples=8, replicas=replicas) < 1e-6


def outcome(layer, x, values, batch=3):
    """Return output, input gradient and weight gradients of a layer with these weights."""
    graph, keep = graph_of(Case(x.shape[1:], layer, None)), ("layer:output", "input:gradient")
    with closing(step_of(graph, batch=batch, keep=keep)) as step:
        for name, value in values.items():
            step.weights[f"layer.{name}"] = value
        step.gradient(x, targets_of("equal", graph.output_shape[0], batch))
        return [step.read(name) for name in (*keep, *(f"layer.{name}:gradient" for name in values))]


@pytest.mark.parametrize("multiplier", [1, 3])
def test_depthwise_is_a_convolution_with_a_group_a_channel(multiplier):
    rng = np.random.default_rng(0)
    x, outputs = rng.normal(size=(3, 7, 6, 4)), 4 * multiplier
    values = {"weight": rng.normal(size=(3, 3, 1, outputs)), "bias": rng.normal(size=outputs)}
    mine = outcome(DepthwiseConv2d(3, multiplier, 2, name="layer"), x, values)
    for a, b in zip(mine, outcome(Conv2d(outputs, 3, 2, groups=4, name="layer"), x, values), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def test_local_with_the_same_weights_everywhere_is_a_convolution():
    rng = np.random.default_rng(1)
    x, weight, bias = rng.normal(size=(3, 5, 4, 2)), rng.normal(size=(3, 3, 2, 3)), rng.normal(size=3)
    everywhere = {"weight": np.broadcast_to(weight, (5, 4, *weight.shape)), "bias": np.tile(bias, 20)}
    y, dx, dw, db = outcome(LocallyConnected2d(3, 3, name="layer"), x, everywhere)
    expected = outcome(Conv2d(3, 3, name="layer"), x, {"weight": weight, "bias": bias})
    sums = y, dx, dw.sum((0, 1)), db.reshape(20, 3).sum(0)
    for a, b in zip(sums, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", [{"stride": 2, "padding": 1}, {"stride": (3, 2), "groups": 2}, {"dilation": 2}])
def test_transpose_is_the_adjoint_of_the_convolution(options):
    """<conv(y), x> = <y, transpose(x)> for the same weights, without biases."""
    rng = np.random.default_rng(2)
    conv = Conv2d(6, 3, bias=False, name="layer", **{"padding": 0} | options)
    y = rng.normal(size=(3, 9, 11, 4))
    h, w, _ = conv.setup((9, 11, 4))
    extra = tuple((n + 2 * p - d * 2 - 1) % s for n, p, d, s in zip((9, 11), conv.padding, conv.dilation, conv.stride,
                                                                    strict=True))  # fmt: skip
    transpose = ConvTranspose2d(4, 3, output_padding=extra, bias=False, name="layer", **options)
    x = rng.normal(size=(3, h, w, 6))
    weight = {"weight": rng.normal(size=(3, 3, 4 // conv.groups, 6))}
    forward, back = outcome(conv, y, weight)[0], outcome(transpose, x, weight)[0]
    assert back.shape == y.shape
    assert (forward * x).sum() == pytest.approx((y * back).sum(), rel=1e-12)


def test_initial_values_have_the_deviation_of_what_an_output_sums():
    """He: 2 over the products of one output, wherever the axes stand."""
    for layer, shape, fan in (
        (DepthwiseConv2d(5, 4), (20, 20, 64), 25),
        (ConvTranspose2d(96, 3, groups=2), (4, 4, 64), 9 * 32),
        (LocallyConnected2d(16, 3), (6, 6, 32), 9 * 32),
    ):
        image = Input(shape)
        Graph(image, layer(image))
        weight = layer.parameters["weight"]
        values = weight.initial(np.random.default_rng(0), weight.shape)
        assert values.shape == weight.shape
        assert values.std() == pytest.approx((2 / fan) ** 0.5, rel=0.02), type(layer)


def test_a_transposed_convolutions_draw_is_turned_group_by_group():
    """Output o of group g sums the drawn weights [:, :, :, o] over the inputs of its group."""
    drawn = np.arange(1 * 2 * 2 * 6).reshape(1, 2, 2, 6)
    layer = ConvTranspose2d(6, (1, 2), groups=2, weight_init=lambda rng, shape: drawn)
    layer.setup((3, 3, 4))
    turned = layer.parameters["weight"].initial(None, (1, 2, 3, 4))
    for o, i in product(range(6), range(2)):
        assert (turned[..., o % 3, o // 3 * 2 + i] == drawn[..., i, o]).all()


@pytest.mark.parametrize(
    ("layer", "shape", "output", "weights", "flops"),
    [
        (DepthwiseConv2d(3, 2, 2), (7, 9, 5), (4, 5, 10), 100, 2 * 4 * 5 * 10 * 9),
        (ConvTranspose2d(6, 4, 2, 1), (5, 7, 3), (10, 14, 6), 16 * 18 + 6, 2 * 5 * 7 * 3 * 16 * 6),
        (LocallyConnected2d(4, 3), (5, 6, 3), (5, 6, 4), 30 * (27 * 4 + 4), 2 * 30 * 27 * 4),
        (Scale(0.5), (5, 6, 3), (5, 6, 3), 0, 0),
    ],
)
def test_sizes(layer, shape, output, weights, flops):
    image = Input(shape)
    (row,) = Graph(image, layer(image)).summary()
    assert (row.shape, row.parameters, row.flops) == (output, weights, flops)


MISTAKES = [
    (lambda: DepthwiseConv2d(3, 0), "DepthwiseConv2d: multiplier: expected a whole number of at least 1, got 0"),
    (lambda: DepthwiseConv2d(3, 1.5), "DepthwiseConv2d: multiplier: expected a whole number of at least 1, got 1.5"),
    (lambda: DepthwiseConv2d(2), r"DepthwiseConv2d: padding 'same' needs an odd size, got \(2, 2\)"),
    (lambda: DepthwiseConv2d("3"), "DepthwiseConv2d: size: expected one or two whole numbers, got '3'"),
    (lambda: LocallyConnected2d(0, 3), "LocallyConnected2d: outputs: expected a whole number from 1 to"),
    (lambda: LocallyConnected2d(3, [3, 3, 3]), r"LocallyConnected2d: size: expected one or two whole numbers, got \[3"),
    (lambda: ConvTranspose2d(0, 3), "ConvTranspose2d: outputs: expected a whole number of at least 1, got 0"),
    (lambda: ConvTranspose2d(3, 3, -1), "ConvTranspose2d: stride: expected one or two whole numbers, got -1"),
    (lambda: ConvTranspose2d(3, 3, 0), "ConvTranspose2d: expected size, stride, dilation of at least 1"),
    (lambda: ConvTranspose2d(3, 3, groups=2), "outputs that groups divide, got .* 3 and 2"),
    (lambda: ConvTranspose2d(3, 3, 2, 1, 2), r"output_padding: expected less than the stride \(2, 2\), got \(2, 2\)"),
    (lambda: ConvTranspose2d(3, 3, padding="same"), "ConvTranspose2d: padding: expected one or two whole numbers, got"),
    (lambda: Scale(0), "Scale: factor: expected a finite number other than 0, got 0"),
    (lambda: Scale(float("nan")), "Scale: factor: expected a finite number other than 0, got nan"),
]


@pytest.mark.parametrize(("made", "said"), MISTAKES)
def test_a_mistake_is_named(made, said):
    with pytest.raises(GpunetError, match=said):
        made()


def test_a_shape_that_does_not_fit_is_named():
    image = Input((5, 5, 4))
    with pytest.raises(GpunetError, match="up: expected channels that 3 groups divide, got 4 from input"):
        Graph(image, ConvTranspose2d(6, 3, groups=3, name="up")(image))
    with pytest.raises(GpunetError, match=r"up: output would have shape \(-3, -3, 2\)"):
        Graph(image, ConvTranspose2d(2, 1, padding=4, name="up")(image))
    with pytest.raises(GpunetError, match="local: expected an input of at least 7 pixels, got 5"):
        Graph(image, LocallyConnected2d(2, 7, padding=0, name="local")(image))
    twice = LocallyConnected2d(4, 3, padding=0, name="local")
    with pytest.raises(GpunetError, match="local.*: expected 4 input channels and windows at 3 x 3 places, as"):
        Graph(image, twice(twice(image)))
    with pytest.raises(GpunetError, match="up.*: expected 4 input channels, as at its first call, got x of shape"):
        Graph(image, (up := ConvTranspose2d(3, 3, name="up"))(up(image)))
    with pytest.raises(GpunetError, match="depth.*: expected 4 input channels, as at its first call, got x of shape"):
        Graph(image, (depth := DepthwiseConv2d(3, 2, name="depth"))(depth(image)))


@pytest.mark.skipif(
    not shutil.which("g++") or platform.machine() != "x86_64", reason="the emulator: there is no g++, or no x86-64"
)
@pytest.mark.parametrize("loss", [SigmoidFocal(), Hinge(squared=True)])
def test_steps_on_the_emulator_are_those_of_numpy(loss):
    """Two steps in double: launches, strided products and losses as on a GPU."""
    image, rng = Input((5, 6, 2)), np.random.default_rng(0)
    x, y = rng.normal(size=(3, 5, 6, 2)), rng.integers(0, 4, 3)
    net = [DepthwiseConv2d(3, 3, 2), ConvTranspose2d(4, 3, 2, 1, 1, 2), ReLU(), LocallyConnected2d(3, 3, 2), Linear(4)]
    results = []
    for backend in (Backend(), emulator.Backend()):
        graph = Graph(image, Sequential(*net, Scale(0.5))(image))
        with closing(Step(graph, loss, SGD(0.1), batch=3, dtype="float64", backend=backend, replicas=1)) as step:
            losses = []
            for _ in range(2):
                step.gradient(x, y)
                losses.append(step.losses()["loss"])
                step.update()
            results.append([np.array(losses), *(value for _, value in step.weights.items())])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_other_initial_values_reach_the_layer():
    image = Input((4, 4, 2))
    for layer in (DepthwiseConv2d(3, weight_init=init.constant(2)), ConvTranspose2d(2, 3, weight_init=("constant", 2)),
                  LocallyConnected2d(2, 3, weight_init=["constant", 2], bias_init=["constant", 3])):  # fmt: skip
        graph = Graph(image, layer(image))
        with closing(Step(graph, batch=1, replicas=1)) as step:
            for name, value in step.weights.items():
                expected = 2 if name.endswith("weight") else 3 if isinstance(layer, LocallyConnected2d) else 0
                assert (value == expected).all(), name
