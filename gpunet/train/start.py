"""Fine-tuning: weights of another training by name and shape, layers that start fresh, weights that keep their values.

    report = start.load(graph, "runs/pretrained", freeze=["stem", "stage1.*"], replace=["head"])
    print(report)
    step = gpunet.Step(graph, ...)

A pattern stands for the weights whose name, or the name of a layer or block around them, it matches: "head" is all of
head, "stem.*" all below stem, "*.gamma" every gamma.
"""

import difflib
import fnmatch
from dataclasses import dataclass, field
from pathlib import Path

from gpunet.core.params import around
from gpunet.core.step import Step
from gpunet.data.preprocess import Preprocess
from gpunet.errors import GpunetError
from gpunet.train.checkpoint import Checkpoint
from gpunet.train.run import Run

MOST = 6  # names that a line of the report lists


def load(target, weights, *, replace=(), freeze=(), freeze_statistics=False):
    """Give a Graph, or a Step, the weights and statistics of a Checkpoint, file or run; return the Report of it.

    What has the same name and shape is taken, unless a pattern in `replace` matches it; all else starts as it would
    have. A graph's next Step starts so, and keeps what `freeze` matches as it is (see `freeze_weights`); a Step, which
    is what its graph was when it was made, takes values only. Optimizer state and counters are never taken. Raises
    GpunetError where nothing fits, and where a frozen weight would be one that starts fresh.
    """
    checkpoint = weights if isinstance(weights, Checkpoint) else find(weights)
    stepped = isinstance(target, Step)
    if stepped and (freeze or freeze_statistics):
        raise GpunetError("start: freeze: expected a graph, whose next Step keeps these weights, got a Step")
    graph = target.graph if stepped else target
    report = compare(graph, checkpoint, replace)
    unfit = sorted(set(matching(graph, freeze, "start: freeze")) & set(report.fresh))
    if unfit:
        raise GpunetError(f"start: freeze: {_listed(unfit, MOST)} would keep first values, which are random")
    report.frozen, report.still = freeze_weights(graph, freeze, freeze_statistics), freeze_statistics
    values = {**checkpoint.weights, **checkpoint.statistics}
    for p in graph.parameters():
        if p.name not in report.matched:
            continue
        if stepped:
            (target.weights if p.trainable else target.statistics)[p.name] = values[p.name]
        else:
            p.initial = lambda rng, shape, value=values[p.name]: value
    return report


def find(weights):
    """Return the Checkpoint of a file, or the best (else the last) one of a run: a directory, or its name in runs/."""
    if Path(weights).suffix == ".safetensors" or Path(weights).is_file():
        return Checkpoint.load(weights)
    return Run.open(weights).checkpoint()


def compare(graph, checkpoint, replace=()):
    """Return the Report of what `load` would take; nothing changes."""
    replaced = matching(graph, replace, "start: replace")
    given = {**checkpoint.weights, **checkpoint.statistics}
    epoch = checkpoint.about.get("epoch")
    report = Report(checkpoint.place + (f", epoch {epoch}" if isinstance(epoch, int) else ""))
    for p in graph.parameters():
        (report.weights if p.trainable else report.statistics)[p.name] = p.size
        if p.name in replaced:
            report.replaced.append(p.name)
        elif p.name not in given:
            report.missing.append(p.name)
        elif given[p.name].shape != p.shape:
            report.shapes[p.name] = given[p.name].shape, p.shape
        elif given[p.name].dtype.kind != "f":
            raise GpunetError(f"{checkpoint.place}: {p.name}: expected floats, got {given[p.name].dtype}")
        else:
            report.matched.append(p.name)
    report.foreign = [name for name in given if name not in report.weights and name not in report.statistics]
    if not any(name in report.weights for name in report.matched):
        raise GpunetError(
            f"{checkpoint.place}: no weight of it has a name and shape of the network's; it has "
            f"{_listed(list(checkpoint.weights), 3)}, the network {_listed(list(report.weights), 3)}"
        )
    return report


def freeze_weights(graph, patterns, statistics=False):
    """Make the weights that patterns match keep their values in every Step made from now on; return their names.

    They lie in memory that no kernel writes: no gradient, decay or momentum reaches them, and gradients that only they
    would need are not computed. A layer's running statistics go on following its batches, unless `statistics` is true
    and the patterns match them, too: then they stay, and training normalises by them as prediction does.
    """
    names = set(matching(graph, patterns, "start: freeze"))
    chosen = [p for p in graph.parameters() if p.trainable and p.name in names]
    if chosen and all(p in chosen or p.frozen for p in graph.parameters() if p.trainable):
        raise GpunetError(f"start: freeze: {', '.join(map(repr, patterns))}: leaves no weight to train")
    for node in graph.nodes if statistics else ():
        kept = [p for p in node.layer.parameters.values() if not p.trainable]
        if all(p.name in names for p in kept):  # one layer's belong together
            for p in kept:
                p.frozen = True
    for p in chosen:
        p.frozen = True
    return [p.name for p in chosen]


def matching(graph, patterns, place):
    """Return the names of parameters that patterns match; GpunetError with the nearest names for one without any."""
    weights = {p.name: p.trainable for p in graph.parameters()}
    found = set()
    for pattern in patterns:
        names = {name for name in weights if any(fnmatch.fnmatchcase(n, pattern) for n in around(name))}
        if not any(weights[name] for name in names):
            known = dict.fromkeys(n for name in weights if weights[name] for n in around(name))
            near = sorted(known, key=lambda name: _likeness(pattern.rstrip(".*"), name))[-3:]
            raise GpunetError(f"{place}: '{pattern}' matches no weight; nearest: {', '.join(near[::-1])}")
        found |= names
    return [name for name in weights if name in found]


