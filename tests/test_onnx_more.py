"""ONNX files of activations, norms, pools and dropouts: in onnxruntime what `predict` gives."""

import numpy as np
import pytest
from test_more_layers import network
from test_onnx import hold, predictor_of

from gpunet import nn

IMAGES = np.random.default_rng(1).integers(0, 256, (5, 9, 7, 4), np.uint8)
IMAGES[:, :5, :4] = 0  # below the mean: windows in which nothing is above 0
LAYERS = {
    "elu": nn.ELU(0.7),
    "softplus": nn.Softplus(),
    "hardswish": nn.Hardswish(),
    "softmax": nn.Softmax(),
    "prelu": nn.PReLU(),
    "prelu, shared": nn.PReLU(shared=True),
    "maxout": nn.Maxout(2),
    "maxout, four": nn.Maxout(4),
    "groupnorm": nn.GroupNorm(2),
    "groupnorm, eps": nn.GroupNorm(4, eps=0.1),
    "layernorm": nn.LayerNorm(),
    "layernorm, image": nn.LayerNorm("image"),
    "stochastic pool": nn.StochasticPool(2),
    "stochastic pool, edges": nn.StochasticPool((3, 2), (2, 2), (1, 1), ceil=True),
    "dropout": nn.Dropout(0.4),
    "dropout, plain": nn.Dropout(0.4, "plain"),
    "dropout2d, plain": nn.Dropout2d(0.3, "plain"),
    "dropconnect": nn.DropConnect(6, 0.3),
    "dropconnect, mean": nn.DropConnect(6, 0.3, "batch", None, bias=False),
    "dropconnect, none dropped": nn.DropConnect(6, 0),
}
ON_IMAGES = (nn.StochasticPool, nn.Dropout2d)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_images(name, tmp_path):
    image = nn.Input((9, 7, 4))
    graph = nn.Graph(image, nn.Flatten()(LAYERS[name](image)))
    hold(predictor_of(graph, 128.0, 1 / 64), IMAGES, tmp_path / "net.onnx", name)


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if not isinstance(layer, ON_IMAGES)])
def test_a_layer_on_rows(name, tmp_path):
    """A layer of its own: parameters of another size."""
    image = nn.Input((9, 7, 4))
    layer = LAYERS[name]
    fresh = type(layer).__new__(type(layer))
    vars(fresh).update(vars(layer), parameters={})
    graph = nn.Graph(image, fresh(nn.Linear(12)(image)))
    hold(predictor_of(graph, 128.0, 1 / 64), IMAGES, tmp_path / "net.onnx", name)


def test_a_network_of_all(tmp_path):
    graph = network()
    assert {type(layer) for layer in LAYERS.values()} <= {type(node.layer) for node in graph.nodes}
    predictor = predictor_of(graph, 128.0, 1 / 64)
    hold(predictor, IMAGES, tmp_path / "net.onnx")
    hold(predictor, IMAGES, tmp_path / "three.onnx", batch=5)
