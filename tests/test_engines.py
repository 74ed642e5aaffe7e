"""Winograd's and numba's engines against plain sums; how an engine is chosen, forced, measured and recorded."""

import json
from contextlib import closing
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_conv_engines import check, geometry, straight, workspaces

from gpunet import models
from gpunet.backends.numpy import Backend, engine_winograd, engines
from gpunet.backends.numpy.scratch import Scratch
from gpunet.core.backend import ENGINES as NAMES
from gpunet.core.backend import Types
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import Conv2d, Flatten, GlobalAvgPool, Graph, Input, Linear, MeanSquaredError, ReLU, SoftmaxCrossEntropy
from gpunet.nn.conv import ENGINES
from gpunet.optim import SGD
from gpunet.train import Trainer, load_config
from gpunet.train import tune as tuning

FLOAT = Types.of("float32")
NUMBA = find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not NUMBA, reason="needs the extra numba")


def module(name):
    return import_module(f"gpunet.backends.numpy.{name}")


def padded_geometry(n, shape, outputs, taps, padding):
    try:
        return geometry(n, shape, outputs, taps, 1, tuple(min(p, taps - 1) for p in padding))
    except GpunetError:
        assume(False)


sides, paddings = st.tuples(st.integers(1, 14), st.integers(1, 14)), st.tuples(st.integers(0, 4), st.integers(0, 4))


@given(
    st.integers(1, 5), sides, st.integers(1, 9), st.integers(1, 9), st.sampled_from([3, 5]), paddings,
    st.sampled_from([1, 40, 1 << 12]), st.integers(0, 1), st.sampled_from([np.float64, np.float32]),
)  # fmt: skip
@settings(max_examples=150)
def test_winograd_of_any_geometry(n, side, c, outputs, taps, padding, block, accumulate, dtype):
    """Partial tiles at every edge; blocks of some rows of tiles, of some images; weights and gradients in pieces."""
    g = padded_geometry(n, (*side, c), outputs, taps, padding)
    assert engine_winograd.covers(g, np.dtype(dtype).itemsize)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BLOCK", "ROWS", "PIECE", "PRODUCT"):
            patch.setattr(engine_winograd, name, min(block, getattr(engine_winograd, name)))
        check(g, dtype, accumulate, engine_winograd)


@needs_numba
@given(
    st.integers(1, 7), sides, st.sampled_from([16, 48]), st.sampled_from([16, 48]), st.sampled_from([3, 5]), paddings,
    st.integers(0, 1),
)  # fmt: skip
@settings(max_examples=60)
def test_compiled_winograd_of_any_geometry(n, side, c, outputs, taps, padding, accumulate):
    """Blocks as small as they get, so that they end within images."""
    compiled = module("numba_winograd")
    g = padded_geometry(n, (*side, c), outputs, taps, padding)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BLOCK", "DEEP"):
            patch.setattr(compiled, name, 1)
        check(g, np.float32, accumulate, compiled)


@needs_numba
@given(
    st.integers(1, 3), st.tuples(st.integers(1, 11), st.just(8)), st.sampled_from([3, 8]), st.sampled_from([8, 48]),
    st.tuples(st.integers(1, 4), st.just(3)), st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.integers(0, 4), st.just(1)), st.tuples(st.integers(1, 2), st.just(1)), st.integers(0, 1),
)  # fmt: skip
@settings(max_examples=60)
def test_register_tiles_of_any_geometry(n, side, c, outputs, size, stride, padding, dilation, accumulate):
    try:
        g = geometry(n, (*side, c), outputs, size, stride, padding, dilation)
    except GpunetError:
        assume(False)
    assume(module("numba_direct").covers(g))
    check(g, np.float32, accumulate, module("numba_direct"))


