"""A network of activations, norms, pools and dropouts: trained, fused, in replicas, on the emulator, planned."""

from contextlib import closing

import numpy as np
import pytest

from gpunet import nn
from gpunet.backends import problem
from gpunet.core.observe import CheckFinite, Poison
from gpunet.core.source import Source
from gpunet.core.step import Step
from gpunet.data import Split
from gpunet.optim.sgd import SGD
from gpunet.testing import check_gradients
from gpunet.train import parse_config
from gpunet.train.summary import Plan


def network(shape=(9, 7, 4), outputs=5):
    """A network of all of them."""
    image = nn.Input(shape)
    stem = nn.Sequential(nn.Conv2d(8, 3), nn.BatchNorm(), nn.ReLU(), name="stem")
    left = nn.Sequential(nn.Conv2d(16, 3), nn.GroupNorm(4), nn.Maxout(2), nn.Dropout2d(0.2, "plain"))
    right = nn.Sequential(nn.Conv2d(8, 3), nn.LayerNorm(), nn.PReLU(), nn.Hardswish(), nn.LayerNorm("image"))
    x = stem(image)
    x = nn.Add()(left(x), right(x), nn.Softmax()(x))
    x = nn.Sequential(nn.StochasticPool(3, 2, 1, ceil=True), nn.ELU(), nn.Dropout(0.1, "plain"), nn.Softplus())(x)
    x = nn.Sequential(nn.DropConnect(12, 0.2), nn.DropConnect(12, 0.2, "batch"), nn.Linear(outputs))(x)
    return nn.Graph(image, x)


def step_of(graph, **options):
    """A Step on twelve images of three classes that differ in brightness."""
    labels = np.arange(12, dtype=np.int32) % 3
    pixels = np.random.default_rng(0).normal(0, 1, (12, 9, 7, 4)) + labels[:, None, None, None]
    source = Source(Split(pixels.astype(np.float32), labels), classes=3)
    return Step(graph, nn.SoftmaxCrossEntropy(), SGD(0.03, momentum=0.8), batch=6, source=source, seed=3, **options)


def losses_of(step, steps):
    losses = []
    for _ in range(steps):
        step()
        losses.append(step.losses()["loss"])
    return losses


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_it_trains_in_replicas_and_fused(dtype):
    """One replica, three, and three of the fused graph: the same losses, and they fall."""
    found = []
    for replicas, fused in ((1, False), (3, False), (3, True)):
        graph = network(outputs=3)
        with closing(step_of(graph.fused() if fused else graph, dtype=dtype, replicas=replicas)) as step:
            losses = losses_of(step, 100)
            assert np.isfinite(losses).all()
            assert np.mean(losses[-20:]) < np.mean(losses[:20]) * 0.7, losses
            assert step.evaluate(step.source)["count"] == 12
            found.append(losses)
    if dtype == "float64":
        for losses in found[1:]:
            np.testing.assert_allclose(losses[:20], found[0][:20], rtol=1e-9)
    else:
        for losses in found[1:]:
            np.testing.assert_allclose(losses[:2], found[0][:2], rtol=1e-4 if dtype == "float32" else 0.05)


def test_it_has_a_plan_and_a_summary():
    config = parse_config({
        "model": {"name": "lenet"}, "data": {"name": "shapes", "train": 60, "test": 20},
        "optimizer": {"lr": 0.1}, "train": {"batch": 10, "replicas": 3},
    })  # fmt: skip
    graph = network((32, 32, 3), 10)
    plan = Plan(config, graph=graph)
    assert plan.memory()["activations"] > 0
    assert plan.fusions() == ["stem.batchnorm1 + stem.relu1 -> BatchNormReLU"]
    lines = str(plan).splitlines()
    for node in graph.nodes:
        (line,) = (line for line in lines if line.startswith(f"{node.path} "))
        assert type(node.layer).__name__ in line
    rows = {row.kind: row for row in graph.summary()}
    assert rows["PReLU"].parameters == 8
    assert rows["GroupNorm"].parameters == 32
    assert rows["DropConnect"].flops == 2 * 12 * 12


@pytest.mark.skipif(bool(problem("emulator")), reason="no emulator here")
def test_the_emulator_trains_as_numpy_does():
    found = []
    for backend in ("numpy", "emulator"):
        with closing(step_of(network(outputs=3), dtype="float64", backend=backend, replicas=1)) as step:
            found.append((losses_of(step, 5), step.predict(np.ones((3, 9, 7, 4)))))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-9)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-8)


@pytest.mark.parametrize("replicas", [1, 3])
def test_nothing_reads_what_was_never_written(replicas):
    check = CheckFinite()
    with closing(step_of(network(outputs=3), replicas=replicas)) as step:
        with step.observed(Poison(), check):
            losses_of(step, 3)
            step.predict(np.ones((3, 9, 7, 4)))
        assert check.fault is None


@pytest.mark.parametrize("replicas", [1, 2])
def test_against_differences(replicas):
    assert check_gradients(network((5, 4, 2), 3), samples=4, replicas=replicas) < 1e-6
