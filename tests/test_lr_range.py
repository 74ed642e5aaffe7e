"""The learning-rate range test: what it tells of known curves, and that its training is the one it says it is."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from small_run import halves, network, recipe

from gpunet import cli
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.train import Trainer, parse_config, plots
from gpunet.train.lr_range import EXPLODED, RangeTest, range_test, smooth

RATES = np.geomspace(1e-5, 10, 200)


def curve(middle=1e-2, exploding=1.0):
    """A loss that falls by a sigmoid of log rate around `middle` and grows like (rate / exploding)^2."""
    falls = 1 / (1 + np.exp(-np.log(RATES / middle) / 0.4))
    return 2.3 - 1.8 * falls + (RATES / exploding) ** 2 / 4  # half as high again as 0.5 at the exploding rate


def test_a_known_curve_tells_its_rates():
    noise = np.random.default_rng(0).normal(0, 0.02, 200)
    found = RangeTest("x", RATES, curve() + noise)
    assert found.steepest == pytest.approx(1e-2, rel=0.25)
    assert found.exploding == pytest.approx(1.0, rel=0.5)
    assert found.suggested == found.steepest
    assert np.abs(found.smoothed[:120] - curve()[:120]).max() < 0.2
    early = RangeTest("x", RATES, curve(exploding=0.05) + noise)
    assert early.suggested == early.exploding / 10 < early.steepest
    assert "to begin with: --set optimizer.lr=0.0" in str(early)


def test_a_descent_behind_the_lowest_loss_does_not_count():
    losses = curve()
    losses[-20:] = np.linspace(30, 0.6, 20)  # it explodes and comes back
    assert RangeTest("x", RATES, losses).steepest == pytest.approx(1e-2, rel=0.25)


def test_without_an_explosion_only_the_descent_is_told():
    found = RangeTest("x", RATES, curve(exploding=1e6))
    assert (found.exploding, found.suggested) == (None, found.steepest)
    assert "it does not explode: a larger --to would show where" in str(found)


def test_a_loss_that_is_not_finite_is_an_explosion():
    losses = curve(exploding=1e6)
    losses[-1] = np.inf
    assert RangeTest("x", RATES, losses).exploding == RATES[-1]


def test_a_loss_that_only_rises_suggests_nothing():
    found = RangeTest("x", RATES, np.linspace(1, 9, 200))
    assert (found.steepest, found.suggested) == (None, None)
    assert "nothing to suggest: the loss never fell" in str(found)


def test_smoothing_leaves_straight_lines_and_takes_noise():
    line = np.linspace(3, 2, 90)
    np.testing.assert_allclose(smooth(line)[15:-15], line[15:-15], rtol=1e-3)
    noise = np.random.default_rng(1).normal(0, 1, 90)
    assert smooth(10 + noise).std() < 0.45
    np.testing.assert_allclose(smooth(np.full(20, 0.7)), 0.7)
    assert smooth(np.array([1.0, np.inf, np.nan, 1])).max() <= EXPLODED
    falling = np.geomspace(9, 0.1, 90)  # by more than EXPLODED: what was high before is no explosion
    assert smooth(falling)[0] > 8


@pytest.fixture
def config(tmp_path):
    """Plateau, patience and watching are the training's; a range test has none of them."""
    return recipe(
        tmp_path,
        schedule={"name": "plateau"},
        train={"patience": 2, "watch": ["net.conv"], "lr_rule": "linear", "base_batch": 20},
        run={"tensorboard": False},
    )


@pytest.mark.parametrize("linear", [False, True])
def test_the_rates_are_those_of_the_updates(linear, config, monkeypatch):
    seen = []
    original = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda step, n: (original(step, n), seen.append(step.metrics()[-1]))[0])
    found = range_test(config, 1e-4, 1e-1, 20, linear=linear, graph=network(), data=halves())
    space = np.linspace if linear else np.geomspace
    np.testing.assert_allclose(found.rates, space(1e-4, 1e-1, 20), rtol=1e-12)
    np.testing.assert_allclose([row[4] for row in seen], found.rates, rtol=1e-6)
    np.testing.assert_allclose([row[0] for row in seen], found.losses)
    assert found.factor == 2  # 40 images an update, for 20
    assert config.schedule.name == "plateau" and config.optimizer.lr == 0.05  # as it was
    if found.suggested:
        assert f"--set optimizer.lr={found.suggested / 2:.2g}  # times 2 by train.lr_rule" in str(found)


