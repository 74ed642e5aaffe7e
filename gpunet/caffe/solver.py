"""A Caffe solver as the sections of a recipe: update rule, learning-rate policy, lengths."""

import inspect
import re
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

from gpunet.caffe.net import Net
from gpunet.caffe.schema import FLAG, MESSAGE, NUMBER, TEXT, WHOLE, Values, shown
from gpunet.errors import GpunetError
from gpunet.optim import OPTIMIZERS
from gpunet.optim.schedules import SCHEDULES

MODES, FORMATS = ("CPU", "GPU"), ("HDF5", "BINARYPROTO")
OLD_TYPES = {"SGD": "SGD", "NESTEROV": "Nesterov", "ADAGRAD": "AdaGrad", "RMSPROP": "RMSProp", "ADADELTA": "AdaDelta",
             "ADAM": "Adam"}  # fmt: skip
IGNORED = {  # what to show, where to compute, how to store: gpunet has its own ways
    "display": WHOLE, "average_loss": WHOLE, "test_iter": [WHOLE], "test_initialization": FLAG,
    "test_compute_loss": FLAG, "snapshot_format": FORMATS, "snapshot_after_train": FLAG, "solver_mode": MODES,
    "device_id": WHOLE, "debug_info": FLAG, "layer_wise_reduce": FLAG,
}  # fmt: skip
SOLVER = {
    "net": TEXT, "train_net": TEXT, "test_net": [TEXT], "net_param": MESSAGE, "train_net_param": MESSAGE,
    "type": TEXT, "solver_type": tuple(OLD_TYPES), "base_lr": NUMBER, "momentum": NUMBER, "momentum2": NUMBER,
    "delta": NUMBER, "rms_decay": NUMBER, "weight_decay": NUMBER, "regularization_type": TEXT,
    "clip_gradients": NUMBER, "lr_policy": TEXT, "gamma": NUMBER, "power": NUMBER, "stepsize": WHOLE,
    "stepvalue": [WHOLE], "max_iter": WHOLE, "iter_size": WHOLE, "test_interval": WHOLE, "random_seed": WHOLE,
    "snapshot": WHOLE, "snapshot_prefix": TEXT, "snapshot_diff": FLAG, **IGNORED,
}  # fmt: skip
# Policies: gpunet's schedule, and {its argument: the solver's field}; of two names the one that it has.
POLICIES = {
    "fixed": ("const", {}),
    "step": ("step", {"size": "stepsize", "gamma": "gamma"}),
    "multistep": ("multistep", {"milestones": "stepvalue", "gamma": "gamma"}),
    "exp": ("exp", {"gamma": "gamma"}),
    "inv": ("inverse", {"gamma": "gamma", "power": "power"}),
    "poly": ("poly", {"power": "power"}),
    "sigmoid": ("sigmoid", {"gamma": "gamma", "size": "stepsize"}),
}
# Update rules: gpunet's optimizer, fixed arguments, and {solver's field: (Caffe's default, names it may have here)}.
MOMENTUM = {"momentum": (0.0, ("momentum",))}
RULES = {
    "SGD": ("sgd", {"form": "caffe"}, MOMENTUM),
    "Nesterov": ("sgd", {"form": "caffe", "nesterov": True}, MOMENTUM),
    "AdaGrad": ("adagrad", {}, {"delta": (1e-8, ("eps",))}),
    "RMSProp": ("rmsprop", {}, {"rms_decay": (0.99, ("decay", "rho", "alpha")), "delta": (1e-8, ("eps",))}),
    "AdaDelta": ("adadelta", {}, {"momentum": (0.0, ("rho", "decay")), "delta": (1e-8, ("eps",))}),
    "Adam": ("adam", {}, {
        "momentum": (0.0, ("beta1",)), "momentum2": (0.999, ("beta2",)), "delta": (1e-8, ("eps",)),
    }),
}  # fmt: skip
IMAGES = {"cifar10": 50_000, "cifar100": 50_000}  # of training, so that updates an epoch are known


@dataclass
class Stage:
    """One solver: the sections that it comes to, and what a later stage of the same training may change."""

    tables: dict
    place: str
    fixed: bool  # lr_policy: "fixed"
    rate: Decimal  # base_lr as it was written
    steps: int
    notes: list = field(default_factory=list)


def solver_values(message):
    """Return the Values of a message of type SolverParameter."""
    values = Values(message, SOLVER)
    for name in ("net_param", "train_net_param"):
        if name in values:
            values.fail(f"{name}: expected net: a file", name)
    return values


def net_path(values):
    """Return (field, path) of the net to train."""
    given = [name for name in ("net", "train_net") if name in values]
    if len(given) != 1:
        values.fail(f"expected one of net and train_net, got {' and '.join(given) or 'none'}", *given[1:])
    return given[0], values.get(given[0])


def read_stage(values, net: Net, name):
    """Return the Stage of a solver and its net; name: of the run where the solver has no snapshot_prefix."""
    lr, steps = values.get("base_lr"), values.get("max_iter")
    if lr is None or lr <= 0:
        values.fail(f"base_lr: expected a number above 0, got {'none' if lr is None else lr}", "base_lr")
    if steps is None or steps < 1:
        values.fail(f"max_iter: expected at least 1, got {'none' if steps is None else steps}", "max_iter")
    accumulate = values.get("iter_size", 1)
    if accumulate < 1:
        values.fail(f"iter_size: expected at least 1, got {accumulate}", "iter_size")
    notes = list(net.notes)
    train = {"steps": steps, "batch": net.batch}
    if accumulate > 1:
        train["accumulate"] = accumulate
    if (seed := values.get("random_seed", -1)) >= 0:
        train["seed"] = seed
    train |= {"order": "shuffled" if net.shuffle else "stored", **_tests(values, net, accumulate, notes)}
    run = {"name": _run_name(values, name)}
    if values.get("snapshot", 0) > 0:
        run["checkpoint_steps"] = values.get("snapshot")
    tables = {
        "model": {"name": "layers", "layers": net.layers},
        "data": net.data,
        "preprocess": {key: net.images[key] for key in ("mean", "scale")},
        "augment": {"flip": True} if net.images["flip"] else {},
        "optimizer": _optimizer(values, float(lr), accumulate),
        "schedule": _schedule(values),
        "train": train,
        "run": run,
    }
    return Stage(tables, values.place, values.get("lr_policy") == "fixed", Decimal(repr(lr)), steps, notes)


