"""Local response normalisation: PyTorch, Caffe's own way of counting, differences, and the network that it was in."""

from contextlib import closing

import numpy as np
import pytest
from caffe_pool import caffe_pool
from golden.make_golden import FOLDER, draw, fingerprint, plain, starting
from golden.make_lrn import BATCH, CASES, DECAY, LR, MOMENTUM, STEPS, images_of, labels

from gpunet import models, optim
from gpunet.backends.numpy import Backend
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import LRN, Conv2d, Flatten, Graph, Input, Linear, MeanSquaredError, Sequential, SoftmaxCrossEntropy
from gpunet.testing import check_gradients


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "lrn.npz") as file:
        return dict(file)


def through(layer, x, dy=None, **options):
    """Return y, and dx for dy, of a layer in a step: mean squared error's gradient is 2 (y - target) / values."""
    image = Input(x.shape[1:])
    step = Step(Graph(image, Flatten()(layer(image))), MeanSquaredError(), optim.SGD(0.0), batch=len(x),
                dtype="float64", keep=("input:gradient",), **{"replicas": 1, **options})  # fmt: skip
    with closing(step):
        y = step.predict(x)
        if dy is None:
            return y.reshape(x.shape)
        step.gradient(x, y - dy.reshape(y.shape) * y.shape[1] / 2)
        return y.reshape(x.shape), step.read("input:gradient")


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradient_equal_pytorch(name, replicas, fast, golden):
    size, alpha, beta, k, region, shape = CASES[name]
    x = images_of(name, shape)
    dy, options = draw(f"lrn/{name}/dy", *x.shape), {"replicas": replicas, "backend": Backend(fast=fast)}
    y, dx = through(LRN(size, alpha, beta, k, region), x, dy, **options)
    np.testing.assert_allclose(y, golden[f"{name}/y"], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(dx, golden[f"{name}/dx"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("size", "shape"), [(3, (5, 4, 2)), (3, (1, 1, 3)), (5, (4, 7, 1)), (7, (3, 2, 2))])
def test_within_counts_as_caffe_does(size, shape):
    """As it is made there: square, AVE pooling that keeps the size, power, product."""
    x, pad = images_of("caffe", shape), (size - 1) // 2
    means = np.stack([caffe_pool(image**2, (size, size), (1, 1), (pad, pad), "AVE") for image in x])
    expected = x * (1 + 2.0 * means) ** -0.75
    np.testing.assert_allclose(through(LRN(size, 2.0, 0.75, region="within"), x), expected, rtol=1e-12)


def test_rows_have_channels_too():
    """Behind a Linear there are no pixels; across goes on, within says what it needs."""
    image = Input((2, 2, 3))
    step = Step(Graph(image, Sequential(Linear(6), LRN(3, 1.0))(image)), batch=2, replicas=1)
    with closing(step):
        assert step.predict(images_of("rows", (2, 2, 3), 2)).shape == (2, 6)
    with pytest.raises(GpunetError, match=r"lrn1: expected an input of shape \(height, width, channels\), got \(6,\)"):
        Graph(image, Sequential(Linear(6), LRN(3, region="within"))(image))


@pytest.mark.parametrize("region", ["across", "within"])
@pytest.mark.parametrize("replicas", [1, 3])
def test_gradients_against_differences(region, replicas):
    net = Sequential(Conv2d(7, 3), LRN(5, 3.0, 0.75, 1.5, region), Linear(3))
    assert check_gradients(net, (6, 5, 2), samples=12, replicas=replicas) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": 4}, "LRN: size: expected an odd whole number, got 4"),
        ({"size": 0}, "LRN: size: expected an odd whole number, got 0"),
        ({"size": True}, "LRN: size: expected an odd whole number, got True"),
        ({"size": (3, 3)}, r"LRN: size: expected an odd whole number, got \(3, 3\)"),
        ({"alpha": -1.0}, "LRN: alpha: expected 0 or more, got -1.0"),
        ({"alpha": float("nan")}, "LRN: alpha: expected 0 or more, got nan"),
        ({"beta": 0.0}, "LRN: beta: expected a number above 0, got 0.0"),
        ({"k": float("inf")}, "LRN: k: expected a number above 0, got inf"),
        ({"region": "WITHIN_CHANNEL"}, "LRN: region: expected 'across' or 'within', got 'WITHIN_CHANNEL'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, text):
    with pytest.raises(GpunetError, match=f"^{text}$"):
        LRN(**arguments)


def test_cifar10_full_has_the_published_size_and_multipliers():
    graph = models.build("cifar10_full")
    assert graph.size == 89_578
    rates = {plain(p.name): (p.rate, p.decay) for p in graph.parameters()}
    assert rates == {
        "conv1.weight": (1, 1), "conv1.bias": (2, 1), "conv2.weight": (1, 1), "conv2.bias": (2, 1),
        "conv3.weight": (1, 1), "conv3.bias": (1, 1), "ip1.weight": (1, 250), "ip1.bias": (2, 0),
    }  # fmt: skip


@pytest.mark.parametrize("form", ["pytorch", "caffe"])  # at one rate the two are the same
def test_cifar10_full_trains_as_pytorch_does(form, golden):
    rule = optim.SGD(LR, momentum=MOMENTUM, weight_decay=DECAY, form=form)
    step = Step(models.build("cifar10_full"), SoftmaxCrossEntropy(), rule, batch=BATCH, dtype="float64", replicas=1)
    with closing(step):
        for name, value in step.weights.items():
            step.weights[name] = starting(name, value.shape)
        for number in range(STEPS):
            step.gradient(64 * images_of("net", (32, 32, 3), BATCH), labels())
            np.testing.assert_allclose(step.losses()["loss"], golden["net/losses"][number], rtol=1e-10)
            step.update()
        for name, value in step.weights.items():
            expected = golden[f"net/{plain(name)}"]
            np.testing.assert_allclose(fingerprint(value), expected, atol=1e-10 * np.abs(expected).max(), err_msg=name)
