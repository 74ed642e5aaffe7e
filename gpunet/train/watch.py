"""Watching a training: statistics of chosen outputs, gradients and weights, as rows of the metrics.

    step = gpunet.Step(net, loss, sgd, batch=100, source=train, keep=watch.keeps(net, ["stage1.*"]))
    rows = Watch(step, ["stage1.*"]).step()         # one training step, and a row for each thing watched

Uses the public Step and nothing else. What is kept lies in memory of its own, so a watched plan is larger; the numbers
that are trained are the same, and without patterns nothing changes at all.
"""

import difflib
import fnmatch

import numpy as np

from gpunet.core.params import around
from gpunet.errors import GpunetError

# Two bins a decade from 1e-10 to 1e4 on either side of zero; one for what is nearer to it, zeros too.
_POSITIVE = [float(f"{10 ** (half / 2):.3g}") for half in range(-20, 9)]
EDGES = [*(-edge for edge in reversed(_POSITIVE)), *_POSITIVE]


class Watch:
    """What patterns match in the network of a Step that was made with `keep=keeps(graph, patterns)`."""

    def __init__(self, step, patterns):
        self.train_step = step
        self.names = matching(step.graph, patterns, step.backend.fuses)
        values = [name for name in self.names if name.endswith((":output", ":output_gradient"))]
        for name in values:
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in step.keep):
                raise GpunetError(f"watch: {name} is not kept; make the Step with keep=watch.keeps(graph, patterns)")
        trained = step.layouts["weights"].parameters
        self.values = values
        self.gradients = [n for n in self.names if n.endswith(":gradient") and n.rpartition(":")[0] in trained]
        self.weights = [n for n in self.names if n in trained]

    def step(self, accumulate=1):
        """Do one training step on the source, in its parts and to the same bits, and return its rows.

        {"split": "watch", "update", "name", mean, sd, zeros, smallest, largest, histogram}; see `summary`. Gradients
        are those of the mean loss, without loss scale and clipping; layers' values are those of the last of the
        `accumulate` batches. A weight, as it was before, has `ratio`: the norm of its change over its own.
        """
        step = self.train_step
        update = int(step.state["update"])
        for number in range(accumulate):
            if number:
                step.advance()
            step.gradient(accumulate=number > 0)
        found, before = self._read(), self._weights()
        step.update()
        step.advance()
        after = self._weights()
        for name, weight in before.items():
            change = np.linalg.norm((after[name] - weight).astype(np.float64))
            found[name] = summary(weight) | {"ratio": _number(change / max(np.linalg.norm(weight), 1e-30))}
        return [{"split": "watch", "update": update, "name": name} | about for name, about in found.items()]

    def _read(self):
        """Return {name: summary} of values and gradients, between gradient and update."""
        step = self.train_step
        unit = 1 / (max(step.losses()["count"], 1) * float(step.state["loss_scale"]))
        units = {name: unit if name.endswith("gradient") else 1 for name in (*self.values, *self.gradients)}
        return {name: summary(step.read(name), unit) for name, unit in units.items()}

    def _weights(self):
        weights = self.train_step.weights.copy()
        return {name: weights[name] for name in self.weights}


def keeps(graph, patterns):
    """Return the names that a Step is to keep so that patterns can be watched."""
    return tuple(name for name in matching(graph, patterns) if name.endswith((":output", ":output_gradient")))


def matching(graph, patterns, fused=False):
    """Return the names of a graph that patterns match, in its order; GpunetError for a pattern that matches none.

    There are "<layer>:output", "<layer>:output_gradient", "<weight>:gradient" and "<weight>". A pattern stands for what
    it matches whole, or without the colon's part, and for all inside a layer or block that it matches.
    """
    known = []
    for node in graph.nodes:
        known += [f"{node.path}:output", f"{node.path}:output_gradient"]
    for p in graph.parameters():
        known += [f"{p.name}:gradient", p.name] * p.trainable
    found = set()
    for pattern in patterns:
        names = {name for name in known if any(fnmatch.fnmatchcase(n, pattern) for n in _around(name))}
        if not names:
            every = list(dict.fromkeys(n for name in known for n in _around(name)))
            near = difflib.get_close_matches(pattern.strip(".*"), every, 3, 0.4) or every[:3]
            why = "; layers that this backend fuses have no values between them (gpunet summary --plan)" * fused
            raise GpunetError(f"watch: '{pattern}' matches nothing; nearest: {', '.join(near)}{why}")
        found |= names
    return [name for name in known if name in found]


def _around(name):
    """Return a name, it without what follows the colon, and the layers and blocks around that."""
    return dict.fromkeys([name, *around(name.partition(":")[0])])


def summary(array, unit=1):
    """Return what a row says of an array times `unit`; of its finite values, where there are others (`not_finite`).

    zeros is the share of exact zeros; histogram {"edges", "counts"}: the same EDGES always, with what lies beyond them
    counted in the bins at either end.
    """
    values = np.asarray(array, np.float32 if array.dtype.itemsize < 4 else array.dtype).reshape(-1) * unit
    finite = values[np.isfinite(values)]
    about = {"not_finite": values.size - finite.size} if finite.size < values.size else {}
    if not finite.size:
        return about
    counts, _ = np.histogram(finite.clip(EDGES[0], EDGES[-1]), EDGES)
    return about | {
        "mean": _number(finite.mean(dtype=np.float64)),
        "sd": _number(finite.std(dtype=np.float64)),
        "zeros": float((finite == 0).mean()),
        "smallest": _number(finite.min()),
        "largest": _number(finite.max()),
        "histogram": {"edges": EDGES, "counts": counts.tolist()},
    }


def _number(value):
    """Return a float of six digits: a row is for reading and drawing."""
    return float(f"{value:.6g}")
