"""Time and memory of a training step on the CPU: gpunet beside PyTorch, interleaved in one run.

    python benchmarks/step_cpu.py                                       # all nets, batches 100 and 128
    python benchmarks/step_cpu.py --nets resnet9 --batch 100 --layers   # and which layer takes how long, on both sides
    python benchmarks/step_cpu.py --write                               # store the figures in results/

A step is forward, backward and an SGD update in float32 on one fixed batch; "forward" the network in inference. In each
round every contender is timed once, for --seconds each; printed are medians over rounds. The contenders: gpunet with
and without its numba engine, PyTorch contiguous, channels_last, and compiled; one that cannot run says why and is left
out.
Memory is the peak of some steps beyond what the imports hold, each contender in a process of its own.

Ratios on a busy machine lie (PyTorch's barriers suffer more than ours). So what other work took is measured before,
during and after; above 5 % of a core a net's figures are marked, and not stored without --force.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import contenders
from quiet import Others, may_store, verdict
from results import machine, store

from gpunet.errors import GpunetError
from gpunet.train.text import columns, size

HERE = Path(__file__).parent
LAYER_STEPS = 10
BEST_PEER, DEFAULT = "torch channels_last", "gpunet numba"


def start(names, graph, batch, threads):
    """Return ({name: contender that has done its first steps}, {name: why it cannot run})."""
    ready, missing = {}, {}
    for name in names:
        try:
            ready[name] = contender = contenders.make(name, graph, batch, threads)
            contender.step()
            contender.forward()
        except GpunetError as error:
            missing[name] = str(error)
    return ready, missing


def mean_time(run, seconds):
    """Return the mean time of a call over about so many seconds."""
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds or count == 0:
        run()
        count += 1
    return passed / count


def rounds_of(calls, rounds, seconds, others):
    """Return ({name: [seconds a call, one a round]}, the largest share of a core that others took in a round).

    Every other round goes backwards, so that nobody always comes behind the same one.
    """
    times, load = {name: [] for name in calls}, others.look()
    for number in range(rounds):
        for name in [*calls][:: -1 if number % 2 else 1]:
            times[name].append(mean_time(calls[name], seconds))
        load = max(load, others.share())
    return times, max(load, others.look())


def memory_of(name, net, batch, threads):
    """Return the bytes that a contender's steps take in a process of its own, or None where it cannot run."""
    command = [sys.executable, HERE / "step_memory.py", name, net, str(batch), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"memory of {name}: left out: {(done.stderr.strip() or 'no reason').splitlines()[-1]}")
        return None
    return int(done.stdout)


def measure(net, batch, arguments):
    """Return the record of a net at a batch size, and print it as it comes."""
    graph, threads = contenders.build(net), arguments.threads
    ready, missing = start(arguments.contenders, graph, batch, threads)
    for name, why in missing.items():
        print(f"{name} is left out: {why.removeprefix(f'{name}: ')}")
    others, record, load = Others(), {}, 0.0
    for what in ("step", "forward"):
        calls = {name: getattr(contender, what) for name, contender in ready.items()}
        times, seen = rounds_of(calls, arguments.rounds, arguments.seconds, others)
        load = max(load, seen)
        record["times" if what == "step" else what] = {
            name: {"median_ms": 1e3 * statistics.median(t), "rounds_ms": [1e3 * s for s in t]}
            for name, t in times.items()
        }
        print(f"{net}, batch {batch}: {line(what, times)}", flush=True)
    if arguments.layers:
        record["layers"] = {name: flat(ready[name].layers(LAYER_STEPS)) for name in layered(ready)}
        print(layer_table(record["layers"]))
    for contender in ready.values():
        contender.close()
    found = {name: memory_of(name, net, batch, threads) for name in contenders.MEASURED}
    record["memory"] = {name: nbytes for name, nbytes in found.items() if nbytes is not None}
    print(f"{net}, batch {batch}: memory beyond imports: {memory_line(record['memory'])}")
    print(f"{net}, batch {batch}: {verdict(load)}", flush=True)
    return {"net": net, "batch": batch, "threads": threads, "others_load": load, "left_out": missing, **record}


def line(what, times):
    """Return medians, and ratios to channels_last where it ran."""
    medians = {name: statistics.median(t) for name, t in times.items()}
    best = medians.get(BEST_PEER)
    ratios = {name: f" ({m / best:.2f})" if best else "" for name, m in medians.items()}
    return f"{what}: " + ", ".join(f"{name} {1e3 * m:.1f} ms{ratios[name]}" for name, m in medians.items())


def memory_line(found):
    """Return bytes, and ratios to channels_last where it ran."""
    best = found.get(BEST_PEER)
    return ", ".join(f"{name} {size(n)}" + (f" ({n / best:.2f})" if best else "") for name, n in found.items())


def layered(ready):
    """Return the two that are compared layer by layer: gpunet as it is by default, and channels_last."""
    return [name for name in (DEFAULT if DEFAULT in ready else "gpunet", BEST_PEER) if name in ready]


def flat(found):
    """Return {(layer, part): seconds} as JSON holds it: [layer, part, milliseconds]."""
    return [[*key, 1e3 * seconds] for key, seconds in found.items()]


def layer_table(layers):
    """Return lines: what each side spends in each layer, and what the first loses there (below 0: wins).

    Parts of a step that have no layer are one row: the loss, the sum over gradients, the update.
    """
    tables = {name: _by_layer(rows) for name, rows in layers.items()}
    names = [*tables]
    keys = dict.fromkeys(key for table in tables.values() for key in table)
    head = ("layer", "part", *(f"{name} ms" for name in names), *["loses ms"] * (len(names) == 2))
    lines = [head]
    for key in keys:
        own = [table.get(key, 0.0) for table in tables.values()]
        lines.append((*key, *(f"{ms:.2f}" for ms in own), *[f"{own[0] - own[-1]:+.2f}"] * (len(names) == 2)))
    sums = [sum(table.values()) for table in tables.values()]
    lines.append(("all", "", *(f"{ms:.2f}" for ms in sums), *[f"{sums[0] - sums[-1]:+.2f}"] * (len(names) == 2)))
    return columns(lines, 2)


def _by_layer(rows):
    table = {}
    for path, part, ms in rows:
        key = (path, part) if part else ("loss, update, sums", "")
        table[key] = table.get(key, 0.0) + ms
    return table


def main():
    """Measure every net at every batch size; --write stores each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=[*contenders.NETS], choices=contenders.NETS)
    parser.add_argument("--batch", nargs="+", type=int, default=[100, 128])
    parser.add_argument("--contenders", nargs="+", default=contenders.TIMED, choices=contenders.TIMED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each contender in a round")
    parser.add_argument("--layers", action="store_true", help="time each layer, too")
    parser.add_argument("--write", action="store_true", help="store the figures in results/")
    parser.add_argument("--force", action="store_true", help="store those of a busy machine, too, marked")
    arguments = parser.parse_args()
    for key in ("threads", "rounds"):
        if getattr(arguments, key) < 1:
            parser.error(f"--{key}: expected at least 1, got {getattr(arguments, key)}")
    if min(arguments.batch) < 1:
        parser.error(f"--batch: expected at least 1, got {min(arguments.batch)}")
    for net in arguments.nets:
        for batch in arguments.batch:
            record = measure(net, batch, arguments)
            if arguments.write and may_store(record["others_load"], arguments.force):
                packages = [p for p, name in (("torch", "torch"), ("numba", DEFAULT)) if name in record["times"]]
                store("step_cpu", f"{net}_{batch}", {**machine(*packages), **record})


if __name__ == "__main__":
    main()