def test_it_is_the_training_of_the_config(config):
    """At one rate all along it, its losses are the Trainer's."""
    found = range_test(config, 0.05, 0.05 * (1 + 1e-12), 12, graph=network(), data=halves())
    config.train.lr_rule, config.train.epochs, config.train.patience = "none", 4, None
    rows = Trainer(config, graph=network(), data=halves(), show=False).fit().rows
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    # epochs of five batches, two an update: a Trainer's third update has one batch, this one's two
    np.testing.assert_allclose(found.losses[:2], losses[:2], rtol=1e-5)


def test_it_stops_where_the_loss_explodes(config):
    config.train.accumulate = 1
    found = range_test(config, 1e-3, 1e6, 60, graph=network(), data=halves())
    assert 10 <= len(found.rates) < 60 and len(found.rates) == len(found.losses)
    assert found.exploding < found.rates[-1]
    assert np.isfinite(found.smoothed).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_not_finite_ends_it(config, monkeypatch):
    config.train.accumulate = 1
    monkeypatch.setattr("gpunet.train.lr_range.EXPLODED", np.inf)
    found = range_test(config, 1e-3, 1e30, 60, graph=network(), data=halves())
    assert 10 < len(found.rates) < 60 and found.losses[-1] == np.inf and np.isfinite(found.losses[:-1]).all()


def test_it_leaves_no_run(config, tmp_path):
    range_test(config, 1e-4, 1e-2, 10, graph=network(), data=halves())
    assert not (tmp_path / "runs").exists()


def test_skipped_updates_are_done_again(config):
    """float16 with a loss scale that has to come down first."""
    config.train.dtype = "float16"
    original = Step.__init__

    def scaled(step, *arguments, **options):
        original(step, *arguments, **options)
        state = step.state
        state["loss_scale"] = 2.0**22
        step.state = state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__init__", scaled)
        found = range_test(config, 1e-4, 1e-2, 12, graph=network(), data=halves())
    assert len(found.losses) == 12 and np.isfinite(found.losses).all()


def test_validation_is_not_needed(config):
    range_test(config, 1e-4, 1e-2, 10, graph=network(), data=halves(validation=0))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 1), "lr-range: expected rates 0 < from < to, got from 0 to 1"),
        ((-1, 1), "expected rates 0 < from < to"), ((1, 1), "expected rates 0 < from < to"),
        ((1, 0.1), "expected rates 0 < from < to"), ((1, float("inf")), "expected rates 0 < from < to"),
        ((float("nan"), 1), "expected rates 0 < from < to"), ((1e-3, float("nan")), "expected rates 0 < from < to"),
        ((1e-3, 1, 9), "lr-range: updates: expected at least 10, got 9"),
        ((1e20, 1e30, 10), r"lr-range: the loss explodes within \d updates, at .*; try a lower --from"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mistakes(arguments, said, config):
    with pytest.raises(GpunetError, match=said):
        range_test(config, *arguments, graph=network(), data=halves())


# The command


def test_the_command_writes_a_picture_and_numbers(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    small = ["data.train=90", "data.test=30", "train.batch=30", "model.hidden=[8]", "train.replicas=1"]
    settings = [word for s in small for word in ("--set", s)]
    drawn = []
    original = plots.plot_range
    monkeypatch.setattr(
        "gpunet.train.lr_range.plot_range", lambda path, found: (drawn.append(found), original(path, found))
    )
    monkeypatch.setattr(sys, "argv", ["gpunet", "lr-range", "mlp_shapes", *settings, "--updates", "30", "--to", "1e3"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("mlp on shapes: ") and " updates, learning rate 1e-05 to " in out[0]
    assert out[-2:] == ["lr-range/lr-range.png", "lr-range/lr-range.json"]
    numbers = json.loads((tmp_path / "lr-range/lr-range.json").read_text())
    (found,) = drawn
    assert numbers["suggested"] == found.suggested and numbers["rates"] == found.rates.tolist()
    assert len(numbers["losses"]) == len(numbers["smoothed"]) == len(numbers["rates"])
    assert Image.open(tmp_path / "lr-range/lr-range.png").width > 900
    assert f"to begin with: --set optimizer.lr={found.suggested:.2g}" in out


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GpunetError, match="cannot be made"):
        RangeTest("x", RATES, curve()).save(tmp_path / "file")


def test_a_picture_of_losses_that_are_not_finite(tmp_path):
    losses = curve()
    losses[-1] = np.inf
    picture, numbers = RangeTest("x", RATES, losses).save(tmp_path)
    assert Image.open(picture).width > 900
    assert json.loads(numbers.read_text())["losses"][-1] is None
    assert parse_config({"model": {"name": "mlp"}, "data": {"name": "shapes"}}).rate == 0.01
