"""The GPU report: everything that only a GPU can show, unattended, a few minutes a part.

    python benchmarks/gpu_report.py --part all                       # 4 parts of at most 7 minutes
    python benchmarks/gpu_report.py --part steps --minutes 7 --out DIR
    python benchmarks/gpu_report.py --part steps --only 'compile *'  # some items, by name
    python benchmarks/gpu_report.py --part all --backend emulator --quick [--out DIR] [--torch-device cpu]

On a GPU machine: gpunet with its extra cuda12 or cuda13 (`pip install -e ".[cuda13]"`, or PYTHONPATH=. where its
dependencies are there); PyTorch with CUDA for the peer of `steps`; CIFAR-10 in --data or GPUNET_DATA for `accuracy`;
compute-sanitizer on PATH or in /usr/local/cuda/bin for the end of `parity`. What is missing is skipped and says so.

    parity     is it right?     what doctor says; every kernel in every type against NumPy; 50 steps in double precision
                                against NumPy; a seed, and graph against no graph, bit for bit; tests/test_cuda.py;
                                compute-sanitizer (memcheck, racecheck). 2 to 5 minutes.
    kernels    is it near the   copies and products as the device's ceilings; then each kernel's largest launches in
               device's limit?  real nets: time, GB/s, share of a copy. 2 to 4 minutes.
    steps      is it fast?      whole training steps of six nets in four types, graph and no graph, beside PyTorch
                                eager, AMP and (last) torch.compile: takes all the minutes it is given.
    accuracy   does it learn?   CIFAR-10 through the Trainer, seconds and test accuracy, a seed twice. 2 to 5 minutes.

Items run in order of importance, in worker processes: one that fails, crashes or hangs does not stop the rest, and
what there is no time for is listed as not run. The exit code is 1 where an item failed.

All parts of one day on one device go into one file, benchmarks/results/gpu-<device>-<date>.json (or --out), as soon as
they are known; the table beside it, gpu-<device>-<date>.md, is made from it. An item's record: status (ok, failed,
skipped, not run), why, seconds, line; rows {table: [{column: value}]}, about {table: words}, problems, traceback.

With --backend emulator the kernels run on the CPU, and with --quick sizes are tiny: this proves every path but CUDA's
own calls. Times then mean nothing, and nothing is written unless --out says where.
"""

import argparse
import datetime
import fnmatch
import os
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # gpunet, where it is not installed

from gpu import accuracy, conditions, kernels, parity, steps, work  # noqa: E402
from results import FOLDER, GpuRecord, table  # noqa: E402

PARTS = {"parity": parity, "kernels": kernels, "steps": steps, "accuracy": accuracy}
ASK_DEVICE = "conditions"


def parse(words=None):
    """Return the options; what a worker is told is hidden."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], required=True)
    parser.add_argument("--backend", choices=["cuda", "emulator"], default="cuda")
    parser.add_argument("--minutes", type=float, default=7.0, help="for each part")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: proves paths, measures nothing")
    parser.add_argument("--out", type=Path, help="folder for JSON and table")
    parser.add_argument("--data", help="folder that holds CIFAR-10")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="items by name: 'squares *'")
    hidden = argparse.SUPPRESS
    parser.add_argument("--torch-device", choices=["cuda", "cpu", "none"], help=hidden)
    parser.add_argument("--plant", action="append", default=[], choices=["fail", "crash", "hang"], help=hidden)
    parser.add_argument("--launch", action="store_true", help=hidden)  # as a sanitizer's child
    parser.add_argument("--work", help=hidden)  # as a worker: where its records go
    parser.add_argument("--deadline", type=float, help=hidden)
    parser.add_argument("--names", nargs="*", default=[], help=hidden)
    options = parser.parse_args(words)
    if options.torch_device is None:
        options.torch_device = "cuda" if options.backend == "cuda" else "none"
    return options


def items_of(options):
    """Return the items of a part that the options ask for."""
    found = [work.Item(ASK_DEVICE, ask_device), *work.planted(options.plant), *PARTS[options.part].items(options)]
    patterns = [ASK_DEVICE, "planted *", *options.only] if options.only else ["*"]
    return [item for item in found if any(fnmatch.fnmatchcase(item.name, pattern) for pattern in patterns)]


def ask_device(bench):
    """Return the conditions that only the backend knows."""
    found = conditions.on_device(bench)
    return {"line": ", ".join(f"{name} {text}" for name, text in found.items()), "conditions": found}


def command_of(options):
    """Return the command of a worker for the same part, but for what it is to do."""
    command = [sys.executable, str(HERE / "gpu_report.py"), "--part", options.part, "--backend", options.backend]
    command += ["--torch-device", options.torch_device]
    command += ["--quick"] if options.quick else []
    command += ["--data", os.path.abspath(options.data)] if options.data else []
    for kind in options.plant:
        command += ["--plant", kind]
    return command


def run_part(options, folder):
    """Run a part, keep each record as soon as it is there, and return how many items failed."""
    began = time.time()
    options.command = command_of(options)
    about = conditions.conditions(options)
    report = GpuRecord(folder, conditions.device(options), emulated=options.backend == "emulator")
    part = report.part(options.part, about, options.minutes)
    counts = dict.fromkeys(("ok", "failed", "skipped", "not run"), 0)
    print(f"\n== {options.part}: {options.minutes:g} minutes, {report.device} ==", flush=True)

    def keep(name, record):
        counts[record["status"]] += 1
        about.update(record.pop("conditions", {}))
        record["at"], record["gpunet"] = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}", about["gpunet"]
        known = part["items"].get(name, {}).get("status")
        if record["status"] != "not run" or known not in ("ok", "failed"):  # what an earlier run found out stays
            part["items"][name] = record
        part["seconds"] = time.time() - began
        report.save()
        print(f"{options.part} {name}: {outcome(record)}", flush=True)

    work.run(options, items_of(options), began + 60 * options.minutes, keep)
    about.update(conditions.at_the_end(options))
    report.save()
    if folder is not None:
        table(folder)
        print(f"wrote {report.path}")
    print(", ".join(f"{count} {what}" for what, count in counts.items()), f"in {time.time() - began:.0f} s", flush=True)
    return counts["failed"]


def outcome(record):
    """Return a record in one line."""
    parts = [record["status"]]
    if "seconds" in record:
        parts.append(f"{record['seconds']:.1f} s")
    parts += [str(record[key]) for key in ("line", "why") if record.get(key)]
    return ", ".join(parts)


def main(words=None):
    """Run parts, or be a worker; return the exit code."""
    options = parse(words)
    if options.launch:
        parity.launch(work.Bench(options, 0).backend)
        return 0
    if options.work:
        work.work(options, items_of(options))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that workers are ended
    worthless = options.quick or options.backend == "emulator"
    folder = options.out if options.out or worthless else FOLDER
    failed = 0
    for name in PARTS if options.part == "all" else [options.part]:
        options.part = name
        failed += run_part(options, folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
