"""Checkpoints: what goes in comes out, a bad file is one clear error, and a fault while writing costs nothing."""

import errno
import os
from pathlib import Path
from random import Random

import mutate
import numpy as np
import pytest
from safetensors.numpy import save

from gpunet import nn
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.models import build
from gpunet.nn import LOSSES
from gpunet.optim import SGD
from gpunet.train import Predictor
from gpunet.train import checkpoint as module
from gpunet.train.checkpoint import Checkpoint


def network(width=4, name="fc"):
    image = nn.Input((4, 4, 2))
    layers = nn.Sequential(
        nn.Conv2d(width, 3, name="conv"), nn.BatchNorm(name="norm"), nn.Linear(3, name=name), name="net"
    )
    return nn.Graph(image, layers(image))


def step_of(graph, optimizer=True, seed=0):
    rule = SGD(0.1, momentum=0.9) if optimizer else None
    return Step(graph, LOSSES["cross_entropy"](), rule, batch=4, replicas=1, seed=seed)


@pytest.fixture
def trained():
    """A step after two updates: no state is what it was at first."""
    step = step_of(network())
    rng = np.random.default_rng(0)
    for _ in range(2):
        step.gradient(rng.normal(size=(4, 4, 4, 2)), np.array([0, 1, 2, 0]))
        step.update()
    return step


@pytest.fixture
def file(trained, tmp_path):
    Checkpoint.of(trained, [1.0, 2.0], 0.5, {"config": "text", "classes": ["ä", "b"]}).save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_what_is_saved_is_restored(trained, file):
    loaded, other = Checkpoint.load(file), step_of(network(), seed=1)
    assert (other.weights["net.conv.weight"] != trained.weights["net.conv.weight"]).any()
    loaded.restore(other)
    for group in ("weights", "statistics"):
        for name, array in getattr(trained, group).items():
            np.testing.assert_array_equal(getattr(other, group)[name], array, err_msg=name)
    assert np.abs(other.optimizer_state["velocity"]["net.fc.weight"]).max() > 0
    for name, array in trained.optimizer_state["velocity"].items():
        np.testing.assert_array_equal(other.optimizer_state["velocity"][name], array, err_msg=name)
    assert other.state == trained.state
    assert other.state["update"] == 2
    assert loaded.about["classes"] == ["ä", "b"]
    assert loaded.about["config_hash"] == module.digest("text") != module.digest("texts")
    np.testing.assert_array_equal(loaded.input["mean"], [1, 2])
    assert loaded.input["scale"] == 0.5


