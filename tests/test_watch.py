"""What is watched: the numbers in the rows, and that watching changes none that is trained."""

import json
from contextlib import closing

import numpy as np
import pytest
from test_step import batch_of, everything, source, step_of, zoo
from test_train import easy

from gpunet.backends import problem
from gpunet.errors import GpunetError
from gpunet.nn import BatchNorm, Conv2d, Graph, Input, Linear, ReLU, Sequential
from gpunet.train import Trainer, parse_config, watch
from gpunet.train.watch import EDGES, Watch, keeps, matching, summary

pytestmark = pytest.mark.usefixtures("no_pictures")
skipped = pytest.mark.skipif(bool(problem("emulator")), reason="no emulator here")


def network():
    image = Input((6, 7, 2))
    stage = Sequential(Conv2d(4, 3, name="conv"), BatchNorm(name="norm"), ReLU(name="relu"), name="stage1")
    return Graph(image, Linear(3, name="head")(stage(image)))


def watched(patterns, graph=None, **options):
    graph = graph or network()
    step = step_of(graph, source=source(), keep=keeps(graph, patterns), **options)
    return step, Watch(step, patterns)


# Names


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("head.*", ["head.weight:gradient", "head.weight", "head.bias:gradient", "head.bias"]),
        ("head:output", ["head:output"]),
        ("*.relu", ["stage1.relu:output", "stage1.relu:output_gradient"]),
        ("*:output", [f"{p}:output" for p in ("stage1.conv", "stage1.norm", "stage1.relu", "head")]),
        ("stage1.conv.weight", ["stage1.conv.weight:gradient", "stage1.conv.weight"]),
        ("*.weight:gradient", ["stage1.conv.weight:gradient", "head.weight:gradient"]),
        ("*.gamma", ["stage1.norm.gamma:gradient", "stage1.norm.gamma"]),
    ],
)  # fmt: skip
def test_a_pattern_stands_for(pattern, expected):
    assert sorted(matching(network(), [pattern])) == sorted(expected)
    assert matching(network(), [pattern, pattern]) == matching(network(), [pattern])


def test_a_block_stands_for_all_inside():
    names = matching(network(), ["stage1"])
    assert len(names) == 3 * 2 + 4 * 2 and all(name.startswith("stage1.") for name in names)
    assert names == matching(network(), ["stage1.*"])
    assert not [name for name in matching(network(), ["*"]) if "mean" in name or "variance" in name]


@pytest.mark.parametrize(
    ("pattern", "near"), [("stage1.cnov", "stage1.conv"), ("haed", "head"), ("head:outptu", "head:output"), ("zzz", "")]
)
def test_a_pattern_without_a_match_is_an_error(pattern, near):
    with pytest.raises(GpunetError, match=rf"watch: '{pattern}' matches nothing; nearest: .*{near}"):
        keeps(network(), ["head", pattern])


def test_a_step_that_keeps_nothing_is_told_so():
    with closing(step_of(network())) as step:
        with pytest.raises(GpunetError, match=r"head:output is not kept; make the Step with keep=watch.keeps"):
            Watch(step, ["head"])
        Watch(step, ["head.weight"])  # nothing of these is kept


# Numbers


def test_a_summary_says_what_is_there():
    values = np.array([0, 0, 1e-12, -3e-5, 0.5, 0.5, 2, -7e5])
    found = summary(values)
    assert found["mean"] == pytest.approx(values.mean(), rel=1e-5)
    assert found["sd"] == pytest.approx(values.std(), rel=1e-5)
    assert (found["zeros"], found["smallest"], found["largest"]) == (0.25, -7e5, 2)
    edges, counts = np.array(found["histogram"]["edges"]), np.array(found["histogram"]["counts"])
    assert len(edges) == len(counts) + 1 and counts.sum() == 8
    assert (np.diff(edges) > 0).all() and (edges == -edges[::-1]).all()
    places = {edges[i]: int(counts[i]) for i in np.flatnonzero(counts)}
    assert places == {-1e4: 1, -3.16e-5: 1, -1e-10: 3, 0.316: 2, 1.0: 1}
    assert "not_finite" not in found
    assert summary(values, 10)["mean"] == pytest.approx(10 * values.mean(), rel=1e-5)


def test_a_summary_of_what_is_not_finite():
    found = summary(np.array([1, np.nan, 3, np.inf], np.float16))
    assert (found["not_finite"], found["mean"], found["largest"]) == (2, 2, 3)
    assert summary(np.array([np.nan])) == {"not_finite": 1}
    json.loads(json.dumps(found, allow_nan=False))


def test_large_arrays_are_summed_in_double():
    found = summary(np.full(3_000_000, 0.1, np.float32))
    assert found["mean"] == pytest.approx(float(np.float32(0.1)), rel=1e-6)
    assert found["sd"] < 1e-7


