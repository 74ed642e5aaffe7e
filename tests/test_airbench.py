"""configs/cifar10_94.toml is the published recipe: its net, its first weights, its updates, number by number."""

import tomllib
from contextlib import closing

import numpy as np
import pytest
from small_run import halves, last_run, network, new, recipe

from gpunet import cli, nn, optim
from gpunet.core.source import Source
from gpunet.core.step import Step
from gpunet.data import Split
from gpunet.errors import GpunetError
from gpunet.train import initial, load_config, parse_config
from gpunet.train.build import build_graph, build_step
from gpunet.train.config import to_toml

NARROW = ["model.widths=[8, 12, 12]", "train.batch=20", "train.steps=5", "train.dtype='float64'", "train.replicas=2"]
BATCH = 2000  # of the published recipe, whose loss is a sum


def images(count=60):
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 10, count).astype(np.int32))


def narrow(*overrides):
    """Return (config, graph with its inits, source) at small widths."""
    config = load_config("cifar10_94", [*NARROW, *overrides])
    graph = build_graph(config, (32, 32, 3), 10)
    source = Source(images(), [120.0] * 3, [1 / 60] * 3, classes=10, smoothing=config.smoothing, name="train")
    initial.fit(graph, initial.begin(config, graph), source, 0)
    return config, graph, source


# The net


def test_the_net_is_the_published_one():
    graph = build_graph(load_config("cifar10_94"), (32, 32, 3), 10)
    kinds = [type(node.layer).__name__ for node in graph.nodes]
    group = ["Conv2d", "MaxPool", "BatchNorm", "GELU", "Conv2d", "BatchNorm", "GELU"]
    assert kinds == ["Conv2d", "GELU", *group * 3, "MaxPool", "Linear", "Scale"]
    shapes = [node.shape for node in graph.nodes if type(node.layer).__name__ in ("Conv2d", "MaxPool", "Linear")]
    assert shapes == [
        (31, 31, 24), (31, 31, 64), (15, 15, 64), (15, 15, 64), (15, 15, 256), (7, 7, 256), (7, 7, 256),
        (7, 7, 256), (3, 3, 256), (3, 3, 256), (1, 1, 256), (10,),
    ]  # fmt: skip
    assert graph.size == 1_971_640
    trained = {p.name: p.shape for p in graph.parameters() if p.trainable and not p.frozen}
    assert trained.pop("whiten.bias") == (24,) and trained.pop("head.weight") == (256, 10)
    assert sum(name.endswith(".beta") for name in trained) == 6
    assert {name: shape[2:] for name, shape in trained.items() if not name.endswith(".beta")} == {
        "group1.conv1.weight": (24, 64), "group1.conv2.weight": (64, 64), "group2.conv1.weight": (64, 256),
        "group2.conv2.weight": (256, 256), "group3.conv1.weight": (256, 256), "group3.conv2.weight": (256, 256),
    }  # fmt: skip
    norms = [node.layer for node in graph.nodes if isinstance(node.layer, nn.BatchNorm)]
    assert {(n.eps, n.momentum, n.scale, n.shift) for n in norms} == {(1e-12, 0.4, False, True)}
    assert graph.nodes[-1].layer.factor == 1 / 256


def test_the_rest_of_the_recipe():
    config = load_config("cifar10_94")
    assert (config.train.batch, config.train.epochs, config.data.validation) == (BATCH, 8, 0)
    assert config.smoothing == 0.2
    np.testing.assert_allclose(config.rates(200, 25), 0.24 * (1 - np.arange(200) / 200), rtol=1e-12)
    assert {"alternate", "crop"} <= {*config.augment.augmentation.active} <= {"flip", "alternate", "crop"}
    assert (config.augment.crop, config.augment.reflect, config.augment.alternate) == (2, True, True)
    assert config.train.views == "flip+shift"


def test_the_first_weights():
    _, graph, _ = narrow()
    with closing(Step(graph, batch=1, replicas=1, dtype="float64")) as step:
        w = dict(step.weights)
    first = w["group2.conv1.weight"]  # 8 inputs, 12 filters
    expected = np.zeros((3, 3, 8, 8))
    expected[1, 1, range(8), range(8)] = 1
    np.testing.assert_array_equal(first[..., :8], expected)
    limit = 1 / np.sqrt(9 * 8)  # what PyTorch gives a convolution
    assert 0.8 * limit < np.abs(first[..., 8:]).max() <= limit * (1 + 1e-5)
    assert w["head.weight"].std() == pytest.approx(1, abs=0.1) and np.abs(w["head.weight"]).max() < 1.7321
    assert 0.2 < np.abs(w["whiten.bias"]).max() < 0.2887
    np.testing.assert_array_equal(w["whiten.weight"][..., :12], -w["whiten.weight"][..., 12:])


# The update: as published, in its layout (filters first) and of sums over a batch of 2000


def newton_schulz(g, steps=3):
    x = g / (np.linalg.norm(g) + 1e-7)
    x = x.T if len(g) > g.shape[1] else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if len(g) > g.shape[1] else x


