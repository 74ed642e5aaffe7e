"""The profile: every entry is in it once a step, its sums are right, and its trace opens in viewers."""

import json
from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest
from test_step import source, step_of, zoo
from typer.testing import CliRunner

from gpunet.backends import backend as named
from gpunet.backends import problem
from gpunet.cli import app
from gpunet.core.backend import Types
from gpunet.core.observe import Event
from gpunet.core.trace import Base, Entry, Tensor
from gpunet.train import parse_config
from gpunet.train import profile as module
from gpunet.train.profile import Ceilings, Report, Row, bytes_of, ceilings, find_data, measure, profile

skipped = pytest.mark.skipif(bool(problem("emulator")), reason="no emulator here")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small ceilings."""
    monkeypatch.setattr(module, "COPIES", (2**12,))
    monkeypatch.setattr(module, "PRODUCTS", (32,))


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """No data set on the machine."""
    monkeypatch.setenv("GPUNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPUNET_DATA", raising=False)


def recipe(**sections):
    table = {
        "model": {"name": "resnet9", "widths": [4, 4, 4, 4]},
        "data": {"name": "shapes", "train": 100, "test": 10},
        "train": {"batch": 20, "replicas": 2, "backend": "numpy"},
    }
    return parse_config({name: table.get(name, {}) | sections.get(name, {}) for name in {**table, **sections}})


def tensor(*shape, arena=None):
    size = int(np.prod(shape)) * 4
    return Tensor(Base(size, arena), shape, np.dtype("f4"))


def event(path, name, start, stop, replica=0, phase="forward", flops=0, reads=(), writes=()):
    return Event(("gradient",), Entry("launch", name, (), reads, writes, path, flops), phase, replica, start, stop)


def made_up():
    """Two replicas, two steps: a product of 1 s and a copy of 0.25 s each, 100 and 50 bytes."""
    a, b = tensor(25), tensor(5)
    events = []
    for number in range(2):
        for replica in range(2):
            t = 10 * number
            events.append(event("stem", "matmul", t, t + 1, replica, flops=500, reads=(a,)))
            events.append(event("stem", "copy", t + 1, t + 1.25, replica, "backward", reads=(b,), writes=(b,)))
    return Report("made up", events, 2, 2, [1.0, 1.5, 1.2], Ceilings(400.0, 2000.0))


def test_rows_are_sums_a_step():
    rows = made_up().rows(lambda e: e.entry.name)
    assert rows == {"matmul": Row(1, 1, 200, 1000), "copy": Row(0.25, 1, 80, 0)}
    assert made_up().total == Row(1.25, 2, 280, 1000)


def test_cells():
    cells = Row(0.25, 1, 80, 0).cells(1.25, Ceilings(400.0, 2000.0))
    assert cells == ("250.000 ms", "20.0%", "1", "80 B", "", "0.00", "", "80%", "")
    cells = Row(1, 2.5, 3e9, 1e12).cells(4, Ceilings(10e9, 2e12))
    assert cells == ("1000.000 ms", "25.0%", "2.5", "2.794 GiB", "1 T", "3.00", "1000.00", "30%", "50%")


def test_the_text():
    lines = str(made_up()).splitlines()
    assert lines[0] == "made up"
    assert " ".join(lines[2].split()) == "layer part time share calls bytes FLOPs GB/s GFLOP/s of copy of GEMM"
    assert lines[3].split()[:4] == ["stem", "forward", "1000.000", "ms"]
    assert lines[5].split()[:4] == ["all", "1250.000", "ms", "100.0%"]
    assert [line.split()[0] for line in lines[7:11]] == ["kernel", "matmul", "copy", "all"]
    assert (
        "sum of the entries 1250.00 ms a step; a normal step takes 1200.00 ms (1000.00 to 1500.00, median of 3)"
        in lines[-2]
    )
    assert "they wait for each other" in lines[-2]


def test_of_a_data_set_only_the_images_taken_count():
    images, order, out = tensor(1000, 8, arena="train.images"), tensor(1000, arena="train.order"), tensor(10, 8)
    taken = event("batch", "batch_crop_flip", 0, 1, phase="batch", reads=(images, order, tensor(3)), writes=(out,))
    assert bytes_of(taken) == 10 * 32 + 10 * 4 + 12 + 320
    assert bytes_of(event("a", "k", 0, 1, reads=(images,), writes=(out,))) == 32000 + 320


@pytest.mark.parametrize("replicas", [1, 3])
def test_every_entry_once_a_step(replicas):
    with closing(step_of(zoo((6, 7, 2)), source=source(12), replicas=replicas)) as step:
        walls, events = measure(step, 4)
        assert len(walls) == 4 and min(walls) > 0
        programs = [step._replay.program(key) for key in (("gradient", 6, False, False), ("update",))]
        for replica in range(replicas):
            expected = [e for p in programs for e in p[replica].plan.entries]
            seen = [e for e in events if e.replica == replica]
            for entry in expected:
                assert sum(e.entry is entry for e in seen) == 4
            assert all(a.stop <= b.start and a.start <= a.stop for a, b in pairwise(seen))
        assert {e.phase for e in events} >= {"batch", "forward", "loss", "backward", "update", "advance"}
        flops = sum(e.entry.flops for e in events) / 4
        assert flops == sum(e.flops for p in programs for replica in p for e in replica.plan.entries) > 0


@pytest.mark.parametrize("backend", ["numpy", pytest.param("emulator", marks=skipped)])
def test_ceilings_are_measured_on_the_backend(backend):
    for replicas in (1, 2) if backend == "numpy" else (1,):
        for dtype in ("float32", "float64", "float16"):
            found = ceilings(named(backend), Types.of(dtype), replicas)
            assert 1e5 < found.copy < 1e13
            assert 1e4 < found.product < 1e15


def test_ceilings_grow_until_a_run_is_long(monkeypatch):
    asked = []

    def race(backend, types, replicas, trace, n):
        asked.append(n)
        return n / 1e6, 8 * n, 2 * n**1.5

    monkeypatch.setattr(module, "COPIES", (1000, 5000, 20_000, 30_000))
    monkeypatch.setattr(module, "PRODUCTS", (10, 100, 200, 300))
    monkeypatch.setattr(module, "_race", race)
    found = ceilings(None, None, 1)
    assert asked == [1000, 5000, 20_000, 100, 10_000, 40_000]
    assert (found.copy, found.product) == pytest.approx((8e6, 2e6 * 200))


# A recipe


@pytest.mark.parametrize(
    ("backend", "accumulate"), [("numpy", 1), ("numpy", 2), pytest.param("emulator", 2, marks=skipped)]
)
def test_a_recipe(backend, accumulate):
    found = profile(recipe(train={"batch": 20, "backend": backend, "accumulate": accumulate, "replicas": 2}), 2)
    paths = {e.entry.path for e in found.events}
    assert {"batch", "stem.conv", "stage3.residual.body2.conv", "head", "loss", "optimizer"} <= paths
    assert not found.notes
    assert found.replicas == 2
    assert all(e.key[1] == 20 for e in found.events if e.key[0] == "gradient"), "a smaller batch"
    rows = found.rows(lambda e: e.entry.path)
    assert rows["stem.conv"].flops == 2 * accumulate * 20 * 32 * 32 * 9 * 3 * 4 * 2  # forward and dW
    assert sum(row.seconds for row in rows.values()) == pytest.approx(found.total.seconds)
    text = str(found)
    assert "stem.conv" in text and f"backend: {backend}" in text and "ceilings measured here" in text


def test_without_the_data_random_images_do(no_data, monkeypatch):
    monkeypatch.setattr("gpunet.data.cifar.fetch", lambda *given: pytest.fail("it downloads"))
    made = recipe()
    made.data = type(made.data)(name="cifar10")
    dataset, notes = find_data(made)
    assert notes == ["note: cifar10 is not here: random images of its size, 80 of them"]
    assert dataset.train.images.shape == (80, 32, 32, 3) and len(dataset.classes) == 10
    assert dataset.train.images.std() > 60 and set(dataset.train.labels) <= set(range(10))


def test_the_recipe_is_left_as_it_was():
    made = recipe()
    before = made.model_dump()
    find_data(made)
    assert made.model_dump() == before


# The trace


def check_schema(trace):
    """Chrome's trace-event format, as its document has it, for the events used here."""
    assert trace["displayTimeUnit"] in ("ms", "ns")
    for item in trace["traceEvents"]:
        assert {"name", "ph", "pid", "tid"} <= item.keys()
        assert isinstance(item["name"], str) and isinstance(item["pid"], int) and isinstance(item["tid"], int)
        if item["ph"] == "M":
            assert item["name"] in ("process_name", "thread_name") and isinstance(item["args"]["name"], str)
            continue
        assert item["ph"] == "X" and isinstance(item["cat"], str)
        assert isinstance(item["ts"], float) and isinstance(item["dur"], float)
        assert item["ts"] >= 0 and item["dur"] >= 0
        assert isinstance(item["args"]["bytes"], int) and isinstance(item["args"]["flops"], int)


