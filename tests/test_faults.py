"""Faults while a training runs: one clear error, and nothing of what was there before is lost."""

import errno
import fcntl
import itertools
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from small_run import SMALL_TOML, halves, last_run, left, network, new, on, recipe, stop_after

from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.train import Checkpoint, Trainer, checkpoint, run, trainer
from gpunet.train.run import Run
from gpunet.train.signals import Signals

ROOT = Path(__file__).resolve().parents[1]
SMALL = SMALL_TOML.replace("epochs = 1", "epochs = 100000")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing takes longer than these trainings."""
    monkeypatch.setattr(trainer, "write_report", lambda result: None)


@pytest.fixture
def config(tmp_path):
    return partial(recipe, tmp_path)


@contextmanager
def disk(folder, nbytes, options=""):
    """Mount a disk of so many bytes; skip where that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}{options}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted, which needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Take all that is left of a disk, to the last byte."""
    with open(folder / "filling", "ab", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC


def after(patch, steps, action):
    """Do something once, after so many calls of the step."""
    original, calls = Step.__call__, []

    def step(self, *arguments):
        original(self, *arguments)
        calls.append(1)
        if len(calls) == steps:
            action()

    patch.setattr(Step, "__call__", step)


# Disks


def test_a_full_disk_costs_nothing_but_time(config, tmp_path):
    whole = left(new(config()).fit().run.path)
    with disk(tmp_path / "small", 1 << 20) as folder:
        made = config(run={"directory": str(folder / "runs")})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "LOOK", -1)
            after(patch, 6, lambda: fill(folder))
            with pytest.raises(GpunetError) as caught:
                new(made).fit()
        there = last_run(made)
        said = str(caught.value)
        assert "No space left on device" in said and "bytes): " in said and "\n" not in said
        assert said.endswith(f"once that is mended, gpunet train --resume {there} goes on from the last checkpoint")
        assert Checkpoint.load(there / "last.safetensors").state["update"] == 4
        assert (there / "metrics.jsonl").read_text().endswith("}\n")
        assert not list(there.glob(".*.part"))
        with pytest.raises(GpunetError, match="No space left|bytes free for checkpoints"):
            on(there).fit()  # it is full still
        (folder / "filling").unlink()
        on(there).fit()
        assert left(there) == whole


def test_a_disk_that_fills_during_the_write_of_a_checkpoint(config, tmp_path, monkeypatch):
    """The metrics have room for their rows; the checkpoint has not, and says how many bytes it needs."""
    with disk(tmp_path / "small", 1 << 20) as folder:
        made, original = config(run={"directory": str(folder / "runs")}), Run.save

        def save(self, loaded, name, keep=1):
            if loaded.state["update"] == 4:
                fill(folder)
            original(self, loaded, name, keep)

        monkeypatch.setattr(Run, "save", save)
        with pytest.raises(GpunetError) as caught:
            new(made).fit()
        there = last_run(made)
        needed = len(Checkpoint.load(there / "last.safetensors").content())
        place, _, told = str(caught.value).partition(": cannot be written (")
        assert place == f"{there}/last.safetensors"
        assert abs(int(told.partition(" ")[0].replace(",", "")) - needed) < 200  # some numbers in it have more digits
        assert "No space left on device; what was there before is whole" in str(caught.value)
        assert Checkpoint.load(there / "last.safetensors").state["update"] == 2
        assert Checkpoint.load(there / "best.safetensors").state["update"] == 3


def test_space_is_checked_before_anything_is_made(config, tmp_path):
    with disk(tmp_path / "small", 16384) as folder:
        with pytest.raises(GpunetError) as caught:
            new(config(run={"directory": str(folder / "runs"), "keep": 5})).fit()
        said = str(caught.value)
        assert f"run directory '{folder}/runs': expected " in said
        assert "bytes free for checkpoints (5 + best + one being written, each " in said and "a lower run.keep" in said
        assert not list(folder.iterdir())


def test_space_is_checked_against_what_is_free(config, tmp_path, monkeypatch):
    """The same without a disk of its own: what a resumed run has written already is not asked for again."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(BaseException, match="^$"):
            new(config()).fit()
    there = last_run(config())
    size = len(Checkpoint.load(there / "last.safetensors").content()) + 4096
    usage = run.shutil.disk_usage(there)
    free = lambda nbytes: lambda place: usage._replace(free=nbytes)  # noqa: E731
    monkeypatch.setattr(run.shutil, "disk_usage", free(4 * size - 8192))
    with pytest.raises(
        GpunetError, match=rf"expected [\d,]+ bytes free for checkpoints .*got {4 * size - 8192:,}; make"
    ):
        new(config()).fit()
    on(there).fit()


