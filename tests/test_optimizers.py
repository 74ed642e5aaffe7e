"""Every update rule: against PyTorch, against straight lines, on two backends, over replicas, around faults."""

import inspect
import platform
import re
import shutil
from contextlib import closing
from dataclasses import fields

import numpy as np
import pytest
from golden.make_optimizers import BATCH, CLASSES, FOLDER, HIDDEN, INPUTS, RULES, SHAPES, STEPS, batch, first
from small_run import Killed, halves, last_run, left, new, on, recipe, stop_after

from gpunet import data, nn, optim
from gpunet.backends.emulator import Backend as Emulator
from gpunet.backends.numpy import Backend as NumPy
from gpunet.core.source import Source
from gpunet.core.step import METRICS, Step
from gpunet.errors import GpunetError
from gpunet.testing.tolerance import assert_close
from gpunet.train import Checkpoint, Trainer, parse_config
from gpunet.train.build import build_graph, build_step
from gpunet.train.config import to_toml

needs_emulator = pytest.mark.skipif(
    not shutil.which("g++") or platform.machine() != "x86_64", reason="the emulator: needs g++ on x86-64"
)


# PyTorch


def mlp():
    """The network of the golden values, with its first weights."""
    image = nn.Input((1, 1, INPUTS))
    layers = nn.Linear(HIDDEN, name="one"), nn.Tanh(), nn.Linear(CLASSES, name="two")
    graph = nn.Graph(image, nn.Sequential(nn.Flatten(), *layers, name="net")(image))
    for p in graph.parameters():
        p.initial = lambda rng, shape, name=p.name: first(name)
    return graph


def mlp_step(optimizer, dtype="float64", **options):
    options = {"batch": BATCH, "dtype": dtype, "replicas": 1} | options
    return Step(mlp(), nn.SoftmaxCrossEntropy(), optimizer, **options)


def feed(step, number):
    """Compute the gradient of one of the golden batches."""
    x, labels = batch(number)
    step.gradient(x.reshape(-1, 1, 1, INPUTS), labels)


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "optimizers.npz") as file:
        return dict(file)


@pytest.mark.parametrize(("replicas", "fast"), [(1, True), (1, False), (3, True)])
@pytest.mark.parametrize("case", RULES)
def test_fifty_updates_are_pytorchs(case, replicas, fast, golden):
    name, settings, _, _ = RULES[case]
    with closing(mlp_step(optim.OPTIMIZERS[name](**settings), replicas=replicas, backend=NumPy(fast))) as step:
        losses = []
        for number in range(STEPS):
            feed(step, number)
            losses.append(step.losses()["loss"])
            step.update()
        np.testing.assert_allclose(losses, golden[f"{case}/losses"], rtol=0, atol=1e-10)
        for key in SHAPES:
            np.testing.assert_allclose(step.weights[key], golden[f"{case}/{key}"], rtol=0, atol=1e-10, err_msg=key)
            if name == "asgd":
                average = step.optimizer_state["average"][key]
                np.testing.assert_allclose(average, golden[f"{case}/average {key}"], rtol=0, atol=1e-10)


def test_the_golden_trainings_are_far_from_each_other_and_from_the_start(golden):
    """So that agreement says something."""
    for case in RULES:
        losses = golden[f"{case}/losses"]
        assert losses[-3:].mean() < 0.99 * losses[:3].mean(), case
    ends = np.array([golden[f"{case}/net.one.weight"].ravel() for case in RULES])
    apart = np.abs(ends[:, None] - ends).max(axis=-1) + np.eye(len(ends))
    assert apart.min() > 1e-5


# Straight lines, by the gradients that the step has


SHAPE, COUNT = (4, 4, 2), 6


def network():
    """Matrices of two shapes and a kernel, vectors, a bias with a rate of its own that does not decay."""
    image = nn.Input(SHAPE)
    conv = nn.Conv2d(4, 3, bias_rate=2.0, bias_decay=0.0, name="conv")
    layers = conv, nn.ReLU(), nn.BatchNorm(name="norm"), nn.Flatten(), nn.Linear(5, name="hidden"), nn.Tanh()
    return nn.Graph(image, nn.Sequential(*layers, nn.Linear(3, bias=False, name="head"), name="net")(image))


def pictures(n=COUNT, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, *SHAPE)), rng.integers(0, 3, n)


def step_of(optimizer, graph=None, dtype="float64", **options):
    options = {"batch": COUNT, "replicas": 1} | options
    return Step(graph or network(), nn.SoftmaxCrossEntropy(), optimizer, dtype=dtype, **options)


STRAIGHT = {}


def straight(*cases):
    """Enter a function(optimizer, w, d, lr, k, t) -> new w: d mean gradient, k a dict of its own, t update from 1."""

    def enter(function):
        STRAIGHT.update({name: (function, rule) for name, rule in cases})
        return function

    return enter


def unit(d, settings, w, decay):
    """Return what a rule takes for a gradient: with L2 unless decoupled."""
    return d if settings.decoupled else d + settings.weight_decay * decay * w


@straight(
    ("sgd decoupled", optim.SGD(0.1, 0.9, 0.1, decoupled=True)),
    ("sgd caffe decoupled", optim.SGD(0.1, 0.9, 0.1, form="caffe", decoupled=True)),
    ("sgd clipped", optim.SGD(0.1, 0.9, 0.01, l1=0.02, clip=0.3, clip_value=0.04)),
    ("sgd clipped by value", optim.SGD(0.1, 0.9, clip_value=0.04)),
    ("sgd max norm", optim.SGD(0.1, 0.9, 0.01, max_norm=0.6)),
)
def _(s, w, d, lr, k, t):
    lr_now = lr if s.form == "caffe" else 1
    k["v"] = s.momentum * k.get("v", 0) + lr_now * d
    return w - (1 if s.form == "caffe" else lr) * k["v"]