def test_the_trace_of_made_up_events():
    trace = made_up().trace()
    check_schema(json.loads(json.dumps(trace)))
    spans = [item for item in trace["traceEvents"] if item["ph"] == "X"]
    assert spans[1] == {
        "name": "stem copy",
        "cat": "backward",
        "ph": "X",
        "ts": 1e6,
        "dur": 0.25e6,
        "pid": 1,
        "tid": 0,
        "args": {"layer": "stem", "kernel": "copy", "bytes": 40, "flops": 0},
    }
    names = {(i["name"], i["tid"]): i["args"]["name"] for i in trace["traceEvents"] if i["ph"] == "M"}
    assert names == {("process_name", 0): "made up", ("thread_name", 0): "replica 1", ("thread_name", 1): "replica 2"}


def test_the_command(no_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text(
        '[model]\nname = "mlp"\nhidden = [8]\n[data]\nname = "cifar10"\n[train]\nbatch = 10\nreplicas = 2\n'
    )
    ran = CliRunner().invoke(app, ["profile", "a.toml", "--steps", "3", "--out", "made/here", "--set", "train.batch=12",
                                   "--backend", "numpy"])  # fmt: skip
    assert ran.exit_code == 0, ran.output
    assert "note: cifar10 is not here: random images of its size, 48 of them" in ran.output
    assert "a: backend: numpy, batch 12, float32, 2 replicas" in ran.output
    trace = json.loads((tmp_path / "made/here/trace.json").read_text())
    check_schema(trace)
    spans = [item for item in trace["traceEvents"] if item["ph"] == "X"]
    assert {item["tid"] for item in spans} == {0, 1}
    assert sum(item["args"]["kernel"] == "softmax_cross_entropy" for item in spans) == 3 * 2
    for replica in (0, 1):  # a viewer needs the calls of a row apart
        own = sorted((i["ts"], i["dur"]) for i in spans if i["tid"] == replica)
        assert all(a[0] + a[1] <= b[0] + 0.01 for a, b in pairwise(own))
    assert CliRunner().invoke(app, ["profile", "a.toml", "--steps", "0"]).exit_code == 2
