"""Exact resume: whatever a training is killed in, and however often, going on gives what it would have given."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from small_run import Killed, halves, last_run, left, network, new, on, recipe, stop_after

from gpunet import data
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.train import Checkpoint, Trainer, trainer
from gpunet.train.resume import Finished, data_digest
from gpunet.train.run import Run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing takes longer than these trainings."""
    monkeypatch.setattr(trainer, "write_report", lambda result: None)


@pytest.fixture
def config(tmp_path):
    return partial(recipe, tmp_path)


def places(monkeypatch, at=None):
    """Count the places at which a training can be killed, and kill it at number `at`."""
    passed = []

    def through(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **options):
            passed.append(name)
            if len(passed) == at:
                raise Killed(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for owner, name in (
        (Step, "__call__"), (Step, "update"), (Step, "advance"), (Step, "evaluate"), (Step, "predict"),
        (Run, "log"), (Run, "save"), (os, "fsync"), (os, "link"), (os, "replace"), (Path, "unlink"),
    ):  # fmt: skip
        through(owner, name)
    through(trainer, "write_report")
    return passed


def kill(config, at):
    """Train until place number `at`; return the run directory, or None if the training ends before or is no run yet."""
    with pytest.MonkeyPatch.context() as patch:
        places(patch, at)
        try:
            new(config).fit()
        except Killed:
            run = last_run(config)
            return run if (run / "config.toml").exists() else None
    return None


@pytest.mark.parametrize(
    ("first", "sections"),
    [*enumerate([
        {},
        {"run": {"checkpoint_steps": 1, "keep": 3},
         "train": {"accumulate": 1, "watch": ["net.conv"], "watch_every": 2}},
        {"run": {"checkpoint_steps": 3}, "train": {"accumulate": 3, "evaluate_every": 2, "window": 40}},
    ], 1)],
)  # fmt: skip
def test_killed_at_any_place_it_goes_on_to_the_same(first, sections, config):
    """Each of three configs at some thirty places, others for each."""
    made = config(**sections)
    with pytest.MonkeyPatch.context() as patch:
        passed = places(patch)
        whole = left(new(made).fit().run.path)
        count = len(passed)
    assert count > 40 and {"__call__", "evaluate", "fsync", "replace", "link", "write_report"} <= set(passed)
    for at in range(first, count + 1, max(3, count // 30)):
        if run := kill(made, at):
            try:
                result = on(run).fit()
            except Finished:
                assert at == count
            else:
                assert result.run.path == run
            assert left(run) == whole, f"killed at {at}, {passed[at - 1]}"
        else:
            assert at < 5 or at > count - 9  # no config.toml yet, or looks were fewer this time


def test_killed_again_and_again(config):
    """At every sixth place, the resumed training too, until it comes through."""
    made = config(run={"checkpoint_steps": 1})
    whole = left(new(made).fit().run.path)
    run, times = kill(made, 6), 1
    while times < 100:
        with pytest.MonkeyPatch.context() as patch:
            places(patch, 25)
            try:
                on(run).fit()
                break
            except Killed:
                times += 1
    assert times > 3
    assert left(run) == whole


@pytest.mark.parametrize(
    "train",
    [
        {"dtype": "float16"},
        {"dtype": "float64", "order": "stored"},
        {"dtype": "bfloat16"},
        {"steps_per_launch": 2, "accumulate": 1},
        {"monitor_test": True},
    ],
)
def test_other_loops_go_on_to_the_same(train, config):
    made = config(train=train, run={"checkpoint_steps": 1})

    def rescaled(made):
        state = made.step.state
        if train.get("dtype") == "float16":
            state["loss_scale"] = 2.0**22  # the first updates are skipped, which moves no update number
            made.step.state = state
        return made

    whole = rescaled(new(made)).fit()
    expected = left(whole.run.path)
    for after in (2, 3, 7):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, after)
            with pytest.raises(Killed):
                rescaled(new(made)).fit()
        assert left(on(last_run(made)).fit().run.path) == expected
    if train.get("dtype") == "float16":
        assert whole.updates < 9


@pytest.fixture
def stopped(config, request):
    """A run that was killed in its second epoch, with a checkpoint after update 4 and rows of later ones."""

    def make(steps=5, **sections):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, steps)
            patch.setattr(trainer, "LOOK", -1)  # rows are written at once
            with pytest.raises(Killed):
                new(config(**sections)).fit()
        return last_run(config(**sections))

    return make


def test_rows_after_the_checkpoint_are_cut_off_and_written_again(stopped, config):
    run = stopped()
    updates = [row["update"] for row in Run(run).metrics() if row["split"] == "train"]
    assert updates == [0, 1, 2, 3, 4]
    assert Run(run).checkpoint("last").state["update"] == 4
    result = on(run).fit()
    assert [row["update"] for row in Run(run).metrics() if row["split"] == "train"] == list(range(9))
    assert result.rows == Run(run).metrics()[:-1]
    assert (result.epochs, result.updates, result.images) == (3, 9, 270)


def test_the_order_of_rows_does_not_depend_on_when_one_looks(config, monkeypatch):
    found = []
    for look in (-1, 1e9):
        monkeypatch.setattr(trainer, "LOOK", look)
        made = config(train={"watch": ["net.conv.weight"], "watch_every": 2}, run={"checkpoint_steps": 0})
        found.append((new(made).fit().run.path / "metrics.jsonl").read_text())
    assert found[0] == found[1]


def test_it_says_where_it_goes_on_and_counts_the_epoch_at_hand_whole(stopped, config, capsys):
    Trainer(config(), graph=network(), data=halves()).fit()
    whole = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    run = stopped()
    checksum = Run(run).checkpoint("last").checksum
    on(run, show=True).fit()
    lines = capsys.readouterr().err.splitlines()
    assert (
        f"resumed {run}: from last.safetensors at update 4, 1 epochs and 2 of 5 batches, checksum {checksum[:12]}"
        in lines
    )
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line.split("%")[:2] for line in epochs] == [line.split("%")[:2] for line in whole[1:]]


