"""The Trainer: it learns, chooses by validation alone, and ends cleanly however it ends."""

import json
import os
import signal
import sys
import threading
from functools import partial

import numpy as np
import pytest
from small_run import halves

from gpunet import data
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.optim import schedules
from gpunet.train import Predictor, Trainer, parse_config, report, trainer
from gpunet.train.build import build_graph, build_normalisation
from gpunet.train.run import Run
from gpunet.train.signals import Signals

pytestmark = pytest.mark.usefixtures("no_pictures")
easy = partial(halves, contrast=100)  # a linear layer tells them apart


@pytest.fixture
def config(tmp_path):
    """Make a small config that writes its runs into tmp_path; sections given replace entries."""

    def make(**sections):
        table = {
            "model": {"name": "mlp", "hidden": [8]},
            "data": {"name": "shapes"},
            "optimizer": {"lr": 0.01},
            "train": {"epochs": 3, "batch": 20, "replicas": 1},
            "run": {"directory": str(tmp_path / "runs"), "name": "try"},
        }
        return parse_config({name: table.get(name, {}) | sections.get(name, {}) for name in {**table, **sections}})

    return make


def runs(tmp_path):
    return sorted((tmp_path / "runs").iterdir())


def test_it_learns_and_leaves_a_run(config, tmp_path):
    result = Trainer(config(), data=easy()).fit()
    assert result.status == "finished"
    assert (result.epochs, result.updates, result.images) == (3, 15, 270)
    assert result.test.accuracy == 1
    np.testing.assert_array_equal(result.test.confusion, [[10, 0], [0, 10]])
    (folder,) = runs(tmp_path)
    assert folder == result.run.path
    assert {p.name for p in folder.iterdir()} == {
        "config.toml", "metrics.jsonl", "best.safetensors", "last.safetensors", "report.md", ".lock",
    }  # fmt: skip


def test_a_trainer_trains_once(config):
    trained = Trainer(config(), data=easy())
    trained.fit()
    with pytest.raises(GpunetError, match="has not trained"):
        trained.fit()


def test_metrics_has_a_row_an_update_and_one_a_measurement(config):
    result = Trainer(config(schedule={"name": "cosine"}, train={"evaluate_every": 2}), data=easy()).fit()
    *rows, last = result.run.metrics()
    assert rows == result.rows
    test = result.test
    assert last == {"split": "test", "epoch": 3, "loss": test.loss, "accuracy": test.accuracy, "count": 20}
    updates = [r for r in rows if r["split"] == "train"]
    assert [r["update"] for r in updates] == list(range(15))
    assert [r["count"] for r in updates] == [20, 20, 20, 20, 10] * 3  # the tail counts what it has
    np.testing.assert_allclose([r["rate"] for r in updates], schedules.cosine(15, 5, 0.01), rtol=1e-6)
    assert updates[4]["epoch"] == 1 and updates[-1]["epoch"] == 3
    assert [(r["split"], r["epoch"], r["count"]) for r in rows if r["split"] != "train"] == [
        ("validation", 2, 20),
        ("validation", 3, 20),
    ]


def test_the_best_is_chosen_by_validation_and_kept(config, monkeypatch):
    measured = iter([(0.5, 1.0), (0.9, 2.0), (0.9, 1.5), (0.9, 1.5), (0.7, 0.1)])
    weights = []

    def evaluate(step, source):
        assert source.name == "validation"
        weights.append(dict(step.weights.items()))
        accuracy, loss = next(measured)
        return {"loss": loss, "accuracy": accuracy, "count": 20}

    monkeypatch.setattr(Step, "evaluate", evaluate)
    trainer = Trainer(config(train={"epochs": 5}), data=easy())
    result = trainer.fit()
    assert result.best["epoch"] == 3  # of equal accuracy the smaller loss, of equal losses the first
    for name, array in weights[2].items():
        np.testing.assert_array_equal(trainer.step.weights[name], array)
    best, last = result.run.checkpoint(), result.run.checkpoint("last")
    assert (best.about["epoch"], best.state["update"]) == (3, 15)
    assert (last.about["epoch"], last.state["update"]) == (5, 25)
    assert last.about["best"]["epoch"] == 3