@pytest.mark.parametrize("backend", ["numpy", pytest.param("emulator", marks=skipped)])
def test_rows_are_those_of_the_step(backend):
    """Beside a second step, whose gradient and update are taken apart by hand."""
    patterns = ["head", "*.conv"]
    step, watching = watched(patterns, backend=backend)
    with closing(step), closing(step_of(network(), source=source(), keep=("*",), backend=backend)) as other:
        for number in range(3):
            rows = {row["name"]: row for row in watching.step()}
            other.gradient()
            count = other.losses()["count"]
            reads = {name: other.read(name) for name in rows if ":" in name}
            before = other.weights.copy()
            other.update()
            other.advance()
            after = other.weights.copy()
            assert {row["update"] for row in rows.values()} == {number}
            assert {row["split"] for row in rows.values()} == {"watch"}
            for name, row in rows.items():
                values = reads.get(name, before.get(name)) / (count if name.endswith("gradient") else 1)
                assert row["mean"] == pytest.approx(values.mean(), rel=1e-4, abs=1e-9), name
                assert row["sd"] == pytest.approx(values.std(), rel=1e-4, abs=1e-9), name
                assert row["zeros"] == (values == 0).mean(), name
                assert (row["smallest"], row["largest"]) == pytest.approx((values.min(), values.max()), rel=1e-4)
                assert ("ratio" in row) == (":" not in name)
                if ":" not in name and before[name].any():
                    ratio = np.linalg.norm(after[name] - before[name]) / np.linalg.norm(before[name])
                    assert row["ratio"] == pytest.approx(ratio, rel=1e-4), name
            assert rows["head.weight"]["ratio"] > 1e-6


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_watching_changes_no_bit(accumulate, replicas):
    graph = zoo((6, 7, 2))
    step, watching = watched(["*"], graph, replicas=replicas)
    with closing(step), closing(step_of(zoo((6, 7, 2)), source=source(), replicas=replicas)) as plain:
        for number in range(4):
            plain(accumulate)
            if number % 2:
                step(accumulate)
            else:
                watching.step(accumulate)
        for a, b in zip(everything(step), everything(plain), strict=True):
            np.testing.assert_array_equal(a, b)
        assert step.state == plain.state
        np.testing.assert_array_equal(step.metrics(), plain.metrics())


def test_gradients_are_those_of_the_mean_loss_whatever_the_scale():
    """float16 multiplies the loss by 1024, and float32 does not; the rows say the same."""
    rows = []
    for dtype in ("float16", "float32"):
        step, watching = watched(["head"], dtype=dtype)
        with closing(step):
            rows.append({row["name"]: row for row in watching.step()})
    for name in ("head:output_gradient", "head.weight:gradient"):
        assert rows[0][name]["sd"] == pytest.approx(rows[1][name]["sd"], rel=0.01)
        assert rows[0][name]["largest"] == pytest.approx(rows[1][name]["largest"], rel=0.02)


def test_a_skipped_update_has_a_ratio_of_zero():
    step, watching = watched(["head.weight"])
    with closing(step):
        weights = step.weights["head.bias"]
        step.weights["head.bias"] = weights + np.nan
        rows = {row["name"]: row for row in watching.step()}
        assert rows["head.weight"]["ratio"] == 0
        assert rows["head.weight:gradient"]["not_finite"]


def test_a_frozen_weight_has_neither_gradient_nor_ratio():
    graph = network()
    for p in graph.parameters():
        p.frozen = p.name == "head.weight"
    step, watching = watched(["head"], graph)
    with closing(step):
        assert {row["name"] for row in watching.step()} == {
            "head:output", "head:output_gradient", "head.bias:gradient", "head.bias",
        }  # fmt: skip


@skipped
def test_what_a_backend_fuses_is_told():
    graph = network()
    kept = keeps(graph, ["*.norm:output"])
    with (
        closing(step_of(graph, source=source(), keep=kept, backend="emulator")) as step,
        pytest.raises(GpunetError, match=r"'\*.norm:output' matches nothing; .*that this backend fuses"),
    ):
        Watch(step, ["*.norm:output"])


# In a training


@pytest.fixture
def config(tmp_path):
    def make(**train):
        return parse_config(
            {
                "model": {"name": "mlp", "hidden": [8]},
                "data": {"name": "shapes"},
                "optimizer": {"lr": 0.01},
                "train": {"epochs": 3, "batch": 20, "replicas": 1} | train,
                "run": {"directory": str(tmp_path / "runs"), "name": "try"},
            }
        )

    return make


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"steps_per_launch": 3}, {"replicas": 2}])
def test_a_training_logs_what_a_recipe_watches(options, config):
    halves = easy()
    plain = Trainer(config(**options), data=halves, show=False).fit()
    result = Trainer(config(watch=["*.linear1", "*.weight"], watch_every=4, **options), data=halves, show=False).fit()
    rows = [row for row in result.run.metrics() if row["split"] == "watch"]
    taken = sorted({row["update"] for row in rows})
    assert taken == list(range(0, result.updates, 4))
    names = {row["name"] for row in rows}
    assert len(rows) == len(names) * len(taken)
    assert any(name.endswith(".weight") for name in names) and any(name.endswith(":output") for name in names)
    assert result.updates == plain.updates
    assert [row for row in result.run.metrics() if row["split"] != "watch"] == plain.run.metrics()
    for name, weight in plain.run.checkpoint("last").weights.items():
        np.testing.assert_array_equal(result.run.checkpoint("last").weights[name], weight)


def test_an_unknown_pattern_ends_before_anything_is_written(config, tmp_path):
    with pytest.raises(GpunetError, match="watch: 'stage9' matches nothing; nearest: "):
        Trainer(config(watch=["stage9"]), data=easy(), show=False)
    assert not (tmp_path / "runs").exists()


def test_nothing_is_watched_for_nothing(config, monkeypatch):
    """Without patterns no step goes by the watch, and the plan is the same to the byte."""
    monkeypatch.setattr(watch, "summary", None)
    halves = easy()
    plain, watching = (Trainer(config(watch=w), data=halves, show=False) for w in ([], ["*:output"]))
    assert plain.step.keep == ()
    assert sum(plain.step.memory().values()) < sum(watching.step.memory().values())
    plain.fit()


def test_the_histogram_is_the_same_everywhere():
    assert EDGES[0] == -EDGES[-1] == -1e4
    assert min(abs(edge) for edge in EDGES) == 1e-10
    assert len(EDGES) == 58
    assert summary(batch_of()[0])["histogram"]["edges"] is EDGES