def test_times_go_on_and_a_progress_bar_too(stopped):
    run = stopped()
    before = Run(run).checkpoint("last").about["progress"]
    result = on(run).fit()
    assert result.seconds > before["elapsed"] > before["spent"] > 0
    assert result.seconds > result.training_seconds > before["seconds"] + before["spent"]
    assert result.images_per_second > 0


@pytest.mark.parametrize(("keep", "names"), [(1, ["last"]), (2, ["last", "last-1"]), (3, ["last", "last-1", "last-2"])])
def test_the_last_checkpoints_are_kept(keep, names, config, stopped):
    run = stopped(8, run={"keep": keep, "checkpoint_steps": 2})
    updates = [Run(run).checkpoint(f"{name}").state["update"] if name == "last" else
               Checkpoint.load(run / f"{name}.safetensors").state["update"] for name in names]  # fmt: skip
    assert updates == [8, 6, 4][:keep]
    assert {p.stem for p in run.glob("last*.safetensors")} == set(names)


def test_checkpoints_by_seconds(config, monkeypatch):
    saved = []
    original = Run.save
    monkeypatch.setattr(Run, "save", lambda run, c, name, keep=1: (saved.append(name), original(run, c, name, keep)))
    new(config(run={"checkpoint_steps": 0, "checkpoint_seconds": 1e-9})).fit()
    assert saved.count("last") == 9 + 3 + 2  # updates, ends of epochs, the end and that it was reached
    saved.clear()
    new(config(run={"checkpoint_steps": 0, "checkpoint_seconds": 3600.0})).fit()
    assert saved.count("last") == 2


# What is refused


