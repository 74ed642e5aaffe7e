"""Where a training step's time goes: by layer and by kernel, beside bytes, FLOPs and what this machine can do.

Looks through gpunet.core.observe.Profile at replays of the public Step; knows recipes, and no layer.
"""

import json
import statistics
import time
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np

from gpunet.backends import backend as named
from gpunet.backends import choose
from gpunet.core.arenas import Arenas
from gpunet.core.observe import Profile
from gpunet.core.replay import Replay
from gpunet.core.step import Step
from gpunet.core.trace import Share, Trace
from gpunet.data import DataNotFound, Split, cifar
from gpunet.train.build import build_data, build_graph, build_normalisation, build_source, build_step, outline, resident
from gpunet.train.text import columns, quantity, size

WARM = 2  # steps before any that counts; a graph is captured in the second
BATCHES = 4  # of random images, where the data set is not there
REPEATS = 5  # of a ceiling's run, of which the fastest counts
COPIES = (2**16, 2**20, 2**24, 2**26)  # elements of a copy; the first that takes LONG is the last
PRODUCTS = (64, 256, 512, 1024, 2048, 4096)  # rows and columns of a square product; the same
LONG = 0.01  # seconds
HEAD = ("time", "share", "calls", "bytes", "FLOPs", "GB/s", "GFLOP/s", "of copy", "of GEMM")


@dataclass
class Ceilings:
    """What all replicas together reach: bytes a second of a large copy, FLOPs a second of a square product."""

    copy: float
    product: float


@dataclass
class Row:
    """Sums over some entries, a step: seconds (the mean over replicas), calls a replica, bytes and FLOPs of all."""

    seconds: float = 0.0
    calls: float = 0.0
    nbytes: float = 0.0
    flops: float = 0.0

    def cells(self, total, ceilings):
        """Return the texts under HEAD; a rate only where there is a count."""
        seconds = max(self.seconds, 1e-12)
        speed, work = self.nbytes / seconds, self.flops / seconds
        return (
            f"{1e3 * self.seconds:.3f} ms",
            f"{self.seconds / max(total, 1e-12):.1%}",
            f"{self.calls:.3g}",
            size(round(self.nbytes)) if self.nbytes else "",
            quantity(self.flops),
            f"{speed / 1e9:.2f}" if speed else "",
            f"{work / 1e9:.2f}" if work else "",
            f"{speed / ceilings.copy:.0%}" if speed else "",
            f"{work / ceilings.product:.0%}" if work else "",
        )


@dataclass
class Report:
    """The events of `steps` observed steps, the seconds of as many normal ones, and the ceilings."""

    title: str
    events: list
    steps: int
    replicas: int
    walls: list
    ceilings: Ceilings
    notes: list = field(default_factory=list)

    def rows(self, key):
        """Return {key(event): Row}, in the order in which keys first ran."""
        rows = defaultdict(Row)
        for event in self.events:
            row = rows[key(event)]
            row.seconds += (event.stop - event.start) / self.steps / self.replicas
            row.calls += 1 / self.steps / self.replicas
            row.nbytes += bytes_of(event) / self.steps
            row.flops += event.entry.flops / self.steps
        return dict(rows)

    @property
    def total(self):
        """The Row of all entries."""
        return self.rows(lambda event: None)[None]

    def table(self, heads, rows):
        """Return rows {texts under heads: Row} and their total as aligned lines."""
        total = self.total
        lines = [(*key, *row.cells(total.seconds, self.ceilings)) for key, row in rows.items()]
        last = ("all", *[""] * (len(heads) - 1), *total.cells(total.seconds, self.ceilings))
        return columns([(*heads, *HEAD), *lines, last], len(heads))

    def __str__(self):
        layers = self.rows(lambda event: (event.entry.path, event.phase))
        kernels = self.rows(lambda event: (event.entry.name,))
        kernels = dict(sorted(kernels.items(), key=lambda item: -item[1].seconds))
        low, middle, high = (1e3 * f(self.walls) for f in (min, statistics.median, max))
        wait = "; in sum, gather and barrier they wait for each other" if self.replicas > 1 else ""
        return "\n".join(
            [
                *(self.title, *self.notes, ""),
                *(self.table(("layer", "part"), layers), "", self.table(("kernel",), kernels), ""),
                f"sum of the entries {1e3 * self.total.seconds:.2f} ms a step; a normal step takes {middle:.2f} ms "
                f"({low:.2f} to {high:.2f}, median of {len(self.walls)}){wait}",
                f"ceilings measured here: copy {self.ceilings.copy / 1e9:.2f} GB/s, "
                f"GEMM {self.ceilings.product / 1e9:.2f} GFLOP/s; above 100 % of copy: out of a cache",
            ]
        )

    def trace(self):
        """Return the events in Chrome's trace-event format, which Perfetto reads: microseconds, a row a replica."""
        begin = min(event.start for event in self.events)
        names = [("process_name", 0, self.title)]
        names += [("thread_name", replica, f"replica {replica + 1}") for replica in range(self.replicas)]
        meta = [{"name": n, "ph": "M", "pid": 1, "tid": tid, "args": {"name": text}} for n, tid, text in names]
        return {
            "displayTimeUnit": "ms",
            "traceEvents": meta
            + [
                {
                    "name": f"{event.entry.path} {event.entry.name}",
                    "cat": event.phase,
                    "ph": "X",
                    "ts": round(1e6 * (event.start - begin), 3),
                    "dur": round(1e6 * (event.stop - event.start), 3),
                    "pid": 1,
                    "tid": event.replica,
                    "args": {
                        "layer": event.entry.path,
                        "kernel": event.entry.name,
                        "bytes": bytes_of(event),
                        "flops": event.entry.flops,
                    },
                }
                for event in self.events
            ],
        }

    def save(self, path):
        """Write the trace."""
        path.write_text(json.dumps(self.trace()), encoding="utf-8")


