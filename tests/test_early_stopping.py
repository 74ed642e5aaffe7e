"""What a training does about its validation: the rate on a plateau, the early end, and both after a resume."""

import numpy as np
import pytest
from small_run import Killed, halves, last_run, left, network, new, on, recipe, stop_after

from gpunet import data
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.train import Trainer, parse_config, report, trainer
from gpunet.train.config import Config
from gpunet.train.monitor import Plateau, Waited
from gpunet.train.run import Run

VALUES = [1.0, 0.9, 0.9, 0.8999, 0.91, 0.95, 0.5, 0.5, 0.6, 0.7]
VALUES += [0.55, 0.56, 0.5, 0.3, 0.4, 0.41, 0.42, 0.43, 0.44, 0.45]


def schedule(**settings):
    return parse_config(
        {"model": {"name": "mlp"}, "data": {"name": "shapes"}, "schedule": {"name": "plateau", **settings}}
    ).schedule


def scales(values, **settings):
    seen, found = Plateau(), []
    for value in values:
        before = seen.scale
        assert seen.fall(value, schedule(**settings)) == (seen.scale < before)
        found.append(seen.scale)
    return found


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than these trainings."""
    monkeypatch.setattr(report, "plot_curves", lambda *arguments: None)
    monkeypatch.setattr(report, "write_pictures", lambda *arguments: [])


@pytest.fixture
def measured(monkeypatch):
    """Let validation give these losses and accuracies, by the epoch, so that a training that goes on gets them too."""

    def give(losses, accuracies=None):
        accuracies = accuracies or [0.5] * len(losses)
        original = Step.evaluate

        def evaluate(step, source):
            found = original(step, source)
            place = int(step.state["batch"]) // step.batches - 1
            return found | {"loss": losses[place], "accuracy": accuracies[place]}

        monkeypatch.setattr(Step, "evaluate", evaluate)

    return give


# Counting


@pytest.mark.parametrize(
    ("settings", "values", "expected"),
    [  # torch.optim.lr_scheduler.ReduceLROnPlateau(eps=0) at rate 1, after each value
        (
            {"factor": 0.5, "patience": 1, "threshold": 1e-3, "minimum": 0.1},
            VALUES,
            [1] * 3 + [0.5] * 2 + [0.25] * 3 + [0.125] * 2 + [0.1] * 10,
        ),
        (
            {"patience": 2, "threshold": 0, "cooldown": 2},
            VALUES,
            [1] * 9 + [0.1] * 7 + [0.01] * 4,
        ),
        (
            {"monitor": "accuracy", "factor": 0.5, "patience": 1, "threshold": 0.05, "cooldown": 1},
            [1 - v for v in VALUES],
            [1] * 3 + [0.5] * 5 + [0.25] * 3 + [0.125] * 4 + [0.0625] * 3 + [0.03125] * 2,
        ),
    ],
)
def test_the_rate_falls_where_pytorchs_does(settings, values, expected):
    np.testing.assert_allclose(scales(values, **settings), expected, rtol=1e-12)


def test_a_loss_that_is_not_finite_is_no_better():
    assert scales([np.nan, np.nan, 1, np.inf, np.nan], patience=1) == [1, 0.1, 0.1, 0.1, pytest.approx(0.01)]


@pytest.mark.parametrize(
    ("sign", "least", "values", "expected"),
    [
        (1, 0, [0.5, 0.5, 0.6, 0.55], [0, 1, 0, 1]),
        (-1, 0, [0.5, 0.5, 0.6, 0.45], [0, 1, 2, 0]),
        (1, 0.1, [0.5, 0.59, 0.61, 0.7, 0.72], [0, 1, 0, 1, 0]),  # by what it was at the last improvement
        (-1, 0.0, [np.nan, -1, np.nan, -2], [1, 0, 1, 0]),
    ],
)
def test_evaluations_without_improvement_are_counted(sign, least, values, expected):
    waited, found = Waited(), []
    for value in values:
        waited.see(value, sign, least)
        found.append(waited.evaluations)
    assert found == expected


# In a training


def test_the_rate_of_the_rows_is_that_of_the_plateau(tmp_path, measured, capsys):
    measured([1.0, 1.0, 0.5, 0.6, 0.7, 0.4])
    config = recipe(
        tmp_path,
        train={"epochs": 6},
        schedule={"name": "plateau", "patience": 0, "factor": 0.5, "minimum": 0.2, "warmup": 1, "warmup_from": 0.5},
    )
    made = Trainer(config, graph=network(), data=halves())
    result = made.fit()
    rates = [row["rate"] for row in result.rows if row["split"] == "train"]  # three updates an epoch
    climb = [0.05 * (0.5 + 0.5 * i / 3) for i in range(3)]
    np.testing.assert_allclose(rates, [*climb, *[0.05] * 3, *[0.025] * 6, *[0.0125] * 3, *[0.01] * 3], rtol=1e-6)
    assert (made.step.state["lr_scale"] == 0.2).all()
    assert capsys.readouterr().err.count("validation loss is on a plateau: learning rate x ") == 3


@pytest.mark.parametrize("monitor", ["loss", "accuracy"])
def test_a_plateau_is_of_what_it_monitors(monitor, tmp_path, measured):
    measured([1.0, 0.9, 0.8], [0.5, 0.5, 0.5])
    settings = {"name": "plateau", "patience": 0, "monitor": monitor}
    result = new(recipe(tmp_path, schedule=settings)).fit()
    rates = [row["rate"] for row in result.rows if row["split"] == "train"]
    assert rates[-1] == pytest.approx(0.05 if monitor == "loss" else 0.005, rel=1e-6)


def test_patience_ends_it_and_the_best_weights_are_back(tmp_path, measured, capsys):
    measured([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], [0.5, 0.7, 0.6, 0.7, 0.65, 0.9])
    config = recipe(tmp_path, train={"epochs": 6, "patience": 3})
    made = Trainer(config, graph=network(), data=halves())
    result = made.fit()
    assert (result.epochs, result.updates) == (5, 15)
    why = "stopped early after epoch 5 of 6: validation accuracy no better in 3 evaluations (train.patience = 3)"
    assert result.status == why
    assert why in capsys.readouterr().err
    assert why[0].upper() + why[1:] in (result.run.path / "report.md").read_text()
    run = Run(result.run.path)
    # 0.7 came again, with a lower loss: the better weights, and no better accuracy
    assert result.best["epoch"] == run.checkpoint("best").about["epoch"] == 4
    assert run.checkpoint("last").about["epoch"] == 5
    best = run.checkpoint("best").weights
    assert all((made.step.weights[name] == value).all() for name, value in best.items())
    with pytest.raises(GpunetError, match="has finished, after 5 epochs"):
        on(run.path)


def test_min_delta_and_evaluations_count_not_epochs(tmp_path, measured):
    measured([1.0] * 12, [i / 100 for i in range(12)])
    counted = {"epochs": 12, "patience": 2, "min_delta": 0.5}
    result = new(recipe(tmp_path, train=counted | {"patience": 3, "min_delta": 0.025})).fit()
    assert result.epochs == 12  # 0.03 better every third evaluation
    result = new(recipe(tmp_path, train=counted)).fit()
    assert result.epochs == 3
    assert "no better by more than 0.5 in 2 evaluations" in result.status
    result = new(recipe(tmp_path, train=counted | {"evaluate_every": 3})).fit()
    assert result.epochs == 9


def values(count=60):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (count, 6, 6, 3)).astype(np.uint8)
    targets = images.reshape(count, -1)[:, :2] / 255
    splits = [data.Split(images[i::3].copy(), values=targets[i::3].astype(np.float32)) for i in range(3)]
    return data.DataSet("values", (), *splits)


def test_of_values_the_loss_is_watched_and_no_accuracy_is_spoken_of(tmp_path, measured, capsys, monkeypatch):
    monkeypatch.setattr("gpunet.train.progress.QUIET", -1)
    monkeypatch.setattr(trainer, "LOOK", -1)
    measured([0.5, 0.6, 0.7], [0.1, 0.2, 0.3])
    config = recipe(tmp_path, train={"patience": 2, "batch": 10, "epochs": 6}, loss={"name": "mse"})
    result = Trainer(config, graph=network(), data=values()).fit()
    assert result.status.startswith("stopped early after epoch 3 of 6: validation loss no better in 2 evaluations")
    said = capsys.readouterr().err
    assert "accuracy" not in said + result.summary + report._title(result)
    (line,) = (line for line in said.splitlines() if line.startswith("epoch   2/6  "))
    assert "%" not in line and "validation 0.6 " in line
    assert "accuracy" not in (result.run.path / "report.md").read_text()


@pytest.mark.parametrize("after", [1, 4, 6, 7, 9, 11])
@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"epochs": 8, "patience": 2}},
        {"train": {"epochs": 5}, "schedule": {"name": "plateau", "patience": 1, "factor": 0.5, "cooldown": 1}},
        {"train": {"epochs": 8, "patience": 3}, "schedule": {"name": "plateau", "patience": 0, "factor": 0.5}},
    ],
)
def test_a_killed_training_counts_on(sections, after, tmp_path, measured):
    measured([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], [0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6])
    config = recipe(tmp_path, run={"checkpoint_steps": 1}, **sections)
    whole = new(config).fit()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, after)
        with pytest.raises(Killed):
            new(config).fit()
    again = on(last_run(config)).fit()
    assert left(again.run.path) == left(whole.run.path)
    assert again.status == whole.status


def test_killed_after_the_last_validation_it_only_finishes(tmp_path, measured, monkeypatch):
    """The checkpoint knows that patience is at its end: no further step is done."""
    measured([1.0] * 8)
    config = recipe(tmp_path, train={"epochs": 8, "patience": 2}, run={"checkpoint_steps": 1})
    whole = left(new(config).fit().run.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Training, "_finish", lambda training: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            new(config).fit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", None)
        result = on(last_run(config)).fit()
    assert result.status.startswith("stopped early after epoch 3 of 8")
    assert left(result.run.path) == whole


# Mistakes


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {"patience": 2}}, r"train.patience = 2: expected a validation split to look at, got halves with"),
        ({"schedule": {"name": "plateau"}}, r'schedule.name = "plateau": expected a validation split to look at'),
    ],
)
def test_without_validation_there_is_nothing_to_watch(sections, said, tmp_path):
    with pytest.raises(GpunetError, match=said):
        Trainer(recipe(tmp_path, **sections), graph=network(), data=halves(validation=0), show=False)


def test_values_have_no_accuracy_to_monitor(tmp_path):
    config = recipe(tmp_path, schedule={"name": "plateau", "monitor": "accuracy"}, loss={"name": "mse"})
    with pytest.raises(GpunetError, match='schedule.monitor = "accuracy": expected a set with labels, got values'):
        Trainer(config, graph=network(), data=values(), show=False)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "patience", 0), ("train", "patience", 1.5), ("train", "min_delta", -1.0),
        ("schedule", "factor", 1.0), ("schedule", "factor", 0.0), ("schedule", "patience", -1),
        ("schedule", "threshold", -1e-3), ("schedule", "minimum", 1.5), ("schedule", "monitor", "accurracy"),
        ("schedule", "cooldown", float("nan")),
    ],
)  # fmt: skip
def test_settings_have_limits(section, key, value):
    table = {"model": {"name": "mlp"}, "data": {"name": "shapes"}, "schedule": {"name": "plateau"}}
    table[section] = table.get(section, {}) | {key: value}
    with pytest.raises(GpunetError, match=rf"'{key}' in \[{section}\]: expected "):
        parse_config(table)


# The rate and the batch


@pytest.mark.parametrize(
    ("rule", "batch", "accumulate", "expected"),
    [("none", 512, 2, 0.1), ("linear", 512, 1, 0.4), ("linear", 64, 1, 0.05), ("linear", 128, 4, 0.4),
     ("sqrt", 512, 1, 0.2), ("sqrt", 128, 1, 0.1)],
)  # fmt: skip
def test_the_rate_grows_with_the_batch_by_its_rule(rule, batch, accumulate, expected):
    config = Config.model_validate({
        "model": {"name": "mlp"}, "data": {"name": "shapes"}, "optimizer": {"lr": 0.1},
        "train": {"lr_rule": rule, "batch": batch, "accumulate": accumulate, "base_batch": 128},
    })  # fmt: skip
    assert config.rate == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(config.rates(3, 1), expected, rtol=1e-12)


def test_the_first_lines_say_the_rate(tmp_path, capsys):
    lines = []
    for rule in ("none", "linear"):
        config = recipe(tmp_path, train={"epochs": 1, "lr_rule": rule, "base_batch": 20}, optimizer={"lr": 0.01})
        rates = [row["rate"] for row in Trainer(config, graph=network(), data=halves()).fit().rows if "rate" in row]
        assert rates[0] == pytest.approx(0.01 if rule == "none" else 0.02, rel=1e-6)
        said = capsys.readouterr().err.splitlines()
        lines.append(next(line for line in said if line.startswith("learning rate")))
    assert lines[0] == "learning rate 0.01, schedule cosine"
    rule = "optimizer.lr 0.01 is for 20, linear rule, 40 images an update"
    assert lines[1] == f"learning rate 0.02, schedule cosine: {rule}"


def recipe_of(schedule):
    return parse_config({"model": {"name": "mlp"}, "data": {"name": "shapes"}, "schedule": schedule})


# The report of a run that was gone on with


def test_the_report_says_how_often_and_from_where_it_was_resumed(tmp_path):
    config = recipe(tmp_path, run={"checkpoint_steps": 2})
    assert "| resumed |" not in (new(config).fit().run.path / "report.md").read_text()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Killed):
            new(config).fit()
    run = last_run(config)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)  # two more checkpoints
        with pytest.raises(Killed):
            on(run).fit()
    result = on(run).fit()
    assert result.resumed == [2, 6]
    assert "| resumed | 2 times, at update 2, 6 |" in (run / "report.md").read_text()


def test_what_is_watched_may_change_in_a_run_that_goes_on(tmp_path):
    config = recipe(tmp_path, run={"checkpoint_steps": 1})
    whole = left(new(config).fit().run.path)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Killed):
            new(config).fit()
    run = last_run(config)
    result = on(run, overrides=['train.watch=["net.conv"]', "train.watch_every=2"]).fit()
    assert [row for row in Run(run).metrics() if row["split"] == "watch"]
    got = left(run)
    assert got["last"] == whole["last"] and got["best"] == whole["best"]
    assert result.resumed == [3]