@pytest.mark.parametrize(
    ("shape", "outputs", "taps"),
    [((56, 56, 64), 32, 3), ((4, 4, 256), 256, 3), ((7, 7, 48), 24, 5), ((33, 18, 32), 64, 3)],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_wide_layers(shape, outputs, taps, dtype):
    g = geometry(3, shape, outputs, taps)
    check(g, dtype, 1, engine_winograd)
    if NUMBA and dtype == np.float32 and g.outputs % 16 == 0:
        check(g, dtype, 1, module("numba_winograd"))


def test_what_is_covered_fits_the_scratch():
    """Channels and sides near the largest that are covered; only bound, not run."""
    covered = 0
    for taps in (3, 5):
        for dtype in (np.float32, np.float64):
            for side in (4, 60, 112, 224, 400):
                for c in (16, 64, 96, 256, 384, 512, 1024):
                    g = geometry(2, (side, side, c), c, taps)
                    if not engine_winograd.covers(g, np.dtype(dtype).itemsize):
                        continue
                    covered += 1
                    x, w = np.empty((2, side, side, c), dtype), np.empty((taps, taps, c, c), dtype)
                    extra, b = workspaces(engine_winograd, g, dtype), np.empty(c, dtype)
                    for engine in ["engine_winograd"] + ["numba_winograd"] * NUMBA:
                        engine = module(engine)
                        engine.forward(x, w, b, x, *extra[0], geometry=g, scratch=Scratch())
                        engine.backward_weight(x, x, w, *extra[1], geometry=g, accumulate=1, scratch=Scratch())
                        engine.backward_input(x, w, x, *extra[2], geometry=g, scratch=Scratch())
    assert covered > 40
    assert not engine_winograd.covers(geometry(2, (8, 8, 1024), 1024, 3))
    assert engine_winograd.covers(geometry(2, (8, 8, 512), 512, 3))


@needs_numba
def test_what_the_compiled_passes_leave_to_numpy():
    compiled, backend = module("numba_winograd"), Backend(numba=True)
    for g, dtype in ((geometry(2, (8, 8, 20), 32, 3), np.float32), (geometry(2, (8, 8, 32), 32, 3), np.float64)):
        x, y, w = np.ones((2, 8, 8, g.c), dtype), np.empty((2, 8, 8, 32), dtype), np.ones((3, 3, g.c, 32), dtype)
        (values,), *_ = workspaces(engine_winograd, g, dtype)
        assert compiled.forward(x, w, y, values, geometry=g, scratch=Scratch()) is None
        backend.bind_call("winograd_forward", (x, w, y, values), {"geometry": g}, Scratch())()
        np.testing.assert_allclose(y[:, 1:-1, 1:-1], 9 * g.c, rtol=1e-5)


def layers_of(name):
    """Return {path: geometry of two images} of the convolutions of a network, one of each kind."""
    graph = models.build(name, **({"widths": (32, 64, 128, 256)} if name == "resnet9" else {}))
    step = Step(graph, SoftmaxCrossEntropy(), SGD(0.1), batch=2, replicas=1, engine="blocked")
    entries = step._replay.program(("gradient", 2, False, True))[0].plan.entries
    found = {}
    for entry in entries:
        if entry.kind == "call":
            found.setdefault(engines.geometry_key(entry.options["geometry"]), (entry.path, entry.options["geometry"]))
    return dict(found.values())


def errors(engine, g):
    """Return the largest errors of y, dW and dx in float32, by the largest value of each in float64."""
    rng = np.random.default_rng(1)
    arrays = [
        rng.normal(size=shape).astype(np.float32)
        for shape in ((g.n, g.h, g.w, g.c), (g.kh, g.kw, g.c, g.outputs), (g.outputs,), (g.n, g.oh, g.ow, g.outputs))
    ]
    x, weight, bias, dy = arrays
    expected = straight(g, *(a.astype(np.float64) for a in arrays))
    y, dw, dx = np.empty_like(dy), np.empty_like(weight), np.empty_like(x)
    extra = workspaces(engine, g, np.float32)
    engine.forward(x, weight, bias, y, *extra[0], geometry=g, scratch=Scratch())()
    engine.backward_weight(x, dy, dw, *extra[1], geometry=g, accumulate=0, scratch=Scratch())()
    engine.backward_input(dy, weight, dx, *extra[2], geometry=g, scratch=Scratch())()
    return [np.abs(a - b).max() / np.abs(b).max() for a, b in zip((y, dw, dx), expected, strict=True)]


@pytest.mark.parametrize("name", ["resnet9", "resnet20"])
def test_rounding_errors_by_layer(name):
    """Printed with -s. Winograd's are up to ten times those of plain sums; more would mean worse points."""
    bounds = {"engine_blocked": 2e-6, "engine_winograd": 6e-6}
    bounds |= {"numba_direct": 4e-6, "numba_winograd": 6e-6} if NUMBA else {}
    for path, g in layers_of(name).items():
        for engine, bound in bounds.items():
            able = {"engine_blocked": True, "engine_winograd": engine_winograd.covers(g)}
            if NUMBA:
                whole = g.c % 16 == g.outputs % 16 == 0
                able |= {"numba_direct": module("numba_direct").covers(g)}
                able |= {"numba_winograd": engine_winograd.covers(g) and whole}
            if able[engine]:
                found = errors(module(engine), g)
                print(f"{name:9} {path:24} {engine:16} y {found[0]:.1e} dW {found[1]:.1e} dx {found[2]:.1e}")
                assert max(found) < bound, f"{engine} at {path}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_winograd_in_a_step_also_where_gradients_accumulate(dtype, replicas):
    image = Input((9, 7, 16))
    graph = Graph(image, Flatten()(Conv2d(32, 3, name="conv")(image)))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 9, 7, 16)), rng.normal(size=(5, 63 * 32))
    results = []
    for engine in ("winograd", "unfold"):
        step = Step(graph, MeanSquaredError(), batch=5, dtype=dtype, engine=engine, replicas=replicas,
                    keep=("conv:output", "input:gradient"))  # fmt: skip
        with closing(step):
            assert step.engines() == {"conv": engine}
            step.gradient(x, y)
            step.gradient(x[:3], y[:3], accumulate=True)
            names = ("conv:output", "input:gradient", "conv.weight:gradient", "conv.bias:gradient")
            results.append([step.read(name) for name in names])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol={"float32": 1e-5, "float64": 1e-13}[dtype] * np.abs(b).max())


