"""benchmarks/gpu_report.py without a GPU: each part on the emulator, in tiny, and what it does when things go wrong."""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_report.py"
sys.path.append(str(SCRIPT.parent))

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="the emulator: there is no g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator's fibers are x86-64"),
]
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")

import gpu_report  # noqa: E402 - it stands beside the package
from gpu import nets, parity, peer, steps, training, work  # noqa: E402
from gpu.bench import Bench, Skip  # noqa: E402
from results import GpuRecord, gpu_table  # noqa: E402

EMULATED = ("--backend", "emulator", "--quick")


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """What there is to train on here is synthetic."""
    monkeypatch.delenv("GPUNET_DATA", raising=False)


def report(*words, code=0):
    """Run the report in a process of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def written(folder):
    """Return (record, table, README) of the one report in a folder."""
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text(), (folder / "README.md").read_text()


def options(**changed):
    """Return a command's options for an emulated, tiny run."""
    found = gpu_report.parse(["--part", "steps", *EMULATED])
    return argparse.Namespace(**{**vars(found), **changed})


@pytest.fixture
def bench():
    """A Bench on the emulator that has a minute."""
    return Bench(options(), time.time() + 60)


# The parts


def test_all_parts_come_together_in_one_file(tmp_path):
    some = ["doctor", "kernels order", "trajectory", "repeat", "graphs", "memcheck"]
    some += ["copies", "squares float32", "resnet9 512 float32", "others float32", "products resnet9 float32"]
    some += ["compile resnet9 512 reduce-overhead", "resnet9 float32, 4 epochs"]
    only = [word for name in some for word in ("--only", name)]
    environment = os.environ.get("PATH")
    said = report("--part", "all", *EMULATED, "--out", tmp_path, *only)
    assert environment == os.environ.get("PATH")
    record, table, readme = written(tmp_path)
    assert list(record["parts"]) == ["parity", "kernels", "steps", "accuracy"]
    items = {f"{part} {name}": item for part, found in record["parts"].items() for name, item in found["items"].items()}
    states = {name: item["status"] for name, item in items.items()}
    skipped = {"steps compile resnet9 512 reduce-overhead", "parity memcheck"} & set(states)
    assert {name for name, state in states.items() if state != "ok"} <= skipped, states
    assert states["steps compile resnet9 512 reduce-overhead"] == "skipped"
    assert "no peer" in items["steps compile resnet9 512 reduce-overhead"]["why"]
    assert "steps resnet9 512 float32: ok" in said
    for words in (
        "sources",
        "numpy",
        "times mean nothing",
        "GB/s",
        "ms",
        "planned, MB",
        "TFLOP/s",
        "images/s",
        "of copy",
    ):
        assert words in table, words
    assert "emulator" in readme
    assert "parity: " in readme
    assert ".md)" in readme


def test_a_step_is_the_sum_of_its_parts(bench):
    found = steps.measure(bench, "resnet9", 512, "float16")
    (row,) = found["rows"][steps.STEP]
    assert row["planned, MB"] > 0
    assert "no peer" in row["best peer"]
    kernels = found["rows"][steps.KERNELS]
    ours = training.Training(bench, "resnet9", 4, "float16", 16).start()
    assert sum(r["launches"] for r in kernels) == sum(len(ours.bound(key)) for key in ours.keys)
    assert sum(r["ms"] for r in kernels) == pytest.approx(row["kernels, ms"])


def test_taking_a_step_apart_is_doing_it_once(bench):
    apart, whole = (training.Training(bench, "airbench", 4, "float16", 16).start() for _ in "12")
    apart.walk(apart.keys, rounds=1)
    whole.run()
    for a, b in ((apart.step.weights, whole.step.weights), (apart.step.statistics, whole.step.statistics)):
        assert all(parity.same(a[name], b[name]) for name in b)
    assert apart.step.state == whole.step.state
    assert apart.step.metrics().tolist() == whole.step.metrics().tolist()


# What goes wrong


def test_items_that_fail_or_crash_do_not_stop_the_rest(tmp_path):
    words = (
        "--part",
        "kernels",
        *EMULATED,
        "--out",
        tmp_path,
        "--only",
        "copies",
        "--plant",
        "fail",
        "--plant",
        "crash",
    )
    said = report(*words, code=1)
    record, table, _ = written(tmp_path)
    items = record["parts"]["kernels"]["items"]
    assert list(items) == ["conditions", "planted fail", "planted crash", "copies"]
    assert [item["status"] for item in items.values()] == ["ok", "failed", "failed", "ok"]
    assert items["planted fail"]["why"] == "ValueError: planted"
    assert 'raise ValueError("planted")' in items["planted fail"]["traceback"]
    assert "exit code -6" in items["planted crash"]["why"]
    assert "in crash" in items["planted crash"]["traceback"]  # faulthandler's
    assert "| planted fail | failed | ValueError: planted |" in table
    assert "2 ok, 2 failed" in said


