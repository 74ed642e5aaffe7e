"""Losses: PyTorch's values, differences, hits, padding, what a config may say, probabilities, evaluation, ONNX."""

import math
from contextlib import closing
from itertools import product

import numpy as np
import pytest
from golden.make_golden import FOLDER, LABELS, LOGITS, dense_targets, logits_of
from golden.make_kinds import LOSS_CASES

from gpunet import data, models
from gpunet.core.source import Source
from gpunet.core.step import Step
from gpunet.data import Split
from gpunet.errors import GpunetError
from gpunet.export import onnx
from gpunet.nn import (
    LOSSES,
    BinaryCrossEntropy,
    Flatten,
    Graph,
    Hinge,
    Input,
    Linear,
    MeanSquaredError,
    SigmoidFocal,
    SoftmaxCrossEntropy,
)  # fmt: skip
from gpunet.optim import SGD
from gpunet.testing import check_gradients
from gpunet.train import Predictor, Trainer, parse_config, report
from gpunet.train.config import load_config, to_toml
from gpunet.train.evaluation import evaluate

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 8 * 2**-10, "bfloat16": 8 * 2**-7}  # of the largest value
SMALLEST = {"model": {"name": "mlp", "hidden": [8]}, "data": {"name": "shapes", "train": 60, "test": 22}}
EVERY = {
    "softmax": SoftmaxCrossEntropy(),
    "mse": MeanSquaredError(),
    "bce": BinaryCrossEntropy(),
    "focal": SigmoidFocal(),
    "focal 0.5": SigmoidFocal(gamma=0.5, alpha=0.7),
    "hinge": Hinge(),
    "hinge squared": Hinge(margin=0.5, squared=True),
    "crammer singer": Hinge(crammer_singer=True),
    "crammer singer squared": Hinge(margin=2, squared=True, crammer_singer=True),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "kinds.npz") as file:
        return dict(file)


def close(got, expected, dtype, where):
    error, allowed = np.abs(got - expected).max(), TOLERANCE[dtype] * np.abs(expected).max()
    assert error <= allowed, f"{where}: largest error {error:.3g}, allowed {allowed:.3g}"


def identity(k):
    """A network whose outputs are its inputs."""
    image = Input((1, 1, k))
    return Graph(image, Flatten()(image))


def measured(loss, x, y, dtype="float64", replicas=1):
    """Return (losses() of one batch, the gradient by the outputs) for outputs x."""
    x = np.asarray(x, np.float64)
    step = Step(identity(x.shape[1]), loss, SGD(0.0), batch=len(x), dtype=dtype, replicas=replicas,
                keep=("input:gradient",))  # fmt: skip
    with closing(step):
        step.gradient(x[:, None, None], np.asarray(y))
        return step.losses(), step.read("input:gradient")[:, 0, 0] / np.float64(step.state["loss_scale"])


@pytest.mark.parametrize("size", LOGITS)
@pytest.mark.parametrize("name", LOSS_CASES)
def test_golden_loss(name, size, golden):
    kind, options, labels, _ = LOSS_CASES[name]
    y = LABELS if labels else dense_targets()
    for dtype, replicas in product(TOLERANCE, (1, 3)):
        if size == "large" and dtype in ("float16", "bfloat16") and kind == "hinge":
            continue  # scores of 256 are up to 1 apart there, as far as the margin; scaled squares overflow
        found, gradient = measured(LOSSES[kind](**options), logits_of(size), y, dtype, replicas)
        where = f"{name} {size} {dtype} replicas={replicas}"
        close(found["loss"] * 5, golden[f"{name}/{size}/loss"], dtype, f"{where}: loss")
        close(gradient, golden[f"{name}/{size}/gradient"], dtype, f"{where}: gradient")
        assert found["count"] == 5, where
        if labels:
            assert found["accuracy"] == (logits_of(size).argmax(1) == LABELS).mean(), where


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("name", EVERY)
def test_loss_against_differences(name, replicas):
    assert check_gradients(Linear(4), (1, 2, 3), loss=EVERY[name], samples=8, replicas=replicas) < 1e-6


