"""Pictures of runs and evaluations, in one style. matplotlib is imported when it is needed, never before."""

import io
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill

import numpy as np

from gpunet.errors import GpunetError
from gpunet.train.checkpoint import write_whole

# Apart in colour, in grey and by line and marker (colours after Okabe and Ito 2008)
COLOURS = {"train": "#0072B2", "validation": "#D55E00", "test": "#009E73", "rate": "#555555"}
MARKERS = {"validation": "o", "test": "s"}
RUN_MARKERS = "osD^vPX*"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#777777",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.edgecolor": "none",
    "figure.dpi": 120,
    "text.parse_math": False,  # names of classes and runs may hold dollars
}
NAMED, COUNTED = 100, 20  # classes up to which a confusion matrix shows names, and counts
TITLES = {"loss": "loss", "accuracy": "accuracy in %", "rate": "learning rate", "norm": "gradient norm"}
COUNTERS = {"update", "epoch", "count", "applied", "batch"}  # of the rows of metrics.jsonl, what is no measurement


@contextmanager
def _figure(path, title, note, size):
    """Give a Figure with title above and note below, and write it as PNG at the end. No window system is touched."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size)
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)  # inches
        figure.suptitle(fill(title, int(size[0] * 10)), x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.supxlabel(fill(note, int(size[0] * 14)), x=0.01, ha="left", fontsize=9, color="#555555")
        yield figure
        content = io.BytesIO()
        figure.savefig(content, format="png")
    write_whole(Path(path), content.getvalue())


def plot_curves(path, title, note, rows, labelled=True):
    """Draw loss, accuracy and learning rate against epochs, from rows of metrics.jsonl, into a PNG; the note below.

    labelled: whether images have classes, so that accuracy means something; else it is left out.
    """
    names = ["loss", "accuracy"][: 1 + labelled]
    updates = [r for r in rows if r["split"] == "train"]
    x = np.array([r["epoch"] for r in updates])
    with _figure(path, title, note, (10, 6)) as figure:
        axes = figure.subplot_mosaic([names, ["rate"] * len(names)], height_ratios=[3, 1])
        for name in names:
            scale = 100 if name == "accuracy" else 1
            _measured(axes[name], rows, name, scale)
            highest = _trained(axes[name], x, scale * np.array([r[name] for r in updates]))
            _limit(axes[name], name, highest)
        axes[names[-1]].legend(loc="lower right" if labelled else "upper right")  # for both
        axes["rate"].plot(x, [r["rate"] for r in updates], color=COLOURS["rate"], lw=1.5)
        for name, ax in axes.items():
            _finish(ax, name, x[-1])


def _trained(ax, x, y):
    """Draw single updates faintly and their mean over the last tenth of an epoch; return the highest mean."""
    mean = moving_mean(x, y)
    ax.plot(x, y, color=COLOURS["train"], alpha=0.25, lw=0.6)
    ax.plot(x, mean, color=COLOURS["train"], lw=1.8, label="train", zorder=3)
    return mean.max()


def moving_mean(x, y):
    """Return the mean of y over the updates of the last tenth of an epoch, at least five; x: epochs."""
    window = max(5, np.count_nonzero(x <= 0.1))
    total, number = np.cumsum(np.insert(y, 0, 0.0)), np.arange(1, len(y) + 1)
    start = np.maximum(number - window, 0)
    with np.errstate(invalid="ignore"):  # an infinite loss leaves a gap from there on
        return (total[number] - total[start]) / (number - start)


def _measured(ax, rows, name, scale):
    """Draw what was measured on validation and test."""
    for split, marker in MARKERS.items():
        points = [(r["epoch"], scale * r[name]) for r in rows if r["split"] == split]
        if points:
            ax.plot(*zip(*points, strict=True), color=COLOURS[split], marker=marker, ms=4, lw=1.5, ls="--", label=split)


def _limit(ax, name, highest):
    """Start at 0; a spike runs out of a picture of losses."""
    top = ax.get_ylim()[1]
    ax.set_ylim(0, min(top, 1.5 * highest) if name == "loss" and highest > 0 else top)


def _finish(ax, name, last):
    ax.set_title(TITLES.get(name, name))
    ax.set_xlim(0, last * 1.02)
    ax.set_xlabel("epoch")
    if name == "rate":
        ax.set_ylim(bottom=0)


def plot_runs(path, title, runs, metric=None):
    """Draw {label: rows of metrics.jsonl} over each other: loss and accuracy, or one metric, and the learning rate.

    Labels may have several lines. Colours go from dark to light in even steps, so that they print in grey; markers tell
    runs apart besides. Raises GpunetError for a metric that no run has.
    """
    updates = {label: [r for r in rows if r["split"] == "train"] for label, rows in runs.items()}
    known = dict.fromkeys(k for rows in updates.values() for k, v in rows[-1].items() if isinstance(v, int | float))
    if metric and metric not in (known := [k for k in known if k not in COUNTERS]):
        raise GpunetError(f"--metric {metric}: expected one of {', '.join(known)}")
    names = [metric] if metric else ["loss", "accuracy"]
    mosaic = [names] if metric == "rate" else [names, ["rate"] * len(names)]
    height = 6 + 0.18 * sum(label.count("\n") + 1 for label in runs)
    note = "Lines: training, mean over a tenth of an epoch. Dashed with markers: validation. Large and hollow: test."
    with _figure(path, title, "", (10, height)) as figure:
        axes = figure.subplot_mosaic(mosaic, height_ratios=[3, 1][: len(mosaic)])
        looks = _looks(len(runs))
        for name, ax in axes.items():
            tops = [_run(ax, name, runs[label], look) for label, look in zip(runs, looks, strict=True)]
            if name in ("loss", "accuracy"):
                _limit(ax, name, max(tops))
            _finish(ax, name, max(rows[-1]["epoch"] for rows in updates.values()))
        handles = [_line(label=label, **look) for label, look in zip(runs, looks, strict=True)]
        figure.legend(
            handles=handles, title=note, loc="outside lower left", fontsize=9, title_fontsize=9, alignment="left"
        )


def _looks(count):
    """Return colour and marker for each of `count` runs: cividis without its lightest part, dark first."""
    from matplotlib import colormaps

    shades = colormaps["cividis"](np.linspace(0, 0.8, count))
    return [{"color": shade, "marker": RUN_MARKERS[i % len(RUN_MARKERS)]} for i, shade in enumerate(shades)]


def _line(**look):
    from matplotlib.lines import Line2D

    return Line2D([], [], lw=2, ms=5, **look)


def _run(ax, name, rows, look):
    """Draw one metric of one run; return the highest mean of its training."""
    rows, scale = [r for r in rows if name in r], 100 if name == "accuracy" else 1
    points = {s: np.array([(r["epoch"], scale * r[name]) for r in rows if r["split"] == s]) for s in COLOURS}
    if not len(points["train"]):
        return 0
    x, y = points["train"].T
    mean = y if name == "rate" else moving_mean(x, y)
    ax.plot(x, mean, color=look["color"], lw=1.6)
    styles = {"validation": {"ms": 4, "ls": "--", "lw": 1.2}, "test": {"ms": 10, "ls": "", "mfc": "none"}}
    for split, style in styles.items():
        if len(points[split]):
            ax.plot(*points[split].T, **look, **style, zorder=3)
    return mean.max()


def plot_reliability(path, title, note, found):
    """Draw an Evaluation's accuracy in each bin of confidence, its gap to the confidence, and how many images it has.

    As Guo et al. 2017, figure 1, draw it: a bar below the diagonal means answers that are surer than they are right.
    """
    middles = [(b.low + b.high) / 2 for b in found.bins]
    width = found.bins[0].high - found.bins[0].low
    accuracy = np.array([b.accuracy for b in found.bins])
    confidence = np.array([b.confidence for b in found.bins])
    with _figure(path, title, note, (6, 7.5)) as figure:
        upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
        upper.bar(middles, accuracy, width, color="#9CC5E3", edgecolor="white", label="accuracy")
        upper.bar(
            middles, confidence - accuracy, width, accuracy, color="none", edgecolor=COLOURS["validation"],
            hatch="////", linewidth=1, label="gap to the mean confidence",
        )  # fmt: skip
        upper.plot([0, 1], [0, 1], color="#333333", lw=1, ls="--", label="calibrated")
        upper.set(title=f"ECE {found.ece:.2%}", ylabel="share of right answers", ylim=(0, 1.02))
        upper.legend(loc="upper left")
        lower.bar(middles, [100 * b.count / found.count for b in found.bins], width, color="#777777", edgecolor="white")
        lower.axvline(found.accuracy, color=COLOURS["train"], lw=1.5, label="accuracy")
        mean = sum(b.confidence * b.count for b in found.bins) / found.count
        lower.axvline(mean, color=COLOURS["validation"], lw=1.5, ls="--", label="mean confidence")
        lower.set(title="images in %", xlabel="confidence: the probability of the answer", xlim=(0, 1))
        lower.legend(loc="lower right", bbox_to_anchor=(1, 0.97), ncols=2)  # beside the title, above all bars


def plot_range(path, found):
    """Draw a learning-rate range test: losses against rates, single and smoothed, and the rates that they tell."""
    note = "A point is an update. To begin with: where the loss falls fastest, or a tenth of where it explodes."
    with _figure(path, f"Learning-rate range test: {found.title}", note, (9, 5.5)) as figure:
        ax = figure.subplots()
        ax.plot(found.rates, found.losses, ".", color=COLOURS["train"], alpha=0.35, ms=4, label="loss of an update")
        ax.plot(found.rates, found.smoothed, color=COLOURS["train"], lw=2, label="smoothed")
        for rate, colour, style, text in (
            (found.steepest, COLOURS["test"], "-", "steepest"),
            (found.exploding, COLOURS["validation"], "--", "explodes"),
            (found.exploding and found.exploding / 10, COLOURS["rate"], ":", "a tenth of that"),
        ):
            if rate:
                ax.axvline(rate, color=colour, ls=style, lw=1.8, label=f"{text}: {rate:.2g}")
        finite = found.losses[np.isfinite(found.losses)]
        low, top = finite.min(), min(finite.max(), 1.5 * found.smoothed.max())  # a spike runs out of it
        ax.set_ylim(low - 0.05 * (top - low), top + 0.05 * (top - low))
        ax.set(xscale="log", xlabel="learning rate", ylabel="training loss")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.legend(loc="upper left")


def plot_confusion(path, title, note, confusion, names):
    """Draw a confusion matrix as a map of shares of the true class (rows); with counts up to 20 classes."""
    count, side = len(names), float(np.clip(0.55 * len(names), 5, 13))
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    size = 9 if count <= COUNTED else 6
    with _figure(path, title, note, (side + 2.2, side + 1.6)) as figure:
        ax = figure.subplots()
        ax.grid(False)
        picture = ax.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(picture, ax=ax, shrink=0.8, label="% of the true class")
        places = range(count) if count <= NAMED else []
        short = [name if len(name) <= 24 else name[:23] + "…" for name in names[: len(places)]]
        ax.set_xticks(places, short, rotation=90 if count > 4 else 0, fontsize=size)
        ax.set_yticks(places, short, fontsize=size)
        ax.set(xlabel="answer", ylabel="true class")
        if count <= COUNTED:
            for (i, j), number in np.ndenumerate(confusion):
                colour = "white" if shares[i, j] > 0.5 else "#222222" if number else "#bbbbbb"
                ax.text(j, i, f"{number:,}", ha="center", va="center", color=colour, fontsize=7 if number > 9999 else 8)