def test_an_item_that_hangs_is_stopped_at_the_deadline(tmp_path):
    words = ("--part", "kernels", *EMULATED, "--out", tmp_path, "--only", "copies", "--plant", "hang")
    start = time.time()
    report(*words, "--minutes", "0.1")
    assert time.time() - start < 60
    items = written(tmp_path)[0]["parts"]["kernels"]["items"]
    for name in ("planted hang", "copies"):
        assert items[name]["status"] == "not run"
        assert items[name]["why"].startswith("out of time")


def test_without_time_everything_is_listed_as_not_run(tmp_path):
    report("--part", "all", *EMULATED, "--out", tmp_path, "--minutes", "0")
    record, table, _ = written(tmp_path)
    for part, module in gpu_report.PARTS.items():
        items = record["parts"][part]["items"]
        assert [*items] == ["conditions", *(item.name for item in module.items(options()))]
        assert {(item["status"], item["why"]) for item in items.values()} == {("not run", "out of time")}
    assert "| trajectory | not run | out of time |" in table


def test_without_a_gpu_every_item_says_why(tmp_path):
    from gpunet import backends

    if backends.problem("cuda") is None:
        pytest.skip("there is a GPU")
    said = report("--part", "kernels", "--quick", "--out", tmp_path, "--only", "copies", code=1)
    assert "no NVIDIA driver" in said or "no CuPy" in said or "no GPU" in said
    assert {item["status"] for item in written(tmp_path)[0]["parts"]["kernels"]["items"].values()} == {"failed"}


def test_an_emulated_run_writes_nothing_unless_told(tmp_path):
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    said = report("--part", "kernels", *EMULATED, "--only", "copies")
    assert "wrote" not in said
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before


def test_names_of_items_are_told_apart():
    for module in gpu_report.PARTS.values():
        names = [item.name for item in module.items(options())]
        assert len(set(names)) == len(names)


# Processes of their own


@pytest.mark.parametrize("errors", [0, 2])
def test_kernels_run_under_a_sanitizer(tmp_path, monkeypatch, bench, errors):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\n[ "$1 $2 $3 $4" = "--tool memcheck --error-exitcode 9" ] || exit 1\nshift 4\n"$@"\n'
                    f"echo '========= ERROR SUMMARY: {errors} errors'\nexit {9 if errors else 0}\n")  # fmt: skip
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = parity.sanitizer(bench, "memcheck")
    assert found["rows"][parity.SANITIZER][0]["result"] == f"ERROR SUMMARY: {errors} errors"
    assert "launched all" in found["output"]
    assert bool(found["problems"]) == bool(errors)


@pytest.mark.parametrize(("body", "closing"), [("pass", "1 passed"), ("assert 1 == 2", "1 failed")])
def test_the_closing_line_of_tests_is_kept(tmp_path, body, closing):
    file = tmp_path / "test_it.py"
    file.write_text(f"def test_it():\n    {body}\n")
    found = parity.run_tests(file, 60)
    assert closing in found["line"]
    assert bool(found["problems"]) == ("failed" in closing)


def test_tests_that_are_not_there_are_skipped(tmp_path):
    with pytest.raises(Skip, match="there is no"):
        parity.run_tests(tmp_path / "test_it.py", 60)


def test_a_child_that_takes_too_long_is_stopped():
    with pytest.raises(TimeoutError, match="longer than 1 s; its last words: begun"):
        parity.child([sys.executable, "-uc", "import time; print('begun'); time.sleep(60)"], 1)


# Records and tables


def test_parts_of_two_runs_share_a_file_and_keep_what_is_not_run_again(tmp_path):
    for item, status in (("a", "ok"), ("b", "ok"), ("a", "failed")):
        record = GpuRecord(tmp_path, "Some GPU")
        record.part("steps", {"driver": "580"}, 7)["items"][item] = {"status": status, "why": "x"}
        record.save()
    assert [path.name for path in tmp_path.glob("*.json")] == [f"gpu-some-gpu-{record.record['date']}.json"]
    items = GpuRecord(tmp_path, "Some GPU").record["parts"]["steps"]["items"]
    assert {name: item["status"] for name, item in items.items()} == {"a": "failed", "b": "ok"}