def test_the_formulas_of_one_row():
    """By hand: scores 3.2, 5.1, -1.7 with class 0 are the lecture's cat, 2.9."""
    cat = [[3.2, 5.1, -1.7]]
    assert measured(Hinge(), cat, [0])[0]["loss"] == pytest.approx(2.9)
    assert measured(Hinge(squared=True), cat, [0])[0]["loss"] == pytest.approx(2.9**2)
    assert measured(Hinge(margin=6.0), cat, [0])[0]["loss"] == pytest.approx(7.9 + 1.1)
    assert measured(Hinge(margin=6.0, crammer_singer=True), cat, [0])[0]["loss"] == pytest.approx(7.9)
    np.testing.assert_array_equal(measured(Hinge(), cat, [0])[1], [[-1, 1, 0]])
    p = [1 / (1 + math.exp(-v)) for v in cat[0]]
    each = [-math.log(p[0]), -math.log(1 - p[1]), -math.log(1 - p[2])]
    assert measured(BinaryCrossEntropy(), cat, [0])[0]["loss"] == pytest.approx(sum(each) / 3)
    terms = 0.25 * (1 - p[0]) ** 2 * each[0] + 0.75 * (p[1] ** 2 * each[1] + p[2] ** 2 * each[2])
    assert measured(SigmoidFocal(), cat, [0])[0]["loss"] == pytest.approx(terms)
    plain = measured(SigmoidFocal(gamma=0, alpha=0.5), cat, [0])[0]["loss"]
    assert plain == pytest.approx(sum(each) / 2)


def test_hinge_takes_the_largest_target_as_the_class():
    x = np.random.default_rng(0).normal(size=(4, 3))
    mixed = [[0.2, 0.5, 0.3], [0.9, 0.05, 0.05], [0, 0.4, 0.6], [0.5, 0.5, 0]]
    (a, da), (b, db) = measured(Hinge(), x, mixed), measured(Hinge(), x, [1, 0, 2, 0])
    assert a == b
    np.testing.assert_array_equal(da, db)


@pytest.mark.parametrize("loss", [BinaryCrossEntropy(), SigmoidFocal()])
def test_hits_of_answers_that_do_not_exclude_each_other(loss):
    one = measured(loss, [[2.0], [-1], [1], [-3]], [[1.0], [1], [0], [0]])[0]
    assert one["accuracy"] == 0.5  # p above 1/2 where the target is
    several = [[1.0, 0, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    x = [[0.1, 0, 5], [0, 3, 1], [-3, -2, -4], [-1, -2, -3], [-1, 2, -3]]
    assert measured(loss, x, several)[0]["accuracy"] == 3 / 5  # one of the labels; best of low ones; none


@pytest.mark.parametrize("name", EVERY)
def test_extreme_outputs_stay_finite(name):
    for dtype in ("float64", "float32"):
        found, gradient = measured(EVERY[name], [[1e4, -1e4, 0], [0, 1e4, -1e4]], [1, 1], dtype)
        assert math.isfinite(found["loss"]) and np.isfinite(gradient).all(), dtype


@pytest.mark.parametrize("name", EVERY)
def test_an_output_that_is_nan_is_seen_in_the_loss(name):
    assert math.isnan(measured(EVERY[name], [[0, math.nan, 1], [1, 2, 3]], [0, 1])[0]["loss"])


@pytest.mark.parametrize("loss", [MeanSquaredError(), BinaryCrossEntropy(), SigmoidFocal()])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_target_that_is_nan_among_numbers_is_no_padding(loss, replicas):
    """Its row counts, its loss is NaN, and all other elements have the gradient that they have without it."""
    x, y = np.array([[-3.0, -1, -2], [2, 1, 3]]), np.array([[0.5, 0.25, 1], [0, 0, 1]])
    plain, expected = measured(loss, x, y, replicas=replicas)
    y[0, 1] = expected[0, 1] = np.nan
    found, gradient = measured(loss, x, y, replicas=replicas)
    assert math.isnan(found["loss"]) and math.isfinite(plain["loss"])
    np.testing.assert_array_equal(gradient, expected)
    assert (found["count"], found["accuracy"]) == (2, 1.0 if isinstance(loss, MeanSquaredError) else 0.5)


def split(n=7, k=3, values=False):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (n, 2, 2, 1)).astype(np.uint8)
    if values:
        return Split(images, values=(rng.random((n, k)) < 0.3).astype(np.float32))
    return Split(images, np.arange(n, dtype=np.int32) % k)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("name", EVERY)
def test_the_padding_of_the_last_batch_counts_nowhere(name, replicas, values):
    """7 images in batches of 4: as in one batch of 7, with labels and with values."""
    loss, image, found = EVERY[name], Input((2, 2, 1)), []
    images = split(values=values)
    if values and loss.op in ("mean_squared_error", "sigmoid_cross_entropy"):
        assert not images.values.any(axis=1).all(), "some rows are all zero, which are images too"
    elif values:
        images.values[:, 0] += 0.5  # a row of zeros has no class
    for batch in (4, 7):
        source = Source(images, 100.0, 1 / 64, classes=None if values else 3)
        with closing(Step(Graph(image, Linear(3, name="fc")(image)), loss, SGD(0.1), batch=batch, source=source,
                          replicas=replicas, dtype="float64")) as step:  # fmt: skip
            found.append(step.evaluate(source))
    assert found[0]["count"] == 7
    assert found[0] == pytest.approx(found[1], rel=1e-12)


# A recipe


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "hinge", "margin": 0}, "'margin' in [loss]: expected a number above 0, got 0"),
        ({"name": "hinge", "margin": "wide"}, "'margin' in [loss]: expected a number, got \"wide\""),
        ({"name": "hinge", "squared": 1}, "'squared' in [loss]: expected true or false, got 1"),
        ({"name": "hinge", "smoothing": 0.1}, "unknown key 'smoothing' in [loss]; known: name, margin, squared, cramm"),
        ({"name": "focal", "gamma": -1}, "'gamma' in [loss]: expected at least 0, got -1"),
        ({"name": "focal", "gamma": math.nan}, "'gamma' in [loss]: expected a finite number, got NaN"),
        ({"name": "focal", "alpha": 1}, "'alpha' in [loss]: expected a number below 1, got 1"),
        ({"name": "focal", "gama": 1}, "unknown key 'gama' in [loss]; did you mean 'gamma'? known: name, smoothing, g"),
        ({"name": "bce", "smoothing": 1}, "'smoothing' in [loss]: expected a number below 1, got 1"),
        ({"name": "svm"}, "'name' in [loss]: expected 'cross_entropy', 'mse', 'hinge', 'bce', 'focal', got \"svm\""),
        ({"margin": 1.0}, "unknown key 'margin' in [loss]; known: name, smoothing"),
        ({"name": []}, "'name' in [loss]: expected 'cross_entropy', 'mse'"),
        (3, "loss: expected a section [loss], got 3"),
    ],
)
def test_every_mistake_is_named(section, said):
    with pytest.raises(GpunetError) as caught:
        parse_config(SMALLEST | {"loss": section}, "a.toml")
    assert str(caught.value).startswith("a.toml: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("section", "kind", "arguments", "smoothing"),
    [
        ({}, SoftmaxCrossEntropy, {}, 0),
        ({"smoothing": 0.1}, SoftmaxCrossEntropy, {}, 0.1),
        ({"name": "mse"}, MeanSquaredError, {}, 0),
        ({"name": "bce", "smoothing": 0.2}, BinaryCrossEntropy, {}, 0.2),
        ({"name": "focal", "gamma": 1}, SigmoidFocal, {"gamma": 1, "alpha": 0.25}, 0),
        ({"name": "hinge", "squared": True}, Hinge, {"margin": 1, "squared": True, "crammer_singer": False}, 0),
    ],
)
def test_a_recipe_makes_its_loss(section, kind, arguments, smoothing, tmp_path):
    config = parse_config(SMALLEST | {"loss": section})
    (tmp_path / "a.toml").write_text(to_toml(config), encoding="utf-8")
    for read in (config, load_config(tmp_path / "a.toml")):
        loss = read.loss_function()
        assert (type(loss), vars(loss), read.smoothing) == (kind, arguments, smoothing)


