"""Views at test time: which they are, pixel by pixel, and that a prediction is the mean over them."""

import json
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import halves, network, new, recipe

from gpunet import Source, Step, cli, nn
from gpunet.core.state import new_state
from gpunet.data import Split
from gpunet.errors import GpunetError
from gpunet.train import Predictor, report
from gpunet.train.views import Views

RNG = np.random.default_rng(0)
IMAGE = np.arange(30, dtype=np.float64).reshape(1, 5, 6, 1)  # each pixel its own value


def views(text, x=IMAGE, size=None, outside=-1.0):
    return [*Views(text).of(x, size or x.shape[1:3], outside)]


def pixel(y, x, reflect):
    """The value of IMAGE at any place."""
    if reflect:
        y, x = abs(y), abs(x)
        y, x = y if y < 5 else 8 - y, x if x < 6 else 10 - x
    return IMAGE[0, y, x, 0] if 0 <= y < 5 and 0 <= x < 6 else -1


def moved(down, right, reflect, h=5, w=6, flip=False):
    """IMAGE with its content moved, cut to h x w, one pixel at a time."""
    columns = [w - 1 - x for x in range(w)] if flip else range(w)
    return np.array([[pixel(y - down, x - right, reflect) for x in columns] for y in range(h)])[None, :, :, None]


def same(found, expected):
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


# Which views


def test_a_flip_is_the_image_and_its_mirror_image():
    same(views("flip"), [IMAGE, IMAGE[:, :, ::-1]])


@pytest.mark.parametrize(
    ("text", "by", "reflect"),
    [("shift", 1, True), ("shift:2", 2, True), ("shift:2,zero", 2, False), ("shift:zero", 1, False)],
)
def test_shifts_are_up_left_and_down_right(text, by, reflect):
    same(views(text), [IMAGE, moved(-by, -by, reflect), moved(by, by, reflect)])


def test_airbenchs_six_views():
    expected = [moved(d, d, True, flip=flip) for d in (0, -1, 1) for flip in (False, True)]
    same(views("flip+shift"), expected)
    same(views("shift+flip"), expected)


@pytest.mark.parametrize(
    ("text", "pad", "reflect"),
    [("ten-crop:pad2", 2, True), ("ten-crop:pad1,zero", 1, False), ("ten-crop", 4, True)],
)
def test_ten_crops_of_the_padded_image(text, pad, reflect):
    corners = [(pad, pad), (pad, -pad), (-pad, pad), (-pad, -pad), (0, 0)]  # from the upper left corner on
    same(views(text), [moved(*corner, reflect, flip=flip) for corner in corners for flip in (False, True)])


def test_a_larger_image_is_cropped_as_it_is():
    found = views("five-crop", size=(3, 4))
    same(found, [moved(-top, -left, False, 3, 4) for top, left in ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1))])
    assert len(views("ten-crop", size=(3, 4))) == 10
    assert len(views("five-crop+flip+shift", size=(3, 4))) == 30