def begin(config, graph, found=()):
    """Do what [start] of a recipe says to a graph; return the Report, or None where it says nothing.

    found: weights whose first values come from the images, which may be frozen without another training's, too.
    """
    start = config.start
    if start.weights is None:
        allowed = bool(start.freeze) and set(matching(graph, start.freeze, "start: freeze")) <= set(found)
        for key in ("freeze", "replace", "freeze_statistics"):
            if getattr(start, key) and not (key == "freeze" and allowed):
                raise GpunetError(f"[start]: {key}: expected beside weights, the run or checkpoint file to start from")
        return None
    report = load(
        graph,
        start.weights,
        replace=start.replace,
        freeze=start.freeze,
        freeze_statistics=start.freeze_statistics,
    )
    report.normalisation = start.normalisation
    return report


def preprocess(config):
    """Return the Preprocess of the checkpoint that [start] names; [preprocess] has to have the same stages."""
    checkpoint = _with_images(config)
    found = Preprocess.from_arrays(checkpoint.input)
    stages = found.gcn is not None, found.whitening.kind if found.whitening else "none"
    if stages != (said := (bool(config.preprocess.gcn), config.preprocess.whiten)):
        raise GpunetError(
            f"[preprocess]: expected gcn and whiten as in {checkpoint.place}, whose images [start] normalisation takes "
            f"over: {stages[0]} and '{stages[1]}'; got {said[0]} and '{said[1]}'"
        )
    return found


def normalisation(config):
    """Return (mean, scale) of the checkpoint that [start] names."""
    checkpoint = _with_images(config)
    return checkpoint.input["mean"], checkpoint.input["scale"]


def _with_images(config):
    """Return the checkpoint that [start] names, which has to say what its images went through."""
    if config.start.weights is None:
        raise GpunetError("[start]: normalisation: expected beside weights, the run or checkpoint file to start from")
    checkpoint = find(config.start.weights)
    if not {"mean", "scale"} <= checkpoint.input.keys():
        raise GpunetError(f"{checkpoint.place}: expected mean and scale of its images, which it has not")
    return checkpoint


@dataclass
class Report:
    """What of a file a network has taken: names by what became of them. weights, statistics: the network's sizes."""

    place: str
    weights: dict = field(default_factory=dict)
    statistics: dict = field(default_factory=dict)
    matched: list = field(default_factory=list)
    shapes: dict = field(default_factory=dict)  # name: (in the file, in the network)
    foreign: list = field(default_factory=list)  # only in the file
    missing: list = field(default_factory=list)  # only in the network
    replaced: list = field(default_factory=list)
    frozen: list = field(default_factory=list)
    still: bool = False  # statistics of frozen layers, too
    normalisation: str | None = None

    @property
    def fresh(self):
        """Names of weights that start as they would without the file."""
        taken = set(self.matched)
        return [name for name in self.weights if name not in taken]

    def __str__(self):
        everything = [*self.weights, *self.statistics]
        of = {kind: [n for n in self.matched if n in getattr(self, kind)] for kind in ("weights", "statistics")}
        counts = [f"{len(names)} of {len(getattr(self, kind))} {kind}" for kind, names in of.items()]
        shapes = [f"{name} {there} -> {here}" for name, (there, here) in self.shapes.items()]
        lines = {
            "matched": f"{' and '.join(counts)}: {_folded(self.matched, everything)}",
            "other shape": shapes and f"{len(shapes)}: {_listed(shapes, MOST)}",
            "only in the file": self.foreign and f"{len(self.foreign)}: {_folded(self.foreign, self.foreign)}",
            "starts fresh": self.fresh and f"{len(self.fresh)} weights: {_folded(self.fresh, [*self.weights])}",
            "frozen": self.frozen and self._frozen(),
            "normalisation": self.normalisation
            and {"data": "mean and scale of the new data", "checkpoint": "mean and scale of the file"}[
                self.normalisation
            ],
        }
        return "\n".join([f"start: {self.place}", *(f"  {k:<18}{v}" for k, v in lines.items() if v)])

    def _frozen(self):
        numbers = sum(self.weights[name] for name in self.frozen)
        text = f"{len(self.frozen)} weights, {numbers:,} numbers: {_folded(self.frozen, [*self.weights])}"
        return text + ("; running statistics " + ("stay" if self.still else "move on")) * bool(self.statistics)


def _likeness(pattern, name):
    """Return how like a pattern a name is, or its last part, for who forgot what is around it: 0 to 1."""
    parts = name, name.rpartition(".")[2]
    return max(difflib.SequenceMatcher(None, pattern, part).ratio() for part in parts)


def _folded(names, everything):
    """Return names as text, the largest layer or block in the place of all that are below it."""
    missing = {outer for name in set(everything) - set(names) for outer in around(name)}
    outer = [next((n for n in around(name)[::-1] if n not in missing), name) for name in names]
    return _listed(list(dict.fromkeys(outer)), MOST)


def _listed(names, most):
    """Return the first names as text, and how many more there are; a file's may hold anything."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(shown) or "none") + more
