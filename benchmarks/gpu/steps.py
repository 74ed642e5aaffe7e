"""Part steps: one training step, as a graph and launch by launch, beside PyTorch on the same device in the same run.

A step is all of it on both sides: the batch gathered from images that lie on the device, random flip and crop,
normalisation, gradients, update; only an epoch's order is drawn before. Contenders take turns: in each round each does
its steps between two events, and the median over rounds counts.
"""

import statistics
import time
import traceback
from contextlib import contextmanager
from functools import partial

import numpy as np

from gpu import nets
from gpu.bench import Item, Skip
from gpu.peer import PEERS, Peer, Resident, load, torch_of
from gpu.training import Training
from gpunet.errors import GpunetError

IMAGES = 49152  # on the device: a multiple of every batch, and more bytes than a cache holds
PATIENCE = 20  # seconds after which two rounds are enough
COMPILED = (("resnet9", 512), ("airbench", 2048))
MODES = ("reduce-overhead", "max-autotune-no-cudagraphs")
OTHERS = ("resnet18", "airbench", "resnet9-narrow", "resnet20")
ORDER = (  # what matters most first
    *((net, batch, "float16") for net, batch in (("resnet9", 512), ("airbench", 2048), ("resnet18", 512))),
    ("resnet9", 512, "float32"),
    ("resnet9", 512, "tf32"),
    ("resnet9", 512, "bfloat16"),
    *((net, 512, "float16") for net in OTHERS[1:]),
    *(("airbench", 2048, dtype) for dtype in ("bfloat16", "tf32")),
    *((net, 512, dtype) for dtype in ("tf32", "bfloat16", "float32") for net in OTHERS),
    ("airbench", 2048, "float32"),
)  # fmt: skip

STEP, CONTENDERS, KERNELS, TIMELINE = (
    "One training step",
    "Every contender",
    "Where the time of a step goes",
    "Inside the graph, as the profiler saw it",
)
ABOUT = {
    STEP: "All of a step on both sides: gather, flip, crop, normalise, gradients, update (SGD, Nesterov). `kernels` is "
    "the sum of each launch measured alone; `graph / kernels` is wanted at most 1.10. What fits into the L2 cache is "
    "read from there when it is measured alone, which makes the sum too small.",
    CONTENDERS: "Median, fastest and slowest round. Memory: all that gpunet planned, the images too; for PyTorch the "
    "most that was allocated above what lay there before, images not among it.",
    KERNELS: "Launches of a step measured alone, the largest sums first.",
    TIMELINE: "Kernels of three steps in a row; busy is their sum over the time from the first's start to the last's "
    "end.",
}


def items(options):
    """Return the items, what matters most first; torch.compile takes minutes, so it comes last."""
    found = [
        Item(f"{net} {batch} {dtype}", partial(measure, net=net, batch=batch, dtype=dtype), needs=5)
        for net, batch, dtype in ORDER
    ]
    found += [
        Item(f"timeline {net} {batch} float16", partial(timeline, net=net, batch=batch), needs=10, apart=True)
        for net, batch in COMPILED
    ]
    return found + [
        Item(
            f"compile {net} {batch} {mode}",
            partial(measure, net=net, batch=batch, dtype="float16", mode=mode),
            needs=30,
            apart=True,
        )
        for mode in MODES
        for net, batch in COMPILED
    ]


class Ours:
    """gpunet's step as a contender: as a graph, or launch by launch."""

    def __init__(self, bench, training, graph):
        self.bench, self.training, self.graph = bench, training, graph

    def start(self):
        """Do the first steps; return planned bytes."""
        with self.bench.graphs(self.graph):
            for _ in range(3):  # bound, captured, replayed
                self.training.run()
            self.training.step.wait()
        return self.training.planned

    def time(self, count):
        """Return the milliseconds of a step, the mean of so many."""
        with self.bench.graphs(self.graph):
            return self.bench.backend.time(self.training.run, count)


def sizes(bench, batch):
    """Return (batch, images) as they are, or tiny."""
    return (4, 16) if bench.quick else (batch, IMAGES)


