"""A value that is not finite: found where it begins, told with all that is known, and never on the disk."""

import json
import re
from contextlib import closing

import ml_dtypes
import numpy as np
import pytest
from test_step import batch_of, network, source, step_of, zoo
from test_train import easy

from gpunet import data
from gpunet.backends import problem
from gpunet.backends.numpy import Backend
from gpunet.core.observe import CheckFinite, Observer, Poison, unfinite
from gpunet.core.step import Step
from gpunet.core.trace import Base, Tensor
from gpunet.errors import GpunetError
from gpunet.nn import Conv2d, Dropout, Flatten, Graph, Input, Linear, ReLU, Sequential, SoftmaxCrossEntropy
from gpunet.optim.sgd import SGD
from gpunet.train import Trainer, parse_config
from gpunet.train.checkpoint import Checkpoint
from gpunet.train.fault import not_finite

pytestmark = pytest.mark.usefixtures("no_pictures")
skipped = pytest.mark.skipif(bool(problem("emulator")), reason="no emulator here")
emulated = pytest.param("emulator", marks=skipped)


@pytest.fixture
def config(tmp_path):
    """Make a config of a small network with convolutions; sections given replace entries."""

    def make(**sections):
        table = {
            "model": {"name": "resnet9", "widths": [4, 4, 4, 4]},
            "data": {"name": "shapes"},
            "optimizer": {"lr": 0.01},
            "train": {"epochs": 3, "batch": 20, "replicas": 2},
            "run": {"directory": str(tmp_path / "runs"), "name": "try"},
        }
        return parse_config({name: table.get(name, {}) | sections.get(name, {}) for name in {**table, **sections}})

    return make


def spoil(step, name, place=5, value=np.inf):
    weight = step.weights[name]
    weight.flat[place] = value
    step.weights[name] = weight


# Observers


class Seen(Observer):
    """Notes what it is called with."""

    def __init__(self):
        self.calls, self.runs = [], []

    def begin(self, replay, keys):
        self.runs.append([key[0] for key in keys])

    def before(self, key, entry, replica):
        self.calls.append(("before", key[0], entry, replica))

    def after(self, key, entry, outputs, replica):
        assert all(output.array().shape == output.shape for output in outputs)
        assert all(output.array().dtype == output.dtype for output in outputs)
        self.calls.append(("after", key[0], entry, replica))


