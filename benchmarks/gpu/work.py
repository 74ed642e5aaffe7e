"""Runs the items of a part: the report's process starts workers, hands them items by name, and keeps the deadline.

What an item does to its process cannot hurt the next one: a worker that fails, crashes or hangs is replaced, and the
items behind go on in a new one. Knows no item.
"""

import ctypes
import faulthandler
import json
import math
import os
import signal
import subprocess
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np

from gpu.bench import Bench, Item, Skip

LATE = "out of time"
POLL = 0.1  # seconds
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def planted(kinds):
    """Return items that go wrong on purpose: they prove that the rest goes on."""

    def fail(bench):
        raise ValueError("planted")

    def crash(bench):
        os.abort()

    def hang(bench):
        time.sleep(3600)

    known = {"fail": fail, "crash": crash, "hang": hang}
    return [Item(f"planted {kind}", known[kind], needs=0.5) for kind in kinds]


# The worker's side


def work(options, items):
    """Do the items named in the options, one after another, and append what came out to a file as lines of JSON."""
    faulthandler.enable()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    bench = Bench(options, options.deadline)
    known = {item.name: item for item in items}
    with open(options.work, "a", encoding="utf-8") as file:

        def say(name, **record):
            file.write(json.dumps({"item": name} | plain(record)) + "\n")
            file.flush()

        for name in options.names:
            if bench.left < known[name].needs:
                say(name, status="not run", why=LATE)
                continue
            say(name, status="began")
            record = attempt(known[name], bench)
            say(name, **record)
            if "traceback" in record:
                return  # what it left behind may be broken: the rest goes to a new process
            bench.clean()


def attempt(item, bench):
    """Run an item; return its record, whatever happens."""
    start = time.time()
    try:
        record = {"status": "ok", "about": {}, **item.run(bench)}
        record["about"] = {
            title: record["about"][title] for title in record.get("rows", {}) if title in record["about"]
        }
        if record.get("problems"):
            record |= {"status": "failed", "why": one_line(record["problems"][0])}
    except Skip as reason:
        record = {"status": "skipped", "why": str(reason)}
    except Exception as error:
        why = one_line(f"{type(error).__name__}: {error}")
        record = {"status": "failed", "why": why, "traceback": traceback.format_exc()}
    return record | {"seconds": time.time() - start}


def one_line(text, most=300):
    """Return a text as one line that is not too long."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def plain(value):
    """Return a value as JSON has it: NumPy's numbers as Python's, what is not finite as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


# The other side


def run(options, items, deadline, keep):
    """Run the items until the deadline; keep(name, record) is called as soon as one is done."""
    pending = list(items)
    while pending:
        if time.time() >= deadline:
            for item in pending:
                keep(item.name, {"status": "not run", "why": LATE})
            return
        together = [pending[0]]
        if not pending[0].apart:
            for item in pending[1:]:
                if item.apart:
                    break
                together.append(item)
        done = set(one_worker(options, together, deadline, keep))
        pending = [item for item in pending if item.name not in done]


def one_worker(options, items, deadline, keep):
    """Give items to a new process; return the names of those that are done with, at least one."""
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder, "lines"), Path(folder, "log")
        lines.touch()
        names = [item.name for item in items]
        command = [*options.command, "--work", str(lines), "--deadline", repr(deadline), "--names", *names]
        with open(log, "wb") as said:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, process_group=0
            )
        done, began, read = [], None, 0
        try:
            while True:
                ended = process.poll() is not None
                late = not ended and time.time() > deadline
                if late:
                    stop(process)
                text = lines.read_text(encoding="utf-8")
                for line in text[read : text.rfind("\n") + 1].splitlines():
                    record = json.loads(line)
                    name = record.pop("item")
                    if record["status"] == "began":
                        began = name, time.time()
                        continue
                    began = None
                    done.append(name)
                    keep(name, record)
                read = text.rfind("\n") + 1
                if ended or late:
                    break
                time.sleep(POLL)
        finally:
            stop(process)
        if began is not None or (not done and not late):
            name, since = began or (names[0], time.time())
            keep(name, unfinished(late, process.returncode, since, log))
            done.append(name)
        return done


def unfinished(late, code, since, log):
    """Return the record of an item whose process ended before it did."""
    said = log.read_text(encoding="utf-8", errors="replace")[-4000:]
    seconds = time.time() - since
    if late:
        return {"status": "not run", "why": f"{LATE}: stopped after {seconds:.0f} s", "said": said, "seconds": seconds}
    why = f"its process ended with exit code {code}"
    last = [line for line in said.splitlines() if line.strip()][-1:]
    return {"status": "failed", "why": one_line(": ".join([why, *last])), "traceback": said, "seconds": seconds}


def stop(process):
    """End a process and those it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
