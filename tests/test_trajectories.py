"""Whole trainings on the emulator against NumPy: the kernels' text, launches, products and the program, all at once.

In double, because training in single precision is chaotic; in the other types over three steps.
"""

import platform
import re
import shutil
from contextlib import closing

import numpy as np
import pytest

from gpunet import data
from gpunet.backends.emulator import Backend
from gpunet.backends.numpy import Backend as NumPy
from gpunet.core.source import Source
from gpunet.core.step import METRICS, Step
from gpunet.errors import GpunetError
from gpunet.models.resnet import resnet
from gpunet.nn import (
    AvgPool,
    BatchNorm,
    BatchNormAddReLU,
    Conv2d,
    Dropout,
    GlobalAvgPool,
    Graph,
    Input,
    Linear,
    MaxPool,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
)  # fmt: skip
from gpunet.optim.sgd import SGD
from gpunet.testing.tolerance import assert_close
from gpunet.train import Trainer, parse_config
from gpunet.train.checkpoint import Checkpoint
from gpunet.train.predictor import Predictor
from gpunet.train.summary import Plan
from gpunet.train.text import size

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.skipif(not shutil.which("g++"), reason="the emulator: there is no g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator's fibers are x86-64"),
]

SHAPE, CLASSES, BATCH = (8, 8, 3), 5, 16
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (54, *SHAPE), np.uint8)  # three batches and a tail of 6
LABELS = RNG.integers(0, CLASSES, len(IMAGES)).astype(np.int32)


def small():
    """Every kind of launch: fused and plain normalisation, both poolings, groups, dropout."""
    image = Input(SHAPE)
    first = Conv2d(8, 3, bias=False), BatchNorm(), ReLU(), MaxPool(2)
    second = Conv2d(12, 3, groups=2), BatchNorm(), AvgPool(3, 1, 1), ReLU(), Dropout(0.2)
    return Graph(image, Sequential(*first, *second, Conv2d(6, 1, 2, 0), GlobalAvgPool(), Linear(CLASSES))(image))


def source(name="train", n=None, images=IMAGES, **options):
    options = {"flip": True, "pad": 1, "smoothing": 0.1} | options
    return Source(data.Split(images[:n], LABELS[:n]), 120.0, 1 / 60, classes=CLASSES, name=name, **options)


def step_of(backend, graph=None, dtype="float64", replicas=1, given=None):
    optimizer = SGD(0.05, 0.9, 5e-4, nesterov=True, clip=2.0)
    return Step(graph or small(), SoftmaxCrossEntropy(), optimizer, batch=BATCH, dtype=dtype, backend=backend,
                replicas=replicas, source=given or source(), rates=np.linspace(0.05, 0.01, 20))  # fmt: skip


def everything(step):
    """Return {what: array} of all that training leaves."""
    kinds = {"weight": step.weights, "statistic": step.statistics, **step.optimizer_state}
    found = {f"{kind} {name}": value for kind, tensors in kinds.items() for name, value in tensors.items()}
    return {**found, "metrics": step.metrics(), "state": step.state}


def trained(backend, calls, graph=None, dtype="float64", replicas=1, **arguments):
    """Return what so many calls of a step leave, and what is predicted and measured then."""
    with closing(step_of(backend, graph, dtype, replicas)) as step:
        for _ in range(calls):
            step(**arguments)
        found = everything(step)
        pixels = IMAGES[:21, ..., :3]
        found |= {"prediction": step.predict(pixels), "prediction of floats": step.predict(pixels / 128.0 - 1)}
        for other in (source("other", 37, order="stored"), step.source):
            found |= {f"{other.name} {what}": value for what, value in step.evaluate(other).items()}
        step()  # measuring has changed nothing
        step.wait()
        return {**found, "metrics after": step.metrics()}


def assert_agree(got, expected, dtype="float64", bound=1e-9):
    """In double to 1e-9; else by the rule for values of a type."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if dtype == "float64" and name != "state":
            np.testing.assert_allclose(got[name], value, rtol=bound, atol=bound, err_msg=name)
        elif name != "state" or dtype == "float64":
            assert_close(name, got[name], value, dtype)
        else:  # its scales are products of powers of two and sums in double
            for field in ("batch", "update", "halt", "epoch", "count", "apply", "good", "loss_scale"):
                assert got[name][field] == value[field], field


def assert_same(got, expected):
    """Bit for bit."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert np.asarray(got[name]).tobytes() == np.asarray(value).tobytes(), name