def test_the_command_line_chooses_a_loss(tmp_path):
    (tmp_path / "a.toml").write_text("[model]\nname='mlp'\n[data]\nname='shapes'\n", encoding="utf-8")
    config = load_config(tmp_path / "a.toml", ["loss.name=hinge", "loss.margin=2"])
    assert vars(config.loss_function()) == {"margin": 2, "squared": False, "crammer_singer": False}
    with pytest.raises(GpunetError, match=r"^--set loss.margin=2: unknown key 'margin' in \[loss\]; known: name, smoo"):
        load_config(tmp_path / "a.toml", ["loss.margin=2"])


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Hinge(margin=0), "Hinge: margin: expected a number above 0, got 0"),
        (lambda: Hinge(margin=math.nan), "Hinge: margin: expected a number above 0, got nan"),
        (lambda: SigmoidFocal(gamma=-1), "SigmoidFocal: gamma: expected a number 0 or more, got -1"),
        (lambda: SigmoidFocal(alpha=1), "SigmoidFocal: alpha: expected a number above 0 and below 1, got 1"),
    ],
)
def test_a_mistake_in_code_is_named(made, said):
    with pytest.raises(GpunetError, match=said):
        made()


# What becomes of the outputs


OUTPUTS = np.array([[2.0, -1, 0.5], [0.1, 0.2, 0.3], [-1, 3, -2], [4, 1, 5]])
IMAGES = Split(np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 2, 1, 0], np.int32))


@pytest.mark.parametrize("name", EVERY)
def test_evaluation_measures_the_loss_that_was_trained(name):
    """Loss and accuracy are those of the kernel, with the loss's own arguments."""
    found, said = evaluate(OUTPUTS, IMAGES, EVERY[name], ""), measured(EVERY[name], OUTPUTS, IMAGES.labels)[0]
    assert (found.loss, found.accuracy) == (pytest.approx(said["loss"]), said["accuracy"])