def test_crops_at_several_sizes():
    x = RNG.normal(size=(2, 8, 12, 3))
    found = views("five-crop:10,8,16", x, (8, 8))
    assert [v.shape for v in found] == [(2, 8, 8, 3)] * 15
    for n in range(2):
        for channel in range(3):
            plane = Image.fromarray(x[n, :, :, channel].astype(np.float32)).resize((15, 10), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(found[3][n, :, :, channel], np.asarray(plane)[2:, 7:])  # lower right
    np.testing.assert_allclose(found[5], x[:, :, :8], rtol=1e-6)  # its own size
    flat = views("ten-crop:9,20", np.full((1, 8, 8, 2), 0.25), (8, 8))
    assert len(flat) == 20 and all((v == 0.25).all() for v in flat)


@pytest.mark.parametrize("reflect", [True, False])
@pytest.mark.parametrize("mean", [np.array([100.0, 50.0]), RNG.uniform(50, 150, (6, 6, 2))])
def test_what_lies_outside_is_what_training_sees_there(reflect, mean):
    """Crops of the training batch, whose corners are drawn, are found among all shifts of the image."""
    images = RNG.integers(0, 256, (1, 6, 6, 2), np.uint8)
    source = Source(Split(images, np.zeros(1, np.int32)), mean, 0.5, pad=1, reflect=reflect, classes=2)
    image = nn.Input((6, 6, 2))
    step = Step(nn.Graph(image, nn.Linear(2)(nn.ReLU(name="seen")(image))), nn.SoftmaxCrossEntropy(), batch=1,
                source=source, dtype="float64", keep=("*:output",))  # fmt: skip
    predictor = Predictor(step, mean, np.array(0.5), ("a", "b"), "cross_entropy")
    seen, original = [], step.predict
    step.predict = lambda x: (seen.append(np.maximum(x, 0)), original(x))[1]
    predictor.predict(images, "ten-crop:pad1" + ",zero" * (not reflect))
    found = 0
    with closing(step):
        for epoch in range(40):
            state = new_state()
            state["batch"], state["epoch"] = epoch, epoch
            step.state = state
            step.gradient()
            drawn = step.read("seen:output")
            found += any(np.abs(drawn - view).max() < 1e-9 for view in seen[::2])
    assert len(seen) == 10
    assert 40 / 9 < found < 40  # of nine crops five are views


# What is made of them


def trained_predictor(layers, loss="cross_entropy", batch=4, mean=120.0):
    image = nn.Input((6, 6, 3))
    step = Step(nn.Graph(image, layers(image)), batch=batch, dtype="float64", seed=1)
    return Predictor(step, np.asarray(mean), np.array([1 / 60] * 3), ("a", "b", "c"), loss)


RAW = RNG.integers(0, 256, (11, 6, 6, 3), np.uint8)


def test_a_network_that_does_not_see_the_difference_predicts_the_same():
    mean = trained_predictor(nn.Sequential(nn.GlobalAvgPool(), nn.Linear(3)))
    np.testing.assert_allclose(mean.predict(RAW, "flip"), mean.predict(RAW), rtol=1e-12)
    assert np.abs(mean.predict(RAW, "shift") - mean.predict(RAW)).max() > 1e-4


def test_a_symmetric_convolution_is_equivariant_to_flips():
    seen = trained_predictor(nn.Sequential(nn.Conv2d(4, 3, name="conv"), nn.ReLU(), nn.GlobalAvgPool(), nn.Linear(3)))
    plain, mirrored = seen.predict(RAW), seen.predict(RAW, "flip")
    assert np.abs(plain - mirrored).max() > 1e-6
    (name,) = (name for name in seen.step.weights if name.endswith("conv.weight"))
    weight = np.array(seen.step.weights[name])
    seen.step.weights[name] = (weight + weight[:, ::-1]) / 2
    np.testing.assert_allclose(seen.predict(RAW, "flip"), seen.predict(RAW), rtol=1e-12)


@pytest.mark.parametrize("text", ["flip", "shift:2", "ten-crop", "five-crop:9,12", "flip+shift:zero"])
def test_probabilities_are_averaged(text):
    predictor = trained_predictor(nn.Sequential(nn.Conv2d(4, 3), nn.ReLU(), nn.Linear(3)))
    seen = Views(text).of((RAW - 120.0) / 60, (6, 6), -2.0)
    logits = np.array([predictor.step.predict(view) for view in seen])
    p = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    np.testing.assert_allclose(predictor.predict(RAW, text), p.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(predictor.outputs(RAW, text), np.log(p.mean(axis=0)), rtol=1e-9)


def test_a_linear_network_with_mse_sees_the_mean_image():
    predictor = trained_predictor(nn.Linear(3), "mse")
    found = predictor.predict(RAW, "flip+shift")
    x = np.mean([*Views("flip+shift").of((RAW - 120.0) / 60, (6, 6))], axis=0)
    (weight,) = (w for name, w in predictor.step.weights.items() if name.endswith("weight"))
    (bias,) = (w for name, w in predictor.step.weights.items() if name.endswith("bias"))
    np.testing.assert_allclose(found, x.reshape(11, -1) @ weight + bias, rtol=1e-9, atol=1e-12)


def test_sure_views_that_disagree_give_a_finite_loss():
    predictor = trained_predictor(nn.Linear(3))
    (name,) = (name for name in predictor.step.weights if name.endswith("weight"))
    predictor.step.weights[name] = 1e4 * RNG.normal(size=(108, 3))
    outputs = predictor.outputs(RAW, "flip")
    assert np.isfinite(outputs).all() and (outputs < -1e3).any()
    np.testing.assert_allclose(predictor.predict(RAW, "flip").sum(axis=1), 1, rtol=1e-9)


def test_an_evaluation_is_of_the_mean(tmp_path, monkeypatch):
    monkeypatch.setattr("gpunet.train.trainer.write_report", lambda result: None)
    trainer = new(recipe(tmp_path))
    test = halves().test
    p = trainer.predict(test.images, "flip+shift")
    found = trainer.evaluate("test", "flip+shift")
    assert found.accuracy == (p.argmax(axis=1) == test.labels).mean()
    assert found.nll == pytest.approx(-np.log(p[np.arange(20), test.labels]).mean(), rel=1e-6)
    assert trainer.evaluate().nll != found.nll


# The command


@pytest.fixture
def gpunet(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot_curves", lambda *arguments: None)
    monkeypatch.setattr(report, "write_pictures", lambda *arguments: [])

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpunet", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_the_command_prints_both(gpunet):
    settings = ["data.train=90", "data.test=30", "train.batch=30", "train.epochs=1", "model.hidden=[8]"]
    assert gpunet("train", "mlp_shapes", *(word for s in settings for word in ("--set", s)))[0] == 0
    (run,) = (path.name for path in Path("runs").iterdir())
    plain = gpunet("evaluate", run)[1].splitlines()[0]
    code, out, _ = gpunet("evaluate", run, "--views", "flip+shift:2", "--json", "found.json")
    assert code == 0
    first, second = out.splitlines()[:2]
    assert first.startswith("test of shapes: accuracy ")
    assert second.startswith("views flip+shift:2, their probabilities averaged; without views: accuracy ")
    assert second.split("without views: ")[1] in plain
    found = json.loads(Path("found.json").read_text())
    assert found["views"] == "flip+shift:2" and set(found["plain"]) == {"loss", "accuracy"}
    assert found["loss"] != found["plain"]["loss"]

    Image.fromarray(RNG.integers(0, 255, (40, 40, 3), np.uint8)).save("a.png")
    plain, seen = gpunet("predict", run, "a.png")[1], gpunet("predict", run, "a.png", "--views", "ten-crop")[1]
    assert plain.startswith("a.png: ") and seen.startswith("a.png: ") and plain != seen
    code, _, err = gpunet("evaluate", run, "--views", "flop")
    assert (code, err.splitlines()[-1]) == (
        2, "gpunet: views: expected flip, shift, five-crop, ten-crop, each once, joined by +; got 'flop'",
    )  # fmt: skip


# Mistakes


@pytest.mark.parametrize("text", ["", "flip+", "+flip", "flip+flip", "Flip", "flip shift", "none", 3, None, ["flip"]])
def test_unknown_views_are_refused(text):
    with pytest.raises(GpunetError, match=r"views: expected flip, shift, five-crop, ten-crop, each once, joined by \+"):
        Views(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shift:0", "shift["), ("shift:-1", "shift["), ("shift:1,2", "shift["), ("shift:", "shift["),
        ("shift:pad2", "shift["), ("shift:1.5", "shift["), ("shift:zero,reflect", "shift["), ("flip:2", "flip, got"),
        ("flip:zero", "flip, got"), ("ten-crop:36,pad4", "ten-crop["), ("ten-crop:pad", "ten-crop["),
        ("five-crop:pad1,pad2", "five-crop["), ("ten-crop:nan", "ten-crop["), ("shift:99999", "shift["),
    ],
)  # fmt: skip
def test_wrong_arguments_are_told_the_form(text, expected):
    with pytest.raises(GpunetError) as caught:
        Views(text)
    assert str(caught.value).startswith(f"views: expected {expected}") and f"got '{text}'" in str(caught.value)


@pytest.mark.parametrize("text", ["ten-crop+flip", "flip+ten-crop", "five-crop+ten-crop", "ten-crop+five-crop:8"])
def test_ten_crops_have_their_own_flips(text):
    with pytest.raises(GpunetError, match="ten-crop has five-crop and flip in it"):
        Views(text)


@pytest.mark.parametrize(
    ("text", "size", "said"),
    [
        ("ten-crop:4", (5, 6), "ten-crop: expected images of at least 5 x 6 pixels, got 4 x 5"),
        ("five-crop", (9, 9), "five-crop: expected images of at least 9 x 9 pixels, got 5 x 6"),
        ("shift:5", None, r"expected fewer pixels than the image has \(5 x 6\), got 5"),
    ],
)
def test_images_that_do_not_do(text, size, said):
    with pytest.raises(GpunetError, match=f"views: {said}"):
        views(text, size=size)


def test_a_mean_image_has_one_size():
    predictor = trained_predictor(nn.Linear(3), mean=RNG.uniform(0, 255, (6, 6, 3)))
    assert predictor.predict(RAW, "ten-crop").shape == (11, 3)
    with pytest.raises(GpunetError, match=r"with a mean image or whitening, expected images of the size \(6 x 6\)"):
        predictor.predict(np.zeros((2, 9, 9, 3), np.uint8), "ten-crop")


def test_a_loaded_network_takes_views(tmp_path, monkeypatch):
    """They need nothing of the training but the network's input and its normalisation."""
    monkeypatch.setattr("gpunet.train.trainer.write_report", lambda result: None)
    trainer = new(recipe(tmp_path, train={"epochs": 1}))
    run = trainer.fit().run
    monkeypatch.setattr("gpunet.train.predictor.build_graph", lambda *arguments: network())
    loaded, images = Predictor.load(run.checkpoint("best")), halves().test.images
    np.testing.assert_array_equal(loaded.predict(images, "ten-crop"), trainer.predict(images, "ten-crop"))