@pytest.mark.parametrize("replicas", [1, 3])
def test_twenty_steps_in_double(replicas):
    """Five epochs, each with a tail, whose six images are two a replica."""
    expected = trained(NumPy(), 20, replicas=replicas)
    assert expected["state"]["epoch"] == 5 and (expected["metrics"][:, 2] == [16, 16, 16, 6] * 5).all()
    losses = expected["metrics"][:, 0]
    assert losses[-4:].mean() < losses[:4].mean() and np.ptp(expected["prediction"]) > 0.1, "it learns"
    assert (expected["metrics"][:, METRICS.index("norm")] > 0.05).all()
    assert_agree(trained(Backend("mixed"), 20, replicas=replicas), expected)


@pytest.mark.parametrize(("dtype", "replicas"), [("float32", 1), ("float32", 3), ("float16", 1), ("bfloat16", 3)])
def test_three_steps_in_single_and_half(dtype, replicas):
    expected = trained(NumPy(), 3, dtype=dtype, replicas=replicas)
    assert len(expected["metrics"]) == 3
    assert_agree(trained(Backend("backward"), 3, dtype=dtype, replicas=replicas), expected, dtype)


def test_a_residual_network_in_double():
    """The ends of its blocks are one layer here and three for NumPy without numba."""
    graph = resnet(SHAPE, CLASSES, depth=8, widths=(4, 6, 8))
    with closing(step_of(Backend(), graph)) as step:
        assert sum(isinstance(node.layer, BatchNormAddReLU) for node in step.graph.nodes) == 3
    assert not NumPy(numba=False).fuses
    expected = trained(NumPy(numba=False), 5, graph)
    assert_agree(trained(Backend(), 5, graph), expected)
    assert_agree(trained(NumPy(), 5, graph), expected)


@pytest.mark.parametrize("replicas", [1, 2])
def test_accumulated_batches_in_double(replicas):
    expected = trained(NumPy(), 4, accumulate=2, replicas=replicas)
    assert (expected["metrics"][:, METRICS.index("count")] == [32, 22, 32, 22]).all()
    assert_agree(trained(Backend(), 4, accumulate=2, replicas=replicas), expected)


@pytest.mark.parametrize(
    ("make", "accumulate"), [(NumPy, 1), (NumPy, 2), (Backend, 2)], ids=["numpy-1", "numpy-2", "emulator-2"]
)
def test_three_steps_in_one_call_are_three_calls(make, accumulate):
    """Bit for bit, across the ends of epochs."""
    expected = trained(make(), 6, dtype="float32", accumulate=accumulate)
    assert_same(trained(make(), 2, dtype="float32", accumulate=accumulate, steps=3), expected)


def test_a_gradient_that_is_not_finite_halts():
    """And no later step changes anything but the count of batches."""
    images = (IMAGES / 255).astype(np.float32)
    images[7, 2, 3, 1] = np.nan
    left = []
    for backend in (NumPy(), Backend()):
        with closing(step_of(backend, given=source(images=images, order="stored"))) as step:
            state = step.state
            state["batch"] = 1
            step.state = state
            step(steps=3)  # the rest of the first epoch has no such image
            assert not step.halted and step.state["update"] == 3
            before = everything(step)
            for _ in range(3):
                step()
                state = step.state
                assert step.halted and (state["halt"], state["update"], state["apply"]) == (4, 3, 0)
            assert state["batch"] == 7
            after = everything(step)
            assert [name for name in after if after[name].tobytes() != before[name].tobytes()] == ["state"]
            assert all(np.isfinite(value).all() for name, value in after.items() if name != "state")
            left.append({name: value for name, value in after.items() if name != "state"})
    assert_agree(left[1], left[0])


# From a recipe


@pytest.fixture
def config(tmp_path):
    """A recipe that runs in tmp_path; sections given replace entries."""

    def make(**sections):
        table = {
            "model": {"name": "resnet9", "widths": [4, 4, 4, 4]},
            "data": {"name": "shapes", "train": 46, "test": 20},
            "augment": {"flip": True, "crop": 2},
            "optimizer": {"lr": 0.05, "nesterov": True},
            "train": {"epochs": 1, "batch": 16, "backend": "emulator", "dtype": "float64", "replicas": 1},
            "run": {"directory": str(tmp_path / "runs"), "name": "try"},
        }
        return parse_config({name: table.get(name, {}) | sections.get(name, {}) for name in {**table, **sections}})

    return make


