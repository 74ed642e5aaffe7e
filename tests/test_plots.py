"""Pictures of runs, what tells runs apart in them, and the same metrics as TensorBoard's events."""

import json
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpunet import data
from gpunet.errors import GpunetError
from gpunet.train import Trainer, compare, parse_config, plots, tensorboard
from gpunet.train.compare import labels
from gpunet.train.plots import moving_mean, plot_runs

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
[model]
name = "mlp"
hidden = [8]
[data]
name = "shapes"
directory = "/somewhere/{name}"
[optimizer]
lr = {lr}
[run]
name = "{name}"
"""


def rows(epochs, batches=5, test=True):
    made = []
    for update in range(epochs * batches):
        loss = 3 / (1 + update)
        row = {"split": "train", "update": update, "epoch": (update + 1) / batches, "loss": loss, "rate": 0.1}
        made.append(row | {"accuracy": 1 - loss / 4, "norm": 2.0, "count": 20})
        if row["epoch"] == int(row["epoch"]):
            made.append({"split": "validation", "epoch": row["epoch"], "loss": loss + 0.1, "accuracy": 0.5, "count": 9})
    return [*made, {"split": "test", "epoch": epochs, "loss": 1.0, "accuracy": 0.625, "count": 9}] if test else made


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Make a run directory of some epochs."""
    monkeypatch.chdir(tmp_path)

    def make(name, epochs=2, lr=0.1, content=None):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(CONFIG.format(name=name, lr=lr))
        if content is None:
            content = "".join(json.dumps(row) + "\n" for row in rows(epochs))
        if epochs:
            (folder / "metrics.jsonl").write_text(content)
        return folder

    return make


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, instead of the pictures: {label: curves} with the title, a figure each."""
    figures = []
    original = plots._figure.__wrapped__

    def figure(path, title, note, size):
        for made in original(path, title, note, size):
            yield made
            figures.append((title, made))

    monkeypatch.setattr(plots, "_figure", contextmanager(figure))
    return figures


def test_runs_are_told_apart_by_what_differs():
    base = {"model.name": "mlp", "optimizer.lr": 0.1, "train.batch": 64, "run.name": "a", "data.directory": "/x"}
    other = base | {"optimizer.lr": 0.2, "run.name": "b", "data.directory": "/y"}
    assert labels([base, other], ["one", "two"]) == ["lr 0.1", "lr 0.2"]
    assert labels([base, other | {"train.batch": 8}], ["", ""]) == ["lr 0.1, batch 64", "lr 0.2, batch 8"]
    assert labels([base, base | {"model.name": "vgg", "model.depth": 11}], ["", ""]) == [
        "model.name mlp, depth unset",
        "model.name vgg, depth 11",
    ]
    assert labels([base, base], ["one", "two"]) == ["one", "two"]  # nothing differs
    assert labels([base, base, other], ["one", "two", "three"]) == ["lr 0.1, one", "lr 0.1, two", "lr 0.2"]
    assert labels([base], ["one"]) == ["one"]
    twice = [{"data.seed": 0, "train.seed": 1}, {"data.seed": 1, "train.seed": 2}]
    assert labels(twice, ["", ""]) == ["data.seed 0, train.seed 1", "data.seed 1, train.seed 2"]
    long = [{f"s.key{i}": i + j for i in range(40)} for j in (0, 1)]
    assert all(len(line) <= 110 for text in labels(long, ["", ""]) for line in text.split("\n"))


def test_runs_of_different_length_in_one_picture(run, drawn, tmp_path):
    one, two = run("one", epochs=2), run("two", epochs=4, lr=0.2)
    path, said = compare.plot([one, two], tmp_path / "both.png")
    assert said == [] and Image.open(path).width == 1200
    ((title, figure),) = drawn
    assert title == "mlp on shapes"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["lr 0.1", "lr 0.2"]
    for ax in figure.axes:
        assert ax.get_xlim() == pytest.approx((0, 4 * 1.02))
    loss, accuracy, rate = (ax.lines for ax in figure.axes)
    assert [len(line.get_xdata()) for line in loss] == [10, 2, 1, 20, 4, 1]  # training, validation, test
    np.testing.assert_allclose(accuracy[1].get_ydata(), [50, 50])
    np.testing.assert_allclose(accuracy[2].get_ydata(), [62.5])
    assert [len(line.get_xdata()) for line in rate] == [10, 20]


def test_equal_runs_of_one_name_are_told_apart_by_their_folders(run, drawn, tmp_path):
    run("one")
    (tmp_path / "runs").rename(tmp_path / "older")
    compare.plot([tmp_path / "older" / "one", run("one")])
    (legend,) = drawn[0][1].legends
    assert [text.get_text() for text in legend.get_texts()] == [f"{tmp_path}/{part}/one" for part in ("older", "runs")]


def test_colours_print_in_grey_and_markers_differ(drawn, tmp_path):
    plot_runs(tmp_path / "x.png", "", {f"run {i}": rows(1) for i in range(5)})
    ((_, figure),) = drawn
    (legend,) = figure.legends
    colours = np.array([line.get_color() for line in legend.get_lines()])[:, :3]
    greys = colours @ [0.299, 0.587, 0.114]
    assert (np.diff(greys) > 0.1).all() and greys[-1] < 0.75
    assert len({line.get_marker() for line in legend.get_lines()}) == 5
    greys = [sum(int(c[i : i + 2], 16) * w for i, w in ((1, 0.299), (3, 0.587), (5, 0.114))) for c in
             plots.COLOURS.values()]  # fmt: skip
    assert max(greys) < 170  # dark enough on white


def test_one_metric(run, drawn, tmp_path):
    one, two = run("one"), run("two", lr=0.2)
    for metric, axes in (("norm", ["gradient norm", "learning rate"]), ("rate", ["learning rate"])):
        compare.plot([one, two], tmp_path / "x.png", metric)
        assert [ax.get_title(loc="left") for ax in drawn[-1][1].axes] == axes
    with pytest.raises(GpunetError, match="--metric los: expected one of loss, rate, accuracy, norm"):
        compare.plot([one, two], tmp_path / "x.png", "los")
    with pytest.raises(GpunetError, match="--metric update: expected one of"):
        compare.plot([one], tmp_path / "x.png", "update")


def test_one_run_gets_its_curves_again(run, drawn):
    one = run("one")
    path, _ = compare.plot([one])
    assert path == one / "curves.png" and path.stat().st_size > 20_000
    ((title, figure),) = drawn
    assert title == "mlp on shapes, test accuracy 62.50%"
    assert len(figure.axes) == 3
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["validation", "test", "train"]
    path, _ = compare.plot([one, "one", "runs/one"])  # one run, named thrice
    assert path.resolve() == one / "curves.png"
    assert not drawn[-1][1].legends


def test_runs_without_metrics_are_named_and_left_out(run, drawn):
    one, none, blank = run("one"), run("none", epochs=0), run("blank", content="")
    only_test = run("tested", content='{"split": "test", "epoch": 1, "loss": 1}\n')
    path, said = compare.plot([none, one, blank, only_test])
    assert path == one / "curves.png"
    assert said == [f"{folder}: left out, it has no metrics" for folder in (none, blank, only_test)]
    with pytest.raises(GpunetError, match="plot: expected a run with metrics, found none in .*none, .*blank"):
        compare.plot([none, blank])


def test_a_line_that_is_being_written_is_left_out_and_a_broken_one_is_told(run):
    content = "".join(json.dumps(row) + "\n" for row in rows(1, test=False))
    torn = run("torn", content=content + '{"split": "tra')
    assert len(compare._rows(compare.Run(torn))) == len(rows(1, test=False))
    watched = '{"split": "watch", "update": 3, "name": "stem.conv", "mean": 1.0}\n'
    (torn / "metrics.jsonl").write_text(watched + content + watched)
    assert len(compare._rows(compare.Run(torn))) == len(rows(1, test=False))
    for broken in (
        *("{", "3", "{}", "[1]", "\xff", "[" * 200_000, '{"split": "train"}', '{"split": []}'),
        *('{"split": "test", "epoch": "one", "loss": 1, "accuracy": 1}', f'{{"split": "test", "epoch": 1{"0" * 400}}}'),
    ):
        (torn / "metrics.jsonl").write_text(f"{broken}\n{content}", encoding="latin-1")
        with pytest.raises(GpunetError, match=r"metrics.jsonl: line 1: expected a row of metrics"):
            compare.plot([torn])


def test_the_command(run, drawn, gpunet, tmp_path):
    run("one"), run("two", lr=0.3), run("none", epochs=0)
    (tmp_path / "folder").mkdir()

    assert gpunet("plot", "one", "two", "none") == (0, "compare.png\n", "runs/none: left out, it has no metrics\n")
    assert (tmp_path / "compare.png").stat().st_size > 20_000
    assert gpunet("plot", "one", "--out", "a.png", "--metric", "loss")[:2] == (0, "a.png\n")
    for arguments, said in (
        (["folder"], "run 'folder': expected a directory with a config.toml"),
        (["nothing", "one"], "run 'nothing': expected a directory"),
        (["one", "--out", "no/where.png"], "no/where.png: cannot be written"),
        (["one", "--out", "one.svg"], "--out one.svg: expected a file that ends in .png"),
        (["one", "--metric", "speed"], "--metric speed: expected one of loss"),
    ):
        code, out, err = gpunet("plot", *arguments)
        assert (code, out) == (2, "") and err.startswith("gpunet: ") and said in err and err.count("\n") == 1
    (tmp_path / "runs" / "one" / "config.toml").write_text("x = [")
    assert "runs/one/config.toml: not TOML: " in gpunet("plot", "one")[2]


@pytest.mark.parametrize("loss", [np.nan, np.inf, 0.0])
def test_losses_that_cannot_be_drawn_leave_a_picture(loss, tmp_path):
    made = [row | {"loss": loss} for row in rows(3)]
    plots.plot_curves(tmp_path / "a.png", "", "", made)
    plot_runs(tmp_path / "b.png", "", {"a": made, "b": rows(2)})
    assert (tmp_path / "a.png").stat().st_size > 10_000 < (tmp_path / "b.png").stat().st_size


@pytest.mark.parametrize(("labelled", "panels"), [(True, 3), (False, 2)])
def test_sets_of_values_have_no_accuracy(labelled, panels, drawn, tmp_path):
    plots.plot_curves(tmp_path / "a.png", "", "", rows(3), labelled)
    ((_, figure),) = drawn
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert len(titles) == panels and ("accuracy in %" in titles) == labelled
    assert sum(ax.get_legend() is not None for ax in figure.axes) == 1


def test_dollars_are_no_formulas(drawn, tmp_path):
    plot_runs(tmp_path / "a.png", "pay $5 or $6", {"$a$": rows(1)})
    ((_, figure),) = drawn
    (legend,) = figure.legends
    assert not any(text.get_parse_math() for text in (figure._suptitle, *legend.get_texts()))


def test_the_moving_mean():
    x, y = np.arange(1, 101) / 20, np.arange(100.0)  # 20 updates an epoch: of the last two, but at least of five
    np.testing.assert_allclose(moving_mean(x, y), [y[max(0, i - 4) : i + 1].mean() for i in range(100)])
    x = np.arange(1, 101) / 100
    np.testing.assert_allclose(moving_mean(x, y), [y[max(0, i - 9) : i + 1].mean() for i in range(100)])


def test_drawing_leaves_the_users_matplotlib_alone(tmp_path):
    """No backend is chosen and no pyplot is imported, so that a notebook's own figures stay."""
    code = f"""
import sys
from tests.test_plots import rows
from gpunet.train.plots import plot_curves
import matplotlib
def settings():  # but for the one whose reading chooses a backend
    return {{key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}}
before = settings()
plot_curves({str(tmp_path / "x.png")!r}, "title", "note", rows(2))
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


# TensorBoard


def events(folder):
    """Return [(step, tag, value)] of the event files in a folder: TFRecords of Event messages."""
    found = []
    for file in sorted(folder.iterdir()):
        content, place = file.read_bytes(), 0
        while place < len(content):  # length, its checksum, the message, its checksum
            (length,) = struct.unpack_from("<Q", content, place)
            found += _scalars(content[place + 12 : place + 12 + length])
            place += length + 16
        assert place == len(content)
    return found


def _scalars(event):
    """Event: 2 step, 5 summary; summary: 1 value; value: 1 tag, 2 simple_value."""
    step, scalars = 0, []
    for number, value in _fields(event):
        if number == 2:
            step = value
        elif number == 5:
            for _, part in _fields(value):
                entry = dict(_fields(part))
                scalars.append((entry[1].decode(), struct.unpack("<f", entry[2])[0]))
    return [(step, tag, value) for tag, value in scalars]


def _fields(message):
    """Return [(number, value)] of a protocol buffer: whole numbers, and bytes of all else."""
    place, found = 0, []

    def varint():
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            found.append((number, varint()))
            continue
        length = {1: 8, 5: 4}.get(kind) or varint()
        found.append((number, message[place : place + length]))
        place += length
    return found


@pytest.fixture
def trainer(tmp_path, no_pictures):
    """A small Trainer that writes TensorBoard's files."""
    rng = np.random.default_rng(0)
    pictures = data.Arrays(
        rng.integers(0, 256, (50, 4, 4, 3)).astype(np.uint8), np.arange(50) % 2, validation=10,
        test=(rng.integers(0, 256, (6, 4, 4, 3)).astype(np.uint8), np.arange(6) % 2),
    )  # fmt: skip

    def make(**settings):
        table = {"model": {"name": "mlp", "hidden": [3]}, "data": {"name": "shapes"}, "optimizer": {"lr": 0.01}}
        table |= {"train": {"epochs": 2, "batch": 10, "replicas": 1}}
        table |= {"run": {"directory": str(tmp_path / "runs"), "tensorboard": True} | settings}
        return Trainer(parse_config(table), data=pictures, show=False)

    return make


