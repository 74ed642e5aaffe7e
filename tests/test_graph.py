"""How calling layers makes a graph: order, names, shapes, sharing, and gradients that meet."""

from contextlib import closing

import numpy as np
import pytest

from gpunet.core.params import Parameter
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import (
    Add,
    BatchNorm,
    Block,
    Concat,
    Conv2d,
    Dropout,
    Graph,
    Input,
    Layer,
    Linear,
    MeanSquaredError,
    ReLU,
    Sequential,
    Tanh,
)  # fmt: skip
from gpunet.nn.init import constant
from gpunet.optim.sgd import SGD


def paths(graph):
    return [node.path for node in graph.nodes]


def parameters(graph):
    return [p.name for p in graph.parameters()]


class Twice(Block):
    """Two layers of a name each."""

    def connect(self, x):
        return Tanh(name="end")(Conv2d(2, 3, name="begin")(x))


def test_nodes_stand_in_call_order_behind_what_they_read():
    image = Input((4, 4, 2))
    stem = Conv2d(3, 1, name="stem")(image)
    left = Conv2d(3, 1, name="left")(stem)
    right = Conv2d(3, 1, name="right")(Conv2d(3, 1, name="deep")(stem))
    ReLU(name="forgotten")(left)
    graph = Graph(image, Add(name="sum")(left, right, stem))
    assert paths(graph) == ["stem", "left", "deep", "right", "sum"]


def test_a_long_chain_needs_no_recursion():
    image = node = Input((1, 1, 2))
    for _ in range(3000):
        node = ReLU()(node)
    graph = Graph(image, node)
    assert len(graph.nodes) == 3000
    assert paths(graph)[-1] == "relu3000"


def test_names_are_paths_numbered_by_kind_in_each_block():
    image = Input((4, 4, 2))
    body = Sequential(Conv2d(2, 3), ReLU(), Conv2d(2, 3), Sequential(ReLU(), name="inner"), name="body")
    graph = Graph(image, Linear(3)(Conv2d(2, 3)(body(image))))
    assert paths(graph) == ["body.conv2d1", "body.relu1", "body.conv2d2", "body.inner.relu1", "conv2d1", "linear1"]
    assert parameters(graph)[:2] == ["body.conv2d1.weight", "body.conv2d1.bias"]


def test_a_blocks_name_stands_before_its_layers_only():
    image = Input((4, 4, 2))
    before = Conv2d(2, 3, name="before")(image)
    graph = Graph(image, Add(name="after")(Twice("block")(before), before))
    assert paths(graph) == ["before", "block.begin", "block.end", "after"]


def test_one_name_for_two_layers_is_an_error():
    image = Input((4, 4, 2))
    with pytest.raises(GpunetError, match=r"^fc: two layers have this name"):
        Graph(image, Linear(3, name="fc")(Linear(3, name="fc")(image)))
    with pytest.raises(GpunetError, match=r"^twice1\.begin: two layers have this name"):
        block = Twice()
        Graph(image, block(block(image)))


def test_a_layer_called_twice_has_two_paths_and_one_set_of_weights():
    image = Input((4, 4, 2))
    body = Sequential(Conv2d(2, 3), Dropout(0.1), name="body")
    graph = Graph(image, body(body(image)))
    assert paths(graph) == ["body.conv2d1", "body.dropout1", "body.conv2d1@2", "body.dropout1@2"]
    assert parameters(graph) == ["body.conv2d1.weight", "body.conv2d1.bias"]
    assert [row.parameters for row in graph.summary()] == [38, 0, 0, 0]
    assert graph.size == 38


def test_gradients_of_a_layer_called_twice_add():
    def network(first, second):
        image = Input((4, 5, 2))
        return Graph(image, Linear(3, name="fc")(second(ReLU()(first(image)))))

    shared = Conv2d(2, 3, name="one")
    one, two = network(shared, shared), network(Conv2d(2, 3, name="one"), Conv2d(2, 3, name="two"))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 4, 5, 2)), rng.normal(size=(4, 3))
    got = []
    for graph in (one, two):
        with closing(Step(graph, MeanSquaredError(), batch=4, dtype="float64", replicas=2)) as step:
            for key in step.weights:
                step.weights[key] = np.random.default_rng(1).normal(size=step.weights[key].shape)
            step.gradient(x, y)
            got.append({key: step.read(f"{key}:gradient") for key in step.weights})
    for key in ("weight", "bias"):
        np.testing.assert_allclose(got[0][f"one.{key}"], got[1][f"one.{key}"] + got[1][f"two.{key}"], rtol=1e-12)
    np.testing.assert_allclose(got[0]["fc.weight"], got[1]["fc.weight"], rtol=1e-12)