@pytest.mark.parametrize("watch", [False, True])
def test_the_test_split_is_watched_only_on_request_and_never_chooses(watch, config, monkeypatch):
    seen = []
    original = Step.evaluate

    def evaluate(step, source):
        seen.append(source.name)
        found = original(step, source)
        return found if source.name == "validation" else found | {"accuracy": 2.0 - len(seen) / 100}

    monkeypatch.setattr(Step, "evaluate", evaluate)
    result = Trainer(config(train={"monitor_test": watch}), data=easy()).fit()
    assert seen == ["validation", "test"] * 3 if watch else ["validation"] * 3
    assert result.best["split"] == "validation"
    text = (result.run.path / "report.md").read_text()
    assert ("monitor_test = true); it chose nothing" in text) is watch


def test_without_validation_the_last_weights_are_kept_and_that_is_said(config, capsys):
    trainer = Trainer(config(), data=easy(validation=0))
    result = trainer.fit()
    assert result.best is None
    assert not (result.run.path / "best.safetensors").exists()
    assert result.run.checkpoint().state["update"] == 15
    assert "no validation split: the last weights are kept" in capsys.readouterr().err
    assert "the last ones: nothing was measured" in (result.run.path / "report.md").read_text()


def test_accumulated_batches_are_one_large_batch(config):
    """Five batches of 20 with their tail of 10 make the update of one batch of 90; so do 4 and 1."""
    settings = {"epochs": 2, "dtype": "float64", "order": "stored"}
    large = Trainer(config(train=settings | {"batch": 90}), data=easy())
    small = Trainer(config(train=settings | {"batch": 20, "accumulate": 5}), data=easy())
    assert large.fit().updates == small.fit().updates == 2
    for name, array in large.step.weights.items():
        np.testing.assert_allclose(small.step.weights[name], array, rtol=1e-9, atol=1e-12)
    uneven = Trainer(config(train=settings | {"batch": 20, "accumulate": 4}), data=easy())
    counts = [r["count"] for r in uneven.fit().rows if r["split"] == "train"]
    assert counts == [80, 10] * 2
    assert len(uneven.step.rates) == 4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path):
    with pytest.raises(GpunetError) as caught:
        Trainer(config(optimizer={"lr": 1e30}, train={"epochs": 50}), data=easy()).fit()
    said = str(caught.value)
    assert "loss or gradient is not finite in epoch 1, batch 2 of 5, at learning rate 1e+30" in said
    assert "Try a lower optimizer.lr (1e+29)" in said
    (folder,) = runs(tmp_path)
    last = Run(folder).checkpoint("last")
    assert all(np.isfinite(a).all() for a in last.weights.values())
    assert last.state["halt"] == last.state["update"] == 1
    assert "Stopped: " in (folder / "report.md").read_text()


def rescaled(made, scale):
    """Set the loss scale of a Trainer that has not trained."""
    state = made.step.state
    state["loss_scale"] = scale
    made.step.state = state
    return made


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "tf32"])
def test_other_types_train_from_end_to_end(dtype, config, capsys, monkeypatch):
    """In float16 from a loss scale that is far too large: that is told once, however often one looks."""
    monkeypatch.setattr(trainer, "LOOK", 0)
    loop = {"dtype": dtype, "epochs": 3, "batch": 27, "accumulate": 2}  # 270 images are left to train on
    made = config(data={"train": 300, "test": 40}, train=loop)
    made.model = type(made.model)(name="resnet9", widths=[4, 4, 4, 4])
    trained = Trainer(made)
    result = (rescaled(trained, 2.0**22) if dtype == "float16" else trained).fit()
    said = [line for line in capsys.readouterr().err.splitlines() if "normal" in line]
    if dtype == "float16":
        assert said == [
            "note: 1 of the first 1 updates skipped, their gradients overflowed float16; at the beginning of "
            "half-precision training that is normal: each halves the loss scale, now 2,097,152"
        ]
        assert 6 <= 15 - result.updates <= 12  # halved to between 65536, where float16 ends, and the usual 1024
    else:
        assert not said
        assert result.updates == 15
    batches = [r["batch"] for r in result.rows if r["split"] == "train"]
    assert len(batches) == result.updates and np.diff(batches).tolist() == [2] * (result.updates - 1)
    assert result.images == 54 * result.updates
    checkpoint = result.run.checkpoint()
    assert {a.dtype for a in checkpoint.weights.values()} == {np.dtype("float32")}
    images = trained.data.test.images
    again = Predictor.load(checkpoint)
    assert again.step.types == trained.step.types
    np.testing.assert_array_equal(again.predict(images), trained.predict(images))
    assert np.isfinite(again.predict(images)).all()
    assert again.evaluate(trained.data).loss == result.test.loss
    steps = trained.step.evaluate(trained.watched["validation"])
    assert trained.evaluate("validation").loss == pytest.approx(steps["loss"], rel=1e-5)


