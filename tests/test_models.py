"""Networks by name: sizes known from elsewhere, and four steps of SGD equal PyTorch's in float64."""

from contextlib import closing

import numpy as np
import pytest
from golden.make_golden import BATCH, FOLDER, NETS, SGD, STEPS, batch_of, fingerprint, plain, starting
from golden.make_kinds import NETS as OTHERS

from gpunet import models, optim
from gpunet.backends.numpy import Backend
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import SoftmaxCrossEntropy

TOLERANCE = 1e-10  # of the largest value in a tensor
VARIANTS = [("blocked", True, 1), ("unfold", False, 1), ("blocked", True, 2), ("unfold", True, 3)]


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "nets.npz") as file, np.load(FOLDER / "kinds.npz") as others:
        return {**file, **others}


def close(got, expected, where):
    error, allowed = np.abs(got - expected).max(), TOLERANCE * np.abs(expected).max()
    assert error <= allowed, f"{where}: largest error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize(("engine", "fast", "replicas"), VARIANTS)
@pytest.mark.parametrize("name", NETS | OTHERS)
def test_four_steps_equal_pytorch(name, engine, fast, replicas, golden):
    net, backend = (NETS | OTHERS)[name], Backend(fast=fast)
    backend.engine = lambda types: engine
    step = Step(net.graph(), SoftmaxCrossEntropy(), optim.SGD(net.lr, **SGD), batch=BATCH, dtype="float64",
                backend=backend, replicas=replicas)  # fmt: skip
    with closing(step):
        for tensors in (step.weights, step.statistics):
            for key, value in tensors.items():
                tensors[key] = starting(key, value.shape)
        for number in range(STEPS):
            step.gradient(*batch_of(name, number % 2, net.shape))
            close(step.losses()["loss"], golden[f"{name}/losses"][number], f"loss of step {number}")
            step.update()
        close(step.metrics()[:, 0], golden[f"{name}/losses"], "the table of metrics")
        for tensors in (step.weights, step.statistics):
            for key, value in tensors.items():
                close(fingerprint(value), golden[f"{name}/{plain(key)}"], key)


SIZES = {  # trainable weights, as published or as others' programs count them
    "lenet": 62_006,
    "cifar10_quick": 145_578,
    "resnet9": 6_573_130,
    "resnet20": 272_474,
    "vgg": 9_228_362,
    "mlp": 3072 * 256 + 256 + 2570,
    "nin": 966_986,
    "airbench94": 1_971_640,  # of which 288 are frozen
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    graph = models.build(name)
    assert graph.size == SIZES[name]
    assert sum(row.parameters for row in graph.summary()) == SIZES[name]
    assert graph.output_shape == (10,)


def test_flops_of_resnet20():
    """He et al. count multiplications, one for two of our operations: about 41 million."""
    flops = sum(row.flops for row in models.build("resnet20").summary() if row.kind in ("Conv2d", "Linear"))
    assert flops / 2 == pytest.approx(41e6, rel=0.02)


def test_flops_of_airbench94():
    """0.236 GFLOP an image, a multiplication and an addition a product."""
    flops = sum(row.flops for row in models.build("airbench94").summary() if row.kind in ("Conv2d", "Linear"))
    assert flops == pytest.approx(0.236e9, rel=2e-3)


@pytest.mark.parametrize("name", ["nin", "airbench94"])
def test_a_step_of_three_replicas_in_half_precision_after_fusing(name):
    """All weights but the frozen ones move, and stay finite."""
    arguments = {"airbench94": {"widths": (8, 8, 8)}}.get(name, {})
    graph = models.build(name, (26, 26, 3), 4, **arguments).fused()
    rng = np.random.default_rng(0)
    with closing(Step(graph, SoftmaxCrossEntropy(), optim.SGD(0.1), batch=5, dtype="float16", replicas=3)) as step:
        before = dict(step.weights.items())
        while step.state["update"] < 1:  # the loss scale is found
            step.gradient(rng.normal(size=(5, 26, 26, 3)), rng.integers(0, 4, 5))
            step.update()
        for key, value in step.weights.items():
            assert np.isfinite(value).all(), key
            assert (value == before[key]).all() == (key == "whiten.weight"), key
        assert step.losses()["count"] == 5


def test_the_initial_values_of_airbench94_are_arguments():
    inits = {"init": ["constant", 2], "whitening_init": ["constant", 3]}
    graph = models.build("airbench94", widths=(8, 8, 8), **inits)
    with closing(Step(graph, batch=1, replicas=1)) as step:
        assert (step.weights["whiten.weight"] == 3).all()
        assert (step.weights["group2.conv1.weight"] == 2).all()
        assert (step.weights["whiten.bias"] == 0).all()
    with pytest.raises(GpunetError, match="airbench94: widths: expected 3, got"):
        models.build("airbench94", widths=(3, 4))


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_traces_other_shapes(name):
    """Memory is planned, nothing is computed."""
    arguments = {"layers": [{"layer": "Linear"}]} if name == "layers" else {}
    graph = models.build(name, (33, 40, 1), 7, **arguments)
    assert graph.output_shape == (7,)
    assert Step(graph, batch=3, replicas=1).memory()["scratch"] > 0


def test_unknown_names_are_refused_with_a_hint():
    with pytest.raises(GpunetError, match="model: unknown name 'resnet8'; did you mean 'resnet"):
        models.build("resnet8")
    with pytest.raises(GpunetError, match="model resnet9: unknown argument 'width'; known: widths"):
        models.build("resnet9", width=3)
    with pytest.raises(GpunetError, match="resnet9: widths: expected 4, got"):
        models.build("resnet9", widths=(3, 4))
    with pytest.raises(GpunetError, match="vgg: depth: expected one of 11, 13, 16, 19, got 12"):
        models.build("vgg", depth=12)