def test_the_table_keeps_the_largest_of_rows_with_one_key():
    rows = [{"_key": "k", "_size": size, "kernel": "relu", "us": 1.5 * size} for size in (2, 3, 1)]
    items = {str(n): {"status": "ok", "rows": {"Kernels": [row]}} for n, row in enumerate(rows)}
    part = {"conditions": {"driver": "580|x"}, "minutes": 7, "seconds": 3, "items": items}
    table = gpu_table({"name": "G", "date": "d", "emulated": False, "parts": {"kernels": part}})
    assert "| kernel | us |\n|---|---|\n| relu | 4.5 |\n" in table
    assert table.count("relu") == 1
    assert r"| driver | 580\|x |" in table


def test_what_differs_between_parts_is_said_for_each():
    parts = {name: {"conditions": {"clock": c}, "minutes": 7, "items": {}} for name, c in (("a", "1"), ("b", "2"))}
    assert "| clock | a: 1; b: 2 |" in gpu_table({"name": "G", "date": "d", "emulated": False, "parts": parts})


def test_json_holds_numbers_of_numpy_and_of_nowhere():
    found = work.plain({"a": np.float32(0.5), "b": (np.int64(3), np.inf), 4: [np.nan], "c": Path("x")})
    assert found == {"a": 0.5, "b": [3, "inf"], "4": ["nan"], "c": "x"}


# The nets and the peer


def test_nets_have_the_weights_of_their_originals():
    assert nets.build("resnet18").size == 11_173_962
    assert nets.build("airbench").size == 1_971_640


@needs_torch
@pytest.mark.parametrize("net", [*nets.NETS])
def test_the_peer_computes_what_gpunet_does(net):
    import torch

    from gpunet import Step

    graph, batch = nets.build(net, tiny=True), 3
    step = Step(graph, batch=batch, replicas=1)
    images = np.random.default_rng(0).standard_normal((batch, *nets.SHAPE), np.float32)
    data = peer.Resident(torch, nets.source(8), torch.device("cpu"))
    other = peer.Peer(torch, graph, data, batch, torch.device("cpu"))
    peer.load(torch, other.net, graph, {**step.weights, **step.statistics})
    if net != "cifar10_quick":  # its first linear layer sees 4 x 4 pixels, in another order
        np.testing.assert_allclose(other.predict(images), step.predict(images), rtol=1e-3, atol=1e-4)
    other.start(1)
    step.close()


@needs_torch
def test_the_peer_crops_and_flips_as_gpunet_may(monkeypatch):
    import torch

    source, n = nets.source(6), 4
    data = peer.Resident(torch, source, torch.device("cpu"))
    other = peer.Peer(torch, nets.build("resnet20", tiny=True), data, n, torch.device("cpu"))
    x, labels = other.inputs()
    x = x.permute(0, 2, 3, 1).numpy() / nets.SCALE + nets.MEAN
    padded = np.pad(source.split.images, ((0, 0), (nets.PAD,) * 2, (nets.PAD,) * 2, (0, 0)))
    for image, number in zip(x.round(), data.order[:n].tolist(), strict=True):
        crops = (padded[number, i : i + 32, j : j + 32] for i in range(9) for j in range(9))
        assert any((image == c).all() or (image == c[:, ::-1]).all() for c in crops)
    assert labels.tolist() == source.labels[data.order[:n].numpy()].tolist()


@needs_torch
def test_steps_run_beside_the_peer_on_a_cpu(bench):
    bench.options.torch_device = "cpu"
    found = steps.measure(bench, "airbench", 512, "float32")
    assert found["problems"] == []
    assert set(found["rounds_ms"]) == {"gpunet graph", "gpunet no graph", *peer.PEERS["float32"]}
    assert found["output_difference"] < 1e-4
    assert found["rows"][steps.STEP][0]["gpunet / peer"] > 0


@needs_torch
def test_the_profilers_spans_become_rows():
    import torch

    spans = steps.profile(torch, lambda: torch.ones(8, 8) @ torch.ones(8, 8), on_gpu=False)
    assert any("mm" in name for name, *_ in spans)
    rows, busy = steps.timeline_rows([("a", 0, 2), ("b", 2, 3), ("a", 3, 4)], {"net": "x"})
    assert busy == 1
    assert [(r["kernel"], r.get("launches")) for r in rows] == [("a", 2), ("b", 1), ("busy", None)]