def trained_loss(engine, seed):
    """Return the mean loss of the last ten of 60 updates of a small network on stripes in noise."""
    image = Input((12, 12, 3))
    h = image
    for i in range(3):
        h = ReLU(name=f"relu{i}")(Conv2d(16, 3, name=f"conv{i}")(h))
    graph = Graph(image, Linear(4)(GlobalAvgPool()(h)))
    rng = np.random.default_rng(seed)
    step = Step(graph, SoftmaxCrossEntropy(), SGD(0.05, 0.9), batch=32, replicas=1, seed=seed, engine=engine)
    losses = []
    with closing(step):
        for _ in range(60):
            labels = rng.integers(0, 4, 32)
            x = rng.normal(size=(32, 12, 12, 3)).astype(np.float32)
            for picture, label in zip(x, labels, strict=True):
                stripes = np.sin(np.arange(12) * (1 + label // 2))
                picture += (stripes[:, None] if label % 2 else stripes[None])[..., None]
            step.gradient(x, labels)
            losses.append(step.losses()["loss"])
            step.update()
            step.advance()
    return np.mean(losses[-10:])


def test_training_reaches_the_loss_that_it_reaches_without_winograd():
    """Within the spread of seeds; benchmarks/engines.py has it for whole trainings."""
    found = {e: [trained_loss(e, seed) for seed in range(4)] for e in ("winograd", "unfold")}
    spread = np.std(found["unfold"], ddof=1)
    assert spread > 0 and max(found["unfold"]) < 1
    assert found["winograd"] != found["unfold"]
    assert abs(np.mean(found["winograd"]) - np.mean(found["unfold"])) < spread


# The choice


def test_names_are_one_list():
    assert tuple(ENGINES) == NAMES


@pytest.mark.parametrize(
    ("g", "plain", "compiled"),
    [
        (geometry(2, (32, 32, 64), 64, 3), "winograd", "winograd"),
        (geometry(2, (32, 32, 16), 16, 3), "winograd", "winograd"),
        (geometry(2, (16, 16, 32), 64, 5), "winograd", "winograd"),
        (geometry(2, (32, 32, 8), 8, 3), "blocked", "direct"),  # narrow
        (geometry(2, (9, 9, 16), 16, 3), "blocked", "direct"),  # narrow, and tiles that reach beyond the edge
        (geometry(2, (2, 2, 64), 64, 3), "blocked", "direct"),  # all of a tile beyond the edge
        (geometry(2, (32, 32, 3), 32, 3), "blocked", "direct"),
        (geometry(2, (32, 32, 64), 64, 3, 2), "blocked", "direct"),
        (geometry(2, (32, 32, 64), 64, 3, 1, "same", 2), "blocked", "direct"),
        (geometry(2, (32, 32, 64), 64, 3, 1, 3), "blocked", "direct"),  # dx would need a negative padding
        (geometry(2, (32, 32, 64), 64, (3, 5)), "blocked", "direct"),
        (geometry(2, (32, 32, 64), 10, 1), "blocked", "blocked"),
    ],
)
def test_the_rule(g, plain, compiled):
    assert engines.choose(g, FLOAT, False) == plain
    if NUMBA:
        assert engines.choose(g, FLOAT, True) == compiled
    for n in (1, 1000):
        again = type(g)(n, *list(vars(g).values())[1:])
        assert engines.choose(again, FLOAT, False) == plain
        assert engines.geometry_key(again) == engines.geometry_key(g)
    assert engines.choose(g, Types.of("float64"), NUMBA) == "blocked"  # gradient checks want plain sums


@pytest.mark.parametrize("name", NAMES)
def test_a_named_engine_computes_what_it_can(name):
    image = Input((8, 8, 32))
    h = Conv2d(32, 3, name="wide")(image)
    graph = Graph(image, Flatten()(Conv2d(10, 1, name="point")(Conv2d(32, 3, 2, name="strided")(h))))
    found = Step(graph, batch=2, engine=name, backend=Backend(numba=NUMBA)).engines()
    if name == "unfold":
        assert found == {"wide": "unfold", "strided": "unfold"}  # one pixel alone needs no unfolding
    else:
        direct = "direct" if NUMBA else "blocked"
        strided = {"blocked": "blocked", "winograd": "blocked", "direct": direct}[name]
        assert found == {"wide": direct if name == "direct" else name, "strided": strided, "point": "blocked"}
    assert Step(graph, batch=2, engine=name, dtype="bfloat16").engines().get("wide") == "unfold"
    assert Step(graph, batch=2, engine=name, backend="emulator").engines().get("wide") == "unfold"


def test_an_unknown_engine_is_refused():
    graph = Graph(image := Input((8, 8, 3)), Flatten()(Conv2d(4, 3)(image)))
    expected = r"^engine: expected one of auto, unfold, blocked, winograd, direct, got 'fft'$"
    with pytest.raises(GpunetError, match=expected):
        Step(graph, batch=2, engine="fft")
    assert Step(graph, batch=2, engine="auto").engines() == Step(graph, batch=2).engines()


RECIPE = """
[model]
name = "layers"
layers = [
    {layer = "Conv2d", outputs = 16, size = 3, name = "one"},
    {layer = "Conv2d", outputs = 16, size = 3, name = "two"},
    {layer = "Conv2d", outputs = 16, size = 3, name = "three"},
    {layer = "Conv2d", outputs = 16, size = 3, groups = 2, name = "grouped"},
    {layer = "GlobalAvgPool"},
    {layer = "Linear", outputs = 10},
]
[data]
name = "shapes"
train = 64
test = 20
validation = 10
[train]
epochs = 1
batch = 16
replicas = 1
backend = "numpy"
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A cache folder of one's own."""
    monkeypatch.setenv("GPUNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_was_measured_is_used(place):
    backend, g = Backend(numba=False), geometry(2, (32, 32, 64), 64, 3)
    assert backend.engine(FLOAT)(g) == "winograd"
    path = engines.table_path(backend, FLOAT)
    key = engines.geometry_key(g)
    path.write_text(json.dumps({key: "unfold"}))
    assert backend.engine(FLOAT)(g) == "unfold"
    assert backend.engine(FLOAT, "blocked")(g) == "blocked"
    assert backend.engine(FLOAT)(geometry(2, (16, 16, 64), 64, 3)) == "winograd"  # not measured
    assert engines.table_path(backend, Types.of("float64")) != path
    if NUMBA:
        assert engines.table_path(Backend(numba=True), FLOAT) != path
    for damaged in ("", "[1]", "{", json.dumps({key: "fft"}), json.dumps({key: 3}), json.dumps({key: ["unfold"]})):
        path.write_text(damaged)
        assert backend.engine(FLOAT)(g) == "winograd"
    path.write_text(json.dumps({key: "direct"}))  # of a machine with numba
    assert backend.engine(FLOAT)(g) == "blocked"


def test_tune_measures_prints_and_keeps(place, gpunet, monkeypatch):
    monkeypatch.setattr(tuning, "SECONDS", 1e-4)
    (place / "small.toml").write_text(RECIPE)
    code, out, err = gpunet("tune", "small.toml")
    assert (code, err) == (0, "")
    assert out.count("chosen") == 2  # geometries: the first layer's, and that of the two behind it
    assert out.count("the rule's") == 2
    names = ["unfold", "blocked", "winograd"] + ["direct"] * NUMBA
    for name in names:
        assert out.count(f" {name} ") == 2
    assert "two and 1 alike" in out and "grouped" not in out
    assert not list((place / "cache" / "kernels").glob("engines-*"))
    code, out, _ = gpunet("tune", "small.toml", "--write")
    (path,) = (place / "cache" / "kernels").glob("engines-*")
    assert code == 0 and out.splitlines()[-1] == str(path)
    table = json.loads(path.read_text())
    assert len(table) == 2 and set(table.values()) <= set(names)
    path.write_text(json.dumps(dict.fromkeys(table, "unfold") | {"of another network": "blocked"}))
    _, out, _ = gpunet("summary", "small.toml", "--plan")
    lines = out[out.index("engines of the convolutions, backend numpy") :].splitlines()[1:5]
    assert [line.split() for line in lines] == [[name, "unfold"] for name in ("one", "two", "three", "grouped")]
    gpunet("tune", "small.toml", "--write")
    assert json.loads(path.read_text())["of another network"] == "blocked"


def test_passes_are_those_that_training_does(place, monkeypatch):
    """Nobody needs the gradient by the images, so a first layer's time is without it."""
    asked = []
    monkeypatch.setattr(
        tuning, "_race", lambda backend, types, g, passes, names, rounds: asked.append(passes) or {"a": 1}
    )
    (place / "small.toml").write_text(RECIPE)
    tuning.tune(load_config("small.toml"))
    assert asked == [{"forward", "backward_weight"}, {"forward", "backward_weight", "backward_input"}]


def test_tune_says_what_it_cannot_do(place, gpunet):
    (place / "small.toml").write_text(RECIPE)
    code, _, err = gpunet("tune", "small.toml", "--backend", "emulator")
    assert code == 2 and "tune: backend: expected numpy, which has several engines, got emulator" in err
    code, _, err = gpunet("tune", "small.toml", "--set", "train.dtype='float16'")
    assert code == 2 and "tune: expected a network with convolutions in float32 or float64" in err
    code, _, err = gpunet("tune", "mlp_shapes")
    assert code == 2 and "got none in mlp" in err
    code, _, err = gpunet("train", "small.toml", "--set", "train.conv_engine='fft'")
    assert code == 2 and "'conv_engine' in [train]: expected 'auto', 'unfold', 'blocked', 'winograd' or 'direct'" in err


def test_a_run_records_its_engines(place, gpunet, no_pictures):
    (place / "small.toml").write_text(RECIPE)
    config = load_config("small.toml", ["train.conv_engine='winograd'", "run.checkpoint_steps=1", "train.epochs=2"])
    trainer = Trainer(config)
    pins = trainer.pins["engine"]
    assert pins == "one winograd, two winograd, three winograd, grouped unfold"
    assert 'conv_engine = "winograd"' in (trainer.fit().run.path / "config.toml").read_text()
    auto = Trainer(load_config("small.toml"))
    table = engines.table_path(auto.step.backend, auto.step.types)
    keys = [engines.geometry_key(e.options["geometry"]) for e in auto.step.passes()]
    table.write_text(json.dumps(dict.fromkeys(keys, "unfold")))
    assert Trainer(load_config("small.toml")).pins["engine"] == ", ".join(
        f"{name} unfold" for name in ("one", "two", "three", "grouped")
    )