def join(stages):
    """Return (tables, notes) of stages that go on one from the other, as solver_lr1 from solver: one run of all."""
    first, *others = stages
    if not others:
        return first.tables, first.notes
    factor = others[0].rate / first.rate
    for before, stage in pairwise(stages):
        if problem := _broken(before, stage, factor):
            raise GpunetError(f"{stage.place}: {problem}")
    milestones = [stage.steps for stage in stages[:-1]]
    schedule = {"name": "multistep", "milestones": milestones, "gamma": float(factor), "unit": "steps"}
    train = {**first.tables["train"], "steps": others[-1].steps}
    return {**first.tables, "schedule": schedule, "train": train}, first.notes


def _broken(before, stage, factor):
    """Return why a stage does not go on from the one before it, or None."""
    if not (before.fixed and stage.fixed):
        return 'expected lr_policy: "fixed" in each stage'
    if stage.steps <= before.steps:
        return f"max_iter: expected more than {before.steps:,} of the stage before it, got {stage.steps:,}"
    if stage.rate != before.rate * factor:
        return f"base_lr: expected {before.rate * factor:f}, {factor} times the stage before it, got {stage.rate:f}"
    for section in before.tables:
        ours, theirs = (_shared(s.tables[section]) for s in (before, stage))
        if ours != theirs:
            return f"expected [{section}] of {before.place}, {ours}, got {theirs}"
    return None


def _shared(table):
    """Return what two stages have to have in common of a section."""
    return {key: value for key, value in table.items() if key not in ("lr", "steps", "checkpoint_steps")}


def _optimizer(values, lr, accumulate):
    kind = OLD_TYPES[values.get("solver_type")] if "solver_type" in values else values.get("type", "SGD")
    where = "solver_type" if "solver_type" in values else "type"
    by_case = {name.lower(): name for name in RULES}
    if kind.lower() not in by_case:
        values.fail(f"type: unknown solver {shown(kind)}; known: {', '.join(RULES)}", where)
    name, fixed, fields = RULES[by_case[kind.lower()]]
    if name not in OPTIMIZERS:
        values.fail(f"type: {kind}: gpunet has no optimizer '{name}'; it has {', '.join(OPTIMIZERS)}", where)
    values.only("regularization_type", "L2")
    known = inspect.signature(OPTIMIZERS[name]).parameters
    found = {"name": name, "lr": lr}
    for given, (default, names) in fields.items():
        here = next((n for n in names if n in known), None)
        value = float(values.get(given, default))
        if here:
            found[here] = value
        elif given in values:
            values.fail(f"{given}: gpunet's '{name}' has none", given)
    for given in ("momentum", "momentum2", "rms_decay", "delta"):
        if values.get(given) and given not in fields:
            values.fail(f"{given}: expected none beside type {kind}", given)
    if values.get("weight_decay", 0):
        found["weight_decay"] = float(values.get("weight_decay"))
    if values.get("clip_gradients", -1) > 0:
        found["clip"] = values.get("clip_gradients") / accumulate  # Caffe cuts the sum of the batches, gpunet the mean
    return found | fixed


def _schedule(values):
    """Return [schedule] of lr_policy."""
    policy = values.get("lr_policy")
    if policy not in POLICIES:
        got = "none" if policy is None else shown(policy)
        values.fail(f"lr_policy: expected one of {', '.join(POLICIES)}, got {got}", "lr_policy")
    name, arguments = POLICIES[policy]
    if name not in SCHEDULES:
        values.fail(f"lr_policy: {policy}: gpunet has no schedule '{name}'; it has {', '.join(SCHEDULES)}", "lr_policy")
    known, found = inspect.signature(SCHEDULES[name]).parameters, {"name": name}
    for argument, given in arguments.items():
        if given not in values:
            values.fail(f"{given}: is missing, lr_policy {shown(policy)} needs it", "lr_policy")
        here = argument if argument in known else given
        found[here] = values.all(given) if argument == "milestones" else values.get(given)
    return found | ({"unit": "steps"} if "unit" in known and arguments else {})


def _tests(values, net, accumulate, notes):
    """Return when the test split is measured."""
    every = values.get("test_interval", 0)
    if not net.tests or every < 1:
        return {}
    images = IMAGES.get(net.data["name"])
    if images is None:
        notes.append(f"test_interval: {every} updates are not known in epochs here; the test split comes after each")
        return {"monitor_test": True}
    epochs = every * accumulate * net.batch / images
    if epochs != int(epochs):
        notes.append(f"test_interval: {every} updates are {epochs:.4g} epochs, rounded to whole ones")
    return {"monitor_test": True, "evaluate_every": max(1, round(epochs))}


def _run_name(values, name):
    """Return the last part of snapshot_prefix, as a folder may be called."""
    prefix = re.split(r"[/\\]", values.get("snapshot_prefix", ""))[-1]
    return re.sub(r"[^\w.-]", "_", prefix).strip(".")[:100] or Path(name).stem
