"""ONNX files: valid by onnx's checker, and in onnxruntime what `predict` gives, for every model and every layer."""

import json
import sys

import numpy as np
import pytest

from gpunet import data, models, nn, optim
from gpunet.core.source import Source
from gpunet.core.step import Step
from gpunet.data import Split
from gpunet.errors import GpunetError
from gpunet.export import _ends, onnx
from gpunet.models.resnet import BasicBlock
from gpunet.train import Predictor, Trainer, parse_config

runtime = pytest.importorskip("onnxruntime")
package = pytest.importorskip("onnx")

TOLERANCE = 1e-5  # of the largest value
SMALL = {  # arguments that make a model small enough for a test; the whole of each stays
    "resnet9": {"widths": (4, 8, 8, 16)},
    "resnet44": {"widths": (4, 8, 8)},
    "resnet56": {"widths": (4, 8, 8)},
    "resnet110": {"widths": (4, 4, 8)},
    "vgg": {"widths": (8, 8, 16, 16, 16), "dropout": 0.5},
    "layers": {"layers": [{"layer": "Conv2d", "outputs": 3, "size": 3}, {"layer": "Linear"}]},
    "airbench94": {"widths": (8, 8, 16)},
}


def predictor_of(graph, mean=0.0, scale=1.0, classes=(), loss="cross_entropy", seed=0, batch=4):
    """A network whose weights and statistics are all away from zeros and ones."""
    step = Step(graph, nn.LOSSES[loss](), batch=batch, replicas=1, seed=seed)
    rng = np.random.default_rng(seed)
    for tensors in (step.weights, step.statistics):
        for name, value in tensors.items():
            last = name.rpartition(".")[2]
            if last in ("variance", "gamma"):
                tensors[name] = rng.uniform(0.5, 1.5, value.shape)
            elif last != "weight":
                tensors[name] = value + rng.uniform(-0.3, 0.3, value.shape)
    return Predictor(step, np.asarray(mean), np.asarray(scale), classes, loss)


def session(path):
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def close(got, expected, where=""):
    assert got.shape == expected.shape, where
    error, allowed = np.abs(got - expected).max(), TOLERANCE * max(np.abs(expected).max(), 1e-3)
    assert np.isfinite(expected).all()
    assert error <= allowed, f"{where}: largest error {error:.3g}, allowed {allowed:.3g}"


def hold(predictor, images, path, where="", **options):
    """Export, and compare what onnxruntime makes of raw images with the predictor."""
    onnx(predictor, path, **options)
    logits, probabilities = session(path).run(["logits", "probabilities"], {"images": images})
    close(logits, predictor.outputs(images), where)
    close(probabilities, predictor.predict(images), where)


@pytest.fixture(scope="module")
def photographs(request):
    """Twelve test images of CIFAR-10, and the mean and 1/sd of its channels."""
    found = data.load("cifar10", request.getfixturevalue("cifar10"))
    mean, sd = data.channel_statistics(found)
    return found.test.images[:12], mean, 1 / sd


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_on_real_images(name, photographs, tmp_path):
    images, mean, scale = photographs
    graph = models.build(name, **SMALL.get(name, {}))
    hold(predictor_of(graph, mean, scale), images, tmp_path / "net.onnx", name)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_at_another_size(name, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (5, 41, 37, 1), np.uint8)
    graph = models.build(name, (41, 37, 1), 7, **SMALL.get(name, {}))
    hold(predictor_of(graph, 120.0, 1 / 64), images, tmp_path / "net.onnx", name)


