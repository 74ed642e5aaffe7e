"""Where measurements go: a JSON for each benchmark, machine and day in results/, and the tables made from them.

python benchmarks/results.py     # make README.md, and a table for each GPU's report, anew
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
STEPPERS = {  # contenders of step_cpu.py as the table has them
    "gpunet numba": "gpunet with numba",
    "gpunet": "gpunet",
    "torch": "PyTorch",
    "torch channels_last": "PyTorch channels_last",
    "torch compile": "PyTorch compiled",
}
HOLDERS = ("gpunet unfold", "gpunet", "gpunet numba", "torch channels_last")


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


def table(folder=FOLDER):
    """Write README.md from all records of a folder, and the table of each GPU's report."""
    paths = sorted(folder.glob("*.json"))
    records = [json.loads(path.read_text()) for path in paths]
    reports = [(path, r) for path, r in zip(paths, records, strict=True) if r["benchmark"] == "gpu"]
    for path, record in reports:
        path.with_suffix(".md").write_text(gpu_table(record))
    lines = ["# Measured", "", "Made by `python benchmarks/results.py` from the JSON files beside this one.", ""]
    steps = [r for r in records if r["benchmark"] == "step_cpu"]
    for what, key in (("training step", "times"), ("forward pass in inference", "forward")):
        lines += _section(
            f"One {what} on the CPU (milliseconds, median over rounds; benchmarks/step_cpu.py)",
            f"| net | batch | {' | '.join(STEPPERS.values())} | gpunet / channels_last | conditions |",
            [_step_row(r, key) for r in steps if key in r],
        )
    lines += _section(
        "Memory of training steps on the CPU (peak beyond imports, in processes of their own; benchmarks/step_cpu.py)",
        "| net | batch | " + " | ".join(f"{name} MB (to channels_last)" for name in HOLDERS) + " | conditions |",
        [_memory_row(r) for r in steps if r.get("memory")],
    )
    trainings = [r for r in records if r["benchmark"] == "accuracy"]
    lines += _section(
        "Whole trainings on CIFAR-10 (benchmarks/accuracy_cpu.py)",
        "| recipe | goal | seeds | test accuracy, median (range) | last epoch: training loss | whole process, median "
        "(range) | conditions |",
        [_accuracy_row(r) for r in trainings],
        *dict.fromkeys(r["peers"] for r in trainings if "peers" in r),
    )
    for r in (r for r in records if r["benchmark"] == "methods"):
        lines += _section(
            f"Every method at its defaults: 10,000 images, 2 epochs, in {r['minutes']:.0f} minutes "
            f"({_conditions(r)}; benchmarks/methods.py)",
            "| | method | training loss, last half epoch | validation loss | validation accuracy |",
            [_method_row(row) for row in r["rows"]],
        )
    for r in (r for r in records if r["benchmark"] == "augment"):
        lines += _section(
            f"What a batch of {r['batch']} costs beside a training step of {r['name']} on one thread, median of "
            f"{r['rounds']} rounds ({_conditions(r)}; benchmarks/augment.py)",
            "| transform | ms (range) | of a step |",
            [_augment_row(name, times, r["times"]["step"]) for name, times in r["times"].items()],
        )
    lines += _section(
        "On a GPU (benchmarks/gpu_report.py)",
        "| device | date | what came out | report | conditions |",
        [_gpu_row(path, r) for path, r in reports],
    )
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _section(title, header, rows, *notes):
    rule = "|" + "---|" * (header.count("|") - 1)
    notes = [line for note in notes for line in (note, "")]
    return [f"## {title}", "", header, rule, *rows, "", *notes] if rows else []


def _conditions(record):
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"{record['processor']}, {record['cores']} cores, {versions}, {record['date']}"