def measure(bench, net, batch, dtype, mode=None):
    """Return the record of one net, batch and type; mode: the peer is compiled by torch.compile, else it is eager."""
    count, images = sizes(bench, batch)
    if mode is not None:
        torch_of(bench.options)  # without a peer there is nothing to do
    training = Training(bench, net, count, dtype, images).start()
    contenders = {"gpunet graph": Ours(bench, training, True), "gpunet no graph": Ours(bench, training, False)}
    problems, notes, about_peer = [], [], {}
    try:
        contenders |= peers(bench, training, net, dtype, mode, problems)
        about_peer = versions(bench)
    except Skip as reason:
        notes.append(str(reason))
    memory, times = compete(bench, contenders, problems)
    walked = training.walk(training.keys, rounds=1)
    if not training.applied:
        notes.append("the last update was not applied: its gradient was not finite")
    label = {"net": net, "batch": count, "type": dtype}
    row = label | compare(times, walked, count) | {"planned, MB": training.planned / 1e6}
    row["best peer"] = row["best peer"] or "; ".join(notes) or "failed"
    batches, difference = {"gpunet": sum(ms for entry, ms in walked if entry.path == "batch")}, None
    for name in filter(times.get, [name for name, contender in contenders.items() if is_peer(contender)]):
        with peer_may_fail(name, problems):
            batches[name] = contenders[name].time(bench.repeats, contenders[name].inputs)
            if dtype == "float32" and difference is None:
                difference = check_peer(bench, training, net, contenders[name])
    return {
        "line": line_of(row),
        "problems": problems,
        "notes": notes,
        "conditions": about_peer,
        "rounds_ms": times,
        "memory_bytes": memory,
        "batch_ms": batches,
        "output_difference": difference,
        "about": ABOUT,
        "rows": {
            STEP: [row],
            CONTENDERS: [contender_row(label, name, t, memory.get(name)) for name, t in times.items() if t],
            KERNELS: kernel_rows(label, walked),
        },
    }


def compare(times, walked, count):
    """Return the columns that put gpunet's graph beside its own launches and beside the fastest peer."""
    medians = {name: statistics.median(t) for name, t in times.items() if t}
    ours, summed = medians["gpunet graph"], sum(ms for _, ms in walked)
    rivals = {name: ms for name, ms in medians.items() if not name.startswith("gpunet")}
    best = min(rivals, key=rivals.get, default=None)
    return {
        "graph, ms": ours,
        "images/s": 1e3 * count / ours,
        "no graph, ms": medians["gpunet no graph"],
        "kernels, ms": summed,
        "graph / kernels": ours / summed,
        "best peer": best,
        "peer, ms": rivals.get(best),
        "gpunet / peer": ours / rivals[best] if best else None,
    }


def line_of(row):
    """Return a row of the comparison in a few words."""
    line = f"graph {row['graph, ms']:.2f} ms, kernels {row['kernels, ms']:.2f} ms"
    if row["peer, ms"] is None:
        return f"{line}, {row['best peer']}"
    return f"{line}, {row['gpunet / peer']:.2f} of {row['best peer']} ({row['peer, ms']:.2f} ms)"


def is_peer(contender):
    """Return whether a contender is PyTorch's."""
    return isinstance(contender, Peer)


def versions(bench):
    """Return {what: text} of the peer."""
    torch, device = torch_of(bench.options)
    about = f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, on {device.type}"
    return {"PyTorch": about}


def peers(bench, training, net, dtype, mode, problems):
    """Return {name: Peer} for gpunet's type; one that fails is among the problems."""
    torch, device = torch_of(bench.options)
    data = Resident(torch, training.source, device)
    wanted = PEERS[dtype] if mode is None else {f"AMP float16 channels_last, {mode}": {"amp": "float16", "mode": mode}}
    found = {}
    for name, settings in wanted.items():
        with peer_may_fail(name, problems):
            graph = nets.build(net, bench.quick)
            found[name] = Peer(torch, graph, data, training.step.batch, device, **settings)
    return found


def compete(bench, contenders, problems):
    """Start the contenders and let them take turns; return ({name: bytes}, {name: milliseconds of each round})."""
    memory, times = {}, {name: [] for name in contenders}
    for name, contender in contenders.items():
        with peer_may_fail(name, problems):
            memory[name] = contender.start()
    began, racing = time.time(), list(memory)
    for number in range(bench.rounds):
        if number >= 2 and (time.time() - began > PATIENCE or bench.left < PATIENCE):
            break
        for name in racing.copy():
            racing.remove(name)
            with peer_may_fail(name, problems):
                times[name].append(contenders[name].time(bench.repeats))
                racing.append(name)
    return memory, times