def layers(shape):
    """A network with a layer of every kind, odd sizes, some called twice."""
    image = nn.Input(shape)
    twice = nn.Conv2d(8, (3, 5), name="twice")
    x = nn.Sequential(nn.Conv2d(8, 5, (2, 1), (1, 3), name="stem"), nn.BatchNorm(eps=1e-3), nn.LeakyReLU(0.2))(image)
    y = nn.Sequential(twice, nn.GELU(), nn.Dropout(0.3), twice, nn.SiLU())(x)
    z = nn.Sequential(nn.Conv2d(8, 3, groups=4, dilation=(2, 1), padding=(2, 1)), nn.Sigmoid())(y)
    x = nn.Concat()(nn.Add()(x, y, z), nn.Conv2d(5, 1, bias=False)(nn.BatchNorm(scale=False)(z)))
    x = nn.Sequential(nn.LRN(3, 0.5), nn.LRN(3, 0.5, region="within"))(x)
    up = nn.ConvTranspose2d(6, (3, 4), (1, 2), (1, 0), (0, 1), 2, (1, 2))(nn.DepthwiseConv2d(3, 2, 2)(z))
    odd = nn.Sequential(nn.LocallyConnected2d(4, 3, (2, 1)), nn.Scale(0.3), nn.LocallyConnected2d(3, 2, padding=0,
                        bias=False), nn.ConvTranspose2d(2, 3, bias=False))(up)  # fmt: skip
    pooled = nn.Sequential(nn.MaxPool(3, 2, 1, ceil=True), nn.Tanh(), nn.AvgPool((3, 2), 2, (1, 0), ceil=True))(x)
    rows = nn.Sequential(nn.Linear(9), nn.BatchNorm(), nn.ReLU())(pooled)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(6, bias=False))(pooled)
    ends = nn.GlobalAvgPool()(x), nn.Flatten()(nn.AvgPool(2)(pooled)), nn.GlobalAvgPool()(odd)
    joined = nn.Concat()(rows, flat, *ends)
    return nn.Graph(image, nn.Sequential(nn.Linear(5, name="logits"), nn.Dropout(0.1))(joined))


@pytest.mark.parametrize("shape", [(17, 23, 3), (20, 15, 1)])
@pytest.mark.parametrize("batch", [None, 6])
def test_all_layers(shape, batch, tmp_path):
    images = np.random.default_rng(2).integers(0, 256, (6, *shape), np.uint8)
    mean = np.random.default_rng(3).uniform(90, 150, shape)  # a mean image
    graph = layers(shape)
    kinds = {type(node.layer) for node in graph.nodes}
    assert kinds == {getattr(nn, n) for n in nn.__all__ if isinstance(getattr(nn, n), type)} - {
        nn.Block, nn.Graph, nn.Layer, nn.Node, nn.Sequential, nn.BatchNormReLU, nn.BatchNormAddReLU,
        *nn.LOSSES.values(),
        # in tests/test_onnx_more.py
        nn.DropConnect, nn.Dropout2d, nn.ELU, nn.GroupNorm, nn.Hardswish, nn.LayerNorm, nn.Maxout, nn.PReLU, nn.Softmax,
        nn.Softplus, nn.StochasticPool,
    }  # fmt: skip
    hold(predictor_of(graph, mean, 0.01), images, tmp_path / "net.onnx", batch=batch)


POOLS = [
    (size, stride, padding)
    for size in (1, 2, 3, (4, 3), (7, 5))
    for stride in (1, 2, 3, (4, 2))
    for padding in (0, 1, (2, 1))
    if all(2 * p <= k for p, k in zip(np.broadcast_to(padding, 2), np.broadcast_to(size, 2), strict=True))
]


@pytest.mark.parametrize("kind", ["max", "with_padding", "without_padding"])
def test_every_pool_at_every_edge(kind, tmp_path):
    """Many pools in one file, each an output of its own, so that loading costs once; images of 5 to 10 pixels."""
    hung = 0
    for height, width in [(5, 9), (6, 7), (8, 10)]:
        for ceil in (False, True):
            image, ends = nn.Input((height, width, 2)), []
            for size, stride, padding in POOLS:
                options = {"stride": stride, "padding": padding, "ceil": ceil}
                pool = nn.MaxPool(size, **options)
                if kind != "max":
                    pool = nn.AvgPool(size, **options, include_pad=kind == "with_padding")
                try:
                    pool.setup(image.shape)
                except GpunetError:
                    continue  # larger than the image
                ends.append(nn.Flatten()(pool(image)))
            graph = nn.Graph(image, nn.Concat()(*ends))
            nodes = [n for n in graph.nodes if type(n.layer) in (nn.MaxPool, nn.AvgPool)]
            hung += sum(any(e > p for e, p in zip(_ends(n), n.layer.padding, strict=True)) for n in nodes)
            images = np.random.default_rng(height).integers(0, 256, (2, height, width, 2), np.uint8)
            hold(predictor_of(graph, 128.0, 1 / 64), images, tmp_path / "net.onnx", f"{height} x {width} ceil={ceil}")
    assert hung > 50, "windows beyond the padding were tried"


