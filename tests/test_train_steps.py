"""train.steps: a training that ends after so many updates, wherever in an epoch that is, killed or not."""

import json
from contextlib import suppress
from functools import partial

import pytest
from small_run import Killed, last_run, left, new, on, recipe, stop_after

from gpunet.errors import GpunetError
from gpunet.optim import schedules
from gpunet.train import parse_config, trainer
from gpunet.train.resume import Finished


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing takes longer than these trainings."""
    monkeypatch.setattr(trainer, "write_report", lambda result: None)


@pytest.fixture
def config(tmp_path):
    return partial(recipe, tmp_path)


def rows(run, split="train"):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["split"] == split]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7])  # three updates are an epoch
@pytest.mark.parametrize("per_launch", [1, 4])
def test_it_ends_after_so_many_updates(config, steps, per_launch):
    settings = config(train={"steps": steps, "epochs": 1, "steps_per_launch": per_launch})
    result = new(settings).fit()
    assert result.status == "finished"
    assert result.updates == steps == len(rows(result.run.path))
    assert result.images == sum((40, 40, 10)[i % 3] for i in range(steps))
    assert len(rows(result.run.path, "validation")) == -(-steps // 3)
    assert result.epochs == pytest.approx(steps / 3)
    with pytest.raises(Finished):
        on(result.run.path)


def test_whole_epochs_are_the_same_by_either_name(config):
    by_steps, by_epochs = (new(config(train=train)).fit().run.path for train in ({"steps": 6}, {"epochs": 2}))
    assert left(by_steps)["last"] == left(by_epochs)["last"]
    assert left(by_steps)["metrics"] == left(by_epochs)["metrics"]


def test_the_schedule_ends_with_the_steps(config):
    settings = config(train={"steps": 4}, schedule={"name": "linear"})
    run = new(settings).fit().run.path
    expected = schedules.linear(4, 3, 0.05)
    assert [row["rate"] for row in rows(run)] == pytest.approx(expected)


@pytest.mark.parametrize(("steps", "images", "epochs"), [(2, 80, 1), (3, 90, 1), (4, 130, 2), (9, 270, 3)])
def test_the_progress_counts_what_there_will_be(config, steps, images, epochs, monkeypatch):
    given = []

    class Seen(trainer.Progress):
        def __init__(self, *arguments, **options):
            given.append(arguments[:2])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(trainer, "Progress", Seen)
    new(config(train={"steps": steps})).fit()
    assert given == [(images, epochs)]


@pytest.mark.parametrize("at", range(6))
def test_killed_anywhere_it_ends_alike(config, at, monkeypatch):
    settings = config(train={"steps": 5})
    expected = left(new(settings).fit().run.path)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, at)
        with suppress(Killed):
            new(settings).fit()
    on_run = last_run(settings)
    try:
        on(on_run).fit()
    except Finished:
        assert at == 5, "only what was not killed has finished"
    found = left(on_run)
    assert found.keys() == expected.keys()
    assert found["last"] == expected["last"]
    assert found["metrics"] == expected["metrics"]


def test_what_is_no_count_is_refused(config):
    for value, got in ((0, "0"), (2.5, "2.5"), ("many", '"many"')):
        with pytest.raises(GpunetError, match=rf"'steps' in \[train\]: expected .*, got {got}"):
            parse_config({"model": {"name": "mlp"}, "data": {"name": "shapes"}, "train": {"steps": value}})