def test_a_recipe_trains_on_the_emulator_and_numpy_evaluates_what_it_leaves(config):
    trainer = Trainer(config(), show=False)
    result = trainer.fit()
    assert (result.status, result.updates, trainer.step.backend.name) == ("finished", 3, "emulator")
    names = {path.name for path in result.run.path.iterdir()}
    assert names >= {"config.toml", "metrics.jsonl", "last.safetensors", "report.md"}
    assert "emulator, float64" in (result.run.path / "report.md").read_text()
    rows = [row for row in result.run.metrics() if row["split"] == "train"]
    assert [row["count"] for row in rows] == [16, 16, 9] and all(np.isfinite(row["loss"]) for row in rows)
    found = Predictor.load(Checkpoint.load(result.run.path / "last.safetensors"), "numpy").evaluate(trainer.data)
    assert found.count == result.test.count == 20
    assert found.loss == pytest.approx(result.test.loss, rel=1e-9)
    np.testing.assert_array_equal(found.confusion, result.test.confusion)


# Whether it fits


class Small(Backend):
    """An emulator with so much free memory, which must not be touched."""

    def __init__(self, free, total=1 << 34):
        super().__init__()
        self.has = free, total

    def memory(self):
        return self.has

    def holders(self):
        return "memory is held by python (77) 900 MiB"

    def malloc(self, nbytes):
        raise AssertionError(f"{nbytes} bytes were allocated")


def plan_of(config, free=0, **train):
    """Return the Plan of a recipe with other settings in [train]."""
    config = config.model_copy(deep=True)
    for name, value in train.items():
        setattr(config.train, name, value)
    return Plan(config, Small(free))


def needed(config, **train):
    return sum(plan_of(config, **train).memory().values())


REFUSED = (
    r"backend emulator: batch 16 needs (?P<needed>.*), but (?P<free>.*) of 16 GiB are free; "
    r"(?:a batch of (?P<batch>\d+) fits: --set train\.batch=(?P<set>\d+)|(?P<none>no batch fits))"
    r"(?:, or all images but (?P<held>[\d,]+) of a split stay on the host: --set train\.window=(?P<window>\d+))?; "
    r"its largest tensors: (?P<largest>.*); memory is held by python \(77\) 900 MiB"
)


def refused(plan):
    """Return what a plan's refusal says."""
    with pytest.raises(GpunetError) as error:
        plan.check()
    found = re.fullmatch(REFUSED, str(error.value))
    assert found, error.value
    return found


@pytest.fixture
def large(config):
    """A recipe whose images and activations are some MiB each."""
    return config(data={"train": 400, "test": 50})


def test_a_plan_that_fits_to_the_byte_is_right(large):
    most = needed(large)
    plan_of(large, most).check()
    assert refused(plan_of(large, most - 1))["batch"] == "15"
    assert needed(large, batch=15) < most


@pytest.mark.parametrize("batch", [1, 8, 11])
def test_what_does_not_fit_is_told_with_the_batch_that_does(large, batch):
    free = needed(large, batch=batch)
    found = refused(plan_of(large, free))
    assert (found["batch"], found["set"]) == (str(batch), str(batch))
    assert (found["needed"], found["free"]) == (size(needed(large)), size(free))
    plan_of(large, free, batch=batch).check()
    with pytest.raises(GpunetError, match=f"batch {batch + 1} needs"):
        plan_of(large, free, batch=batch + 1).check()
    layers = re.findall(r"([\w.]+) [\d.]+ MiB", found["largest"])
    assert len(layers) == 5 and set(layers) <= {row.path for row in plan_of(large).graph.summary()}
    assert layers[0] == "stage1.conv.conv", "its unfolded input is four times that of the stem"


def test_no_batch_fits(large):
    found = refused(plan_of(large, needed(large, batch=1) - 1))
    assert found["none"] and found["batch"] is None
    assert refused(plan_of(large, 0))["none"]


def test_the_window_that_is_offered_fits(large):
    """Where the images are what is too large."""
    free = needed(large) - plan_of(large).memory()["images"] // 2
    found = refused(plan_of(large, free))
    window = int(found["window"])
    assert found["held"] == f"{window:,}" and window >= 2 * 16
    plan_of(large, free, window=window).check()
    assert needed(large, window=window) <= free


def test_a_trainer_checks_before_it_allocates(config, monkeypatch):
    """The data set is there by then, the device is not touched."""
    monkeypatch.setattr(Backend, "memory", Small.memory)
    monkeypatch.setattr(Backend, "holders", Small.holders)
    monkeypatch.setattr(Backend, "malloc", Small.malloc)
    monkeypatch.setattr(Backend, "has", (1 << 20, 1 << 34), raising=False)
    with pytest.raises(GpunetError, match="^backend emulator: batch 16 needs .* but 1 MiB of 16 GiB are free; "):
        Trainer(config(), show=False)
