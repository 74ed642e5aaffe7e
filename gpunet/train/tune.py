"""Measures every engine on every convolution of a recipe's network, and keeps which was fastest on this machine."""

import json
import statistics
import time
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from gpunet.backends import backend as named
from gpunet.backends import choose
from gpunet.core.arenas import Arenas
from gpunet.core.backend import ENGINES as NAMES
from gpunet.core.replay import Replay
from gpunet.core.trace import Share, Trace
from gpunet.errors import GpunetError
from gpunet.nn.conv import ENGINES
from gpunet.train.build import build_graph, build_source, build_step, outline, resident
from gpunet.train.checkpoint import write_whole
from gpunet.train.text import columns

ROUNDS = 7  # in each of which every engine is measured once; their median counts
SECONDS = 0.02  # of one measurement at least


@dataclass
class Found:
    """The layers of one geometry, their passes, {engine: seconds of all passes} and the engine used without a table."""

    layers: list
    geometry: object
    passes: set
    seconds: dict
    rule: str

    @property
    def best(self):
        """The fastest engine."""
        return min(self.seconds, key=self.seconds.get)

    def rows(self):
        """Return the texts of a table, a row an engine, the fastest first."""
        g, first = self.geometry, self.layers[0]
        layer = first if len(self.layers) == 1 else f"{first} and {len(self.layers) - 1} alike"
        what = f"{g.h} x {g.w} x {g.c} -> {g.outputs}, {g.kh} x {g.kw}" + f" / {g.stride_y}" * (g.stride_y > 1)
        rows = []
        for name, seconds in sorted(self.seconds.items(), key=lambda item: item[1]):
            speed, marks = len(self.passes) * g.flops / seconds / 1e9, []
            marks += ["chosen"] * (name == self.best) + ["the rule's"] * (name == self.rule)
            rows.append((layer, what, name, ", ".join(marks), f"{1e3 * seconds:.3f}", f"{speed:.1f}"))
            layer = what = ""
        return rows


@dataclass
class Tuning:
    """What was measured for one backend and type of numbers."""

    backend: object
    types: object
    found: list

    def __str__(self):
        rows = [row for found in self.found for row in found.rows()]
        return columns([("layer", "size", "engine", "", "ms", "GFLOP/s"), *rows], 4)

    def save(self):
        """Put the fastest engines into this machine's table, which "auto" reads from then on; return its path."""
        from gpunet.backends.numpy import engines

        path = engines.table_path(self.backend, self.types)
        table = engines.read_table(self.backend, self.types)
        table |= {engines.geometry_key(f.geometry): f.best for f in self.found}
        write_whole(path, json.dumps(table, indent=1, sort_keys=True).encode())
        return path


def tune(config, rounds=ROUNDS):
    """Return the Tuning of a recipe: one replica's share of a batch, all passes that its training does. Reads no image.

    One replica is measured alone. Raises GpunetError where there is nothing to choose.
    """
    from gpunet.backends.numpy import engines

    name, _ = choose(config.train.backend)
    if name != "numpy":
        raise GpunetError(f"tune: backend: expected numpy, which has several engines, got {name}; --backend numpy")
    backend, config = named(name), config.model_copy(deep=True)
    config.train.conv_engine = "blocked"
    dataset = resident(config, outline(config))
    graph = build_graph(config, dataset.train.images.shape[1:], len(dataset.classes))
    step = build_step(config, graph, build_source(config, "train", dataset, 0.0, 1.0), backend)
    groups = {}
    for entry in step.passes():
        g = entry.options["geometry"]
        found = groups.setdefault(engines.geometry_key(g), Found([], g, set(), {}, ""))
        found.passes.add(entry.name.partition("_")[2])
        if entry.path not in found.layers:
            found.layers.append(entry.path)
    if not groups:
        raise GpunetError(
            f"tune: expected a network with convolutions in float32 or float64 and one group, got none in "
            f"{config.model.name} ({config.train.dtype}): the rest is computed by unfold"
        )
    for found in groups.values():
        g = found.geometry
        found.rule = engines.choose(g, step.types, backend.numba)
        possible = [name for name in NAMES if engines.computes(name, g, step.types, backend.numba)]
        found.seconds = _race(backend, step.types, g, found.passes, possible, rounds)
    return Tuning(backend, step.types, list(groups.values()))


def _race(backend, types, g, passes, names, rounds):
    """Return {engine: median seconds of the passes}, measured in turns."""
    arenas, rng = Arenas(backend, 1), np.random.default_rng(0)
    shapes = {"x": (g.n, g.h, g.w, g.c), "y": (g.n, g.oh, g.ow, g.outputs), "w": (g.kh, g.kw, g.c, g.outputs)}
    for name, shape in shapes.items():
        arenas.declare(name, shape, types.real, lambda shape=shape: rng.normal(size=shape))
        arenas.declare(f"d{name}", shape, types.real, lambda shape=shape: rng.normal(size=shape))

    def traced(key, replica):
        t = Trace(types, Share(g.n, 0, g.n), {}, arenas, training=True, engine=key[0], parts=backend.parts)
        x, y, w, dx, dy, dw = (t.arena(name) for name in ("x", "y", "w", "dx", "dy", "dw"))
        engine, kept = ENGINES[key[0]], None
        if "forward" in passes:
            kept = engine.forward(t, g, x, w, None, y)
        if "backward_weight" in passes:
            engine.backward_weight(t, g, x, kept, dy, dw, 0)
        if "backward_input" in passes:
            engine.backward_input(t, g, dy, w, dx)
        return t, None

    replay, times = Replay(backend, arenas, traced), {name: [] for name in names}
    with closing(replay):
        for name in names * 2:  # the first run compiles and allocates
            replay.run([(name,)])
        for _ in range(rounds):
            for name, taken in times.items():
                count, started = 0, time.perf_counter()
                while (passed := time.perf_counter() - started) < SECONDS or not count:
                    replay.run([(name,)])
                    count += 1
                taken.append(passed / count)
    return {name: statistics.median(taken) for name, taken in times.items()}