def test_tensorboard_gets_what_metrics_has(trainer):
    pytest.importorskip("tensorboardX")
    result = trainer().fit()
    folder = result.run.path / "tensorboard"
    assert sorted(p.name for p in folder.iterdir()) == ["test", "train", "validation"]
    trained = [row for row in result.rows if row["split"] == "train"]
    found = events(folder / "train")
    assert [step for step, tag, _ in found if tag == "loss"] == list(range(8))
    for tag in ("loss", "accuracy", "rate", "norm"):
        np.testing.assert_allclose([v for _, t, v in found if t == tag], [r[tag] for r in trained], rtol=1e-6)
    assert not {"split", "update", "epoch", "count", "batch"} & {tag for _, tag, _ in found}
    measured = [row for row in result.rows if row["split"] == "validation"]
    assert [(s, t) for s, t, _ in events(folder / "validation")] == [
        (row["update"], tag) for row in measured for tag in ("loss", "accuracy")
    ]
    loss, accuracy = events(folder / "test")
    assert loss[:2] == (8, "loss") and accuracy[2] == pytest.approx(result.test.accuracy)


def test_what_layers_did_stands_under_their_names(tmp_path):
    pytest.importorskip("tensorboardX")
    board = tensorboard.Board(tmp_path)
    board.add([{"split": "watch", "update": 3, "name": "stem.conv", "mean": 0.5, "histogram": {"counts": [1]}}])
    board.close()
    assert events(tmp_path / "watch") == [(3, "stem.conv/mean", 0.5)]