@straight(("signsgd", optim.SignSGD(weight_decay=0.1)), ("signsgd plain", optim.SignSGD(momentum=0.0)))
def _(s, w, d, lr, k, t):
    k["v"] = s.momentum * k.get("v", 0) + (1 - s.momentum) * d
    return w - lr * np.sign(k["v"])


@straight(("lion", optim.Lion(lr=0.01, weight_decay=0.5)), ("lion l2", optim.Lion(decoupled=False)))
def _(s, w, d, lr, k, t):
    m = k.get("m", 0)
    k["m"] = s.beta2 * m + (1 - s.beta2) * d
    return w - lr * np.sign(s.beta1 * m + (1 - s.beta1) * d)


@straight(
    ("windowed_adagrad", optim.WindowedAdagrad(window=3, weight_decay=0.1)),
    ("windowed_adagrad of one", optim.WindowedAdagrad(window=1, decoupled=True, weight_decay=0.1)),
)
def _(s, w, d, lr, k, t):
    k.setdefault("seen", []).append(d**2)
    return w - lr * d / (np.sqrt(sum(k["seen"][-s.window :])) + s.eps)


@straight(("rmsprop inside", optim.RMSProp(inside=True, alpha=0.9, eps=1e-4, weight_decay=0.1)))
def _(s, w, d, lr, k, t):
    """The lecture's second AdaDelta."""
    k["beta"] = s.alpha * k.get("beta", 0) + (1 - s.alpha) * d**2
    return w - lr / np.sqrt(k["beta"] + s.eps) * d


@straight(("natural_gradient", optim.NaturalGradient(weight_decay=0.1)))
def _(s, w, d, lr, k, t):
    k.setdefault("seen", []).append(COUNT * d**2)
    shares = s.rho ** np.arange(t)[::-1]
    fisher = sum(f * share for f, share in zip(k["seen"], shares, strict=True)) / shares.sum()
    return w - lr * d / (fisher + s.damping)


@straight(("lars", optim.LARS(weight_decay=0.1)), ("lars max norm", optim.LARS(lr=3.0, max_norm=0.5)))
def _(s, w, d, lr, k, t):
    decay = 1  # of matrices; the bias that does not decay is a vector
    length, pull = np.linalg.norm(w), np.linalg.norm(d - s.weight_decay * decay * w)
    local = s.trust * length / (pull + s.weight_decay * length) if w.ndim > 1 else 1
    k["v"] = s.momentum * k.get("v", 0) + local * lr * d
    return w - k["v"]


def orthogonal(d, steps=5):
    """Five quintics, in the form of the paper: on the wide side, from the left."""
    x = d.reshape(-1, d.shape[-1]) / np.linalg.norm(d)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return (x if x.shape == d.reshape(-1, d.shape[-1]).shape else x.T).reshape(d.shape)


@straight(
    ("muon", optim.Muon(weight_decay=0.1)),
    ("muon sgd", optim.Muon(rest="sgd", nesterov=False, rest_rate=0.5)),
    ("muon airbench", optim.Muon(lr=0.24, momentum=0.6, normalize=True, steps=3, rest="sgd", weight_decay=0.0)),
    ("muon but the head", optim.Muon(exclude=["net.head"])),
)
def _(s, w, d, lr, k, t):
    if w.ndim > 1 and not (s.exclude and w.shape == (5, 3)):
        k["v"] = s.momentum * k.get("v", 0) + d
        u = orthogonal(d + s.momentum * k["v"] if s.nesterov else k["v"], s.steps)
        columns, rows = w.shape[-1], w.size // w.shape[-1]
        if s.normalize:
            return w / np.linalg.norm(w) * np.sqrt(columns) - lr * u
        return w - lr * max(1, columns / rows) ** 0.5 * u
    lr = lr * s.rest_rate
    if s.rest == "sgd":
        k["v"] = s.rest_momentum * k.get("v", 0) + d
        return w - lr * (d + s.rest_momentum * k["v"] if s.nesterov else k["v"])
    k["m"] = s.beta1 * k.get("m", 0) + (1 - s.beta1) * d
    k["s"] = s.beta2 * k.get("s", 0) + (1 - s.beta2) * d**2
    return w - lr * k["m"] / (1 - s.beta1**t) / (np.sqrt(k["s"] / (1 - s.beta2**t)) + s.eps)