def test_half_precision_that_never_gets_finite_stops_the_run(config, tmp_path, capsys, monkeypatch):
    """Ten halvings from 1024 to 1, all in epochs without an update, and the next step ends the run."""
    monkeypatch.setattr(report, "plot_curves", None)  # there is nothing to draw
    with pytest.raises(GpunetError) as caught:
        Trainer(config(preprocess={"scale": 1e30}, train={"dtype": "float16", "epochs": 50}), data=easy()).fit()
    said = str(caught.value)
    assert "not finite in epoch 3, batch 1 of 5, at learning rate 0.01 and the smallest loss scale, 1; the" in said
    (folder,) = runs(tmp_path)
    assert "curves" not in (folder / "report.md").read_text()
    assert Run(folder).checkpoint("last").state["update"] == 0
    lines = capsys.readouterr().err.splitlines()
    assert sum("every update skipped" in line for line in lines) == 2
    assert sum("normal" in line for line in lines) == 1


def interrupted(kind, config, after=7):
    """Train, and send a signal in the middle of an update."""
    original, calls = Step.__call__, []

    def step(self, *arguments):
        original(self, *arguments)
        calls.append(1)
        if len(calls) == after:
            os.kill(os.getpid(), kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", step)
        Trainer(config(train={"epochs": 50}), data=easy()).fit()


@pytest.mark.parametrize(
    ("kind", "raised"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
)
def test_a_signal_leaves_a_checkpoint_and_a_report(kind, raised, config, tmp_path):
    handlers = [signal.getsignal(k) for k in Signals.KINDS]
    with pytest.raises(raised) as caught:
        interrupted(kind, config)
    if raised is SystemExit:
        assert caught.value.code == {signal.SIGTERM: 143, signal.SIGHUP: 129}[kind]
    (folder,) = runs(tmp_path)
    assert Run(folder).checkpoint("last").state["update"] == 7
    assert len([r for r in Run(folder).metrics() if r["split"] == "train"]) == 7
    text = (folder / "report.md").read_text()
    assert f"Interrupted by {kind.name}." in text
    assert "measured once" not in text  # the test split waits for the end of a training
    assert [signal.getsignal(k) for k in Signals.KINDS] == handlers


def test_a_second_signal_ends_at_once():
    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.caught == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_it_trains_outside_the_main_thread(config):
    results = []
    thread = threading.Thread(target=lambda: results.append(Trainer(config(), data=easy()).fit()))
    thread.start()
    thread.join()
    assert results[0].status == "finished"


def test_a_run_predicts_as_the_trainer_did(config):
    halves = easy()
    trained = Trainer(config(augment={"flip": True, "crop": 1}, preprocess={"mean": "image"}), data=halves)
    result = trained.fit()
    again = Predictor.load(result.run.checkpoint())
    images = halves.test.images
    np.testing.assert_array_equal(again.predict(images), trained.predict(images))
    np.testing.assert_allclose(again.predict(images).sum(axis=1), 1, rtol=1e-6)
    assert again.classes == ("left", "right")
    assert again.evaluate(halves).accuracy == result.test.accuracy
    other = data.DataSet("other", ("up", "down"), halves.train, test=halves.test)
    with pytest.raises(GpunetError, match=r"other: expected the classes of the training \(left, right"):
        again.evaluate(other)
    with pytest.raises(GpunetError, match="split: expected one of train, validation, test, got 'tests'"):
        trained.evaluate("tests")


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_predictor_and_step_measure_the_same(loss, config):
    """Two ways to the same numbers: host formulas on predictions, and the loss kernel on padded batches."""
    trained = Trainer(config(loss={"name": loss, "smoothing": 0.2 if loss == "cross_entropy" else 0.0}), data=easy())
    trained.fit()
    own, steps = trained.evaluate("validation"), trained.step.evaluate(trained.watched["validation"])
    assert own.loss == pytest.approx(steps["loss"], rel=1e-5)
    assert (own.accuracy, own.count) == (steps["accuracy"], steps["count"])


def test_confusion_has_true_classes_in_rows(config, monkeypatch):
    trained = Trainer(config(), data=easy())
    answers = np.eye(2)[[0, 1, 1, 1] * 5]  # of each four images, of classes 0 1 0 1, one 0 is taken for 1
    monkeypatch.setattr(trained.predictor, "outputs", lambda images, views: answers)
    found = trained.evaluate("test")
    np.testing.assert_array_equal(found.confusion, [[5, 5], [0, 10]])
    assert found.accuracy == 0.75
    rows = report.class_rows(found.confusion, trained.data.classes)
    assert rows[1:] == [("left", "10", "5", "50.0%", "right (5)"), ("right", "10", "10", "100.0%", "")]


@pytest.mark.parametrize("order", ["shuffled", "stored"])
def test_only_training_is_shuffled_and_augmented(order, config):
    sections = {"train": {"order": order}, "augment": {"flip": True, "crop": 2}, "loss": {"smoothing": 0.1}}
    trained = Trainer(config(**sections), data=easy())
    assert trained.step.source.order == order
    source = trained.step.source
    assert (source.augmentation.flip, source.augmentation.crop, source.smoothing) == (True, 2, 0.1)
    assert trained.watched["validation"].order == "stored"
    plain = Trainer(config(), data=easy())
    plain.step.weights.update(trained.step.weights)
    measured = [t.step.evaluate(t.watched["validation"]) for t in (trained, plain)]
    assert measured[0] == measured[1]


def test_values_are_fitted_with_mse(config):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 4, 4, 1)).astype(np.float32)
    y = x.reshape(80, 16) @ rng.normal(size=(16, 2)).astype(np.float32)
    values = data.Arrays(x, y.astype(np.float32), validation=16, test=(x[:8], y[:8].astype(np.float32)))
    sections = {"model": {"hidden": []}, "loss": {"name": "mse"}, "optimizer": {"lr": 0.05}, "train": {"epochs": 40}}
    sections["preprocess"] = {"mean": 0.0, "scale": 1.0}
    result = Trainer(config(**sections), data=values).fit()
    assert result.test.loss < 1e-3 * float(np.square(y).mean())
    assert result.test.confusion is None
    assert result.best["loss"] == min(r["loss"] for r in result.rows if r["split"] == "validation")
    predictor = Predictor.load(result.run.checkpoint())
    np.testing.assert_allclose(predictor.predict(x[:3]), y[:3], atol=0.2)