def test_a_finished_run_says_so_and_stays_as_it_is(config):
    run = new(config()).fit().run.path
    before = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    with pytest.raises(Finished, match="has finished, after 3 epochs: nothing to do"):
        on(run)
    assert {p: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != ".lock"} == {
        p: content for p, content in before.items() if p.name != ".lock"
    }


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_that_was_not_finite_is_not_gone_on_with(config):
    made = config(optimizer={"lr": 1e38}, schedule={"name": "const"})
    with pytest.raises(GpunetError, match="not finite"):
        new(made).fit()
    with pytest.raises(GpunetError, match="stopped where loss or gradient was not finite"):
        on(last_run(made))


@pytest.mark.parametrize(
    ("pin", "value"),
    [
        ("gpunet", "0.0.1"), ("numpy", "1.0"), ("blas", "another"), ("draws", 99), ("backend", "cuda"),
        ("engine", "fft"), ("dtype", "tf32"), ("replicas", 5), ("processor", "Z80"), ("device", "a GPU"),
    ],
)  # fmt: skip
def test_what_pins_the_bits_is_recorded_and_a_difference_refused(pin, value, stopped, monkeypatch):
    run = stopped()
    recorded = Run(run).checkpoint("last").about["pins"]
    original = trainer.pins
    monkeypatch.setattr(trainer, "pins", lambda step: original(step) | {pin: value})
    was = recorded.get(pin, "none")
    with pytest.raises(GpunetError) as caught:
        on(run)
    assert f"would not give the same bits: {pin} was {was}, is {value}; have it" in str(caught.value)
    result = on(run, inexact=True).fit()
    assert result.run.checkpoint("last").about["progress"]["inexact"] == [f"{pin} was {was}, is {value}"]


def test_replicas_are_pinned_for_real_and_can_be_set(stopped, config):
    run = stopped()
    with pytest.raises(GpunetError, match=r"replicas was 2, is 1; have it as it was \(train.replicas can be set\)"):
        on(run, overrides=["train.replicas=1"])
    result = on(run, overrides=["train.replicas=1"], inexact=True).fit()
    assert result.updates == 9
    assert "replicas = 1" in (run / "config.toml").read_text()


def test_the_data_set_has_to_be_the_same(stopped):
    run, same = stopped(), halves()
    turned = halves().train.images[:, ::-1].copy()
    for other in (
        halves(train=92),
        data.DataSet("halves", ("left", "right"), data.Split(turned, same.train.labels), same.validation, same.test),
        data.DataSet("halves", ("right", "left"), same.train, same.validation, same.test),
        data.DataSet("halves", ("left", "right"), same.train, same.validation),
    ):
        with pytest.raises(GpunetError, match="expected the data set it was trained on .*got another: halves: train"):
            on(run, data=other, inexact=True)
    assert data_digest(halves()) == data_digest(data.DataSet("moved", same.classes, *same.splits.values()))
    on(run).fit()


def test_settings_that_change_bits_are_refused_and_others_taken(stopped, config):
    run = stopped()
    for text in ("optimizer.lr=0.5", "train.epochs=4", "train.seed=1", "augment.flip=false", "train.evaluate_every=2"):
        key = text.partition("=")[0]
        with pytest.raises(
            GpunetError, match=rf"{key} is .* in the run, .* by --set; with --resume these can be set: run"
        ):
            on(run, overrides=[text])
    with pytest.raises(GpunetError, match="unknown key 'keeps' in"):
        on(run, overrides=["run.keeps=1"])
    whole = left(new(config()).fit().run.path)
    overrides = ["run.keep=1", "run.checkpoint_steps=0", "optimizer.lr=0.05", "train.window=40"]  # that lr is the run's
    result = on(run, overrides=overrides).fit()
    ended = left(run)
    assert {k: v for k, v in ended.items() if k in ("metrics", "last", "best")} == {
        k: whole[k] for k in ("metrics", "last", "best")
    }
    assert "window = 40" in (run / "config.toml").read_text() == result.run.checkpoint("last").about["config"]