def walk(s, rule, w, gradients, state, t, rates):
    """Return the weights after one update, all around the rule included."""
    norm = np.sqrt(sum(np.square(g).sum() for g in gradients.values()))
    after = {}
    for name, g in gradients.items():
        bias, x = name == "net.conv.bias", w[name]
        lr, decay = rates[min(t, len(rates)) - 1] * (2 if bias else 1), 0 if bias else 1
        d = g * min(1, s.clip / norm) if s.clip else g
        d = np.clip(d, -s.clip_value, s.clip_value) if s.clip_value else d
        d = d + s.l1 * decay * np.sign(x)
        if s.decoupled:
            rest = getattr(s, "rest_rate", 1) if x.ndim == 1 or (getattr(s, "exclude", ()) and "head" in name) else 1
            x = x * (1 - lr * rest * s.weight_decay * decay)
        else:
            d = d + s.weight_decay * decay * x
        x = rule(s, x, d, lr, state.setdefault(name, {}), t)
        if s.max_norm and x.ndim > 1:
            norms = np.sqrt(np.square(x.reshape(-1, x.shape[-1])).sum(axis=0))
            x = x * np.minimum(1, s.max_norm / norms)
        after[name] = x
    return after


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("case", STRAIGHT)
def test_rules_that_pytorch_has_not_are_straight_lines(case, replicas):
    """Rates that change, a bias with a rate and decay of its own, and sums over layers that replicas cut."""
    rule, s = STRAIGHT[case]
    rates, state = [s.lr, s.lr / 2, s.lr / 2, s.lr / 3], {}
    with closing(step_of(s, rates=rates, replicas=replicas)) as step:
        w = dict(step.weights)
        for t in range(1, 9):
            step.gradient(*pictures(seed=t % 3))
            gradients = {name: step.read(f"{name}:gradient") / COUNT for name in w}
            w = walk(s, rule, w, gradients, state, t, rates)
            step.update()
            for name, value in w.items():
                np.testing.assert_allclose(step.weights[name], value, rtol=1e-9, atol=1e-11, err_msg=f"{t}: {name}")


def test_clips_and_limits_bite_in_these_cases():
    """What never comes into force is not tested."""
    with closing(step_of(optim.SGD(0.0))) as step:
        step.gradient(*pictures())
        gradients = [step.read(f"{name}:gradient") / COUNT for name in step.weights]
        assert np.sqrt(sum(np.square(g).sum() for g in gradients)) > 0.3 * 1.5
        assert max(np.abs(g).max() for g in gradients) * 0.5 > 0.04
        matrices = [w.reshape(-1, w.shape[-1]) for w in step.weights.values() if w.ndim > 1]
        assert all((np.linalg.norm(m, axis=0) > 0.6).any() for m in matrices)


def test_newton_schulz_leaves_singular_values_about_one():
    """In every shape, as Muon's momentum goes in: that of a gradient, with singular values far apart."""
    rng = np.random.default_rng(0)
    image = nn.Input((1, 1, 12))
    layers = nn.Linear(40, name="up"), nn.Tanh(), nn.Linear(6, name="down"), nn.Linear(6, name="square")
    graph = nn.Graph(image, nn.Sequential(nn.Flatten(), *layers, name="net")(image))
    s = optim.Muon(lr=1.0, weight_decay=0.0, steps=6)
    with closing(Step(graph, nn.SoftmaxCrossEntropy(), s, batch=32, dtype="float64", replicas=1)) as step:
        before = dict(step.weights)
        step.gradient(rng.normal(size=(32, 1, 1, 12)), rng.integers(0, 6, 32))
        step.update()
        for name, w in before.items():
            if w.ndim > 1:
                moved = (w - step.weights[name]) / max(1, w.shape[1] / w.shape[0]) ** 0.5
                values = np.linalg.svd(moved, compute_uv=False)
                assert np.median(values) > 0.6 and values.max() < 1.3, name


# SAM and vSGD: gradients of the small network by hand


def mlp_gradient(w, number):
    """Return (mean loss, mean gradients) of the golden network on a batch, in straight NumPy."""
    x, labels = batch(number)
    hidden = np.tanh(x @ w["net.one.weight"] + w["net.one.bias"])
    logits = hidden @ w["net.two.weight"] + w["net.two.bias"]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(BATCH), labels]).mean()
    dy = (p - np.eye(CLASSES)[labels]) / BATCH
    dh = dy @ w["net.two.weight"].T * (1 - hidden**2)
    return loss, {
        "net.one.weight": x.T @ dh,
        "net.one.bias": dh.sum(axis=0),
        "net.two.weight": hidden.T @ dy,
        "net.two.bias": dy.sum(axis=0),
    }


@pytest.mark.parametrize("replicas", [1, 3, 5])
def test_sam_takes_the_gradient_up_the_hill(replicas):
    s = optim.SGD(0.2, 0.9, 0.01, sam=0.3)
    w, v = {name: first(name) for name in SHAPES}, dict.fromkeys(SHAPES, 0)
    with closing(mlp_step(s, replicas=replicas)) as step:
        for number in range(8):
            feed(step, number)
            loss, g = mlp_gradient(w, number)
            norm = np.sqrt(sum(np.square(d).sum() for d in g.values()))
            _, up = mlp_gradient({name: w[name] + 0.3 * g[name] / norm for name in w}, number)
            assert step.losses()["loss"] == pytest.approx(loss, rel=1e-10)
            for name in w:
                np.testing.assert_allclose(step.read(f"{name}:gradient") / BATCH, up[name], rtol=1e-9, atol=1e-12)
                v[name] = 0.9 * v[name] + up[name] + 0.01 * w[name]
                w[name] = w[name] - 0.2 * v[name]
            step.update()
            for name in w:
                np.testing.assert_allclose(step.weights[name], w[name], rtol=1e-9, atol=1e-11)
        assert np.abs(up["net.one.weight"] - g["net.one.weight"]).max() > 1e-3