@contextmanager
def peer_may_fail(name, problems):
    """Let a peer's error be one of the problems, and gpunet's own an error."""
    try:
        yield
    except Exception:
        if name.startswith("gpunet"):
            raise
        problems.append(f"{name}: {traceback.format_exc(limit=-3)}")


def contender_row(label, name, times, nbytes):
    """Return the row of one contender."""
    return label | {
        "contender": name,
        "ms": statistics.median(times),
        "fastest": min(times),
        "slowest": max(times),
        "rounds": len(times),
        "memory, MB": nbytes / 1e6 if nbytes is not None else None,
    }


def kernel_rows(label, walked, most=8):
    """Return a row for each kernel that takes much of a step, and one for the rest."""
    sums = {}
    for entry, ms in walked:
        launches, total, flops = sums.get(entry.name, (0, 0.0, 0))
        sums[entry.name] = launches + 1, total + ms, flops + entry.flops
    whole = sum(total for _, total, _ in sums.values())
    ranked = sorted(sums.items(), key=lambda item: -item[1][1])
    rest = [sums for _, sums in ranked[most:]]
    if rest:
        launches, total, _ = map(sum, zip(*rest, strict=True))
        ranked = [*ranked[:most], ("all others", (launches, total, 0))]
    return [
        label
        | {
            "kernel": name,
            "launches": launches,
            "ms": total,
            "share": f"{total / whole:.0%}",
            "TFLOP/s": flops / total / 1e9 if flops else None,
        }
        for name, (launches, total, flops) in ranked
    ]


def check_peer(bench, training, net, peer):
    """Return the largest difference of the outputs of gpunet and its peer, with the same weights and images."""
    step, graph = training.step, nets.build(net, bench.quick)
    images = np.random.default_rng(1).standard_normal((step.batch, *nets.SHAPE), np.float32)
    load(peer.torch, peer.net, graph, {**step.weights, **step.statistics})
    for module in peer.net.modules():
        if isinstance(module, peer.torch.nn.BatchNorm2d):
            module.reset_running_stats()
    tensors = step.statistics
    for name in tensors:  # as before the first step
        if name.endswith((".mean", ".variance")):
            tensors[name] = np.full(tensors[name].shape, float(name.endswith(".variance")))
    ours, theirs = step.predict(images), peer.predict(images)
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not difference < 1e-2:
        raise GpunetError(f"the peer is another net: outputs differ by {difference:.2g} of the largest")
    return difference


def timeline(bench, net, batch):
    """Return what PyTorch's profiler, which sees every kernel of the process, says of three replays of the graph."""
    torch, device = torch_of(bench.options)
    count, images = sizes(bench, batch)
    training = Training(bench, net, count, "float16", images).start()
    ours = Ours(bench, training, True)
    ours.start()

    def steps():
        for _ in range(3):
            training.run()
        training.step.wait()

    with bench.graphs(True):
        spans = profile(torch, steps, device.type == "cuda")
    if not spans:
        raise Skip("the profiler saw no kernel")
    rows, busy = timeline_rows(spans, {"net": net, "batch": count})
    return {"line": f"kernels busy {busy:.1%} of the time", "busy": busy, "about": ABOUT, "rows": {TIMELINE: rows}}


def profile(torch, call, on_gpu):
    """Return [(name, start, stop)] in microseconds of the kernels of a call; of PyTorch's own functions on a CPU."""
    kinds = torch.profiler.ProfilerActivity
    call()
    with torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU]) as profiler:
        call()
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == wanted
    ]


def timeline_rows(spans, label, most=12):
    """Return (rows of the kernels that take most, share of the time in which one ran)."""
    totals = {}
    for name, start, stop in spans:
        launches, total = totals.get(name, (0, 0.0))
        totals[name] = launches + 1, total + stop - start
    whole = max(stop for *_, stop in spans) - min(start for _, start, _ in spans)
    busy = sum(total for _, total in totals.values()) / whole
    rows = [
        label | {"kernel": name[:60], "launches": n, "us each": total / n, "share": f"{total / whole:.1%}"}
        for name, (n, total) in sorted(totals.items(), key=lambda item: -item[1][1])[:most]
    ]
    return [*rows, label | {"kernel": "busy", "share": f"{busy:.1%}"}], busy
