"""Fine-tuning: what a file gives is told and taken, what is frozen stays to the bit, what is not needed is not run."""

import re
import signal
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gpunet import data, models, nn
from gpunet.backends.numpy import Backend
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.optim import SGD
from gpunet.train import Checkpoint, Predictor, Trainer, load_config, parse_config, start, trainer

FIRST = {"net.conv1", "net.norm1"}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Pictures and report take longer than these trainings."""
    monkeypatch.setattr(trainer, "write_report", lambda *arguments: None)


def network(classes=3, width=4, shape=(6, 6, 2), middle="norm2"):
    """Two convolutions with normalisation, and a head."""
    image = nn.Input(shape)
    layers = nn.Sequential(
        nn.Conv2d(4, 3, name="conv1"), nn.BatchNorm(name="norm1"), nn.ReLU(name="relu1"),
        nn.Conv2d(width, 3, name="conv2"), nn.BatchNorm(name=middle), nn.ReLU(name="relu2"),
        nn.Linear(classes, name="head"), name="net",
    )  # fmt: skip
    return nn.Graph(image, layers(image))


def step_of(graph, optimizer=None, **options):
    options = {"batch": 6, "replicas": 1} | options
    return Step(graph, nn.SoftmaxCrossEntropy(), optimizer or SGD(0.1, 0.9, 0.01), **options)


def batch_of(number, n=6, shape=(6, 6, 2), classes=3):
    rng = np.random.default_rng(number)
    return rng.normal(size=(n, *shape)), rng.integers(0, classes, n)


def train(step, updates=3, accumulate=1):
    for number in range(updates):
        for part in range(accumulate):
            step.gradient(*batch_of(10 * number + part), accumulate=part > 0)
        step.update()


@pytest.fixture
def file(tmp_path):
    """A checkpoint after some training, with values that arithmetic would not leave alone."""
    with closing(step_of(network(5), seed=3)) as step:
        for number in range(3):
            step.gradient(*batch_of(number, classes=5))
            step.update()
        weight = step.weights["net.conv1.weight"]
        weight.flat[:4] = -0.0, 1e-45, -1e-42, 3e38
        weight.flat[3] = 1.0000001
        step.weights["net.conv1.weight"] = weight
        Checkpoint.of(step, [1.0, 2.0], 0.5, {"epoch": 7}).save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def bits(tensors):
    return {name: value.tobytes() for name, value in tensors.items()}


OPTIMIZERS = [SGD(0.1, 0.9, 0.01), SGD(0.1, 0.9, 0.1, nesterov=True), SGD(0.1, 0.5, 0.1, form="caffe", clip=0.1)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("replicas", "fast", "accumulate"), [(1, True, 1), (1, False, 2), (3, True, 2)])
def test_frozen_weights_stay_to_the_bit(optimizer, replicas, fast, accumulate, file):
    graph, given = network(), Checkpoint.load(file)
    report = start.load(graph, file, freeze=["net.conv1", "*.norm?.gamma"])
    assert report.frozen == ["net.conv1.weight", "net.conv1.bias", "net.norm1.gamma", "net.norm2.gamma"]
    with closing(step_of(graph, optimizer, replicas=replicas, backend=Backend(fast=fast))) as step:
        for name in report.matched:
            tensors, values = step.weights, given.weights
            if name in step.statistics:
                tensors, values = step.statistics, given.statistics
            assert tensors[name].tobytes() == values[name].tobytes(), name
        train(step, accumulate=accumulate)
        after = bits(step.weights)
        assert {name for name in given.weights if after[name] == given.weights[name].tobytes()} == set(report.frozen)
        assert all((step.statistics[name] != given.statistics[name]).all() for name in given.statistics)
        assert set(step.optimizer_state["velocity"]) == set(step.weights) - set(report.frozen)
        assert [*step.weights] == [p.name for p in graph.parameters() if p.trainable]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_others_train_as_if_nothing_were_frozen(dtype, file):
    """One update: the same gradients, the same weights; and with statistics as in PyTorch they move."""
    free, frozen = network(5), network(5)
    start.load(free, file)
    start.load(frozen, file, freeze=["net.conv1", "net.norm1"])
    with closing(step_of(free, dtype=dtype)) as one, closing(step_of(frozen, dtype=dtype)) as other:
        assert one.weights["net.conv2.bias"].dtype == (np.float64 if dtype == "float64" else np.float32)
        for step in (one, other):
            step.gradient(*batch_of(0, classes=5))
            step.update()
        for name, value in other.weights.items():
            same = (value == one.weights[name]).all()
            assert same == (name.rpartition(".")[0] not in FIRST), name
        assert bits(one.statistics) == bits(other.statistics)


def backward_of(step):
    """Return {layer: names of the entries of the gradient's program that are not of the forward pass}."""
    (program,) = step._replay.program(("gradient", step.batch, False, True))
    entries = program.plan.entries
    loss = next(i for i, entry in enumerate(entries) if entry.path == "loss")
    found = {}
    for entry in entries[loss:]:
        found.setdefault(entry.path, []).append(entry.name)
    return {path: names for path, names in found.items() if path.startswith("net")}


@pytest.mark.parametrize("engine", ["blocked", "unfold"])
def test_what_only_frozen_weights_need_is_not_computed(engine):
    backend = Backend(numba=False)  # which fuses nothing
    backend.engine = lambda types: engine

    def plan(*patterns, keep=(), statistics=False):
        graph = network()
        start.freeze_weights(graph, patterns, statistics)
        step = step_of(graph, backend=backend, keep=keep)
        return backward_of(step), step.memory()

    everything, memory = plan()
    assert [*everything] == [f"net.{n}" for n in ("head", "relu2", "norm2", "conv2", "relu1", "norm1", "conv1")]
    head, less = plan("net.conv?", "net.norm?")
    assert [*head] == ["net.head"]
    assert head["net.head"] == everything["net.head"][: len(head["net.head"])]
    assert len(head["net.head"]) == len(everything["net.head"]) - 1, "nor the head's dx"
    assert less["gradient"] < memory["gradient"]
    assert less["scratch"] < memory["scratch"]
    assert "frozen" in less
    assert "frozen" not in memory
    lower, _ = plan("net.conv1", "net.norm1")
    assert [*lower] == ["net.head", "net.relu2", "net.norm2", "net.conv2"]
    upper, _ = plan("net.conv2", "net.norm2", "net.head")
    assert [*upper] == [*everything]
    for layer in ("head", "conv2"):  # a gradient goes through, and none is left
        assert len(upper[f"net.{layer}"]) < len(everything[f"net.{layer}"])
    assert "batchnorm_gradient" not in upper["net.norm2"]
    kept, _ = plan("net.conv?", "net.norm?", keep=["input:gradient"])
    assert [*kept] == [*everything], "asked for, it is computed"


def residual(fused):
    image = nn.Input((4, 4, 2))
    x = nn.Sequential(nn.Conv2d(3, 3, name="first"), nn.BatchNorm(name="norm1"), nn.ReLU())(image)
    y = nn.Sequential(nn.Conv2d(3, 3, name="second"), nn.BatchNorm(name="norm2"))(x)
    graph = nn.Graph(image, nn.Linear(3)(nn.ReLU()(nn.Add()(y, x))))
    return graph.fused() if fused else graph


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
def test_training_through_frozen_statistics(fused, replicas):
    """Gradients against central differences; the numbers that training and prediction normalise by are the same."""
    graph = residual(fused)
    start.freeze_weights(graph, ["*.norm*"], statistics=True)
    rng = np.random.default_rng(0)
    with closing(step_of(graph, dtype="float64", replicas=replicas, keep=["prediction"])) as step:
        for name, value in step.statistics.items():
            step.statistics[name] = value + rng.uniform(0.1, 0.5, value.shape)
        before, (x, y) = bits(step.statistics), batch_of(0, shape=(4, 4, 2))

        def loss():
            step.gradient(x, y)
            return step.losses()["loss"] * len(x)

        loss()
        gradients = {name: step.read(f"{name}:gradient") for name in step.layouts["weights"].parameters}
        np.testing.assert_allclose(step.read("prediction"), step.predict(x), rtol=1e-12)
        for name, gradient in gradients.items():
            value = step.weights[name]
            for place in (0, value.size // 2, value.size - 1):
                sides = []
                for change in (1e-6, -1e-6):
                    moved = value.copy()
                    moved.flat[place] += change
                    step.weights[name] = moved
                    sides.append(loss())
                step.weights[name] = value
                assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(gradient.flat[place], rel=1e-6, abs=1e-8), name
        loss()
        step.update()
        assert bits(step.statistics) == before


def test_statistics_are_frozen_by_layers_that_patterns_match():
    graph = network()
    start.freeze_weights(graph, ["net.norm1", "net.norm2.gamma"], statistics=True)
    assert {p.name for p in graph.parameters() if p.frozen} == {
        *(f"net.norm1.{n}" for n in ("gamma", "beta", "mean", "variance")),
        "net.norm2.gamma",
    }
    with closing(step_of(graph)) as step:
        before = {name: value.copy() for name, value in step.statistics.items()}
        train(step, 1)
        moved = {name: bool((step.statistics[name] != value).any()) for name, value in before.items()}
    assert moved == {name: "norm2" in name for name in before}


def test_a_step_is_what_its_graph_was_when_it_was_made(file):
    graph = network()
    with closing(step_of(graph)) as free:
        start.freeze_weights(graph, ["net.conv1"])
        before = free.weights["net.conv1.weight"]
        train(free, 1)
        assert (free.weights["net.conv1.weight"] != before).any()
    with closing(step_of(network(), dtype="float64")) as step:
        head = step.weights["net.head.weight"]
        report = start.load(step, str(file), replace=["net.norm2"])
        given = Checkpoint.load(file)
        np.testing.assert_array_equal(step.weights["net.conv2.weight"], given.weights["net.conv2.weight"])
        np.testing.assert_array_equal(step.statistics["net.norm1.mean"], given.statistics["net.norm1.mean"])
        assert (step.weights["net.norm2.gamma"] == 1).all()
        assert (step.statistics["net.norm2.variance"] == 1).all()
        np.testing.assert_array_equal(step.weights["net.head.weight"], head)
        assert step.state["update"] == 0
        assert report.fresh == ["net.norm2.gamma", "net.norm2.beta", "net.head.weight", "net.head.bias"]
        with pytest.raises(GpunetError, match="start: freeze: expected a graph, whose next Step keeps these weights"):
            start.load(step, file, freeze=["net.conv1"])


def test_the_report(file):
    report = start.load(network(), file, freeze=["net.conv1", "net.norm1"], replace=["net.norm2"])
    assert str(report) == (
        f"start: {file}, epoch 7\n"
        "  matched           6 of 10 weights and 2 of 4 statistics: net.conv1, net.norm1, net.conv2\n"
        "  other shape       2: net.head.weight (144, 5) -> (144, 3), net.head.bias (5,) -> (3,)\n"
        "  starts fresh      4 weights: net.norm2, net.head\n"
        "  frozen            4 weights, 84 numbers: net.conv1, net.norm1; running statistics move on"
    )
    report = start.load(network(5, middle="other"), file, freeze=["net.conv1.bias"])
    assert str(report) == (
        f"start: {file}, epoch 7\n"
        "  matched           8 of 10 weights and 2 of 4 statistics: net.conv1, net.norm1, net.conv2, net.head\n"
        "  only in the file  4: net\n"
        "  starts fresh      2 weights: net.other\n"
        "  frozen            1 weights, 4 numbers: net.conv1.bias; running statistics move on"
    )
    assert re.search("matched +10 of 10 weights and 4 of 4 statistics: net$", str(start.load(network(5), file)))


def test_as_many_values_in_another_shape_do_not_fit(file):
    given = Checkpoint.load(file)
    given.weights["net.conv2.weight"] = given.weights["net.conv2.weight"].reshape(9, 4, 1, 4)
    graph = network()
    report = start.load(graph, given)
    assert report.shapes["net.conv2.weight"] == ((9, 4, 1, 4), (3, 3, 4, 4))
    with closing(step_of(graph, seed=1)) as step, closing(step_of(network(), seed=1)) as fresh:
        np.testing.assert_array_equal(step.weights["net.conv2.weight"], fresh.weights["net.conv2.weight"])


def test_a_long_report_is_short():
    graph, other = models.build("resnet110", widths=(2, 2, 4)), models.build("resnet110", widths=(2, 2, 8))
    with closing(step_of(graph, batch=1)) as step:
        report = start.load(other, Checkpoint.of(step, 0, 1, {}))
    assert len(str(report)) < 1500
    assert "stage3_block6 and 13 more" in str(report)
    assert "stem, stage1_block1, stage1_block2, stage1_block3, stage1_block4, stage1_block5 and" in str(report)


def test_names_of_a_file_are_printed_as_what_they_are(file):
    given = Checkpoint.load(file)
    given.weights["evil\x1b[2J\n"] = np.zeros(2, np.float32)
    assert "only in the file  1: 'evil\\x1b[2J\\n'" in str(start.load(network(5), given))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"freeze": ["net.conv3"]}, r"^start: freeze: 'net\.conv3' matches no weight; nearest: net\.conv[12], net\.co"),
        ({"freeze": ["stem.*"]}, r"^start: freeze: 'stem\.\*' matches no weight; nearest: net"),
        ({"freeze": ["net.norm1.mean"]}, r"'net\.norm1\.mean' matches no weight"),
        ({"replace": ["heat"]}, r"^start: replace: 'heat' matches no weight; nearest: net\.head"),
        ({"freeze": ["net"], "replace": ["net.conv1"]}, "would keep first values, which are random"),
        ({"freeze": ["*.head"]}, r"^start: freeze: net\.head\.bias, net\.head\.weight would keep first values"),
    ],
)
def test_patterns_that_cannot_be_meant(arguments, said, file):
    graph = network()
    with pytest.raises(GpunetError, match=said):
        start.load(graph, file, **arguments)
    assert not any(p.frozen for p in graph.parameters()), "nothing has changed"