def bytes_of(event):
    """Return the bytes that an entry reads and writes; of a data set, those of the images that it takes."""
    entry = event.entry
    if event.phase != "batch" or not entry.writes:
        return entry.nbytes
    rows = entry.writes[0].shape[0]
    taken = (t.nbytes * min(rows, t.shape[0]) // t.shape[0] if t.shape else t.nbytes for t in entry.reads)
    return sum(taken) + sum(t.nbytes for t in entry.writes)


def profile(config, steps=10):
    """Return the Report of `steps` training steps of a recipe, after some warm ones; nothing is written."""
    name, chosen = choose(config.train.backend)
    backend = named(name)
    dataset, notes = find_data(config)
    train, batch = dataset.train, config.train.batch
    outputs = len(dataset.classes) if train.labels is not None else train.values.shape[1]
    graph = build_graph(config, train.images.shape[1:], outputs)
    dataset = resident(config, dataset)
    mean, scale = build_normalisation(config, dataset)
    whole = max(len(train) // batch, 1) * batch  # no smaller batch at the end: all steps do the same
    dataset = replace(dataset, train=_first(train, whole))
    step = build_step(config, graph, build_source(config, "train", dataset, mean, scale), backend)
    if backend.graphs:
        notes.append("each entry is waited for here, which a normal step, one graph, does not: short ones look longer")
    with closing(step):
        walls, events = measure(step, steps, config.train.batches_an_update(step.batches))
    title = f"{config.run.name or config.model.name}: {chosen}, batch {batch}, {config.train.dtype}"
    title += f", {step.replicas} replicas" if step.replicas > 1 else ""
    return Report(title, events, steps, step.replicas, walls, ceilings(backend, step.types, step.replicas), notes)


def measure(step: Step, steps, accumulate=1):
    """Return (seconds of each of `steps` normal steps, Events of as many that are observed)."""
    walls, seen = [], Profile()
    for number in range(WARM + steps):
        start = time.perf_counter()
        step(accumulate)
        step.wait()
        walls += [time.perf_counter() - start] * (number >= WARM)
    with step.observed(seen):
        for _ in range(steps):
            step(accumulate)
    return walls, seen.events


def find_data(config):
    """Return (the recipe's DataSet, notes); random images of its sizes where it is not on this machine."""
    config = config.model_copy(deep=True)
    config.data.fallback = None
    if config.data.name in cifar.SETS:
        config.data.download = False
    try:
        return build_data(config), []
    except DataNotFound:
        dataset = outline(config)
    n = min(len(dataset.train), BATCHES * config.train.batch)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, *dataset.train.images.shape[1:]), np.uint8)
    labels = rng.integers(0, len(dataset.classes), n, np.int32)
    note = f"note: {config.data.name} is not here: random images of its size, {n:,} of them"
    return replace(dataset, train=Split(images, labels), validation=None, test=None), [note]


def _first(split, n):
    labels, values = (a if a is None else a[:n] for a in (split.labels, split.values))
    return Split(split.images[:n], labels, values)


def ceilings(backend, types, replicas):
    """Return the Ceilings of a backend: the largest copy and the fastest product, all replicas at once."""
    copy = product = 0.0
    for n in COPIES:
        seconds, nbytes, _ = _race(backend, types, replicas, _copy, n)
        copy = nbytes / seconds
        if seconds > LONG:
            break
    for n in PRODUCTS:
        seconds, _, flops = _race(backend, types, replicas, _product, n * n)
        product = max(product, flops / seconds)
        if seconds > LONG:
            break
    return Ceilings(copy, product)


def _race(backend, types, replicas, trace, n):
    """Run one traced entry in all replicas at once; return (seconds of the fastest run, bytes, FLOPs of all)."""
    arenas, seen = Arenas(backend, replicas), Profile()
    values = np.random.default_rng(0).normal(size=4099)
    for name, dtype in (("wide", types.wide), ("a", types.real), ("b", types.real), ("out", types.real)):
        arenas.declare(name, (n,), dtype, lambda: np.resize(values, n))

    def traced(key, replica):
        t = Trace(types, Share.of(replicas, replica, replicas), {}, arenas, training=False, engine="")
        t.barrier()
        trace(t, n)
        return t, None

    replay = Replay(backend, arenas, traced)
    replay.observers = (seen,)
    with closing(replay):
        for _ in range(1 + REPEATS):
            replay.run([("race",)])
    events = [event for event in seen.events if event.entry.kind != "barrier"]
    own = [[e.stop - e.start for e in events if e.replica == r] for r in range(replicas)]
    seconds = min(map(max, zip(*own, strict=True)))
    last = [event.entry for event in events[-replicas:]]
    return max(seconds, 1e-9), sum(e.nbytes for e in last), sum(e.flops for e in last)


def _copy(t, n):
    t.launch("cast_forward", t.arena("wide"), t.arena("out"), n)


def _product(t, n):
    side = round(n**0.5)
    t.matmul(*(t.arena(name).reshape(side, side) for name in ("a", "b", "out")))
