"""Runs side by side: what differs in their configs, and their metrics in one picture. Knows nothing of training."""

import json
from pathlib import Path
from textwrap import fill

from gpunet.errors import GpunetError
from gpunet.train.checkpoint import MALFORMED
from gpunet.train.config import read_toml
from gpunet.train.plots import plot_curves, plot_runs
from gpunet.train.run import SPLITS, Run, read_row

UNSET = "unset"  # a setting that a run has not


def plot(paths, out=None, metric=None):
    """Draw the curves of one run, or of several over each other; return (the picture's path, lines to be said).

    Unless told, the picture is curves.png in the one run, or compare.png in the working folder. Runs without metrics of
    training are named in the lines and left out. Raises GpunetError for a folder that is no run.
    """
    if out is not None and Path(out).suffix.lower() != ".png":
        raise GpunetError(f"--out {out}: expected a file that ends in .png")
    runs = list({run.path.resolve(): run for run in map(Run.open, paths)}.values())
    rows = [_rows(run) for run in runs]
    said = [f"{run.path}: left out, it has no metrics" for run, found in zip(runs, rows, strict=True) if not found]
    kept = [(run, found) for run, found in zip(runs, rows, strict=True) if found]
    if not kept:
        raise GpunetError(f"plot: expected a run with metrics, found none in {', '.join(str(r.path) for r in runs)}")
    configs = [_config(run) for run, _ in kept]
    heads = dict.fromkeys(f"{config['model.name']} on {config['data.name']}" for config in configs)
    if len(kept) == 1 and metric is None:
        (run, found), (title,) = kept[0], heads
        tests = [f", test accuracy {r['accuracy']:.2%}" for r in found if r["split"] == "test"]
        path = Path(out or run.path / "curves.png")
        plot_curves(path, title + "".join(tests[-1:]), str(run.path.name), found)
    else:
        title = "; ".join(heads) if len(heads) < 4 else f"{len(kept)} runs"
        names = [run.path.name for run, _ in kept]
        names = labels(configs, names if len(set(names)) == len(names) else [str(run.path) for run, _ in kept])
        path = Path(out or "compare.png")
        plot_runs(path, title, dict(zip(names, (found for _, found in kept), strict=True)), metric)
    return path, said


def _rows(run):
    """Return the numbers of metrics.jsonl over epochs, [] without one of training.

    A last line that is being written, or was half written when a run died, is left out.
    """
    place = run.path / "metrics.jsonl"
    if not place.exists():
        return []
    lines, rows = place.read_text(encoding="utf-8", errors="replace").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            row = read_row(line)
            if row["split"] in SPLITS:
                rows.append(_numbers(row))
        except MALFORMED:
            if number < len(lines):
                raise GpunetError(f"{place}: line {number}: expected a row of metrics") from None
    return rows if any(row["split"] == "train" for row in rows) else []


def _numbers(row):
    """Return split and numbers of a row."""
    return {"split": row["split"]} | {k: float(value) for k, value in row.items() if isinstance(value, int | float)}


def _config(run):
    """Return the resolved config of a run as {"section.key": value}; one with keys that are not known here will do."""
    path = run.path / "config.toml"
    try:
        table = read_toml(path.read_bytes(), path)
        config = {f"{section}.{key}": v for section, values in table.items() for key, v in values.items()}
    except AttributeError:
        raise GpunetError(f"{path}: expected a config of gpunet, sections with settings in them") from None
    return {"model.name": "network", "data.name": "data"} | config


def labels(configs, names):
    """Return a label a run: the settings in which not all runs agree, and the run's name where that does not do.

    configs: flat dicts. "lr 0.1, batch 64"; "name", and a key of two sections, stands with its section: "model.name".
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    differ = [
        key
        for key in keys
        if any(config.get(key) != configs[0].get(key) for config in configs)
        and not key.startswith("run.")  # where a run is kept changes nothing in it
        and key != "data.directory"
    ]
    last = [key.rpartition(".")[2] for key in differ]
    short = [key if part == "name" or last.count(part) > 1 else part for key, part in zip(differ, last, strict=True)]
    made = [
        ", ".join(f"{name} {_value(config.get(key, UNSET))}" for key, name in zip(differ, short, strict=True))
        for config in configs
    ]
    made = [
        f"{text}, {name}" if text and made.count(text) > 1 else text or name
        for text, name in zip(made, names, strict=True)
    ]
    return [fill(text, 110) for text in made]


def _value(value):
    return value if isinstance(value, str) else json.dumps(value)
