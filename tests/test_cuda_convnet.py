"""cuda-convnet's network with unshared weights: its size layer by layer, its gradient, and that it learns."""

from contextlib import closing

import numpy as np
import pytest

from gpunet import models
from gpunet.core.step import Step
from gpunet.nn import SoftmaxCrossEntropy
from gpunet.optim import SGD
from gpunet.testing import check_gradients

LAYERS = {  # at 24 x 24, pooled to 12 and to 6: weights and biases by hand
    "conv1": 5 * 5 * 3 * 64 + 64,
    "conv2": 5 * 5 * 64 * 64 + 64,
    "local3": 6 * 6 * (3 * 3 * 64 * 64 + 64),
    "local4": 6 * 6 * (3 * 3 * 64 * 32 + 32),
    "fc10": 6 * 6 * 32 * 10 + 10,
}


def sizes(graph):
    """Weights and biases of the layers that have some, by name."""
    return {row.path.rpartition(".")[2]: row.parameters for row in graph.summary() if row.parameters}


def test_the_size_of_every_layer():
    graph = models.build("cuda_convnet", (24, 24, 3))
    assert sizes(graph) == LAYERS
    assert graph.size == sum(LAYERS.values()) == 2_112_970


@pytest.mark.parametrize(("side", "pooled"), [(24, 6), (32, 8), (25, 6)])
def test_shapes(side, pooled):
    """A window that begins inside the image counts, so that 25 pixels become 12, then 6."""
    graph = models.build("cuda_convnet", (side, side, 3), 7)
    assert graph.output_shape == (7,)
    assert sizes(graph)["local4"] == pooled * pooled * (3 * 3 * 64 * 32 + 32)
    with closing(Step(graph, batch=2, replicas=1)) as step:
        assert step.predict(np.zeros((2, side, side, 3))).shape == (2, 7)


def test_published_deviations_and_twice_the_rate_for_biases():
    graph = models.build("cuda_convnet", (24, 24, 3))
    layers = {node.path.rpartition(".")[2]: node.layer for node in graph.nodes if node.layer.parameters}
    with closing(Step(graph, batch=1, replicas=1)) as step:
        weights = {name.split(".", 1)[1]: value for name, value in step.weights.items()}
    for name, deviation in zip(LAYERS, (1e-4, 0.01, 0.04, 0.04, 0.01), strict=True):
        assert weights[f"{name}.weight"].std() == pytest.approx(deviation, rel=0.05), name
        assert not weights[f"{name}.bias"].any(), name
        assert {key: p.rate for key, p in layers[name].parameters.items()} == {"weight": 1.0, "bias": 2.0}


def test_against_differences():
    """Of crops of 6 x 6, pooled to 3 and to 1: every layer as it is, but for unshared weights at one place alone."""
    graph = models.build("cuda_convnet", (6, 6, 2), 3, init="he")
    assert check_gradients(graph, loss=SoftmaxCrossEntropy(), samples=5, batch=2) < 1e-6


def test_it_learns_a_batch_by_heart():
    """From the published values, on raw pixels around 0."""
    rng = np.random.default_rng(0)
    images, labels = rng.normal(0, 60, (8, 8, 8, 3)), np.arange(8) % 4
    graph = models.build("cuda_convnet", (8, 8, 3), 4)
    with closing(Step(graph, SoftmaxCrossEntropy(), SGD(0.01, 0.9), batch=8, replicas=1)) as step:
        losses = []
        for _ in range(60):
            step.gradient(images, labels)
            losses.append(step.losses()["loss"])
            step.update()
    assert losses[0] == pytest.approx(np.log(4), rel=0.01)
    assert losses[-1] < 0.1 * losses[0]