def test_files_that_cannot_be_meant(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GpunetError, match=r"^none\.safetensors: expected a checkpoint, found no file$"):
        start.load(network(), "none.safetensors")
    with pytest.raises(GpunetError, match="^run 'none': expected a directory with a config.toml"):
        start.load(network(), "none")
    Path("b.safetensors").write_bytes(b"a picture, say" * 40)
    with pytest.raises(GpunetError, match=r"^b\.safetensors: expected a checkpoint; the file is damaged or none"):
        start.load(network(), "b.safetensors")
    with pytest.raises(
        GpunetError,
        match=r"a\.safetensors: no weight of it has a name and shape of the network's; it has net\.conv1\.weight, "
        r"net\.conv1\.bias, net\.norm1\.gamma and 7 more|it has net\..* and 7 more, the network sequential1",
    ):
        start.load(models.build("mlp"), file)
    with pytest.raises(GpunetError, match="start: freeze: 'net': leaves no weight to train"):
        start.load(network(5), file, freeze=["net"])
    given = Checkpoint.load(file)
    given.weights["net.conv1.bias"] = np.arange(4)
    with pytest.raises(GpunetError, match=r"net\.conv1\.bias: expected floats, got int64"):
        start.load(network(), given)


# By a recipe


def config_of(folder, **sections):
    table = {
        "model": {"name": "resnet9", "widths": [4, 4, 6, 6]},
        "data": {"name": "shapes"},
        "optimizer": {"lr": 0.05, "weight_decay": 1e-3},
        "train": {"epochs": 1, "batch": 20, "replicas": 1},
        "run": {"directory": str(folder), "name": "try"},
    }
    return parse_config(table | sections)