def _step_row(r, key):
    medians = {name: found["median_ms"] for name, found in r[key].items()}
    ours, best = medians.get("gpunet numba", medians.get("gpunet")), medians.get("torch channels_last")
    numbers = [f"{medians[name]:.1f}" if name in medians else "" for name in STEPPERS]
    numbers.append(f"{ours / best:.2f}" if ours and best else "")
    return f"| {_net(r)} | {' | '.join(numbers)} | {r['threads']} threads, {_conditions(r)}{_busy(r)} |"


def _memory_row(r):
    held, best = r["memory"], r["memory"].get("torch channels_last")
    numbers = [
        f"{held[name] / 1e6:.0f}" + (f" ({held[name] / best:.2f})" if best else "") if name in held else ""
        for name in HOLDERS
    ]
    return f"| {_net(r)} | {' | '.join(numbers)} | {r['threads']} threads, {_conditions(r)} |"


def _net(r):
    return f"{r.get('net', r['name'])} | {r['batch']}"


def _busy(r):
    return "" if r["others_load"] <= 0.05 else f"; others used {r['others_load']:.0%} of a core"


def _method_row(row):
    return (
        f"| {row['group'][:-1]} | {row['method']} | {row['train_loss']:.3f} | {row['validation_loss']:.3f} "
        f"| {row['validation_accuracy']:.1%} |"
    )


def _augment_row(name, times, step):
    median, low, high = (times[key] for key in ("median_ms", "min_ms", "max_ms"))
    share = "" if times is step else f"{median / step['median_ms']:.1%}"
    return f"| {name} | {median:.2f} ({low:.2f} to {high:.2f}) | {share} |"


def _accuracy_row(r):
    runs, median = r["runs"], r["median"]
    found, seconds = ([run[key] for run in runs] for key in ("test_accuracy", "seconds"))
    accuracy = f"{median['test_accuracy']:.2%} ({min(found):.2%} to {max(found):.2%})"
    goal = r.get("goal")
    goal = f"{goal:.0%}, {'reached' if median['test_accuracy'] >= goal else 'missed'}" if goal else ""
    resumed = sum(bool(run.get("resumed")) for run in runs)
    notes = [*r["overrides"], *[f"{resumed} of the runs were gone on with"] * bool(resumed)]
    busy = _busy({"others_load": max(run.get("others_load", 0.0) for run in runs)})
    return (
        f"| {r['name']} | {goal} | {len(runs)} | {accuracy} | {median['train_loss_last_epoch']:.3f} "
        f"| {median['seconds']:.0f} s ({min(seconds):.0f} to {max(seconds):.0f}) "
        f"| {''.join(f'{note}; ' for note in notes)}{_conditions(r)}{busy} |"
    )


# The report of a GPU: parts, and in them items with rows of tables


class GpuRecord:
    """The JSON of one device and day: parts that run at different times come together in it. folder: None keeps none.

    {"benchmark": "gpu", "name": device, "date": day, "parts": {part: {"conditions", "minutes", "seconds", "items"}}}
    """

    def __init__(self, folder, device, emulated=False):
        self.folder, self.device = folder, device
        date = datetime.date.today().isoformat()
        self.record = {"benchmark": "gpu", "name": device, "date": date, "emulated": emulated, "parts": {}}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            stem = re.sub(r"[^a-z0-9.]+", "-", f"gpu {device} {date}".lower()).strip("-")
            self.path = folder / f"{stem}.json"
            if self.path.is_file():
                self.record = json.loads(self.path.read_text())

    def part(self, name, conditions, minutes):
        """Return a part to be filled: items that it has already stay until they are run again."""
        part = self.record["parts"].setdefault(name, {"items": {}})
        part |= {"conditions": conditions, "minutes": minutes}
        return part

    def save(self):
        """Write JSON and table; whoever reads meanwhile sees whole files."""
        if self.folder is None:
            return
        for path, text in (
            (self.path, json.dumps(self.record, indent=1) + "\n"),
            (self.path.with_suffix(".md"), gpu_table(self.record)),
        ):
            aside = path.with_suffix(".part")
            aside.write_text(text)
            os.replace(aside, path)