def test_a_graph_of_ones_own(config):
    graph = build_graph(config(model={"name": "mlp", "hidden": [3]}), (6, 6, 3), 2)
    trained = Trainer(config(), graph=graph, data=easy())
    assert trained.graph is graph
    assert trained.fit().updates == 15


def test_normalisation(config):
    halves = easy()
    pixels = halves.train.images.astype(np.float64)
    mean, scale = build_normalisation(config(), halves)
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(scale, 1 / pixels.std(axis=(0, 1, 2)))
    mean, scale = build_normalisation(config(preprocess={"mean": "image", "scale": 1.0}), halves)
    np.testing.assert_allclose(mean, pixels.mean(axis=0))
    assert scale == 1
    mean, scale = build_normalisation(config(preprocess={"mean": [1.0, 2.0, 3.0], "scale": [1, 2, 4]}), halves)
    assert (mean.tolist(), scale.tolist()) == ([1, 2, 3], [1, 2, 4])
    flat = data.DataSet("flat", ("a",), data.Split(np.full((2, 2, 2, 3), 7, np.uint8), np.zeros(2, np.int32)))
    assert (build_normalisation(config(), flat)[1] == 1).all()


def test_rates_and_decays_of_vectors(config):
    """bias_rate and decay_bias multiply what the model itself says of its parameters."""

    def parameters(**optimizer):
        made = config(optimizer=optimizer)
        made.model = type(made.model)(name="resnet9", widths=[2, 2, 2, 2])
        return {p.name: p for p in build_graph(made, (8, 8, 3), 2).parameters()}

    expected = {"gamma": (1, 0), "beta": (2, 0), "bias": (2, 0), "weight": (1, 1), "mean": (1, 1), "variance": (1, 1)}
    plain, seen = parameters(), set()
    for name, p in parameters(bias_rate=2.0, decay_bias=False).items():
        kind = name.split(".")[-1]
        rate, decay = expected[kind]
        assert (p.rate, p.decay) == (rate * plain[name].rate, decay * plain[name].decay), name
        seen.add(kind)
    assert seen == set(expected)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {"batch": 91}}, "batch: expected at most 90, the images of train, got 91"),
        ({"train": {"backend": "cuba"}}, "backend: expected .*got 'cuba'"),
        ({"model": {"hidden": 3}}, r"\[model\] mlp with hidden = 3: "),
        ({"preprocess": {"mean": [1.0, 2.0]}}, "mean or scale: expected 1, 3 or"),
    ],
)
def test_mistakes_that_only_the_data_shows(sections, said, config, tmp_path):
    with pytest.raises(GpunetError, match=said):
        Trainer(config(**sections), data=easy()).fit()
    assert not (tmp_path / "runs").exists()