@pytest.fixture(scope="module")
def shapes():
    return data.load("shapes", train=120, test=20)


@pytest.fixture
def pretrained(shapes, tmp_path):
    """A run on all classes of shapes."""
    return Trainer(config_of(tmp_path / "runs"), data=shapes, show=False).fit().run


def three_classes(shapes):
    """The same pictures with other classes, all somewhat darker."""
    splits = {n: data.Split(s.images // 2, (s.labels % 3).astype(np.int32)) for n, s in shapes.splits.items()}
    return data.DataSet("thirds", ("a", "b", "c"), **splits)


@pytest.mark.parametrize("whose", ["data", "checkpoint"])
@pytest.mark.parametrize("still", [False, True])
def test_a_new_head_on_other_classes(whose, still, shapes, pretrained, tmp_path, capsys):
    settings = {
        "weights": str(pretrained.path),
        "freeze": ["stem", "stage1.*"],
        "freeze_statistics": still,
        "normalisation": whose,
    }
    tuned = Trainer(config_of(tmp_path / "runs", start=settings), data=three_classes(shapes))
    before = pretrained.checkpoint("best")
    result = tuned.fit()
    assert str(tuned.started) in "".join(capsys.readouterr())
    assert str(tuned.started).splitlines()[1:] == [
        "  matched           24 of 26 weights and 16 of 16 statistics: stem, stage1, stage2, stage3",
        "  other shape       2: head.weight (6, 10) -> (6, 3), head.bias (10,) -> (3,)",
        "  starts fresh      2 weights: head",
        "  frozen            12 weights, 572 numbers: stem, stage1; running statistics "
        + ("stay" if still else "move on"),
        "  normalisation     mean and scale of the " + {"data": "new data", "checkpoint": "file"}[whose],
    ]
    after = Checkpoint.load(result.run.path / "last.safetensors")
    for name, value in before.weights.items():
        if name.startswith(("stem.", "stage1.")):
            assert after.weights[name].tobytes() == value.tobytes(), name
        elif not name.startswith("head"):
            assert (after.weights[name] != value).any(), name
    for name, value in before.statistics.items():
        kept = still and name.startswith(("stem.", "stage1."))
        assert (after.statistics[name].tobytes() == value.tobytes()) == kept, name
    assert np.allclose(after.input["mean"], before.input["mean"]) == (whose == "checkpoint")
    assert result.test.confusion.shape == (3, 3)
    loaded = Predictor.load(Checkpoint.load(result.run.path / "best.safetensors"))
    images = shapes.test.images[:5]
    np.testing.assert_allclose(loaded.predict(images), tuned.predict(images), atol=1e-6)
    again = load_config(result.run.path / "config.toml")
    assert (again.start.freeze, again.start.normalisation) == (["stem", "stage1.*"], whose)


def test_it_goes_on_from_where_the_weights_were(shapes, pretrained, tmp_path):
    """With everything taken, the network is the one that was saved."""
    tuned = Trainer(config_of(tmp_path / "x", start={"weights": str(pretrained.path)}), data=shapes, show=False)
    images = shapes.test.images[:7]
    np.testing.assert_array_equal(tuned.predict(images), Predictor.load(pretrained.checkpoint()).predict(images))
    assert not any(v.any() for v in tuned.step.optimizer_state["velocity"].values())
    assert tuned.step.state["update"] == 0


def test_it_resumes_without_the_file_it_started_from(shapes, pretrained, tmp_path, monkeypatch):
    """To the bit as if it had not been stopped, and with the same frozen."""
    settings = {"weights": str(pretrained.path), "freeze": ["stem"], "normalisation": "checkpoint"}
    given = three_classes(shapes)
    config = config_of(tmp_path / "y", start=settings)
    whole = Trainer(config.model_copy(deep=True), data=given, show=False).fit()
    stopped = Trainer(config, data=given, show=False)
    replay = Step.__call__

    def interrupted(self, *arguments):
        replay(self, *arguments)
        if self.state["update"] == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Step, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stopped.fit()
    (folder,) = {p for p in (tmp_path / "y").iterdir() if p != whole.run.path}
    pretrained.path.rename(tmp_path / "moved")
    resumed = Trainer.resume(folder, data=given, show=False)
    assert resumed.started is None
    assert resumed.step.state["update"] == 2
    result = resumed.fit()
    one, other = (Checkpoint.load(r.run.path / "last.safetensors") for r in (whole, result))
    assert bits(one.weights) == bits(other.weights)
    assert bits(one.statistics) == bits(other.statistics)
    assert bits(one.input) == bits(other.input)
    np.testing.assert_array_equal(one.weights["stem.conv.weight"], resumed.step.weights["stem.conv.weight"])


def test_a_recipe_that_cannot_be_meant(shapes, tmp_path):
    for key, value in (("freeze", ["stem"]), ("replace", ["head"]), ("freeze_statistics", True)):
        with pytest.raises(GpunetError, match=rf"^\[start\]: {key}: expected beside weights"):
            Trainer(config_of(tmp_path, start={key: value}), data=shapes, show=False)
    with pytest.raises(GpunetError, match=r"^\[start\]: normalisation: expected beside weights"):
        Trainer(config_of(tmp_path, start={"normalisation": "checkpoint"}), data=shapes, show=False)
    with pytest.raises(GpunetError, match=r"'normalisation' in \[start\]: expected 'data' or 'checkpoint', got"):
        config_of(tmp_path, start={"weights": "x", "normalisation": "mine"})
    with pytest.raises(GpunetError, match=r"unknown key 'freze' in \[start\]; did you mean 'freeze'"):
        config_of(tmp_path, start={"freze": []})


def test_a_path_is_kept_whole(tmp_path, monkeypatch):
    """The run's own recipe must mean the same file from any folder."""
    monkeypatch.chdir(tmp_path)
    Path("runs/old").mkdir(parents=True)
    Path("a.safetensors").touch()
    Path("r.toml").write_text('[model]\nname = "mlp"\n[data]\nname = "shapes"\n')
    for given, kept in (("old", "runs/old"), ("a.safetensors", "a.safetensors")):
        assert load_config("r.toml", [f"start.weights={given}"]).start.weights == str(tmp_path / kept)
    assert load_config("r.toml", ["start.weights=none"]).start.weights == "none"
