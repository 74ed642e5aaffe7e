"""Where measurements go: a JSON for each benchmark, machine and day in results/, and results/README.md made from them.

python benchmarks/results.py     # make the table anew
"""

import datetime
import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import gpunet

FOLDER = Path(__file__).parent / "results"


def machine(*packages):
    """Return what a figure depends on beside the code: processor, cores, versions, day."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {"gpunet": gpunet.__version__, **{name: version(name) for name in ("numpy", *packages)}},
    }


def processor():
    """Return the processor's name, as /proc/cpuinfo has it, else its architecture."""
    try:
        names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def store(benchmark, name, record):
    """Write a record to results/<benchmark>_<name>_<machine>_<date>.json and make the table anew."""
    words = (benchmark, name, record["processor"], str(record["cores"]), record["date"])
    stem = re.sub(r"[^a-z0-9.]+", "-", "_".join(words).lower().replace("_", " _ "))
    path = FOLDER / f"{stem.replace('-_-', '_')}.json"
    path.write_text(json.dumps({"benchmark": benchmark, "name": name, **record}, indent=1) + "\n")
    table()
    print(f"wrote {path}")


def table():
    """Write results/README.md from all records."""
    records = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    lines = ["# Measured", "", "Made by `python benchmarks/results.py` from the JSON files beside this one.", ""]
    lines += _section(
        "One training step on the CPU (median over rounds; benchmarks/step_cpu.py)",
        "| net | batch | gpunet ms | PyTorch ms | PyTorch channels_last ms | gpunet / channels_last | conditions |",
        [_step_row(r) for r in records if r["benchmark"] == "step_cpu"],
    )
    lines += _section(
        "Whole trainings (benchmarks/accuracy.py)",
        "| recipe | seeds | test accuracy, median (range) | last epoch: training loss | whole process | conditions |",
        [_accuracy_row(r) for r in records if r["benchmark"] == "accuracy"],
    )
    (FOLDER / "README.md").write_text("\n".join(lines) + "\n")


def _section(title, header, rows):
    rule = "|" + "---|" * (header.count("|") - 1)
    return [f"## {title}", "", header, rule, *rows, ""] if rows else []


def _conditions(record):
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"{record['processor']}, {record['cores']} cores, {versions}, {record['date']}"


def _step_row(r):
    ours, theirs, best = (r["times"][c]["median_ms"] for c in ("gpunet", "torch", "torch channels_last"))
    busy = "" if r["others_load"] <= 0.05 else f"; others used {r['others_load']:.0%} of a core"
    numbers = f"{ours:.1f} | {theirs:.1f} | {best:.1f} | {ours / best:.2f}"
    return f"| {r['name']} | {r['batch']} | {numbers} | {r['threads']} threads, {_conditions(r)}{busy} |"


def _accuracy_row(r):
    runs, median = r["runs"], r["median"]
    found = [run["test_accuracy"] for run in runs]
    accuracy = f"{median['test_accuracy']:.2%} ({min(found):.2%} to {max(found):.2%})"
    settings = f"{', '.join(r['overrides'])}; " if r["overrides"] else ""
    return (
        f"| {r['name']} | {len(runs)} | {accuracy} | {median['train_loss_last_epoch']:.3f} "
        f"| {median['seconds']:.0f} s | {settings}{_conditions(r)} |"
    )


if __name__ == "__main__":
    table()