def test_a_config_that_is_not_the_runs_is_shown_and_refused(stopped, config):
    run = stopped()
    with pytest.raises(GpunetError) as caught:
        on(run, given=config(optimizer={"lr": 0.5}, train={"batch": 30}))
    assert "optimizer.lr is 0.05 in the run, 0.5 in the one given; train.batch is 20 in the run, 30 in" in str(
        caught.value
    )
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("momentum = 0.9", "momentum = 0.8"))
    with pytest.raises(
        GpunetError, match=r"config.toml: was changed since .*momentum is 0.9 in the run, 0.8 in the file"
    ):
        on(run)
    (run / "config.toml").write_text(text)
    on(run, given=config(run={"keep": 5, "name": "other"})).fit()


def test_fine_tuning_goes_on_without_the_file_it_began_with(config):
    first = new(config()).fit().run.path
    start = {"weights": str(first / "best.safetensors"), "freeze": ["net.conv"], "normalisation": "checkpoint"}
    made = config(start=start, run={"name": "tuned"})
    whole = left(new(made).fit().run.path)
    run = kill(made, 30)
    (first / "best.safetensors").unlink()
    on(run).fit()
    assert left(run) == whole


# What is damaged


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_anywhere_is_noticed(stopped, tmp_path):
    content = (stopped() / "last.safetensors").read_bytes()
    file = tmp_path / "a.safetensors"
    header = int.from_bytes(content[:8], "little") + 8
    for place in [*range(0, header, 11), *range(header, len(content), 29), len(content) - 1]:
        file.write_bytes(content)
        flip(file, place)
        with pytest.raises(GpunetError, match="a.safetensors: (expected a|checkpoint format)"):
            Checkpoint.load(file)
    file.write_bytes(content)
    Checkpoint.load(file)


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "missing", "folder"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(harm, stopped, config, capsys):
    whole, run = left(new(config()).fit().run.path), stopped(7)
    file = run / "last.safetensors"
    content = file.read_bytes()
    file.unlink()
    if harm in ("flip", "truncate", "empty"):
        file.write_bytes({"flip": content, "truncate": content[:-100], "empty": b""}[harm])
    if harm == "flip":
        flip(file, len(content) - 30)
    if harm == "folder":
        file.mkdir()
    with pytest.raises(GpunetError, match="got another"):
        on(run, data=halves(train=92))  # refused, so that nothing is touched
    assert file.exists() is (harm != "missing")
    on(run, show=True).fit()
    said = capsys.readouterr().err
    assert f"resumed {run}: from last-1.safetensors at update 4, 1 epochs and 2 of 5 batches" in said
    assert (f"note: {file}: expected a checkpoint" in said) is (harm != "missing")
    assert ("it is now last.safetensors.damaged" in said) is (harm != "missing")
    assert all(Checkpoint.load(file) for file in run.glob("last*.safetensors"))
    assert left(run) == whole


def test_no_whole_checkpoint_is_one_clear_error(stopped):
    run = stopped()
    for file in run.glob("last*"):
        flip(file, 100)
    with pytest.raises(GpunetError) as caught:
        on(run)
    said = str(caught.value)
    assert (
        "no checkpoint to go on from: " in said
        and "last.safetensors: expected" in said
        and "last-1.safetensors" in said
    )
    assert f"gpunet train {run / 'config.toml'}" in said


def test_before_the_first_checkpoint_it_begins_again(stopped, config, capsys):
    whole, run = left(new(config()).fit().run.path), stopped(1)
    assert not list(run.glob("*.safetensors"))
    on(run, show=True).fit()
    assert "no checkpoint yet, from the beginning" in capsys.readouterr().err
    assert left(run) == whole


def test_a_damaged_best_checkpoint_is_refused_or_forgotten(stopped):
    run = stopped()
    flip(run / "best.safetensors", -1)
    with pytest.raises(GpunetError, match=r"best.safetensors: expected .*; the best weights until now are lost"):
        on(run)
    assert on(run, inexact=True).fit().best["epoch"] > 1