def test_without_the_setting_there_is_no_folder(trainer):
    result = trainer(tensorboard=False).fit()
    assert not (result.run.path / "tensorboard").exists()


def test_without_the_package_it_is_told_before_anything_is_made(trainer, monkeypatch, tmp_path):
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GpunetError, match=r'tensorboardX is missing; pip install "gpunet\[tensorboard\]"$'):
        trainer()
    assert not (tmp_path / "runs").exists()
    trainer(tensorboard=False).fit()


def test_rows_that_are_written_again_hide_the_first(tmp_path):
    """A resumed run starts a new file, whose first event says from which step on older ones do not count."""
    pytest.importorskip("tensorboardX")
    board = tensorboard.Board(tmp_path)
    board.add([{"split": "train", "update": i, "loss": 1.0} for i in range(4)])
    board.close()
    (first,) = (tmp_path / "train").iterdir()
    first.rename(first.with_name("events.out.tfevents.0.x"))
    board = tensorboard.Board(tmp_path)
    board.add([{"split": "train", "update": 2, "loss": 2.0, "norms": [1, 2]}])
    board.close()
    (second,) = (p for p in (tmp_path / "train").iterdir() if p.name != "events.out.tfevents.0.x")
    starts = []
    content, place = second.read_bytes(), 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        event = dict(_fields(content[place + 12 : place + 12 + length]))
        starts += [event.get(2, 0)] if 7 in event else []  # 7: session_log
        place += length + 16
    assert starts == [2]
    assert events(tmp_path / "train")[-1] == (2, "loss", 2.0)