def test_a_run_directory_that_cannot_be_made(config, tmp_path):
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(GpunetError, match=r"run directory '.*runs/try-.*': cannot be made: .*--out"):
        Trainer(config(), data=easy()).fit()


def test_two_runs_of_the_same_second_do_not_meet(config):
    made = [Run.create(config()).path for _ in range(3)]
    assert len(set(made)) == 3


def test_the_report_says_what_was_trained_on_and_nothing_secret(config, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    halves = easy()
    noted = data.DataSet("halves", halves.classes, halves.train, halves.validation, halves.test, "a stand-in")
    result = Trainer(config(), data=noted).fit()
    text = (result.run.path / "report.md").read_text()
    for part in (
        "**a stand-in**",
        "90 images",
        "| left | 10 | 10 | 100.0% |  |",
        "hidden = [8]",
        "| OMP_NUM_THREADS | 1 |",
        "numpy 2",
    ):
        assert part in text, part
    assert "hunter2" not in text
    assert "note: a stand-in" in result.summary


def test_curves_are_drawn(config, monkeypatch):
    monkeypatch.undo()
    result = Trainer(config(), data=easy()).fit()
    content = (result.run.path / "curves.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(content) > 20_000


def test_plain_lines_off_a_terminal(config, capsys):
    Trainer(config(), data=easy()).fit()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert len(lines) == 3
    assert "validation" in lines[0] and "img/s" in lines[0] and "left" in lines[0]
    Trainer(config(), data=easy(), show=False).fit()
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(config, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(trainer, "LOOK", 0)
    Trainer(config(), data=easy()).fit()
    shown = capsys.readouterr().err
    assert "270/270" in shown.replace(" ", "")
    assert "accuracy" in shown


def test_checkpoints_and_config_describe_the_run(config):
    result = Trainer(config(train={"seed": 5}), data=easy()).fit()
    about = result.run.checkpoint("last").about
    assert about["input_shape"] == [6, 6, 3] and about["outputs"] == 2
    assert json.loads(json.dumps(about["classes"])) == ["left", "right"]
    assert about["config"] == (result.run.path / "config.toml").read_text()
    assert result.run.config().train.seed == 5


def test_the_same_seed_gives_the_same_weights(config):
    one, two, other = (Trainer(config(train={"seed": seed}), data=easy()) for seed in (3, 3, 4))
    for made in (one, two, other):
        made.fit()
    same = [np.array_equal(a, two.step.weights[name]) for name, a in one.step.weights.items()]
    assert all(same)
    assert not all(np.array_equal(a, other.step.weights[name]) for name, a in one.step.weights.items())