def test_a_step_that_only_predicts_takes_weights_alone(trained, file):
    other = step_of(network(), optimizer=False, seed=1)
    Checkpoint.load(file).restore(other)
    x = np.random.default_rng(1).normal(size=(3, 4, 4, 2)).astype(np.float32)
    np.testing.assert_array_equal(other.predict(x), trained.predict(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: b"", "damaged or none"),
        (lambda content: content[: len(content) // 2], "damaged or none"),
        (lambda content: content[:-1], "damaged or none"),
        (lambda content: b"\xff" * 8 + content[8:], "damaged or none"),
        (lambda content: b"a picture, say" * 40, "damaged or none"),
        (lambda content: save({"x": np.zeros(3)}), "a safetensors file of something else"),
        (lambda content: save({"x": np.zeros(3)}, {"gpunet": "{"}), "a safetensors file of something else"),
        (lambda content: save({"x": np.zeros(3)}, {"gpunet": "[]"}), "a safetensors file of something else"),
        (lambda content: content.replace(b'\\"format\\": 3,', b'\\"format\\": 9,'), "this gpunet reads format 3"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_clear_error(change, said, file):
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(GpunetError) as caught:
        Checkpoint.load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_a_folder(tmp_path):
    with pytest.raises(GpunetError, match=r"none\.safetensors: expected a checkpoint, found no file"):
        Checkpoint.load(tmp_path / "none.safetensors")
    with pytest.raises(GpunetError, match="expected a checkpoint"):
        Checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (network(width=5), r"weights: net\.conv\.weight: expected shape \(3, 3, 2, 5\), got \(3, 3, 2, 4\)"),
        (
            network(name="head"),
            r"weights: expected the network's 6 names; the file has no net\.head\.weight, net\.head\.bias and has "
            r"net\.fc\.bias, net\.fc\.weight, which the network has not",
        ),
    ],
)
def test_another_network_is_named_and_stays_as_it_was(graph, said, file):
    step = step_of(graph)
    before = step.weights["net.norm.beta"] + 0
    with pytest.raises(GpunetError, match=rf"a\.safetensors: {said}"):
        Checkpoint.load(file).restore(step)
    np.testing.assert_array_equal(step.weights["net.norm.beta"], before)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_fault_while_writing_leaves_the_old_file(name, trained, file, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(GpunetError, match=r"a\.safetensors: cannot be written \([\d,]+ bytes\): No space"):
        Checkpoint.of(trained, 0, 1, {}).save(file)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["a.safetensors"]


def test_nothing_of_a_file_is_unpickled():
    assert "pickle" not in Path(module.__file__).read_text(encoding="utf-8")


def rewritten(file, change):
    """Change header and tensors of a file, and give it the checksum that belongs to them."""
    header, tensors = mutate.parts(file.read_bytes())
    change(header, tensors)
    file.write_bytes(mutate.joined(header, tensors))


@pytest.mark.parametrize("kind", ["BF16", "I32", "F8_E4M3", "C64"])
def test_tensors_of_other_types_are_named(kind, file):
    name = "weights/net.fc.bias"

    def change(header, tensors):
        header[name]["dtype"], tensors[name] = kind, b"\0" * (3 * mutate.SIZES[kind])

    rewritten(file, change)
    with pytest.raises(GpunetError, match=rf"a\.safetensors: {name}: expected F16, F32, F64, got {kind}$"):
        Checkpoint.load(file)


def test_tensors_of_others_are_left_alone(trained, file):
    """Of a file only the groups are read that are ours."""

    def change(header, tensors):
        header["theirs"], tensors["theirs"] = {"dtype": "BF16", "shape": [2]}, b"abcd"
        header["weights/net.fc.bias"]["dtype"], tensors["weights/net.fc.bias"] = "F16", np.float16([1, 2, 3]).tobytes()

    rewritten(file, change)
    loaded = Checkpoint.load(file)
    assert (
        loaded.weights["net.fc.bias"].tolist() == [1, 2, 3] and loaded._tensors().keys() == content_of(trained).keys()
    )


def content_of(step):
    return Checkpoint.of(step, 0, 1, {})._tensors()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("config", 3, "config: expected a recipe in TOML, got 3"),
        ("classes", "abc", "classes: expected a list of names, got 'abc'"),
        ("classes", ["a", 3], r"classes: expected a list of names, got \['a', 3\]"),
        (
            "input_shape",
            [6, 6],
            r"input_shape: expected height, width and channels, whole numbers from 1 on, got \[6, 6\]",
        ),
        ("input_shape", [6, 6.0, 3], r"input_shape: expected height, .*got \[6, 6\.0, 3\]"),
        ("input_shape", [0, 6, 3], r"input_shape: expected height, .*got \[0, 6, 3\]"),
        ("outputs", True, "outputs: expected a whole number from 1 on, got True"),
        ("outputs", 2**40, "outputs: expected a whole number from 1 on, got 1099511627776"),
        ("epoch", "\x1b[31m", r"epoch: expected a whole number from 0 on, got '\\x1b\[31m'"),
    ],
)
def test_metadata_of_another_kind_is_named(key, value, said, file):
    file.write_bytes(mutate.about(Random(0), file.read_bytes(), lambda rng, about: about | {key: value}))
    with pytest.raises(GpunetError, match=rf"a\.safetensors: {said}$"):
        Checkpoint.load(file)


RECIPE = "[model]\nname = 'mlp'\nhidden = [4]\n[data]\nname = 'shapes'\n"
FITTING = {"config": RECIPE, "classes": ["a", "b", "c"], "input_shape": [4, 4, 2], "outputs": 3}


@pytest.fixture
def predicts(tmp_path):
    """A checkpoint to predict with, changed by a function: (mean, scale, about) -> the same."""

    def make(change=lambda mean, scale, about: (mean, scale, about)):
        graph = build("mlp", (4, 4, 2), 3, hidden=[4])
        Checkpoint.of(step_of(graph), *change(0.5, [1.0, 2.0], dict(FITTING))).save(tmp_path / "a.safetensors")
        return Checkpoint.load(tmp_path / "a.safetensors")

    return make


def without(key):
    return lambda mean, scale, about: (mean, scale, {k: v for k, v in about.items() if k != key})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *((without(key), f"expected a checkpoint to predict with; it has no {key}$") for key in FITTING),
        (lambda m, s, a: (m, s, a | {"config": "[["}), "not TOML"),
        (
            lambda m, s, a: (m, s, a | {"config": "x = " + "[" * 5000}),
            "not TOML: lists or tables in each other, too deep",
        ),
        (lambda m, s, a: (m, s, a | {"config": "x = " + "9" * 5000}), "not TOML: Exceeds the limit"),
        (lambda m, s, a: (m, s, a | {"config": RECIPE + "[train]\nx = 1"}), r"unknown key 'x' in \[train\]; known"),
        (lambda m, s, a: (m, s, a | {"config": RECIPE.replace("[4]", "[1000000000]")}), "weights: .*expected shape"),
        (lambda m, s, a: (m, s, a | {"classes": ["a"]}), "classes: expected 3 names, one an output, or none, got 1"),
        (lambda m, s, a: (m, s, a | {"outputs": 2**31 - 1, "classes": []}), "weights: .*expected shape"),
        (
            lambda m, s, a: ([1.0, 2.0, 3.0], s, a),
            r"input/mean: expected 1, 2 or \(4, 4, 2\) numbers, got shape \(3,\)",
        ),
        (lambda m, s, a: (m, np.nan, a), "input/scale: expected finite numbers, got NaN or infinity"),
    ],
)
def test_what_cannot_predict_is_one_clear_error(change, said, predicts):
    with pytest.raises(GpunetError, match=rf"^\S*a\.safetensors: (.*: )?{said}"):
        Predictor.load(predicts(change)).predict(np.zeros((1, 4, 4, 2), np.uint8))


def test_a_batch_that_no_memory_holds(predicts):
    def change(mean, scale, about):
        return mean, scale, about | {"config": f"{RECIPE}[train]\nbatch = {9 * 10**18}\n"}

    with pytest.raises(GpunetError, match="^predict: a batch of 9,000,000,000,000,000,000 images: cannot be allocated"):
        Predictor.load(predicts(change)).predict(np.zeros((1, 4, 4, 2), np.uint8))


def test_outputs_that_are_not_finite_are_no_answer(predicts):
    def change(mean, scale, about):
        return mean, 1e308, about

    with pytest.raises(GpunetError, match="predict: outputs: expected finite numbers"):
        Predictor.load(predicts(change)).predict(np.full((1, 4, 4, 2), 255, np.uint8))
    assert Predictor.load(predicts()).predict(np.zeros((1, 4, 4, 2), np.uint8)).sum() == pytest.approx(1)