def test_probabilities_by_loss():
    sigmoid = 1 / (1 + np.exp(-OUTPUTS))
    for name in ("bce", "focal"):
        found = evaluate(OUTPUTS, IMAGES, name, "")
        assert found.nll is None
        assert found.brier == pytest.approx(np.square(sigmoid - np.eye(3)[IMAGES.labels]).sum(1).mean())
        assert found.mistakes[0].confidence == pytest.approx(sigmoid[3, 2])
        assert found.mistakes[0].probability == pytest.approx(sigmoid[3, 0])
        assert [what for what, _ in found.lines()] == ["accuracy", "loss", "Brier score", "calibration error"]
    found = evaluate(OUTPUTS, IMAGES, "hinge", "")
    assert found.nll is found.brier is found.ece is None
    assert found.mistakes[0].confidence == 5
    assert [what for what, _ in found.lines()] == ["accuracy", "loss"]


def test_several_labels_an_image():
    values = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 0], [1, 0, 0]], np.float32)
    found = evaluate(OUTPUTS, Split(np.zeros((4, 2, 2, 1), np.uint8), values=values), "bce", "")
    said = measured(BinaryCrossEntropy(), OUTPUTS, values)[0]
    assert (found.loss, found.accuracy) == (pytest.approx(said["loss"]), said["accuracy"])
    assert said["accuracy"] == 0.5
    assert found.rmse is found.r2 is None


@pytest.mark.parametrize("name", LOSSES)
def test_predictor_and_onnx_agree(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    step = Step(models.build("mlp", (4, 4, 1), 3, hidden=(5,)), LOSSES[name](), batch=4, replicas=1)
    predictor = Predictor(step, np.asarray(100.0), np.asarray(1 / 64), ("a", "b", "c"), name)
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), np.uint8)
    outputs, predicted = predictor.outputs(images), predictor.predict(images)
    expected = {
        "cross_entropy": np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True),
        "bce": 1 / (1 + np.exp(-outputs)),
        "focal": 1 / (1 + np.exp(-outputs)),
    }.get(name, outputs)
    np.testing.assert_allclose(predicted, expected, rtol=1e-5)
    for what, source in (("predictor", predictor), ("step", None)):
        onnx(source or step, tmp_path / f"{what}.onnx")
        session = runtime.InferenceSession(str(tmp_path / f"{what}.onnx"), providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        assert names == (["logits"] if name in ("mse", "hinge") else ["logits", "probabilities"])
        if source and len(names) == 2:
            np.testing.assert_allclose(session.run(["probabilities"], {"images": images})[0], predicted, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["hinge", "bce", "focal"])
def test_a_run_learns_and_is_evaluated(name, dtype, tmp_path, monkeypatch):
    """From recipe to test: the loss falls, the checkpoint predicts, the test's loss is that of the kernel."""
    monkeypatch.setattr(report, "plot_curves", lambda *arguments: None)
    monkeypatch.setattr(report, "write_pictures", lambda *arguments: [])
    arguments = {"hinge": {"margin": 0.5, "squared": True}, "focal": {"gamma": 1.0, "alpha": 0.5}}.get(name, {})
    config = parse_config(
        SMALLEST
        | {
            "data": {"name": "shapes", "train": 200, "test": 22},
            "loss": {"name": name} | arguments,
            "optimizer": {"lr": {"hinge": 2e-4, "bce": 0.05, "focal": 0.05}[name]},
            "train": {"epochs": 8, "batch": 32, "replicas": 2, "dtype": dtype},
            "run": {"directory": str(tmp_path), "name": "a"},
        }
    )
    trainer = Trainer(config, show=False)
    result = trainer.fit()
    losses = [row["loss"] for row in result.rows if row["split"] == "train"]
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:3])
    test = trainer.step.evaluate(Source(trainer.data.test, trainer.predictor.mean, trainer.predictor.scale,
                                        classes=len(trainer.data.classes), name="again"))  # fmt: skip
    assert test["count"] == 22
    assert result.test.loss == pytest.approx(test["loss"], rel=1e-5 if dtype == "float32" else 1e-2)
    assert result.test.accuracy == pytest.approx(test["accuracy"])
    loaded = Predictor.load(result.run.checkpoint("best"))
    assert vars(loaded.step.loss) == vars(config.loss_function())
    np.testing.assert_allclose(loaded.predict(trainer.data.test.images), trainer.predict(trainer.data.test.images))


def test_hinge_and_values_in_a_data_set():
    """A DataSet of values is evaluated by any loss."""
    values = np.eye(3, dtype=np.float32)[[0, 2, 1, 0]]
    same = data.Split(np.zeros((4, 2, 2, 1), np.uint8), values=values)
    found = evaluate(OUTPUTS, same, Hinge(margin=0.5), "")
    assert found.loss == pytest.approx(evaluate(OUTPUTS, IMAGES, Hinge(margin=0.5), "").loss)
    assert found.accuracy == 0.75