def muon(w, g, memory, share):
    """lr .24, momentum .6 of Nesterov; the filters are made as long as sqrt(their number) before the step."""
    w, g = (np.moveaxis(a, 3, 0).reshape(a.shape[3], -1) for a in (w, g))
    memory["v"] = 0.6 * memory.get("v", 0) + g
    w = w * len(w) ** 0.5 / np.linalg.norm(w)
    return w - 0.24 * share * newton_schulz(g + 0.6 * memory["v"])


def sgd(w, g, memory, share, lr):
    """Momentum .85 of Nesterov; weight_decay = 2e-6 * 2000 / lr is part of the gradient."""
    d = g + 2e-6 * BATCH / lr * w
    memory["v"] = 0.85 * memory.get("v", 0) + d
    return w - lr * share * (d + 0.85 * memory["v"])


def test_updates_are_the_published_ones():
    config, graph, source = narrow()
    memories, moved = {}, set()
    with closing(build_step(config, graph, source)) as step:
        w = {name: value for name, value in step.weights.items() if name != "whiten.weight"}
        for update in range(5):
            step.gradient()
            for name in w:
                g = step.read(f"{name}:gradient") * (BATCH / 20)  # the sum over 2000 such images
                memory, share, shape = memories.setdefault(name, {}), 1 - update / 5, w[name].shape
                if w[name].ndim == 4:
                    rows = muon(w[name], g, memory, share)
                    w[name] = np.moveaxis(rows.reshape(shape[3], *shape[:3]), 0, 3)
                else:
                    w[name] = sgd(w[name], g, memory, share, 0.67 if name == "head.weight" else 0.053)
            before = dict(step.weights)
            step.update()
            step.advance()
            for name, value in w.items():
                np.testing.assert_allclose(step.weights[name], value, rtol=1e-5, atol=1e-7, err_msg=f"{update} {name}")
                moved |= {name} if np.abs(before[name] - value).max() > 1e-6 else set()
            np.testing.assert_array_equal(step.weights["whiten.weight"], before["whiten.weight"])
            w = {name: step.weights[name].copy() for name in w}
    assert moved == set(w)


def test_decay_bites_where_it_should():
    """Gradients of nothing: what still moves, moves by decay; the published rates of it, to the first order."""
    config, graph, source = narrow()
    with closing(build_step(config, graph, source)) as step:
        step.gradient(np.zeros((20, 32, 32, 3)), np.full((20, 10), 0.1))
        before = {name: value.copy() for name, value in step.weights.items()}
        g = {name: step.read(f"{name}:gradient") * (BATCH / 20) for name in ("head.weight", "whiten.bias")}
        step.update()
        for name, lr in (("head.weight", 0.67), ("whiten.bias", 0.053)):
            left = (before[name] - step.weights[name]) / 1.85 - lr * g[name]
            np.testing.assert_allclose(left, 0.004 * before[name], rtol=1e-3, atol=1e-8)


def test_what_is_orthogonalized_has_no_decay_in_its_gradient():
    config = load_config("cifar10_94", NARROW)
    config.optimizer.groups[0].decay = 1.0
    graph = build_graph(config, (32, 32, 3), 10)
    source = Source(images(), [120.0] * 3, [1 / 60] * 3, classes=10, name="train")
    with pytest.raises(GpunetError, match="Muon: decoupled: expected True, got False: decay .* group1.conv1"):
        build_step(config, graph, source)
    Step(graph, nn.SoftmaxCrossEntropy(), optim.Muon(decoupled=False, weight_decay=0.0), batch=2).close()


def test_it_fits_into_8_gigabytes(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpunet", "summary", "cifar10_94", "--backend", "numpy"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    number, unit = capsys.readouterr().out.split("peak")[1].split()
    assert unit == "GiB" and float(number) < 4  # one replica a core more adds little: the batch is shared


# Views in a recipe


def test_the_test_at_the_end_averages_over_the_views_of_the_recipe(tmp_path):
    config = recipe(tmp_path, train={"views": "flip+shift", "epochs": 1})
    assert parse_config(tomllib.loads(to_toml(config))).train.views == "flip+shift"
    trainer = new(config)
    result = trainer.fit()
    seen, plain = trainer.evaluate("test", "flip+shift"), trainer.evaluate("test")
    assert result.test.nll == seen.nll != plain.nll
    row = result.run.metrics()[-1]
    assert (row["split"], row["loss"]) == ("test", seen.loss)
    assert "views flip+shift" in result.summary
    assert "the mean over views flip+shift" in (last_run(config) / "report.md").read_text()


@pytest.mark.parametrize(
    ("views", "said"),
    [
        ("flop", "'views' in [train]: expected flip, shift, five-crop, ten-crop, each once, joined by +, got \"flop\""),
        ("shift:0", "'views' in [train]: expected shift[:PIXELS,zero|reflect], got \"shift:0\""),
        (3, "'views' in [train]: expected a text in quotes, got 3"),
    ],
)
def test_views_that_are_none_are_refused(tmp_path, views, said):
    with pytest.raises(GpunetError) as caught:
        recipe(tmp_path, train={"views": views})
    assert said in str(caught.value)


def test_views_that_do_not_fit_are_told_before_the_training(tmp_path):
    with pytest.raises(GpunetError, match=r"views: expected fewer pixels than the image has \(6 x 6\), got 6"):
        new(recipe(tmp_path, train={"views": "shift:6"}))
    assert network().input_shape == halves().train.images.shape[1:] == (6, 6, 3)