def test_a_value_read_three_times_gets_the_sum_of_its_gradients():
    image = Input((2, 3, 4))
    graph = Graph(image, Linear(2, name="fc")(Concat()(image, image, Add()(image, image))))
    with closing(Step(graph, MeanSquaredError(), batch=3, dtype="float64", keep=("input:gradient",))) as step:
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(3, 2, 3, 4)), rng.normal(size=(3, 2))
        step.gradient(x, y)
        weight = step.weights["fc.weight"].reshape(2, 3, 3, 4, 2)
        total = weight[:, :, 0] + weight[:, :, 1] + 2 * weight[:, :, 2]
        expected = np.einsum("nk,hwck->nhwc", step.read("prediction") - y, total)
        np.testing.assert_allclose(step.read("input:gradient"), expected, rtol=1e-12, atol=1e-12)


def test_sizes_follow_from_the_input():
    image = Input((9, 7, 3))
    graph = Graph(image, Linear(5)(Conv2d(4, 3, stride=2)(image)))
    assert [node.shape for node in graph.nodes] == [(5, 4, 4), (5,)]
    assert graph.summary()[1].parameters == 5 * 4 * 4 * 5 + 5
    assert graph.summary()[0].flops == 2 * 5 * 4 * 4 * 27


def test_a_second_input_is_refused():
    image, other = Input((4, 4, 2)), Input((4, 4, 3))
    with pytest.raises(GpunetError, match=r"a second Input of shape \(4, 4, 3\)"):
        Graph(image, Concat()(image, other))


def test_a_layer_is_called_on_nodes():
    with pytest.raises(GpunetError, match="fc: a layer is called on nodes, got ndarray"):
        Linear(3, name="fc")(np.zeros((2, 2)))


def test_parts_of_a_graph_are_graphs_over_the_same_weights():
    image = Input((4, 4, 2))
    hidden = ReLU()(Conv2d(3, 3, name="conv")(image))
    whole, part = Graph(image, Linear(2, name="fc")(hidden)), Graph(image, hidden)
    assert part.parameters() == whole.parameters()[:2]
    with closing(Step(part, batch=2, replicas=1)) as step:
        assert step.predict(np.ones((2, 4, 4, 2), np.float32)).shape == (2, 4, 4, 3)


def test_a_weight_has_one_name_in_all_graphs():
    image = Input((4, 4, 2))
    layer = Linear(2)
    Graph(image, layer(image))
    with pytest.raises(GpunetError, match=r"^linear2\.weight: in another graph it is linear1\.weight"):
        Graph(image, layer(Linear(32)(image)))


class Idle(Layer):
    """A layer with a weight that it does not use."""

    def setup(self, shape):
        self.parameters.setdefault("weight", Parameter((3,), constant(1)))
        return shape

    def forward(self, t, x):
        return x, None

    def backward(self, t, dy, saved):
        return dy


def test_a_weight_without_gradient_is_an_error():
    image = Input((1, 1, 4))
    with closing(Step(Graph(image, Linear(2)(Idle(name="idle")(image))), MeanSquaredError(), batch=2)) as step:
        assert step.predict(np.ones((2, 1, 1, 4), np.float32)).shape == (2, 2)
        with pytest.raises(GpunetError, match=r"^idle\.weight: a trainable weight that no layer gives a gradient"):
            step.gradient(np.ones((2, 1, 1, 4)), np.ones((2, 2)))


def test_running_statistics_belong_to_one_call():
    """Two calls in a batch would blend the sum of their means into the running one."""
    image = Input((4, 4, 2))
    norm = BatchNorm(name="norm")
    step = Step(Graph(image, Linear(2)(norm(ReLU()(norm(image))))), MeanSquaredError(), SGD(0.1), batch=2)
    with closing(step), pytest.raises(GpunetError, match="^norm@2: expected one call of a layer with running"):
        step.gradient(np.ones((2, 4, 4, 2)), np.ones((2, 2)))