def test_metrics_that_were_cut_are_refused(stopped):
    run = stopped()
    file = run / "metrics.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:100])
    with pytest.raises(
        GpunetError, match=r"metrics.jsonl: expected the rows of the training until its checkpoint: .*found 100"
    ):
        on(run).fit()
    assert file.read_bytes() == content[:100]
    file.write_bytes(b"x" * len(content))
    with pytest.raises(GpunetError, match="metrics.jsonl: expected the rows"):
        on(run).fit()
    file.write_bytes(content)
    on(run).fit()


def resealed(file, change):
    """Change a checkpoint's metadata and give it the checksum that belongs to that."""
    loaded = Checkpoint.load(file)
    change(loaded)
    loaded.save(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.about.pop("progress"),
        lambda c: c.about["progress"].update(ended="three"),
        lambda c: c.about["progress"].update(more=1),
        lambda c: c.about.update(best=[1]),
        lambda c: c.about.update(config="[["),
        lambda c: c.about.pop("config"),
        lambda c: c.input.clear(),
        lambda c: c.state.pop("batch"),
        lambda c: c.state.update(update="many"),
    ],
)
def test_a_checkpoint_of_something_else_is_one_clear_error(change, stopped):
    run = stopped()
    for file in run.glob("last*"):
        resealed(file, change)
    with pytest.raises(GpunetError, match=r"last(-1)?\.safetensors: (expected a|not TOML)"):
        on(run)


def test_nothing_in_a_run_directory_is_executed(tmp_path):
    """Files named like modules, a pickle for a checkpoint: none of them is opened as code or unpickled."""
    script = f"""
import pickle, sys
from pathlib import Path
folder = Path({str(tmp_path)!r})
seen = []
def hook(event, arguments):
    if event == "exec" and str(folder) in arguments[0].co_filename or event.startswith("pickle"):
        seen.append((event, arguments))
sys.modules["numba"] = None  # which unpickles what it has compiled, from the user's own cache
sys.addaudithook(hook)
from gpunet import cli
class Evil:
    def __reduce__(self):
        return exec, (f"open({str(tmp_path / "owned")!r}, 'w')",)
for name in ("numpy", "gpunet", "sitecustomize", "config", "conftest"):
    (folder / f"{{name}}.py").write_text(f"open({str(tmp_path / "owned")!r}, 'w')")
(folder / "config.toml").write_text('[model]\\nname = "mlp"\\nhidden = [4]\\n[data]\\nname = "shapes"\\ntrain = 60\\n'
    'test = 20\\n[train]\\nepochs = 1\\nbatch = 30\\n')
(folder / "last-1.safetensors").write_bytes(pickle.dumps(Evil()))
(folder / "metrics.jsonl").write_bytes(pickle.dumps(Evil()))
sys.argv = ["gpunet", "train", "--resume", str(folder)]
for _ in range(2):
    try:
        cli.main()
    except SystemExit as end:
        print(end.code or 0)
    (folder / "last-1.safetensors").unlink(missing_ok=True)
print(seen)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["2", "0", "[]"]
    assert "no checkpoint to go on from" in done.stderr and "epoch   1/1" in done.stderr
    assert not (tmp_path / "owned").exists()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["split"] == "test"


def test_links_in_a_run_directory_are_not_written_through(stopped, tmp_path):
    run, victim = stopped(), tmp_path / "mine.txt"
    for name in (".lock", "metrics.jsonl", ".last.safetensors.part"):
        victim.write_text("precious")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(victim)
        with pytest.raises(GpunetError):
            on(run).fit()
        assert victim.read_text() == "precious"
        (run / name).unlink(missing_ok=True)


def test_five_real_kills():
    """The script that does thirty: real processes, SIGKILL, in steps, checkpoint writes and evaluations."""
    command = [sys.executable, ROOT / "benchmarks" / "kill_and_resume.py", "--kills", "5", "--epochs", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]  # a checkpoint's write is soon over: on a busy machine it may miss all
    assert last.startswith("5 of 5; ") and "an evaluation" in last and "a step" in last