def test_fused_layers(tmp_path):
    image = nn.Input((9, 8, 4))
    x = nn.Sequential(nn.Conv2d(4, 3), nn.BatchNorm(), nn.ReLU())(image)
    graph = nn.Graph(image, nn.Linear(3)(BasicBlock(6, 2, project=True, name="block")(x)))
    predictor = predictor_of(graph)
    images = np.random.default_rng(0).integers(0, 3, (4, 9, 8, 4), np.uint8)
    expected = predictor.outputs(images)
    predictor.step.graph = graph.fused()
    assert any(isinstance(node.layer, nn.BatchNormAddReLU) for node in predictor.step.graph.nodes)
    onnx(predictor, tmp_path / "net.onnx")
    close(session(tmp_path / "net.onnx").run(["logits"], {"images": images})[0], expected)


def test_any_batch_or_the_one_that_was_named(tmp_path):
    predictor = predictor_of(models.build("lenet", (20, 20, 3)), 100.0, 0.02)
    images = np.random.default_rng(0).integers(0, 256, (7, 20, 20, 3), np.uint8)
    onnx(predictor, tmp_path / "any.onnx")
    for n in (1, 3, 7):
        close(session(tmp_path / "any.onnx").run(["logits"], {"images": images[:n]})[0], predictor.outputs(images[:n]))
    onnx(predictor, tmp_path / "three.onnx", batch=3)
    three = session(tmp_path / "three.onnx")
    assert three.get_inputs()[0].shape == [3, 20, 20, 3]
    assert [o.shape for o in three.get_outputs()] == [[3, 10], [3, 10]]
    close(three.run(["logits"], {"images": images[:3]})[0], predictor.outputs(images[:3]))
    with pytest.raises(Exception, match="images"):
        three.run(None, {"images": images})


def test_the_file_says_what_goes_in_and_what_comes_out(tmp_path):
    names = tuple(f"class {i} ä" for i in range(10))
    model = onnx(predictor_of(models.build("mlp"), classes=names), tmp_path / "net.onnx", pixels="float32")
    package.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)
    opened = session(tmp_path / "net.onnx")
    known = opened.get_modelmeta().custom_metadata_map
    assert json.loads(known["classes"]) == list(names)
    assert known["input"] == ("raw pixels 0 to 255, normalised inside; float32 (n, 32, 32, 3): height, width, channels")
    assert known["input_layout"] == "NHWC"
    assert known["gpunet"] == model.producer_version
    assert [(i.name, i.type, i.shape) for i in opened.get_inputs()] == [("images", "tensor(float)", ["n", 32, 32, 3])]
    assert [(o.name, o.shape) for o in opened.get_outputs()] == [("logits", ["n", 10]), ("probabilities", ["n", 10])]
    assert model.opset_import[0].version == 17
    assert model.ir_version == 8
    assert "sequential1.head.weight" in {c.name for c in model.graph.initializer}


def test_a_step_with_and_without_a_source(tmp_path):
    """With one it takes the pixels of that, without one what the network takes."""
    images = np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3), np.uint8)
    split = Split(images, np.arange(6, dtype=np.int32) % 3)
    source = Source(split, np.array([120.0, 110, 100]), 1 / 64, classes=3)
    graph = nn.Graph(image := nn.Input((12, 12, 3)), nn.Sequential(nn.Conv2d(4, 3), nn.ReLU(), nn.Linear(3))(image))
    step = Step(graph, nn.SoftmaxCrossEntropy(), optim.SGD(0.1), batch=3, source=source, replicas=1)
    onnx(step, tmp_path / "with.onnx")
    close(session(tmp_path / "with.onnx").run(["logits"], {"images": images})[0], step.predict(images))
    bare = Step(graph, batch=3, replicas=1)
    onnx(bare, tmp_path / "without.onnx")
    floats = source.normalise(images).astype(np.float32)
    close(session(tmp_path / "without.onnx").run(["logits"], {"images": floats})[0], bare.predict(floats))