def test_sam_keeps_statistics_and_tensors_of_the_first_gradient():
    """And draws the same masks in both: what dropout leaves out has no gradient at all."""
    image = nn.Input(SHAPE)
    layers = nn.Conv2d(4, 3, name="conv"), nn.BatchNorm(name="norm"), nn.Flatten(), nn.Dropout(0.5, name="drop")
    graph = nn.Graph(image, nn.Sequential(*layers, nn.Linear(3, name="head"), name="net")(image))
    left = []
    for sam in (0.0, 0.5):
        with closing(step_of(optim.SGD(0.1, sam=sam), graph, keep=("*:output",))) as step:
            step.gradient(*pictures())
            left.append({name: step.read(name) for name in ("net.conv:output", "net.drop:output", "prediction")})
            gradient = step.read("net.head.weight:gradient")
            dropped = (left[-1]["net.drop:output"] == 0).all(axis=0)
            assert (gradient[dropped] == 0).all() and (gradient[~dropped] != 0).all()
            step.update()
            left[-1] |= dict(step.statistics)
    for name, value in left[0].items():
        np.testing.assert_array_equal(left[1][name], value, err_msg=name)


def test_sam_adds_up_over_batches():
    """Each batch climbs by its own gradient; the update takes the sum."""
    w = {name: first(name) for name in SHAPES}
    with closing(mlp_step(optim.SGD(0.2, 0.0, sam=0.3), replicas=2)) as step:
        total = dict.fromkeys(SHAPES, 0)
        for number in range(3):
            x, labels = batch(number)
            step.gradient(x.reshape(-1, 1, 1, INPUTS), labels, accumulate=number > 0)
            _, g = mlp_gradient(w, number)
            norm = np.sqrt(sum(np.square(d).sum() for d in g.values()))
            _, up = mlp_gradient({name: w[name] + 0.3 * g[name] / norm for name in w}, number)
            total = {name: total[name] + up[name] / 3 for name in w}
        step.update()
        for name in w:
            np.testing.assert_allclose(step.weights[name], w[name] - 0.2 * total[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("scope", ["weight", "layer", "all"])
def test_vsgd_finds_its_rates(scope, replicas):
    s = optim.VSGD(scope=scope, caution=2.0, floor=0.05)
    w, k, memory = {name: first(name) for name in SHAPES}, None, None
    with closing(mlp_step(s, replicas=replicas)) as step:
        for number in range(8):
            feed(step, number)
            loss, g = mlp_gradient(w, number)
            _, there = mlp_gradient({name: w[name] + g[name] for name in w}, number)
            bend = {name: g[name] * (there[name] - g[name]) for name in w}  # h * g^2, where h is diagonal
            assert step.losses()["loss"] == pytest.approx(loss, rel=1e-9)
            if k is None:
                k = {name: [g[name], 2 * g[name] ** 2, 2 * bend[name]] for name in w}
            else:
                for name in w:
                    for i, new in enumerate((g[name], g[name] ** 2, bend[name])):
                        k[name][i] = k[name][i] + (new - k[name][i]) / memory[name]
            sums = {name: (m**2, v, b) for name, (m, v, b) in k.items()}
            if scope != "weight":
                sums = {name: [q.sum() for q in three] for name, three in sums.items()}
            if scope == "all":
                whole = np.sum(list(sums.values()), axis=0)
                sums = dict.fromkeys(sums, whole)
            first_time = memory is None
            memory = {n: 2 if first_time else memory[n] * (1 - a / v) + 1 for n, (a, v, _) in sums.items()}
            w = {name: w[name] - a / np.maximum(b, 0.05 * v) * g[name] for name, (a, v, b) in sums.items()}
            step.update()
            for name in w:
                np.testing.assert_allclose(
                    step.weights[name], w[name], rtol=1e-7, atol=1e-9, err_msg=f"{number} {name}"
                )
                np.testing.assert_allclose(
                    step.optimizer_state["memory"][name], np.broadcast_to(memory[name], w[name].shape), rtol=1e-6
                )


def test_vsgd_compares_gradients_of_one_batch():
    with closing(mlp_step(optim.VSGD())) as step:
        feed(step, 0)
        x, labels = batch(1)
        with pytest.raises(GpunetError, match="VSGD: accumulate: expected 1: it compares gradients of a batch"):
            step.gradient(x.reshape(-1, 1, 1, INPUTS), labels, accumulate=True)


# All of them, with all that goes around a rule

EVERY = {
    **{name: lambda rule=rule: rule() for name, rule in optim.OPTIMIZERS.items()},
    "sgd caffe decoupled": lambda: optim.SGD(0.05, 0.9, 0.1, form="caffe", decoupled=True),
    "sgd sam": lambda: optim.SGD(0.1, 0.9, sam=0.1, max_norm=1.0),
    "adam with everything": lambda: optim.Adam(l1=1e-3, weight_decay=1e-2, clip=0.5, clip_value=0.05, max_norm=0.6),
    "rmsprop with everything": lambda: optim.RMSProp(momentum=0.9, centered=True, inside=True, sam=0.05),
    "vsgd weight": lambda: optim.VSGD(scope="weight"),
    "vsgd all": lambda: optim.VSGD(scope="all", max_norm=0.8),
    "muon sgd": lambda: optim.Muon(rest="sgd", normalize=True, exclude=["net.head"], clip=0.5, l1=1e-4),
}
AVERAGES = {"none": lambda: None, "ema": lambda: optim.EMA(0.9), "swa": lambda: optim.SWA(2, 2)}


def source(name="train", n=14, **options):
    """Batches of 6, 6 and 2: with three replicas one has nothing to do in the last."""
    rng = np.random.default_rng(7)
    images, labels = rng.integers(0, 256, (n, *SHAPE), np.uint8), rng.integers(0, 3, n).astype(np.int32)
    return Source(data.Split(images, labels), 120.0, 1 / 60, classes=3, name=name, **options)


def training(case, average="none", **options):
    """Return a Step of network() on source() with rates that change."""
    s, average = EVERY[case](), "none" if case == "asgd" else average  # which keeps one itself
    rates = s.lr * np.linspace(1, 0.5, 5)
    options = {"source": source(), "rates": rates, "average": AVERAGES[average]()} | options
    return step_of(s, **options)


def everything(step):
    """Return {what: array} of all that training leaves."""
    kinds = {"weight": step.weights, "statistic": step.statistics, **step.optimizer_state}
    found = {f"{kind} {name}": value for kind, tensors in kinds.items() for name, value in tensors.items()}
    return {**found, "metrics": step.metrics()}


def trained(case, steps=7, **options):
    with closing(training(case, **options)) as step:
        for _ in range(steps):
            step()
        return everything(step)


def assert_same(got, expected):
    """Bit for bit."""
    assert got.keys() == expected.keys()
    different = [name for name, value in expected.items() if got[name].tobytes() != value.tobytes()]
    assert not different


@pytest.mark.parametrize("case", EVERY)
def test_three_replicas_train_as_one(case):
    """Sums over layers and networks too, wherever their slices end; steps by signs hang on their last bits."""
    one, three = (trained(case, average="swa", replicas=replicas) for replicas in (1, 3))
    for name, value in one.items():
        np.testing.assert_allclose(three[name], value, rtol=1e-8, atol=1e-10, err_msg=name)


@needs_emulator
@pytest.mark.parametrize("case", EVERY)
def test_the_emulator_trains_as_numpy(case):
    expected = trained(case, 5, average="ema", replicas=2)
    got = trained(case, 5, average="ema", replicas=2, backend=Emulator("mixed"))
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-8, atol=1e-9, err_msg=name)


@needs_emulator
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", ["adamw", "lars", "muon", "vsgd", "sgd sam", "adam with everything"])
def test_the_emulator_takes_two_steps_in_every_type_as_numpy(case, dtype):
    expected = trained(case, 2, dtype=dtype)
    got = trained(case, 2, dtype=dtype, backend=Emulator())
    for name, value in expected.items():
        if name != "metrics" and not name.startswith(("bend", "memory")):  # differences of gradients, and quotients
            assert_close(name, got[name], value, dtype)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("case", EVERY)
def test_a_gradient_that_is_not_finite_changes_nothing(case, fast):
    """No weight, no slot, no average, at the first update and at a later one."""
    for steps in (0, 3):
        with closing(training(case, "ema", replicas=2, backend=NumPy(fast))) as step:
            for _ in range(steps):
                step()
            before = everything(step)
            x, labels = pictures()
            x[2, 1, 1, 1] = np.nan
            step.gradient(x, labels)
            step.update()
            assert step.halted and step.state["update"] == steps
            assert_same(everything(step), before)


@pytest.mark.parametrize("case", EVERY)
def test_a_frozen_weight_stays(case):
    """Whatever decays, clips or limits; and the others train."""
    graph = network()
    for p in graph.parameters():
        p.frozen = p.name in ("net.hidden.weight", "net.norm.gamma")
    with closing(training(case, "ema", graph=graph, replicas=2)) as step:
        before = {name: value + 0 for name, value in step.weights.items()}
        for _ in range(4):
            step()
        moved = {name for name, value in step.weights.items() if (value != before[name]).any()}
        assert moved == before.keys() - {"net.hidden.weight", "net.norm.gamma"}
        assert {"net.hidden.weight", "net.norm.gamma"} <= step.averages.keys()


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("case", EVERY)
def test_a_checkpoint_goes_on_bit_for_bit(case, average, tmp_path):
    """Through a file, after five of nine updates, in another epoch than it began in."""
    with closing(training(case, average, dtype="float32", replicas=2)) as step:
        for _ in range(5):
            step()
        Checkpoint.of(step, 0.0, 1.0, {"config": ""}).save(tmp_path / "a.safetensors")
        for _ in range(4):
            step()
        expected = everything(step)
    with closing(training(case, average, dtype="float32", replicas=2)) as other:
        Checkpoint.load(tmp_path / "a.safetensors").restore(other)
        for _ in range(4):
            other()
        got = everything(other)
        assert len(got["metrics"]) == 9
        got["metrics"], expected["metrics"] = got["metrics"][5:], expected["metrics"][5:]
        assert_same(got, expected)


@pytest.mark.parametrize("case", EVERY)
def test_half_precision_skips_and_goes_on(case):
    """An update whose gradient overflows changes nothing but the loss scale; those after it are applied."""
    with closing(training(case, dtype="float16", replicas=1)) as step:
        step()
        record = step.state
        record["loss_scale"] = 2.0**22
        step.state = record
        before = everything(step)
        step()
        assert (step.state["update"], step.state["loss_scale"], step.halted) == (1, 2.0**21, False)
        kept = {name: value for name, value in everything(step).items() if name != "metrics"}
        assert_same(kept, {name: value for name, value in before.items() if name != "metrics"})
        record = step.state
        record["loss_scale"] = 8
        step.state = record
        for _ in range(2):
            step()
        assert step.state["update"] == 3
        after = everything(step)
        assert all(np.isfinite(value).all() for value in after.values())
        assert (after["weight net.head.weight"] != before["weight net.head.weight"]).any()


@pytest.mark.parametrize("case", EVERY)
def test_half_precision_follows_double(case):
    """The loss scale is in nothing that a rule keeps or measures."""
    kept = {}
    for dtype in ("float64", "bfloat16", "float16"):
        with closing(training(case, dtype=dtype)) as step:
            for _ in range(2):
                step()
            slots = {slot: tensors.copy() for slot, tensors in step.optimizer_state.items()}
            kept[dtype] = {slot: np.concatenate([v.ravel() for v in s.values()]) for slot, s in slots.items()}
    for slot, whole in kept["float64"].items():
        if slot in ("memory", "bend", "step"):
            continue  # quotients, differences and signs of small numbers
        for dtype, bound in (("float16", 0.05), ("bfloat16", 0.3)):
            assert np.linalg.norm(kept[dtype][slot] - whole) <= bound * np.linalg.norm(whole) + 1e-12, (slot, dtype)


# What is reported


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_penalty_is_what_decay_adds_to_the_loss(replicas):
    """At the weights of the loss beside it: L2 and L1 of what decays; decoupled decay is no part of a loss."""
    for s, expected in (
        (optim.SGD(0.1, weight_decay=0.02), lambda w: 0.01 * (w**2).sum()),
        (optim.Adam(weight_decay=0.02, l1=0.1), lambda w: 0.01 * (w**2).sum() + 0.1 * np.abs(w).sum()),
        (optim.AdamW(weight_decay=0.02, l1=0.1), lambda w: 0.1 * np.abs(w).sum()),
        (optim.AdamW(weight_decay=0.02), lambda w: 0.0),
    ):
        with closing(step_of(s, replicas=replicas)) as step:
            for number in range(3):
                penalty = sum(expected(w) for name, w in step.weights.items() if name != "net.conv.bias")
                step.gradient(*pictures(seed=number))
                step.update()
                row = dict(zip(METRICS, step.metrics()[-1], strict=True))
                assert row["penalty"] == pytest.approx(penalty, rel=1e-12)
                assert row["loss"] > 0.3


# Averages


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("average", [optim.EMA(0.8), optim.SWA(3, 2), optim.SWA(0)])
def test_averages_are_straight_lines(average, replicas):
    with closing(training("adam", average="none", replicas=replicas)) as plain:
        step = step_of(optim.Adam(), source=source(), rates=plain.rates, average=average, replicas=replicas)
        with closing(step):
            mean, seen = None, []
            for t in range(1, 11):
                plain()
                step()
                w = {name: value + 0 for name, value in plain.weights.items()}
                if isinstance(average, optim.EMA):
                    keep = min(0.8, (t + 1) / (t + 10))
                    mean = {name: keep * mean[name] + (1 - keep) * w[name] for name in w} if mean else w
                else:
                    if t > average.start and (t - average.start) % average.every == 0:
                        seen.append(w)
                    mean = {name: np.mean([s[name] for s in seen], axis=0) for name in w} if seen else w
                for name in w:
                    np.testing.assert_allclose(step.weights[name], w[name], rtol=1e-12, atol=1e-14)
                    np.testing.assert_allclose(step.averages[name], mean[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_averages_are_evaluated_predicted_with_and_saved(average, tmp_path):
    x, held = pictures(seed=3)[0], source("held", 9, order="stored")
    with closing(training("sgd", average)) as step:
        for _ in range(9):
            step()
        step.estimate()
        averages, statistics = dict(step.averages), dict(step.statistics)
        assert any((averages[name] != step.weights[name]).any() for name in averages)
        prediction, found = step.predict(x), step.evaluate(held)
        Checkpoint.of(step, 0.0, 1.0, {"config": ""}).save(tmp_path / "a.safetensors")
    with closing(step_of(None)) as other:
        for name, value in averages.items():
            other.weights[name] = value
        for name, value in statistics.items():
            other.statistics[name] = value
        np.testing.assert_array_equal(other.predict(x), prediction)
        assert other.evaluate(source("held", 9, order="stored")) == pytest.approx(found, rel=1e-12)
    with closing(step_of(None)) as reader:
        Checkpoint.load(tmp_path / "a.safetensors").restore(reader)
        np.testing.assert_array_equal(reader.predict(x), prediction)


@pytest.mark.parametrize("replicas", [1, 2])
def test_statistics_are_estimated_at_the_averages(replicas):
    """The mean over the epoch's whole batches of what a step with these weights measures; nothing else changes."""
    with closing(training("sgd", "ema", replicas=replicas, source=source(order="stored"))) as step:
        for _ in range(7):
            step()
        before = everything(step)
        record = step.state
        step.estimate()
        averages, estimated = dict(step.averages), dict(step.statistics)
        after = everything(step)
        assert_same(
            {name: value for name, value in after.items() if not name.startswith("statistic")},
            {name: value for name, value in before.items() if not name.startswith("statistic")},
        )
        assert step.state == record
        once = everything(step)
        step.estimate()
        for name, value in everything(step).items():
            np.testing.assert_allclose(value, once[name], rtol=1e-14, atol=1e-15)
    seen = []
    given = source(order="stored")
    with closing(step_of(optim.SGD(0.0), replicas=replicas, keep=("net.relu1:output",))) as other:
        for name, value in averages.items():
            other.weights[name] = value
        for start in (0, 6):
            x = given.normalise(given.split.images[start : start + 6])
            other.gradient(x, given.labels[start : start + 6])
            seen.append(other.read("net.relu1:output").reshape(-1, 4))
    mean = np.mean([s.mean(axis=0) for s in seen], axis=0)
    variance = np.mean([s.var(axis=0, ddof=1) for s in seen], axis=0)
    np.testing.assert_allclose(estimated["net.norm.mean"], mean, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(estimated["net.norm.variance"], variance, rtol=1e-10, atol=1e-12)


def test_a_rule_that_keeps_an_average_takes_no_other():
    with pytest.raises(GpunetError, match="average: ASGD keeps an average itself; expected None"):
        step_of(optim.ASGD(), average=optim.EMA())
    with closing(step_of(optim.ASGD(t0=0.0))) as step:
        for number in range(4):
            step.gradient(*pictures(seed=number))
            step.update()
        assert any((step.averages[name] != w).any() for name, w in step.weights.items())


# Settings and recipes


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_rule_says_what_it_is_and_has_defaults(name):
    rule = optim.OPTIMIZERS[name]
    first_line, rest = rule.__doc__.split("\n", 1)
    assert len(first_line) <= 115 and first_line.endswith(".") and re.search(r"[=:]", first_line)
    assert re.search(r"(19|20)\d\d|[Aa]s adam", rest) or "lecture" in rest, "where it comes from"
    assert rule().lr > 0 and getattr(optim, rule.__name__) is rule


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: optim.Adam(beta1=1.0), "Adam: beta1: expected a number below 1, got 1.0"),
        (lambda: optim.Adam(beta2=-0.1), "Adam: beta2: expected 0 or more, got -0.1"),
        (lambda: optim.Adam(eps=0), "Adam: eps: expected a number above 0, got 0"),
        (lambda: optim.Adam(lr="fast"), "Adam: lr: expected a number, got 'fast'"),
        (lambda: optim.Adam(lr=float("nan")), "Adam: lr: expected a finite number, got nan"),
        (lambda: optim.Adam(lr=float("inf")), "Adam: lr: expected a finite number, got inf"),
        (lambda: optim.SGD(nesterov="yes"), "SGD: nesterov: expected True or False, got 'yes'"),
        (lambda: optim.WindowedAdagrad(window=0), "WindowedAdagrad: window: expected 1 or more, got 0"),
        (lambda: optim.WindowedAdagrad(window=1.5), "WindowedAdagrad: window: expected a whole number, got 1.5"),
        (lambda: optim.VSGD(scope="net"), "VSGD: scope: expected 'weight' or 'layer' or 'all', got 'net'"),
        (lambda: optim.VSGD(clip=1.0), "VSGD: clip: expected 0, got 1.0: it measures the gradient itself"),
        (lambda: step_of(optim.Muon(decoupled=False)), "Muon: decoupled: expected True, got False: decay has no part"),
        (lambda: optim.Muon(exclude="head"), "Muon: exclude: expected a list of texts, got 'head'"),
        (lambda: optim.EMA(1.0), "EMA: decay: expected a number below 1, got 1.0"),
        (lambda: optim.SWA(-1), "SWA: start: expected 0 or more, got -1"),
        (lambda: step_of(optim.Muon(exclude=["tail"])), "Muon: exclude: 'tail' matches no weight that trains; known: "),
    ],
)
def test_a_wrong_setting_is_named(make, said):
    with pytest.raises(GpunetError) as caught:
        make()
    assert str(caught.value).startswith(said)


RECIPE = {"model": {"name": "mlp", "hidden": [4]}, "data": {"name": "shapes", "train": 40, "test": 20}}


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_recipe_names_any_rule_and_survives_its_own_text(name):
    """Unset keys are the rule's defaults; the resolved text gives the same config, and that the same rule."""
    import tomllib

    config = parse_config(RECIPE | {"optimizer": {"name": name}, "train": {"batch": 8}})
    rule = optim.OPTIMIZERS[name]()
    again = parse_config(tomllib.loads(to_toml(config)))
    assert again == config
    graph = build_graph(again, (8, 8, 3), 3)
    rng = np.random.default_rng(0)
    split = data.Split(rng.integers(0, 256, (16, 8, 8, 3), np.uint8), np.arange(16, dtype=np.int32) % 3)
    with closing(build_step(again, graph, Source(split, 0.0, 1.0), NumPy())) as step:
        assert type(step.optimizer) is type(rule) and step.rates[0] == rule.lr
        for f in fields(rule):
            assert list(np.atleast_1d(getattr(step.optimizer, f.name))) == list(np.atleast_1d(getattr(rule, f.name)))
        step()
        assert step.state["update"] == 1


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optimizer": {"name": "adm"}}, "'name' in [optimizer]: expected 'sgd', 'signsgd', "),
        ({"optimizer": {"name": 3}}, "'name' in [optimizer]: expected 'sgd', 'signsgd', "),
        (
            {"optimizer": {"name": "adam", "momentum": 0.9}},
            "unknown key 'momentum' in [optimizer]; known: name, lr, beta1",
        ),
        (
            {"optimizer": {"name": "adam", "beta": 0.9}},
            "unknown key 'beta' in [optimizer]; did you mean 'beta2'? known",
        ),
        ({"optimizer": {"name": "adam", "beta1": 1}}, "'beta1' in [optimizer]: expected a number below 1, got 1"),
        ({"optimizer": {"name": "adam", "lr": 0}}, "'lr' in [optimizer]: expected a number above 0, got 0"),
        ({"optimizer": {"name": "muon", "steps": 0}}, "'steps' in [optimizer]: expected at least 1, got 0"),
        ({"optimizer": {"name": "muon", "exclude": "head"}}, "'exclude' in [optimizer]: expected a list, got \"head\""),
        ({"optimizer": {"clip": -1}}, "'clip' in [optimizer]: expected at least 0, got -1"),
        ({"optimizer": {"groups": 3}}, "'groups' in [optimizer]: expected a list, got 3"),
        ({"optimizer": {"groups": [3]}}, "'groups' in [optimizer]: expected a table, got 3"),
        ({"optimizer": {"groups": [{}]}}, "'match' in [optimizer.groups] is missing"),
        (
            {"optimizer": {"groups": [{"match": []}]}},
            "'match' in [optimizer.groups]: expected a list of at least 1, got []",
        ),
        (
            {"optimizer": {"groups": [{"match": [3]}]}},
            "'match' in [optimizer.groups]: expected a text in quotes, got 3",
        ),
        (
            {"optimizer": {"groups": [{"match": ["a"], "rat": 2}]}},
            "unknown key 'rat' in [optimizer.groups]; did you mean 'rate'? known: match, rate, decay",
        ),
        ({"average": {"name": "mean"}}, "'name' in [average]: expected 'none', 'ema', 'swa', got \"mean\""),
        ({"average": {"decay": 0.9}}, "'name' in [average] is missing"),
        ({"average": {"name": "ema", "decay": 1}}, "'decay' in [average]: expected a number below 1, got 1"),
        ({"average": {"name": "ema", "start": 1}}, "unknown key 'start' in [average]; known: name, decay"),
        ({"train": {"accumulate": "all"}}, "'accumulate' in [train]: expected a whole number or 'epoch', got \"all\""),
    ],
)
def test_mistakes_in_a_recipe(sections, said):
    with pytest.raises(GpunetError) as caught:
        parse_config(RECIPE | sections, "a.toml")
    assert str(caught.value).startswith(f"a.toml: {said}") and "\n" not in str(caught.value)


