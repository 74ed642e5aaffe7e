"""Networks by name: sizes known from elsewhere, and four steps of SGD equal PyTorch's in float64."""

from contextlib import closing

import numpy as np
import pytest
from golden.make_golden import BATCH, FOLDER, NETS, SGD, STEPS, batch_of, fingerprint, plain, starting

from gpunet import models, optim
from gpunet.backends.numpy import Backend
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import SoftmaxCrossEntropy

TOLERANCE = 1e-10  # of the largest value in a tensor
VARIANTS = [("blocked", True, 1), ("unfold", False, 1), ("blocked", True, 2), ("unfold", True, 3)]


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "nets.npz") as file:
        return dict(file)


def close(got, expected, where):
    error, allowed = np.abs(got - expected).max(), TOLERANCE * np.abs(expected).max()
    assert error <= allowed, f"{where}: largest error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize(("engine", "fast", "replicas"), VARIANTS)
@pytest.mark.parametrize("name", NETS)
def test_four_steps_equal_pytorch(name, engine, fast, replicas, golden):
    net, backend = NETS[name], Backend(fast=fast)
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