def test_values_have_no_probabilities(tmp_path):
    onnx(predictor_of(models.build("mlp", (4, 4, 1), 2), loss="mse"), tmp_path / "net.onnx")
    assert [o.name for o in session(tmp_path / "net.onnx").get_outputs()] == ["logits"]


def test_an_image_that_comes_out(tmp_path):
    """Outputs of three axes are gpunet's, channels last."""
    image = nn.Input((5, 6, 2))
    predictor = predictor_of(nn.Graph(image, nn.Conv2d(3, 3)(image)), loss="mse")
    images = np.random.default_rng(0).integers(0, 5, (2, 5, 6, 2), np.uint8)
    onnx(predictor, tmp_path / "net.onnx")
    close(session(tmp_path / "net.onnx").run(None, {"images": images})[0], predictor.outputs(images))


class Doubled(nn.ReLU):
    """Somebody's own layer: a subclass, which must not pass for its base."""


def test_what_cannot_be_written_is_refused_by_name(tmp_path, monkeypatch):
    image = nn.Input((4, 4, 1))
    graph = nn.Graph(image, nn.Sequential(Doubled(name="mine"), nn.Linear(2), name="net")(image))
    with pytest.raises(GpunetError, match=r"net\.mine: Doubled has no form in ONNX; expected one of Conv2d, Linear"):
        onnx(predictor_of(graph), tmp_path / "net.onnx")
    good = predictor_of(models.build("mlp", (4, 4, 1), 2))
    with pytest.raises(GpunetError, match="export: batch: expected at least 1, got 0"):
        onnx(good, tmp_path / "net.onnx", batch=0)
    with pytest.raises(GpunetError, match="export: pixels: expected uint8 or float32, got 'int8'"):
        onnx(good, tmp_path / "net.onnx", pixels="int8")
    with pytest.raises(GpunetError, match=r"nowhere/net\.onnx: cannot be written"):
        onnx(good, tmp_path / "nowhere" / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(GpunetError, match=r'^export: the package onnx is missing: pip install "gpunet\[onnx\]"$'):
        onnx(good, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_pictures")
def test_the_command(tmp_path, monkeypatch, gpunet):
    monkeypatch.chdir(tmp_path)
    config = parse_config(
        {
            "model": {"name": "cifar10_quick", "init": "he"},
            "data": {"name": "shapes", "train": 90, "test": 20},
            "preprocess": {"mean": "image"},
            "optimizer": {"lr": 0.01},
            "train": {"epochs": 1, "batch": 30, "replicas": 1},
            "run": {"name": "pools"},
        }
    )
    trainer = Trainer(config, show=False)
    folder = trainer.fit().run.path.name

    code, said, _ = gpunet("export", folder, "a.onnx", "--checkpoint", "best", "--batch", "5")
    assert code == 0
    assert "a.onnx: 583.6 KiB, ONNX opset 17, IR version 8" in said
    assert "images uint8 (5, 32, 32, 3), normalised inside -> logits and probabilities" in said
    assert "classes: " in said
    images = trainer.data.test.images[:5]
    close(session("a.onnx").run(["probabilities"], {"images": images})[0], trainer.predict(images))
    for arguments, text in (
        (("a.pt",), "expected a file name that ends in .onnx, got 'a.pt'"),
        (("a.onnx", "--batch", "few"), "--batch: expected a whole number or dynamic, got 'few'"),
        (("a.onnx", "--checkpoint", "first"), "checkpoint: expected best or last, got 'first'"),
    ):
        code, _, complaint = gpunet("export", folder, *arguments)
        assert code == 2
        assert text in complaint


def test_activations_by_themselves(tmp_path):
    """To 1e-6, so that an approximation of the error function does not pass for it."""
    image = nn.Input((8, 8, 1))
    kinds = (nn.ReLU(), nn.LeakyReLU(0.3), nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.SiLU())
    predictor = predictor_of(nn.Graph(image, nn.Concat()(*(nn.Flatten()(kind(image)) for kind in kinds))), 128, 1 / 32)
    images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    onnx(predictor, tmp_path / "net.onnx")
    got, expected = session(tmp_path / "net.onnx").run(["logits"], {"images": images})[0], predictor.outputs(images)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