def test_groups_multiply_rates_and_decays_by_name():
    groups = [{"match": ["*.bias"], "rate": 2, "decay": 0}, {"match": ["net.head", "*.conv1.*"], "rate": 0.5}]
    plain = parse_config(RECIPE | {"model": {"name": "lenet"}})
    grouped = parse_config(RECIPE | {"model": {"name": "lenet"}, "optimizer": {"bias_rate": 3.0, "groups": groups[:1]}})
    parameters = [{p.name: p for p in build_graph(config, (32, 32, 3), 3).parameters()} for config in (plain, grouped)]
    for name, p in parameters[0].items():
        bias = name.endswith(".bias")
        other = parameters[1][name]
        assert (other.rate, other.decay) == (p.rate * (6 if bias else 1), p.decay * (0 if bias else 1)), name
    wrong = parse_config(RECIPE | {"optimizer": {"groups": [{"match": ["*.bia"]}]}})
    with pytest.raises(GpunetError, match=r"^optimizer.groups: match: '\*.bia' matches no weight; nearest: "):
        build_graph(wrong, (8, 8, 3), 3)


@pytest.mark.parametrize("rule", optim.OPTIMIZERS.values(), ids=optim.OPTIMIZERS)
def test_only_the_rate_is_told_by_its_place(rule):
    """And SGD's first settings; all else is keywords, whose order then means nothing."""
    by_place = [p.name for p in inspect.signature(rule).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert by_place == (["lr", "momentum", "weight_decay", "nesterov", "form"] if rule is optim.SGD else ["lr"])
    assert rule(0.25).lr == 0.25


def test_many_batches_make_one_update():
    """More than one launch takes: bit for bit what the single programs do."""
    with closing(training("adam", replicas=2)) as step, closing(training("adam", replicas=2)) as single:
        step(accumulate=40)
        for number in range(40):
            single.gradient(accumulate=number > 0)
            if number == 39:
                single.update()
            single.advance()
        assert step.state["update"] == 1 and step.state["batch"] == 40
        assert_same(everything(step), everything(single))


def test_an_epoch_makes_one_update(tmp_path, monkeypatch):
    """Descent by the gradient of the whole set: 90 images in batches of 20, the tail as heavy as its images."""
    monkeypatch.setattr("gpunet.train.trainer.write_report", lambda result: None)
    table = {
        "model": {"name": "mlp", "hidden": []},
        "data": {"name": "shapes"},
        "optimizer": {"name": "rprop"},
        "train": {"epochs": 3, "batch": 20, "accumulate": "epoch", "replicas": 1, "dtype": "float64"},
        "run": {"directory": str(tmp_path)},
    }
    result = Trainer(parse_config(table), data=halves(), show=False).fit()
    rows = [row for row in result.run.metrics() if row["split"] == "train"]
    assert (result.updates, result.epochs) == (3, 3) and [row["count"] for row in rows] == [90, 90, 90]
    whole = Trainer(
        parse_config(table | {"train": table["train"] | {"batch": 90, "accumulate": 1}}), data=halves(), show=False
    )
    for name, value in whole.fit().step.weights.items():
        np.testing.assert_allclose(result.step.weights[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_a_killed_training_with_an_average_goes_on_to_the_same_end(name, tmp_path, monkeypatch):
    """Files with averages, statistics estimated at each evaluation, and a rule that counts: the same bytes."""
    monkeypatch.setattr("gpunet.train.trainer.write_report", lambda result: None)
    sections = {"optimizer": {"name": "adamw"}, "average": {"name": name} | ({"start": 1.0} if name == "swa" else {})}
    whole = recipe(tmp_path / "whole", **sections)
    step = new(whole).fit().step
    statistics = step.statistics.copy()
    step.estimate()  # the same again: the best weights were measured with statistics of their own
    for key, value in step.statistics.items():
        np.testing.assert_allclose(statistics[key], value, rtol=1e-5, atol=1e-6)
    cut = recipe(tmp_path / "cut", **sections)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Killed):
            new(cut).fit()
    on(last_run(cut)).fit()
    expected, got = left(last_run(whole)), left(last_run(cut))
    assert any(key.startswith("optimizer/weights/") for key in expected["last"])
    for part in ("metrics", "last", "best"):
        assert got[part] == expected[part], part
