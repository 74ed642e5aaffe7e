"""What the CPU benchmarks compute, away from real data: seeds that are gone on with, loads, rounds, memory, tables."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from small_run import SMALL_TOML, Killed, stop_after

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import accuracy_cpu
import contenders
import quiet
import results
import step_cpu
import step_memory

from gpunet import cli
from gpunet.errors import GpunetError
from gpunet.train import Trainer, load_config

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells a process's memory")


# Seeds


@pytest.fixture
def calls(monkeypatch):
    """The command runs in this process; what it was called with."""
    seen = []

    def run(command, **options):
        seen.append(command[3:])
        monkeypatch.setattr("sys.argv", ["gpunet", *command[3:]])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return subprocess.CompletedProcess(command, end.value.code or 0)

    monkeypatch.setattr(accuracy_cpu, "subprocess", types.SimpleNamespace(run=run, DEVNULL=None))
    return seen


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL_TOML.replace("epochs = 1", "epochs = 2"))
    return str(path)


def test_a_seed_is_trained_once_and_then_read_back(calls, small, tmp_path):
    first = accuracy_cpu.train(small, 3, ["train.batch=20"], tmp_path / "seed-3")
    assert first["seed"] == 3 and 0 <= first["test_accuracy"] <= 1 and first["seconds"] > 0 and first["resumed"] == []
    (run,) = (tmp_path / "seed-3").glob("small-*")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert first["test_accuracy"] == rows[-1]["accuracy"] and rows[-1]["split"] == "test"
    last = [row["loss"] for row in rows if row["split"] == "train" and row["epoch"] > 1]
    assert len(last) == 5 and first["train_loss_last_epoch"] == pytest.approx(np.mean(last))
    assert load_config(run / "config.toml").train.seed == 3
    assert accuracy_cpu.train(small, 3, ["train.batch=20"], tmp_path / "seed-3") == first
    assert len(calls) == 1


def test_a_seed_that_was_killed_is_gone_on_with(calls, small, tmp_path, monkeypatch):
    whole = accuracy_cpu.train(small, 0, [], tmp_path / "whole")
    config = load_config(small, [f"run.directory='{tmp_path / 'cut'}'", "train.seed=0", "run.checkpoint_steps=1"])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 3)
        Trainer(config, show=False).fit()
    (run,) = (accuracy_cpu.Run.open(path.parent) for path in (tmp_path / "cut").glob("*/config.toml"))
    assert 0 < accuracy_cpu.elapsed(run) < 600
    monkeypatch.setattr(accuracy_cpu, "elapsed", lambda run: 5000.0)
    found = accuracy_cpu.train(small, 0, [], tmp_path / "cut")
    assert calls[-1] == ["train", "--resume", str(run.path)]
    assert found["resumed"] == [3] and 5000 < found["seconds"] < 5600
    assert {k: found[k] for k in whole if k.startswith(("test", "train"))} == {
        k: whole[k] for k in whole if k.startswith(("test", "train"))
    }


def test_a_folder_of_other_settings_is_refused(calls, small, tmp_path):
    accuracy_cpu.train(small, 0, [], tmp_path)
    with pytest.raises(GpunetError, match=r"train.batch is 30 in the run, 25 in what is asked for; choose another"):
        accuracy_cpu.train(small, 0, ["train.batch=25"], tmp_path)


def test_a_training_that_fails_is_no_figure(calls, small, tmp_path):
    with pytest.raises(GpunetError, match="the training ended with code 2; called again, this goes on with it"):
        accuracy_cpu.train(small, 0, ["optimizer.lr=1e30"], tmp_path)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("accuracy", "seconds", "said"),
    [(0.91, 700, "is reached"), (0.899, 700, "is NOT reached"), (0.91, 721, "is NOT reached")],
)
def test_a_goal_is_an_accuracy_in_a_time(accuracy, seconds, said):
    runs = [{"seed": n, "resumed": [], "test_accuracy": a, "seconds": s} for n, (a, s) in
            enumerate([(0.1, 1), (accuracy, seconds), (0.99, 10_000)])]  # fmt: skip
    medians, line = accuracy_cpu.summary(runs, (0.9, 12))
    assert medians == {"test_accuracy": accuracy, "seconds": seconds}
    assert f"the goal of 90% in 12 minutes {said}" in line
    assert "goal" not in accuracy_cpu.summary(runs, None)[1]


def test_every_goal_has_its_recipe():
    for name in accuracy_cpu.GOALS:
        assert load_config(name).data.name == "cifar10"
        assert len((accuracy_cpu.Path(__file__).parents[1] / "configs" / f"{name}.toml").read_text().splitlines()) <= 40


# The load


def test_others_are_all_but_us(monkeypatch):
    moments = iter([(0, 100, 10), (10, 118, 20), (12, 122, 24), (14, 123, 25.5)])
    monkeypatch.setattr(quiet, "_now", lambda: next(moments))
    others = quiet.Others()
    assert [others.share(), others.share(), others.share()] == [0.8, 0.0, 0.0]


def test_the_kernels_own_counts():
    ticks = quiet.os.sysconf("SC_CLK_TCK")
    stat = f"cpu  {ticks} {ticks} {ticks} 999 999 {ticks} {ticks} {3 * ticks} {ticks} 0\ncpu0 1 2 3\n"
    assert quiet.busy(stat) == 8  # stolen time counts, guests are in user time
    wall, everybody, ours = quiet._now()
    assert everybody >= ours > 0 and wall > 0


def test_figures_of_a_busy_machine_are_not_stored(capsys):
    assert quiet.may_store(0.05, False) and quiet.may_store(0.5, True)
    assert not quiet.may_store(0.051, False)
    assert "not stored: other work took 5% of a core: NOT QUIET" in capsys.readouterr().out


# Steps


def test_rounds_are_interleaved(monkeypatch):
    order = []
    others = types.SimpleNamespace(look=lambda: 0.01, share=iter([0.02, 0.3, 0.04]).__next__)
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times, load = step_cpu.rounds_of(calls, 3, 0, others)
    assert "".join(order) == "abccbaabc" and load == 0.3
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_to_channels_last():
    times = {"gpunet": [0.3, 0.1, 0.2], "torch channels_last": [0.1, 0.1, 0.5]}
    assert step_cpu.line("step", times) == "step: gpunet 200.0 ms (2.00), torch channels_last 100.0 ms (1.00)"
    assert step_cpu.line("step", {"gpunet": [0.2]}) == "step: gpunet 200.0 ms"
    assert step_cpu.memory_line({"gpunet": 3 << 20, "torch channels_last": 6 << 20}) == (
        "gpunet 3 MiB (0.50), torch channels_last 6 MiB (1.00)"
    )


def test_layers_stand_side_by_side():
    layers = {
        "gpunet": [["conv", "forward", 3.0], ["conv", "backward", 5.0], ["sgd", "", 1.0], ["loss", "", 0.5]],
        "torch channels_last": [["conv", "forward", 2.0], ["conv", "backward", 5.25], ["optimizer", "", 0.25]],
    }
    assert [line.split() for line in step_cpu.layer_table(layers).splitlines()[1:]] == [
        ["conv", "forward", "3.00", "2.00", "+1.00"],
        ["conv", "backward", "5.00", "5.25", "-0.25"],
        ["loss,", "update,", "sums", "1.50", "0.25", "+1.25"],
        ["all", "9.50", "7.50", "+2.00"],
    ]


def test_gpunets_layers_are_the_networks():
    graph = contenders.models.build("mlp", (4, 4, 1), 3, hidden=[5])
    contender = contenders.make("gpunet", graph, 6, 2)
    found = contender.layers(2)
    assert contender.forward().shape == (6, 3) and contender.made.state["update"] == 2
    contender.close()
    paths = {node.path for node in graph.nodes}
    assert {part for path, part in found if path not in paths} == {""}
    assert {(graph.nodes[-1].path, part) for part in ("forward", "backward")} <= found.keys()
    assert all(seconds > 0 for seconds in found.values())


def test_who_cannot_run_says_why():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        patch.setitem(sys.modules, "numba", None)
        graph = contenders.models.build("mlp", (4, 4, 1), 3, hidden=[5])
        ready, missing = step_cpu.start(contenders.TIMED, graph, 4, 1)
    for contender in ready.values():
        contender.close()
    assert [*ready] == ["gpunet"] and [*missing] == ["gpunet numba", *contenders.TORCH]
    assert missing["torch"].startswith("torch: import of torch halted")


@needs_torch
@pytest.mark.parametrize("net", [*contenders.NETS])
def test_pytorch_does_the_same_and_all_its_layers_are_timed(net):
    graph = contenders.build(net)
    ours, theirs = (contenders.make(name, graph, 4, 1) for name in ("gpunet", "torch channels_last"))
    if net != "cifar10_quick":  # its first linear layer sees 4 x 4 pixels, in another order
        np.testing.assert_allclose(theirs.forward(), ours.forward(), rtol=1e-3, atol=1e-4)
    found = theirs.layers(1)
    ours.close()
    assert {path for path, part in found if part == "forward"} == {node.path for node in graph.nodes}
    trained = {n.path for n in graph.nodes if any(p.trainable and not p.frozen for p in n.layer.parameters.values())}
    assert {path for path, part in found if part == "backward"} >= trained


# Memory


def test_a_processs_memory_is_read():
    text = "Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n"
    assert (step_memory.status("VmHWM", text), step_memory.status("VmRSS", text)) == (2 << 20, 1 << 20)


def test_growth_is_the_peak_beyond_what_imports_hold(monkeypatch):
    held = {"VmRSS": 100, "VmHWM": 175}
    monkeypatch.setattr(step_memory, "status", held.__getitem__)
    assert step_memory.growth("gpunet", "cifar10_quick", 1, 1) == 75


@needs_proc
def test_memory_grows_with_the_batch():
    small, large = (step_cpu.memory_of("gpunet unfold", "cifar10_quick", batch, 1) for batch in (1, 33))
    kept = 32 * (32 * 32 * (3 + 32) + 3 * 16 * 16 * 32) * 4  # some of what 32 images more need
    assert small > 0 and kept < large - small < 20 * kept


def test_a_child_that_fails_is_left_out(capsys):
    assert step_cpu.memory_of("gpunet", "cifar10_quick", 0, 1) is None
    assert capsys.readouterr().out.startswith("memory of gpunet: left out: gpunet.errors.GpunetError: batch: expected")


# The table


MACHINE = {"processor": "a processor", "cores": 2, "date": "2026-01-02", "versions": {"gpunet": "1", "numpy": "2"}}


def rows_of(tmp_path, **record):
    (tmp_path / "one.json").write_text(json.dumps({**MACHINE, **record}))
    results.table(tmp_path)
    return (tmp_path / "README.md").read_text().splitlines()


def test_the_table_of_steps(tmp_path):
    times = {name: {"median_ms": ms} for name, ms in
             (("gpunet numba", 50), ("gpunet", 80), ("torch channels_last", 40))}  # fmt: skip
    memory = {"gpunet": 30_000_000, "torch channels_last": 60_000_000}
    lines = rows_of(tmp_path, benchmark="step_cpu", name="resnet9_128", net="resnet9", batch=128, threads=2,
                    others_load=0.06, times=times, forward={"gpunet": {"median_ms": 9}}, memory=memory)  # fmt: skip
    about = "2 threads, a processor, 2 cores, gpunet 1, numpy 2, 2026-01-02"
    assert f"| resnet9 | 128 | 50.0 | 80.0 |  | 40.0 |  | 1.25 | {about}; others used 6% of a core |" in lines
    assert f"| resnet9 | 128 |  | 9.0 |  |  |  |  | {about}; others used 6% of a core |" in lines
    assert f"| resnet9 | 128 |  | 30 (0.50) |  | 60 (1.00) | {about} |" in lines


def test_the_table_of_trainings(tmp_path):
    runs = [{"test_accuracy": a, "seconds": s, "resumed": r, "others_load": 0.0} for a, s, r in
            ((0.91, 600, []), (0.90, 660, [5]), (0.93, 630, []))]  # fmt: skip
    median = {"test_accuracy": 0.91, "seconds": 630, "train_loss_last_epoch": 1.25}
    lines = rows_of(tmp_path, benchmark="accuracy", name="cifar10_90", goal=0.9, overrides=[], peers="Others: none.",
                    runs=runs, median=median)  # fmt: skip
    assert lines[-2:] == ["Others: none.", ""]
    assert (
        "| cifar10_90 | 90%, reached | 3 | 91.00% (90.00% to 93.00%) | 1.250 | 630 s (600 to 660) "
        "| 1 of the runs were gone on with; a processor, 2 cores, gpunet 1, numpy 2, 2026-01-02 |"
    ) in lines
