"""Curves of a run as a picture. matplotlib is imported when it is needed, never before."""

import numpy as np

# Apart in colour, in grey and by line and marker (colours after Okabe and Ito 2008)
COLOURS = {"train": "#0072B2", "validation": "#D55E00", "test": "#009E73", "rate": "#555555"}
MARKERS = {"validation": "o", "test": "s"}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#777777",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 120,
}


def plot_curves(path, title, note, rows):
    """Draw loss, accuracy and learning rate against epochs, from rows of metrics.jsonl, into a PNG; the note below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    updates = [r for r in rows if r["split"] == "train"]
    x = np.array([r["epoch"] for r in updates])
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10, 6), layout="constrained")
        axes = figure.subplot_mosaic([["loss", "accuracy"], ["rate", "rate"]], height_ratios=[3, 1])
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color="#555555", wrap=True)
        for name in ("loss", "accuracy"):
            scale = 100 if name == "accuracy" else 1
            _measured(axes[name], rows, name, scale)
            highest = _trained(axes[name], x, scale * np.array([r[name] for r in updates]))
            top = axes[name].get_ylim()[1]
            axes[name].set_ylim(0, min(top, 1.5 * highest) if name == "loss" else top)  # a spike runs out of it
            axes[name].set_title("loss" if name == "loss" else "accuracy in %")
            axes[name].legend(loc="upper right" if name == "loss" else "lower right")
        axes["rate"].plot(x, [r["rate"] for r in updates], color=COLOURS["rate"], lw=1.5)
        axes["rate"].set_title("learning rate")
        axes["rate"].set_ylim(bottom=0)
        for ax in axes.values():
            ax.set_xlim(0, x[-1] * 1.02)
            ax.set_xlabel("epoch")
        figure.savefig(path)
        plt.close(figure)


def _trained(ax, x, y):
    """Draw single updates faintly and their mean over the last tenth of an epoch; return the highest mean."""
    window = max(5, np.count_nonzero(x <= 0.1))
    total, number = np.cumsum(np.insert(y, 0, 0.0)), np.arange(1, len(y) + 1)
    start = np.maximum(number - window, 0)
    mean = (total[number] - total[start]) / (number - start)
    ax.plot(x, y, color=COLOURS["train"], alpha=0.25, lw=0.6)
    ax.plot(x, mean, color=COLOURS["train"], lw=1.8, label="train", zorder=3)
    return mean.max()


def _measured(ax, rows, name, scale):
    """Draw what was measured on validation and test."""
    for split, marker in MARKERS.items():
        points = [(r["epoch"], scale * r[name]) for r in rows if r["split"] == split]
        if points:
            ax.plot(*zip(*points, strict=True), color=COLOURS[split], marker=marker, ms=4, lw=1.5, ls="--", label=split)