def gpu_table(record):
    """Return the Markdown of a GPU's report."""
    lines = [f"# gpunet on {record['name']}, {record['date']}", ""]
    lines += [
        "Made by `python benchmarks/results.py` from the JSON beside it, measured by benchmarks/gpu_report.py.",
        "",
    ]
    if record["emulated"]:
        lines += ["**The emulator stood in for a GPU: what is right or wrong holds, times mean nothing.**", ""]
    lines += _conditions_table(record["parts"])
    for name, part in record["parts"].items():
        lines += ["", f"## {name}", "", _counted(part)]
        lines += _unfinished(part["items"])
        for item in part["items"].values():
            if item.get("text"):
                lines += ["", "```", item["text"], "```"]
        for title, rows in _tables(part["items"]).items():
            about = next((i["about"][title] for i in part["items"].values() if title in i.get("about", {})), "")
            lines += ["", f"### {title}", "", *([about, ""] if about else []), *_markdown(rows)]
    return "\n".join(lines) + "\n"


def _conditions_table(parts):
    """Return lines: what is the same for all parts, and what differs between them."""
    rows = []
    for what in dict.fromkeys(key for part in parts.values() for key in part["conditions"]):
        said = {name: str(part["conditions"][what]) for name, part in parts.items() if what in part["conditions"]}
        texts = list(dict.fromkeys(said.values()))
        together = len(texts) == 1
        rows.append({"condition": what, "": texts[0] if together else "; ".join(f"{p}: {t}" for p, t in said.items())})
    return _markdown(rows)


def _counted(part):
    """Return how many items came to what, and how long the part took."""
    found = [item["status"] for item in part["items"].values()]
    counts = ", ".join(f"{found.count(status)} {status}" for status in dict.fromkeys(found))
    versions = dict.fromkeys(item["gpunet"] for item in part["items"].values() if "gpunet" in item)
    several = f" Measured with: {'; '.join(versions)}." if len(versions) > 1 else ""
    return f"{counts or 'nothing was run'}; {part.get('seconds', 0):.0f} s of {part['minutes']:g} minutes.{several}"


def _unfinished(items):
    """Return lines on the items that are not ok, and on what the others noted."""
    rows = [
        {"item": name, "status": item["status"], "why": item.get("why", "; ".join(item.get("notes", [])))}
        for name, item in items.items()
        if item["status"] != "ok" or item.get("notes")
    ]
    return ["", *_markdown(rows)] if rows else []


def _tables(items):
    """Return {title: rows} of all items; of rows with one `_key` the one with the largest `_size` stays."""
    tables = {}
    for item in items.values():
        for title, rows in item.get("rows", {}).items():
            known = tables.setdefault(title, {})
            for row in rows:
                key = row.get("_key", len(known))
                if key not in known or known[key].get("_size", 0) < row.get("_size", 0):
                    known[key] = row
    return {title: [rows[key] for key in sorted(rows, key=lambda k: k if isinstance(k, str) else "")]
            for title, rows in tables.items()}  # fmt: skip


def _markdown(rows):
    """Return the lines of a table of dicts."""
    columns = [c for c in dict.fromkeys(c for row in rows for c in row) if not c.startswith("_")]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return lines + [f"| {' | '.join(_cell(row.get(c)) for c in columns)} |" for row in rows]


def _cell(value):
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _gpu_row(path, r):
    parts = "; ".join(f"{name}: {_counted(part)}" for name, part in r["parts"].items())
    conditions = {key: text for part in r["parts"].values() for key, text in part["conditions"].items()}
    known = ("gpunet", "driver_version", "CUDA runtime of CuPy", "cupy-cuda13x", "cupy-cuda12x", "cuBLAS", "torch")
    versions = ", ".join(f"{key} {conditions[key]}" for key in known if key in conditions)
    note = "times mean nothing; " if r["emulated"] else ""
    return f"| {r['name']} | {r['date']} | {parts} | [table]({path.with_suffix('.md').name}) | {note}{versions} |"


if __name__ == "__main__":
    table()