@pytest.mark.parametrize(("name", "first"), [("last.safetensors", 2), ("metrics.jsonl", 12)])
def test_what_cannot_be_written_is_named_with_its_bytes(name, first, config, monkeypatch):
    """Without a disk of its own: the write itself fails in its middle."""
    made, whole, count = config(), left(new(config()).fit().run.path), itertools.count()

    def write_all(file, content):
        if Path(file.name).name.removeprefix(".").removesuffix(".part") == name and next(count) >= first:
            file.write(content[: len(content) // 2])
            raise OSError(errno.EIO, "Input/output error")
        original(file, content)

    original = checkpoint.write_all
    monkeypatch.setattr(trainer, "LOOK", -1)
    for module in (checkpoint, run):
        monkeypatch.setattr(module, "write_all", write_all)
    with pytest.raises(
        GpunetError, match=rf"{name}: cannot be written \([\d,]+ bytes\): Input/output error; .*--resume"
    ):
        new(made).fit()
    there = last_run(made)
    assert (there / "metrics.jsonl").read_text().endswith("}\n")
    Checkpoint.load(there / "last.safetensors")
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "write_report", lambda result: None)
    on(there).fit()
    assert left(there) == whole


def test_a_report_that_cannot_be_written_is_written_when_it_can(config, monkeypatch):
    made = config()
    whole, reports = left(new(made).fit().run.path), []

    def full(result):
        raise OSError(errno.ENOSPC, "No space left on device", "curves.png")

    monkeypatch.setattr(trainer, "write_report", full)
    with pytest.raises(GpunetError, match="No space left on device: 'curves.png'; once that is mended, .*--resume"):
        new(made).fit()
    monkeypatch.setattr(trainer, "write_report", reports.append)
    there = last_run(made)
    assert on(there).fit().status == "finished"
    assert left(there) == whole and len(reports) == 1 and reports[0].test.count == 20


def test_a_read_only_folder(config, tmp_path):
    made = config()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(BaseException, match="^$"):
            new(made).fit()
    there = last_run(made)
    said = r"run directory '.*': cannot be made: Read-only file system; .*--out"
    with disk(tmp_path / "readonly", 1 << 20, ",ro") as folder, pytest.raises(GpunetError, match=said):
        new(config(run={"directory": str(folder / "runs")})).fit()
    subprocess.run(["mount", "--bind", there, there], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", there], check=True)
        with pytest.raises(GpunetError, match=rf"run '{there}': cannot be written to: Read-only file system"):
            on(there)
    finally:
        subprocess.run(["umount", "-l", there], check=True)
    on(there).fit()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; the read-only disk above is for root")
def test_a_folder_of_somebody_else(config, tmp_path):
    (tmp_path / "runs").mkdir(mode=0o500)
    with pytest.raises(GpunetError, match=r"cannot be made: Permission denied; .*--out"):
        new(config()).fit()


# Locks


def test_two_trainings_in_one_folder(config):
    made, seen = config(), []

    def second():
        with pytest.raises(GpunetError) as caught:
            on(last_run(made))
        seen.append(str(caught.value))

    with pytest.MonkeyPatch.context() as patch:
        after(patch, 4, second)
        there = new(made).fit().run.path
    assert f"run '{there}': process {os.getpid()} on {os.uname().nodename} trains it; wait" in seen[0]


def started(*arguments, cwd):
    """Start the command as users do."""
    command = [sys.executable, "-m", "gpunet", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(process, beginning):
    for line in process.stderr:
        if line.startswith(beginning):
            return line
    raise AssertionError(f"it ended before '{beginning}'")


def test_the_lock_of_a_living_process_holds_and_that_of_a_killed_one_does_not(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    first = started("train", "small.toml", "--set", "run.checkpoint_steps=5", cwd=tmp_path)
    try:
        wait_for(first, "epoch   3")
        (there,) = (tmp_path / "runs").iterdir()
        second = started("train", "--resume", there, cwd=tmp_path)
        _, said = second.communicate(timeout=60)
        assert second.returncode == 2
        assert said.startswith(f"gpunet: run '{there}': process {first.pid} on ") and said.count("\n") == 1
    finally:
        first.kill()
        first.communicate()
    third = started("train", "--resume", there, cwd=tmp_path)
    try:
        assert "resumed" in wait_for(third, "resumed")
        wait_for(third, "epoch")
        third.send_signal(signal.SIGINT)
        _, said = third.communicate(timeout=60)
    finally:
        third.kill()
    assert third.returncode == 130
    assert said.splitlines()[-1] == f"gpunet train --resume {there} goes on from here"


def test_a_lock_is_given_back_however_it_ends(config):
    made = config()
    for error in (GpunetError("wrong"), RuntimeError("broken"), KeyboardInterrupt()):

        def fail(error=error):
            raise error

        with pytest.MonkeyPatch.context() as patch:
            after(patch, 3, fail)
            with pytest.raises((GpunetError, KeyboardInterrupt)):
                new(made).fit()
        Run(last_run(made)).lock()
    there = last_run(made)
    with pytest.raises(GpunetError, match="another data set|got another"):
        on(there, data=halves(train=92))
    on(there)  # refusing it left no lock


# Signals


def test_a_second_signal_ends_during_the_last_write_and_nothing_is_lost(config, monkeypatch):
    made = config()
    whole = left(new(made).fit().run.path)
    original = os.fsync

    def slow(file):
        if signals:
            os.kill(os.getpid(), signal.SIGINT)  # the user has no patience
        original(file)

    signals = []
    with pytest.MonkeyPatch.context() as patch:
        after(patch, 5, lambda: (signals.append(1), os.kill(os.getpid(), signal.SIGINT)))
        patch.setattr(os, "fsync", slow)
        with pytest.raises(KeyboardInterrupt):
            new(made).fit()
    there = last_run(made)
    assert Run(there).checkpoint("last").state["update"] == 4
    on(there).fit()
    assert left(there) == whole


def test_a_closed_terminal_ends_a_training_with_a_checkpoint(tmp_path):
    """A real terminal: after the signal nothing can be written to it, and the shell sends the signal once more."""
    (tmp_path / "small.toml").write_text(SMALL)
    keeper, terminal = pty.openpty()
    command = [sys.executable, "-m", "gpunet", "train", "small.toml"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=terminal, stdout=terminal,
        stderr=terminal, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    try:
        said = b""
        while b"epoch   3" not in said:
            said += os.read(keeper, 4096)
        os.close(keeper)  # the kernel sends SIGHUP
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 129
    finally:
        process.kill()
        process.wait()
    (there,) = (tmp_path / "runs").iterdir()
    assert Run(there).checkpoint("last").state["update"] > 0
    assert "Interrupted by SIGHUP." in (there / "report.md").read_text()


def test_a_closed_terminal_is_told_twice():
    with Signals() as signals:
        for _ in range(2):  # a process that obeyed the second would end here
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.status == "interrupted by SIGHUP"
        with pytest.raises(SystemExit, match="129"):
            signals.end()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.caught
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_what_is_there_and_names_the_way_back(kind, config, capsys):
    made = config()
    whole = left(new(made).fit().run.path)
    for steps in (2, 3, 4):  # in an epoch, at its end
        with pytest.MonkeyPatch.context() as patch:
            after(patch, steps, lambda: os.kill(os.getpid(), kind))
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                Trainer(made, graph=network(), data=halves()).fit()
        there = last_run(made)
        assert capsys.readouterr().err.splitlines()[-1] == f"gpunet train --resume {there} goes on from here"
        assert Run(there).checkpoint("last").state["update"] == steps
        on(there).fit()
        assert left(there) == whole


# Replicas and clocks


@pytest.mark.parametrize("error", [RuntimeError("a wire is loose"), MemoryError(), ZeroDivisionError("by zero")])
@pytest.mark.parametrize("place", ["train", "evaluate"])
def test_a_failing_replica_is_named_and_nothing_half_done_is_saved(place, error, config, monkeypatch):
    made = config()
    whole, calls = left(new(made).fit().run.path), []
    trained = new(made)
    original = trained.step.backend.bind_launch

    def bind_launch(kernel, arguments, workspace):
        call = original(kernel, arguments, workspace)
        if kernel.name != ("sgd_update" if place == "train" else "metrics_sum"):
            return call

        def failing():
            calls.append(1)
            if len(calls) == 14:
                raise error
            call()

        return failing

    trained.step.backend.bind_launch = bind_launch
    with pytest.raises(GpunetError) as caught:
        trained.fit()
    there, said = last_run(made), str(caught.value)
    assert (
        said.startswith(f"{there}: epoch ")
        and "replica " in said
        and type(error).__name__ in said
        and str(error) in said
    )
    assert f"gpunet train --resume {there} goes on from the last checkpoint" in said
    on(there).fit()
    assert left(there) == whole


def test_a_clock_that_is_set_back_changes_nothing(config, monkeypatch):
    """Wall time jumps wildly; checkpoints by seconds still come, and no time is negative."""
    jumps = itertools.cycle([2e9, 0.0, 1e9, -1e6])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    saved, original = [], Run.save
    monkeypatch.setattr(Run, "save", lambda run, c, name, keep=1: (saved.append(name), original(run, c, name, keep)))
    result = new(config(run={"checkpoint_steps": 0, "checkpoint_seconds": 1e-9})).fit()
    assert saved.count("last") == 14
    assert 0 < result.training_seconds < result.seconds < 600
    progress = result.run.checkpoint("last").about["progress"]
    assert 0 < progress["seconds"] < progress["elapsed"] < 600


def test_a_mistake_of_the_command_is_one_line(monkeypatch, gpunet, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(SMALL.replace("100000", "1"))
    for arguments, said in (
        ([], "train: expected a CONFIG, or --resume RUN"),
        (["small.toml", "--inexact"], "train: expected --resume RUN beside --inexact"),
        (["--resume", "nothing"], "run 'nothing': expected a directory with a config.toml"),
        (["--resume", "nothing", "--out", "x"], "train: --out: a run that goes on stays in its directory"),
    ):
        code, _, err = gpunet("train", *arguments)
        assert code == 2
        assert err.startswith(f"gpunet: {said}")
    for arguments, said in (
        (["small.toml"], "finished"),
        (["--resume", "last run"], "has finished, after 1 epochs: nothing to do"),
    ):
        arguments = [str(next(Path("runs").iterdir())) if a == "last run" else a for a in arguments]
        code, _, err = gpunet("train", *arguments)
        assert code == 0
        assert said in err