@pytest.mark.parametrize("backend", ["numpy", emulated])
def test_an_observer_sees_every_entry_once_in_order(backend):
    seen = Seen()
    with closing(step_of(zoo((6, 7, 2)), source=source(), backend=backend)) as step:
        step()
        with step.observed(seen):
            step()
        step()
        assert seen.runs == [["gradient", "update", "advance"]]
        programs = [step._replay.program(key)[0] for key in (("gradient", 6, False, False), ("update",))]
        expected = [entry for program in programs for entry in program.plan.entries]
        assert [call[2] for call in seen.calls[::2]][: len(expected)] == expected
        assert [call[0] for call in seen.calls] == ["before", "after"] * (len(seen.calls) // 2)
        assert [call[2] for call in seen.calls[::2]] == [call[2] for call in seen.calls[1::2]]


def test_observers_see_every_replica_and_change_no_bit():
    seen = Seen()
    steps = [step_of(zoo((6, 7, 2)), source=source(), replicas=3) for _ in range(2)]
    with closing(steps[0]) as plain, closing(steps[1]) as step:
        with step.observed(seen, CheckFinite()), step.observed(Poison()):
            for _ in range(4):
                step()
        for _ in range(4):
            plain()
        assert {call[3] for call in seen.calls} == {0, 1, 2}
        for name, weight in plain.weights.items():
            np.testing.assert_array_equal(step.weights[name], weight)
        calls = len(seen.calls)
        step()
        assert len(seen.calls) == calls, "it looks on after the with block"


def test_a_normal_replay_makes_the_calls_that_were_bound_and_no_others():
    with closing(step_of(source=source())) as step:
        step()
        step._replay._outputs = step._replay._around = None  # would fail
        lists = []
        run = step._replay._team.run
        step._replay._team.run = lambda given: lists.append(given) or run(given)
        step()
        bound = [step._replay._bound[key][0] for key in (("gradient", 6, False, False), ("update",))]
        assert lists[0][0][: len(bound[0].calls)] == bound[0].calls


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("engine", ["blocked", "unfold"])
def test_a_healthy_network_is_finite_everywhere_from_poisoned_memory(engine, replicas, monkeypatch):
    """So what an entry leaves unwritten in an output is never read, and no fault is told where there is none."""
    check = CheckFinite()
    with closing(step_of(zoo((6, 7, 2)), source=source(), replicas=replicas)) as step:
        monkeypatch.setattr(step.backend, "engine", lambda types: engine)
        with step.observed(Poison(), check):
            for _ in range(4):
                step()
            step.predict(batch_of()[0])
        assert check.fault is None


class Graphs(Backend):
    """A NumPy backend that captures lists as a GPU does, and waits where it is told to."""

    graphs, fuses = True, False

    def __init__(self):
        super().__init__()
        self.done = []

    def capture(self, calls):
        def launch():
            self.done.append("graph")
            for call in calls:
                call()

        return launch

    def synchronize(self):
        self.done.append("wait")


def test_under_observers_a_graph_is_neither_captured_nor_launched():
    backend, seen = Graphs(), Seen()
    with closing(step_of(source=source(12), backend=backend)) as step, closing(step_of(source=source(12))) as plain:
        for _ in range(3):
            step()
        backend.done.clear()
        with step.observed(seen):
            step()
        assert backend.done == ["wait"] * (1 + len(seen.calls) // 2)  # before all, and after each entry
        backend.done.clear()
        step.again(0, 2)  # no observer: as ever
        step()
        assert backend.done.count("graph") >= 1
        for _ in range(5):
            plain()
        for name, weight in plain.weights.items():
            np.testing.assert_array_equal(step.weights[name], weight)


class Scratch(Observer):
    """Notes what the scratch memory reads as before anything runs."""

    def begin(self, replay, keys):
        tensor = Tensor(Base(64), (64,), np.dtype(np.uint8))
        self.found = [replay.backend.download(replay.backend.view(m, 0, tensor)) for m in replay._scratch]


@pytest.mark.parametrize(
    ("backend", "replicas"), [("numpy", 1), ("numpy", 3), pytest.param("emulator", 1, marks=skipped)]
)
def test_poison_is_nan_of_every_type(backend, replicas):
    scratch = Scratch()
    with closing(step_of(zoo((6, 7, 2)), backend=backend, replicas=replicas)) as step:
        with step.observed(Poison(), scratch):
            step.gradient(*batch_of())
        assert len(scratch.found) == replicas
        for memory in scratch.found:
            for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
                assert np.isnan(memory.view(dtype).astype(np.float64)).all()


class Products(Observer):
    """Keeps what the products of a layer wrote."""

    def __init__(self, path):
        self.path, self.found = path, []

    def after(self, key, entry, outputs, replica):
        if entry.path == self.path and entry.name == "matmul":
            self.found += [output.array().copy() for output in outputs]


@pytest.mark.parametrize("backend", ["numpy", emulated])
def test_an_output_of_strided_parts_is_read_as_it_is(backend):
    """The products of a grouped convolution write columns of y, each group its own."""
    conv = Conv2d(6, 3, groups=2, bias=False, name="conv")  # behind another, so that it begins somewhere in its arena
    graph = network(Conv2d(4, 1, name="first"), conv, Linear(3, name="fc"))
    products = Products("net.conv")
    with closing(step_of(graph, backend=backend, keep=("net.conv:output",))) as step:
        with step.observed(products):
            step.gradient(*batch_of())
        y = step.read("net.conv:output")
        forward, *weights = products.found
        np.testing.assert_array_equal(forward, y.reshape(-1, 2, 3).swapaxes(0, 1))
        gradient = step.read("net.conv.weight:gradient")
        np.testing.assert_array_equal(weights[0], gradient.reshape(-1, 2, 3).swapaxes(0, 1))


# The first fault


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_first_fault_has_a_name(replicas, backend="numpy", kernel="blocked_forward", argument="out"):
    x, y = batch_of()
    check, again = CheckFinite(), CheckFinite()
    with closing(step_of(network(), backend=backend, replicas=replicas)) as step:
        with step.observed(check):
            step.gradient(x, y)
        assert check.fault is None
        spoil(step, "net.fc.weight")
        with step.observed(again):
            step.gradient(x, y)
        fault = again.fault
        assert (fault.path, fault.phase, fault.replica, fault.run) == ("net.fc", "forward", 0, 0)
        assert fault.nan + fault.inf and str(fault).startswith("net.fc: forward: ")
    x[4, 1, 2, 0] = np.nan
    with closing(step_of(network(), backend=backend, replicas=replicas)) as step:
        check = CheckFinite()
        with step.observed(check):
            step.gradient(x, y)
        fault = check.fault
        assert (fault.path, fault.kernel, fault.argument) == ("net.conv", kernel, argument)
        if kernel == "blocked_forward":
            assert (fault.replica, fault.index) == ((0, (4, 0, 1, 0)) if replicas == 1 else (1, (1, 0, 1, 0)))
            assert (fault.nan, fault.inf) == (9 * 4, 0)  # the pixel's neighbours, all channels
            assert "blocked_forward: out: 36 of" in str(fault) and "(36 NaN)" in str(fault)


@skipped
def test_the_first_fault_has_a_name_on_the_emulator():
    test_the_first_fault_has_a_name(1, "emulator", "unfold", "columns")


def test_a_fault_in_backward_is_told_from_one_in_forward():
    """An activation that underflows the other way: finite forward, too large a gradient."""
    graph = network(Linear(4, name="a"), Linear(3, name="b"))
    x, y = batch_of()
    with closing(step_of(graph, dtype="float32")) as step:
        for name in ("net.a.weight", "net.b.weight"):
            weight = np.zeros_like(step.weights[name])
            step.weights[name] = weight
        step.weights["net.b.weight"] = np.full((4, 3), [1e38, -1e38, 1e38], np.float32)
        step.weights["net.a.bias"] = np.zeros(4, np.float32)
        check = CheckFinite()
        with step.observed(check):
            step.gradient(x * 1e10, y)
        assert (check.fault.path, check.fault.phase, check.fault.kernel) == ("net.a", "backward", "matmul")
        assert check.fault.shape == (1, *step.weights["net.a.weight"].shape) or check.fault.shape[-1] == 4


def test_the_earliest_fault_of_all_replicas_counts():
    x, y = batch_of(6)
    x[5] = np.inf  # the last replica's, in its first layer
    with closing(step_of(network(), replicas=3)) as step:
        for _ in range(5):  # whichever thread is faster
            check = CheckFinite()
            with step.observed(check):
                step.gradient(x, y)
            assert (check.fault.replica, check.fault.path) == (2, "net.conv")


def test_what_counts_as_not_finite():
    assert unfinite(np.arange(3)) is None
    assert unfinite(np.array([[1.0, 2], [np.inf, np.nan]], np.float16)) == (1, 1, (1, 0))
    assert unfinite(np.array([1.0, np.nan], ml_dtypes.bfloat16)) == (1, 0, (1,))
    assert unfinite(np.array(np.inf)) == (0, 1, ())
    assert not_finite({"a": np.ones(2)}, {"m": np.array([np.nan])}, {"v": {"a": np.ones(1)}}) == {
        "statistics m": (1, 0, (0,))
    }


def test_again_is_that_batch_and_puts_all_back():
    """Order, crops and dropout of a batch some epochs ago, with accumulation; what follows is as if nothing was."""
    graph = network(Dropout(0.5, name="drop"), Conv2d(3, 3, name="conv"), Flatten(), Linear(3, name="fc"))
    steps = [step_of(graph, source=source(), replicas=2) for _ in range(2)]
    with closing(steps[0]) as step, closing(steps[1]) as plain:
        expected = {}
        for number in range(7):
            for s in steps:
                s.gradient(accumulate=number % 2 == 1)
            expected[number] = step.read("net.conv.weight:gradient")
            for s in steps:
                s.advance()
        state, metrics = step.state, step.metrics()
        for first, count in ((3, 1), (2, 2), (0, 2), (6, 1)):
            step.again(first, count)
            if first % 2 == 0:
                np.testing.assert_array_equal(step.read("net.conv.weight:gradient"), expected[first + count - 1])
        assert step.state == state
        np.testing.assert_array_equal(step.metrics(), metrics)
        for s in steps:
            s.gradient()
            s.update()
        for name, weight in plain.weights.items():
            np.testing.assert_array_equal(step.weights[name], weight)


# The report


def plain(config, **sections):
    """A config of a network without BatchNorm, which would hold the values down."""
    made = config(**sections)
    made.model = type(made.model)(name="mlp", hidden=[8])
    return made


def trained(config, dataset=None, at=None, name=None, value=np.inf):
    """Train, and set a weight before step `at`; return (the Trainer, what it said)."""
    trainer = Trainer(config, data=dataset or easy(side=8), show=False)
    original, calls = Step.__call__, []

    def step(self, *arguments):
        if len(calls) == at:
            spoil(self, name, value=value)
        calls.append(1)
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(GpunetError) as caught:
        patch.setattr(Step, "__call__", step)
        trainer.fit()
    return trainer, str(caught.value)


def checkpoints(tmp_path):
    (folder,) = (tmp_path / "runs").iterdir()
    return {file.name: Checkpoint.load(file) for file in folder.glob("*.safetensors")}


def assert_finite_on_disk(tmp_path):
    for name, found in checkpoints(tmp_path).items():
        assert not not_finite(found.weights, found.statistics, found.optimizer), name


@pytest.mark.parametrize(
    ("backend", "value"),
    [("numpy", np.inf), ("numpy", -np.inf), ("numpy", np.nan), pytest.param("emulator", np.inf, marks=emulated.marks)],
)
@pytest.mark.parametrize("layer", ["stem.conv", "stage2.conv.conv", "head"])
def test_a_planted_weight_is_reported_with_layer_and_step(layer, backend, value, config, tmp_path):
    made = config(train={"epochs": 3, "batch": 20, "backend": backend})
    trainer, said = trained(made, at=7, name=f"{layer}.weight", value=value)
    lines = said.split("\n  ")
    assert "loss or gradient is not finite in epoch 2, batch 3 of 5, at learning rate 0.01" in lines[0]
    assert "weights in memory are not finite and are not saved; the newest good ones are in best.safet" in lines[0]
    assert re.match(rf"first: {layer}: forward: \w+: out: [\d,]+ of [\d,]+ values are not finite \(", lines[1])
    assert "; epoch 2, batch 3" in lines[1]
    assert lines[2] == "at update 7: loss nan"
    before = r"finite before: update 6 \(epoch 2, batch 2\): loss \d\S*, gradient norm \d\S*, rate 0.01"
    assert re.match(before, lines[5])
    assert "images and targets: finite" in lines
    assert f"weights: not finite: {layer}.weight (1 of its values, the first at [" in said
    assert f"into {layer}.weight after update 6" in lines[-1]
    assert_finite_on_disk(tmp_path)
    assert "not written" not in (tmp_path / "runs").name
    assert trainer.step.state["halt"] == 7 and trainer.step.halted


def test_before_any_checkpoint_none_is_written(config, tmp_path):
    _, said = trained(config(), at=1, name="stem.conv.weight")
    assert "not saved; no checkpoint was written before" in said
    assert "finite before: update 0 (epoch 1, batch 1)" in said
    assert not checkpoints(tmp_path)


def test_in_half_precision_the_halvings_end_it_too(config, tmp_path):
    """float16 halves its loss scale ten times first; the update at which it began is told all the same."""
    made = config(train={"epochs": 9, "batch": 20, "dtype": "float16"})
    _, said = trained(made, at=7, name="stage2.conv.conv.weight")
    assert "and the smallest loss scale, 1; the weights in memory are not finite" in said
    assert "first: operands: forward: cast_forward: y: 1 of" in said
    assert "which is stage2.conv.conv.weight in float16" in said
    assert "at update 7: " in said and "finite before: update 6 (epoch 2, batch 2)" in said
    assert_finite_on_disk(tmp_path)


def test_weights_that_are_not_finite_at_the_end_are_an_error(config, tmp_path):
    """float16 may not have come down to a loss scale of 1 by then."""
    made = config(train={"epochs": 3, "batch": 20, "dtype": "float16"})
    _, said = trained(made, at=12, name="head.weight")
    assert "weights are not finite in epoch 3, batch 5 of 5, at learning rate 0.01 and loss scale" in said
    assert "weights: not finite: head.weight" in said
    assert_finite_on_disk(tmp_path)


def test_an_overflow_in_forward_keeps_the_weights_before_it(config, tmp_path):
    _, said = trained(config(optimizer={"lr": 1e30}))
    assert "in epoch 1, batch 2 of 5, at learning rate 1e+30; the weights before it are in last.safetensors" in said
    assert re.search(r"first: \S+: forward: ", said)
    assert re.search(r"weights: finite, the largest is \d\S*e\+\d\d in ", said)
    assert "Try a lower optimizer.lr (1e+29), schedule.warmup = 1 or optimizer.clip = 1" in said
    assert_finite_on_disk(tmp_path)
    assert checkpoints(tmp_path)["last.safetensors"].state["halt"] == 1


def test_clipping_that_is_there_is_lowered(config):
    _, said = trained(config(optimizer={"lr": 1e30, "clip": 2.0}))
    assert "or a lower optimizer.clip (0.2)" in said


def test_an_update_that_overflows_is_not_saved(config, tmp_path):
    """The gradient was finite, the new weights are not: halted one batch later, and the disk has the ones before."""
    settings = {"preprocess": {"mean": 0.0, "scale": 1.0}, "optimizer": {"lr": 1e38}, "run": {"checkpoint_steps": 1}}
    _, said = trained(plain(config, **settings))
    assert "weights in memory are not finite" in said and "or that itself overflowed" in said
    assert_finite_on_disk(tmp_path)


def broken_images(n=90, bad=17):
    """A data set of floats, one image of which is not finite."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(n, 8, 8, 3)).astype(np.float32)
    images[bad, 3, 4, 1] = np.nan
    labels = (np.arange(n) % 2).astype(np.int32)
    return data.DataSet("broken", ("a", "b"), data.Split(images, labels))


@pytest.mark.parametrize("order", ["shuffled", "stored"])
def test_an_image_that_is_not_finite_has_a_number(order, config):
    made = config(
        train={"epochs": 1, "batch": 20, "order": order, "accumulate": 2}, preprocess={"mean": 0.0, "scale": 1.0}
    )
    _, said = trained(made, broken_images())
    assert "first: batch: batch_crop_flip: x: 1 of 1,920 values are not finite (1 NaN)" in said
    assert "images and targets: image 17 of train (counted from 0) is not finite as the network gets it" in said
    assert "weights: finite" in said
    assert "Look at the data: gpunet data check" in said


def test_targets_that_are_not_finite(config):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(40, 2)).astype(np.float32)
    y[33, 1] = np.inf
    values = data.DataSet("values", (), data.Split(rng.normal(size=(40, 8, 8, 3)).astype(np.float32), values=y))
    made = config(loss={"name": "mse"}, preprocess={"mean": 0.0, "scale": 1.0})
    _, said = trained(made, values)
    assert "first: batch: batch_values: " in said
    assert "images and targets: target 33 of train" in said


def test_a_norm_that_rose_is_told(config):
    made = plain(config, optimizer={"lr": 50.0}, train={"epochs": 50, "batch": 20}, preprocess={"scale": 1.0})
    _, said = trained(made)
    assert re.search(r"The gradient's norm rose from \S+ to \S+: it diverged; try a lower optimizer.lr", said)


def test_what_is_not_found_again_is_told(config):
    """Somebody who heals the weight before one looks."""
    made, original = config(), Step.again

    def heal(self, *arguments):
        spoil(self, "head.weight", value=0.5)
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "again", heal)
        _, said = trained(made, at=3, name="head.weight")
    assert "first: nothing: computed once more, every output of the batch is finite" in said


def test_the_report_of_the_run_has_it(config, tmp_path):
    trained(config(), at=7, name="head.weight")
    (folder,) = (tmp_path / "runs").iterdir()
    assert "first: head: forward: " in (folder / "report.md").read_text()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if row["split"] == "train"]) == 7


def test_validation_of_nan_is_never_the_best(config, tmp_path):
    """A weight broken after an epoch's last step: what is measured then is not kept, and the next batch reports it."""
    trainer = Trainer(config(), data=easy(side=8), show=False)
    original, calls = Step.evaluate, []

    def evaluate(self, source):
        calls.append(1)
        if len(calls) == 2:
            spoil(self, "head.weight", value=np.nan)
        return original(self, source)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(GpunetError, match="epoch 3, batch 1 of 5"):
        patch.setattr(Step, "evaluate", evaluate)
        trainer.fit()
    assert_finite_on_disk(tmp_path)
    assert checkpoints(tmp_path)["best.safetensors"].about["epoch"] == 1


def test_a_loss_of_nan_is_never_the_best(config):
    """Weights that are finite, and right on all images, and whose loss is NaN."""
    measured = iter([(0.5, 1.0), (1.0, np.nan), (0.4, 2.0)])

    def evaluate(self, source):
        accuracy, loss = next(measured)
        return {"loss": loss, "accuracy": accuracy, "count": 20}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "evaluate", evaluate)
        result = Trainer(config(), data=easy(side=8), show=False).fit()
    assert result.best["epoch"] == 1


def test_a_halt_in_an_accumulated_update_looks_at_all_its_batches(config):
    """The second of three batches has the bad image."""
    images = broken_images(60, bad=25)
    made = config(
        train={"epochs": 1, "batch": 10, "order": "stored", "accumulate": 3, "replicas": 1},
        preprocess={"mean": 0.0, "scale": 1.0},
    )
    _, said = trained(made, images)
    assert "in epoch 1, batch 3 of 6" in said
    assert "image 25 of train" in said
    assert "the first at [5, 3, 4, 1]; epoch 1, batch 3" in said  # batch 3 of 6: images 20 to 29


def test_graphs_of_ones_own_have_no_phase_but_their_own():
    """Programs that are no gradient name their kind."""
    graph = Graph(image := Input((4, 4, 1)), Sequential(Flatten(), Linear(3, name="fc"), ReLU(), name="n")(image))
    with closing(Step(graph, SoftmaxCrossEntropy(), SGD(0.1), batch=2, replicas=1)) as step:
        spoil(step, "n.fc.weight")
        check = CheckFinite()
        with step.observed(check):
            step.predict(np.ones((2, 4, 4, 1)))
        assert (check.fault.path, check.fault.phase) == ("n.fc", "predict")
