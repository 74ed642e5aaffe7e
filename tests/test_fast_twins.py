"""Fast twins and numba's against their definitions: every case, sizes of several blocks and tails, a replay again."""

import importlib
import inspect
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import gpunet.backends.numpy
from gpunet.backends.numpy import dropconnect
from gpunet.backends.numpy.scratch import ALIGN, BLOCK, ColumnSums, RepeatedRow, Scratch
from gpunet.backends.numpy.transforms import transforms_draw
from gpunet.core.augmentation import COLOR, GEOMETRY, Augmentation
from gpunet.core.state import STATE
from gpunet.errors import GpunetError
from gpunet.testing.cases import CASES, SIZES, blank, positive, random, state
from gpunet.testing.tolerance import assert_close

FOLDER = Path(gpunet.backends.numpy.__file__).parent
NUMBA = find_spec("numba") is not None


def twins(kind):
    """Return {name, or numba:name: function} of the modules `kind`_*.py that stand beside a definition's."""
    found, mark = {}, "" if kind == "fast" else f"{kind}:"
    for path in sorted(FOLDER.glob(f"{kind}_*.py")):
        if (FOLDER / path.name.removeprefix(f"{kind}_")).exists():
            for name, function in vars(importlib.import_module(f"gpunet.backends.numpy.{path.stem}")).items():
                own = inspect.isfunction(function) and function.__module__.endswith(f".{path.stem}")
                if own and name[0] != "_":
                    found[mark + name] = function
    return found


FAST = twins("fast") | (twins("numba") if NUMBA else {})
LARGE = {}
COPIES = ("adam_update", "batch_warp", "batchnorm_combine", "concat_forward", "concat_backward", "dropconnect_gradient",
          "gradient_norm", "penalty_sum", "sgd_update", "sum_parts", "unfold")  # fmt: skip


def kernel_of(name):
    return name.rpartition(":")[2]


def kinds(kernel):
    """Return the names of a kernel's twins."""
    return [name for name in FAST if kernel_of(name) == kernel]


def definition(name):
    stem = FAST[name].__module__.rsplit(".", 1)[1].partition("_")[2]
    return getattr(importlib.import_module(f"gpunet.backends.numpy.{stem}"), kernel_of(name))


def aligned(value):
    """A copy at the start of a cache line, as in an arena."""
    if not isinstance(value, np.ndarray) or value.dtype == STATE:
        return value
    copy = Scratch(value.nbytes)(value.shape, value.dtype)
    copy[...] = value
    return copy


def bound(name, arguments):
    """Return (the call or None, copies of the arguments that it works on, its scratch)."""
    copies, scratch = {k: aligned(v) for k, v in arguments.items()}, Scratch()
    return FAST[name](**copies, scratch=scratch), copies, scratch


def hold(name, arguments):
    """Compare after two replays of each: neither what scratch held before nor the last replay may show."""
    call, quick, scratch = bound(name, arguments)
    if call is None:
        return False
    slow = {k: aligned(v) for k, v in arguments.items()}
    for garbage in (0xFF, 0x01):  # NaN, then denormals
        scratch._buffer[:] = garbage
        definition(name)(**slow)
        call()
        for argument, value in slow.items():
            if isinstance(value, np.ndarray):
                assert_close(f"{name}: {argument}", quick[argument], value, value.dtype)
    return True


def large(*names):
    """Enter a function(rng, dtype) that yields arguments of these kernels for several blocks and a tail."""

    def enter(function):
        LARGE.update({name: (function, name) for name in names})
        return function

    return enter


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", sorted(FAST))
def test_every_case(name, dtype):
    for size in range(SIZES):
        arguments = CASES[kernel_of(name)](np.random.default_rng(size), size, np.dtype(dtype), np.dtype(dtype))
        flat = {k: v.reshape(-1) if isinstance(v, np.ndarray) and v.shape else v for k, v in arguments.items()}
        hold(name, arguments)
        hold(name, flat)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", sorted(FAST))
def test_several_blocks_and_a_tail(name, dtype):
    function, kernel = LARGE[kernel_of(name)]
    covered = [hold(name, a) for a in function(np.random.default_rng(1), np.dtype(dtype), kernel)]
    assert all(covered) or (name.startswith("gelu") and dtype == "float64")


@pytest.mark.parametrize("name", sorted(FAST))
def test_a_replay_allocates_no_block(name):
    function, kernel = LARGE[kernel_of(name)]
    for arguments in function(np.random.default_rng(1), np.dtype("float32"), kernel):
        call, _, _ = bound(name, arguments)
        call()
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 18


@pytest.mark.parametrize("real", [np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)])
@pytest.mark.parametrize("name", sorted(FAST))
def test_other_types_are_left_to_the_definition(name, real):
    """Unless the work is a copy, whatever the type, or has no storage type in it."""
    arguments = CASES[kernel_of(name)](np.random.default_rng(0), 5, real, np.dtype("float32"))
    assert not hold(name, arguments) or kernel_of(name) in COPIES


def test_parameters_are_the_definitions():
    for name, function in FAST.items():
        *names, last = inspect.signature(function).parameters.values()
        assert [p.name for p in names] == list(inspect.signature(definition(name)).parameters), name
        assert (last.name, last.kind) == ("scratch", last.KEYWORD_ONLY), name


def test_every_fast_twin_has_large_arguments():
    kernels = {kernel_of(name) for name in FAST}
    assert kernels == LARGE.keys() if NUMBA else kernels < LARGE.keys()


@pytest.mark.skipif(not NUMBA, reason="numba is not installed: nothing holds its twins to their definitions here")
def test_numba_has_twins_of_what_a_step_spends_its_time_on():
    """Convolution is an engine's."""
    usual = {"batchnorm_moments", "batchnorm_relu_forward", "batchnorm_add_relu_forward", "batchnorm_relu_backward",
             "batchnorm_relu_backward_sums", "relu_backward", "maxpool_forward", "maxpool_backward", "sgd_update",
             "gradient_norm"}  # fmt: skip
    assert usual <= {kernel_of(name) for name in FAST if name.startswith("numba:")}


# Convolution: images, groups, and a window that hangs over every edge


@large("unfold", "fold")
def _columns(rng, dtype, name):
    for groups, stride, dilation in ((1, 1, 1), (3, 2, 1), (2, 1, 2)):
        n, h, w, c, kh, kw, pad = 7, 33, 31, 12, 3, 5, 2
        oh, ow = ((s + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for s, k in ((h, kh), (w, kw)))
        shapes = {"x": (n, h, w, c), "columns": (groups, n * oh * ow, kh * kw * c // groups)}
        given = "x" if name == "unfold" else "columns"
        arrays = {k: random(rng, s, dtype) if k == given else blank(s, dtype) for k, s in shapes.items()}
        sizes = dict(n=n, h=h, w=w, c=c, oh=oh, ow=ow, kh=kh, kw=kw, stride_y=stride, stride_x=stride)
        sizes |= dict(pad_y=pad, pad_x=pad, dilation_y=dilation, dilation_x=dilation, groups=groups)
        yield {k: arrays[k] for k in sorted(arrays, key=lambda k: k != given)} | sizes


# Activation and elementwise: 2.5 and 3 blocks of float32 and some elements

N = BLOCK // 4 * 5 // 2 + 7


@large("relu_forward", "sigmoid_forward", "tanh_forward", "gelu_forward", "silu_forward")
def _activation_forward(rng, dtype, name):
    x = random(rng, N, dtype, 3)
    x[:6] = 90, -90, 800, -800, -0.0, 0
    yield {"x": x, "y": blank(N, dtype), "n": N}


@large("relu_backward", "sigmoid_backward", "tanh_backward")
def _activation_backward(rng, dtype, name):
    yield {"dy": random(rng, N, dtype), "y": random(rng, N, dtype), "dx": blank(N, dtype), "n": N}


@large("gelu_backward", "silu_backward")
def _activation_backward_from_x(rng, dtype, name):
    yield {"dy": random(rng, N, dtype), "x": random(rng, N, dtype, 3), "dx": blank(N, dtype), "n": N}


@large("elu_backward", "hardswish_backward")
def _kinks_backward(rng, dtype, name):
    given = {"y": random(rng, N, dtype)} if name == "elu_backward" else {"x": random(rng, N, dtype, 3)}
    alpha = {"alpha": 0.7} if name == "elu_backward" else {}
    yield {"dy": random(rng, N, dtype), **given, "dx": blank(N, dtype), **alpha, "n": N}


@large("hardswish_forward")
def _hardswish(rng, dtype, name):
    yield {"x": random(rng, N, dtype, 3), "y": blank(N, dtype), "n": N}


@large("scale_forward")
def _scale(rng, dtype, name):
    yield {"x": random(rng, N, dtype), "y": blank(N, dtype), "factor": 1 / 7, "n": N}


@large("leaky_relu_forward")
def _leaky_forward(rng, dtype, name):
    yield {"x": random(rng, N, dtype), "y": blank(N, dtype), "slope": 0.1, "n": N}


@large("leaky_relu_backward")
def _leaky_backward(rng, dtype, name):
    yield {"dy": random(rng, N, dtype), "y": random(rng, N, dtype), "dx": blank(N, dtype), "slope": 0.1, "n": N}


@large("add_forward")
def _add(rng, dtype, name):
    yield {"a": random(rng, N, dtype), "b": random(rng, N, dtype), "y": blank(N, dtype), "n": N}


@large("concat_forward", "concat_backward")
def _concat(rng, dtype, name):
    for c, width, offset in ((3, 7, 2), (64, 128, 64)):
        wide, narrow = random(rng, (500, width), dtype), random(rng, (500, c), dtype)
        names = ("x", "y") if name == "concat_forward" else ("dy", "dx")
        arrays = dict(zip(names, (narrow, wide) if name == "concat_forward" else (wide, narrow), strict=True))
        yield {**arrays, "rows": 500, "c": c, "width": width, "offset": offset}


MATRICES = [(3001, 31), (1000, 100), (4099, 16), (700, 513)]  # lines of 16, 5, 32 and one row, with a rest


@large("bias_forward")
def _bias(rng, dtype, name):
    for rows, c in MATRICES:
        yield {"b": random(rng, c, dtype), "y": random(rng, (rows, c), dtype), "rows": rows, "c": c}


@large("column_sum")
def _column_sum(rng, dtype, name):
    for rows, c in MATRICES:
        for parts in (1, 3):
            x = random(rng, (rows, c), dtype, 0.1)
            yield {"x": x, "sums": blank((parts, c), dtype), "rows": rows, "c": c, "parts": parts}


@large("sum_parts")
def _sum_parts(rng, dtype, name):
    for parts, n in ((1, 3001), (5, 700)):
        for accumulate in (0, 1):
            y = random(rng, n, dtype) if accumulate else blank(n, dtype)
            x = random(rng, (parts, n), dtype)
            yield {"x": x, "y": y, "accumulate": accumulate, "parts": parts, "n": n}


# Batch normalisation


@large("batchnorm_combine")
def _combine(rng, dtype, name):
    for parts, c in ((1, 64), (7, 33)):
        moments = positive(rng, (parts, 3, c), dtype)
        moments[:, 0] = rng.integers(0, 100, (parts, 1))
        yield {"moments": moments, "total": blank((3, c), dtype), "parts": parts, "c": c}


@large("batchnorm_moments")
def _moments(rng, dtype, name):
    for rows, c in MATRICES:
        for parts in (1, 3):
            x = random(rng, (rows, c), dtype) * dtype.type(0.1) + random(rng, c, dtype)
            yield {"x": x, "moments": blank((parts, 3, c), dtype), "rows": rows, "c": c, "parts": parts}


@large("batchnorm_forward", "batchnorm_relu_forward", "batchnorm_add_relu_forward")
def _normalise(rng, dtype, name):
    for rows, c in MATRICES:
        residual = {"residual": random(rng, (rows, c), dtype)} if "add" in name else {}
        yield {
            "x": random(rng, (rows, c), dtype),
            "mean": random(rng, c, dtype),
            "inverse": positive(rng, c, dtype),
            "gamma": positive(rng, c, dtype),
            "beta": random(rng, c, dtype),
            **residual,
            "y": blank((rows, c), dtype),
            "rows": rows,
            "c": c,
        }


def _affine(rng, c, dtype):
    return {"gamma": positive(rng, c, dtype), "beta": random(rng, c, dtype)}


@large("batchnorm_backward_sums", "batchnorm_relu_backward_sums")
def _backward_sums(rng, dtype, name):
    for rows, c in MATRICES:
        for parts in (1, 3):
            yield {
                "dy": random(rng, (rows, c), dtype, 0.1),
                "x": random(rng, (rows, c), dtype),
                "mean": random(rng, c, dtype),
                "inverse": positive(rng, c, dtype),
                **(_affine(rng, c, dtype) if "relu" in name else {}),
                "sums": blank((parts, 2, c), dtype),
                "rows": rows,
                "c": c,
                "parts": parts,
            }


@large("batchnorm_backward", "batchnorm_relu_backward")
def _backward(rng, dtype, name):
    for rows, c in MATRICES:
        yield {
            "dy": random(rng, (rows, c), dtype),
            "x": random(rng, (rows, c), dtype),
            "mean": random(rng, c, dtype),
            "inverse": positive(rng, c, dtype),
            "gamma": positive(rng, c, dtype),
            **({"beta": random(rng, c, dtype)} if "relu" in name else {}),
            "sums": random(rng, (2, c), dtype, 100),
            "dx": blank((rows, c), dtype),
            "total": 2 * rows,
            "rows": rows,
            "c": c,
        }


@pytest.mark.parametrize("name", kinds("batchnorm_moments"))
@pytest.mark.parametrize("mean", [0, 30, 1000])
def test_moments_of_a_large_mean_do_not_cancel(mean, name):
    """float32 knows x to 1e-7 of itself: so good is the variance of what is stored."""
    x = (np.random.default_rng(0).normal(mean, 1, (40000, 16))).astype(np.float32)
    moments = np.empty((1, 3, 16), np.float32)
    call, copies, _ = bound(name, {"x": x, "moments": moments, "rows": 40000, "c": 16, "parts": 1})
    call()
    exact = x.astype(np.float64)
    np.testing.assert_allclose(copies["moments"][0, 1], exact.mean(0), rtol=2e-7, atol=1e-7)
    np.testing.assert_allclose(copies["moments"][0, 2], exact.var(0) * 40000, rtol=2e-6)


@pytest.mark.parametrize("name", kinds("batchnorm_moments"))
def test_moments_where_the_first_block_is_unlike_the_rest(name):
    """The worst for moments about a pilot: it lies far from the mean."""
    x = np.random.default_rng(0).normal(0, 1, (80000, 16)).astype(np.float32)
    x[:2048] += 100
    arguments = {"x": x, "moments": np.empty((1, 3, 16), np.float32), "rows": 80000, "c": 16, "parts": 1}
    call, copies, _ = bound(name, arguments)
    call()
    exact = x.astype(np.float64)
    np.testing.assert_allclose(copies["moments"][0, 2], exact.var(0) * 80000, rtol=2e-5)


# Pooling: n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x

POOLS = [
    (5, 16, 16, 32, 8, 8, 2, 2, 2, 2, 0, 0),  # nothing overlaps
    (9, 15, 13, 24, 7, 6, 2, 2, 2, 2, 0, 0),  # the last row and column are in no window
    (7, 16, 16, 16, 8, 8, 3, 3, 2, 2, 0, 0),  # Caffe's: hangs over the edge
    (3, 15, 17, 16, 8, 9, 3, 3, 2, 2, 1, 1),
    (2, 12, 11, 8, 12, 11, 3, 3, 1, 1, 1, 1),
    (2, 9, 14, 3, 3, 5, 2, 2, 3, 3, 0, 0),  # gaps
    (2, 9, 9, 4, 4, 9, 3, 1, 2, 1, 0, 0),
    (2, 9, 9, 4, 9, 5, 1, 3, 1, 2, 0, 1),
    (1, 130, 70, 16, 65, 35, 3, 3, 2, 2, 1, 1),  # bands of one image
    (1, 128, 128, 16, 64, 64, 2, 2, 2, 2, 0, 0),
    (1, 90, 90, 24, 89, 90, 4, 3, 1, 1, 1, 1),
    (20, 8, 8, 16, 1, 1, 8, 8, 8, 8, 0, 0),
    (20, 7, 7, 16, 2, 2, 5, 5, 3, 3, 1, 1),
]
SIZE_NAMES = ("n", "h", "w", "c", "oh", "ow", "kh", "kw", "stride_y", "stride_x", "pad_y", "pad_x")


@large("maxpool_forward", "maxpool_backward", "avgpool_forward", "avgpool_backward")
def _pool(rng, dtype, name):
    for size in POOLS:
        n, h, w, c, oh, ow, *_ = size
        sizes = dict(zip(SIZE_NAMES, size, strict=True))
        x = np.round(random(rng, (n, h, w, c), dtype), 1)  # ties
        y, dy, dx = blank((n, oh, ow, c), dtype), random(rng, (n, oh, ow, c), dtype), blank(x.shape, dtype)
        index = blank(y.shape, np.uint8)
        if name == "maxpool_forward":
            yield {"x": x, "y": y, "index": index, **sizes}
        elif name == "maxpool_backward":
            definition("maxpool_forward")(x, y, index, *size)
            yield {"dy": dy, "index": index, "dx": dx, **sizes}
        else:
            arrays = {"x": x, "y": y} if name == "avgpool_forward" else {"dy": dy, "dx": dx}
            for include_pad in (0, 1):
                yield {**arrays, **sizes, "include_pad": include_pad}


@large("global_average_forward")
def _global_forward(rng, dtype, name):
    x = random(rng, (7, 49, 130), dtype)
    yield {"x": x, "y": blank((7, 130), dtype), "n": 7, "pixels": 49, "c": 130}


@large("global_average_backward")
def _global_backward(rng, dtype, name):
    dy = random(rng, (7, 130), dtype)
    yield {"dy": dy, "dx": blank((7, 49, 130), dtype), "n": 7, "pixels": 49, "c": 130}


# Local response normalisation


LRN = {"across": [(4099, 33, 5), (30_000, 4, 1), (2000, 96, 9)], "within": [(33, 17, 13, 12, 3), (2, 40, 50, 32, 7)]}


@large("lrn_across_forward", "lrn_across_backward", "lrn_within_forward", "lrn_within_backward")
def _lrn(rng, dtype, name):
    _, region, way = name.split("_")
    for *shape, size in LRN[region]:
        x, scale = random(rng, shape, dtype, 3), positive(rng, shape, dtype)
        sizes = dict(zip(("rows", "c") if region == "across" else ("n", "h", "w", "c"), shape, strict=True))
        given = {"share": 0.05, "beta": 0.75}
        if way == "forward":
            yield {
                "x": x,
                "y": blank(shape, dtype),
                "scale": blank(shape, dtype),
                **given,
                "k": 1.5,
                **sizes,
                "size": size,
            }
        else:
            arrays = {"dy": random(rng, shape, dtype), "x": x, "y": random(rng, shape, dtype), "scale": scale}
            yield {**arrays, "dx": blank(shape, dtype), **given, **sizes, "size": size}


# Dropout, DropConnect, optimizer


@large("dropconnect_weights", "dropconnect_gradient", "dropconnect_forward", "dropconnect_backward_input",
       "dropconnect_backward_weight")  # fmt: skip
def _dropconnect(rng, dtype, name):
    for n, inputs, outputs in ((5, 70, 40), (3, 33, 64), (4, 20, 1)):
        shapes = {"w": (inputs, outputs), "x": (n, inputs), "dy": (n, outputs), "d": (inputs, outputs)}
        shapes |= {"masked": shapes["w"], "dw": shapes["w"], "y": shapes["dy"], "dx": shapes["x"]}
        arguments = {"state": state(batch=12345), "seed": 2**63 + 5, "site": 2**32 - 1, "threshold": 20000}
        arguments |= {"first": 99, "accumulate": 0, "n": n, "inputs": inputs, "outputs": outputs}
        function = getattr(dropconnect, name)
        for key, shape in shapes.items():
            arguments[key] = blank(shape, dtype) if key in ("masked", "dw", "y", "dx") else random(rng, shape, dtype)
        yield {key: arguments[key] for key in inspect.signature(function).parameters}


@large("dropout_apply")
def _dropout(rng, dtype, name):
    for first in (0, 5, 16, 99991):
        for threshold in (0, 6554, 65535):
            yield {
                "x": random(rng, N, dtype),
                "y": blank(N, dtype),
                "state": state(batch=12345),
                "seed": 2**63 + 5,
                "site": 2**32 - 1,
                "threshold": threshold,
                "scale": 1.25,
                "first": first,
                "n": N,
            }


@large("gradient_norm")
def _norm(rng, dtype, name):
    n = 256 * 201
    for parts in (1, 3):
        for last in (0, 1e30, np.inf, np.nan):
            g = random(rng, n, dtype, 1e-2)
            g[-1] = last
            yield {"g": g, "norms": blank(parts, np.float64), "n": n, "parts": parts}


@large("penalty_sum")
def _penalty(rng, dtype, name):
    blocks, rows = 203, 9
    for variant in range(4):
        yield {
            "w": random(rng, blocks * 256, dtype),
            "table": np.sort(rng.integers(0, rows, blocks)).astype(np.int32),
            "decay": positive(rng, rows, dtype),
            "l1": positive(rng, rows, dtype) * (variant % 2),
            "penalties": blank(1, np.float64),
            "decoupled": variant // 2,
            "rows": rows,
            "n": blocks * 256,
            "parts": 1,
        }


@large("sgd_update")
def _sgd(rng, dtype, name):
    blocks, rows, steps = 203, 9, 5
    n = blocks * 256
    for variant in range(8):
        now = state(update=[2, 9][variant % 2], apply=int(variant != 7), gradient_scale=0.02)
        now["lr_scale"][1] = 0.5
        yield {
            "w": random(rng, n, dtype),
            "g": random(rng, n, dtype),
            "velocity": random(rng, n, dtype),
            "table": np.sort(rng.integers(0, rows, blocks)).astype(np.int32),
            "rate": positive(rng, rows, dtype),
            "decay": positive(rng, rows, dtype),
            "group": rng.integers(0, 2, rows).astype(np.int32),
            "rates": positive(rng, steps, dtype),
            "state": now,
            "momentum": 0.9,
            "nesterov": variant >> 1 & 1,
            "caffe": variant >> 2,
            "decoupled": 0,
            "rows": rows,
            "steps": steps,
            "n": n,
        }


@large("adam_update")
def _adam(rng, dtype, name):
    for variant, a in enumerate(_sgd(rng, dtype, "sgd_update")):
        settings = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-3, "decoupled": variant % 2}
        yield {
            "w": a["w"],
            "g": a["g"],
            "mean": a["velocity"],
            "square": positive(rng, a["n"], dtype),
            **{key: a[key] for key in ("table", "rate", "decay", "group", "rates", "state")},
            "correction": np.array([0.3, 0.02], dtype),
            **settings,
            **{key: a[key] for key in ("rows", "steps", "n")},
        }


@pytest.mark.parametrize("name", kinds("sgd_update"))
def test_an_update_reads_the_table_and_the_schedule_at_each_replay(name):
    (arguments, *_) = _sgd(np.random.default_rng(0), np.dtype("float32"), "sgd_update")
    call, quick, _ = bound(name, arguments)
    slow = {k: aligned(v) for k, v in arguments.items()}
    call()
    definition("sgd_update")(**slow)
    for a in (quick, slow):
        a["table"][:] = a["table"][::-1].copy()
        a["rates"][2] = 7
        a["decay"][:] = 0.5
        a["group"][:] = 1
    call()
    definition("sgd_update")(**slow)
    assert_close("w", quick["w"], slow["w"], np.float32)


# Augmentation

CROPS = [  # flip, pad, reflect, mean image, oh - h
    (1, 4, 0, False, 0),
    (1, 4, 1, False, 0),
    (0, 0, 0, False, 0),
    (0, 0, 0, True, 0),
    (1, 4, 0, True, 0),
    (1, 4, 1, True, 0),
    (1, 1, 0, False, -3),
    (0, 12, 0, False, 0),
]


@large("batch_crop_flip")
def _crop_flip(rng, dtype, name):
    h, w, c, n, count = 16, 12, 3, 150, 400
    for i, (flip, pad, reflect, mean_image, more) in enumerate(CROPS):
        channels = h * w * c if mean_image else c
        now = state(batch=13, epoch=6)  # the second of two: 200 .. 400, of which 380 are there
        images = rng.integers(0, 256, (count, h, w, c))
        yield {
            "images": images.astype([np.uint8, np.float32][i % 2]),
            "order": rng.permutation(count)[:380].astype(np.int32),
            "state": now,
            "mean": rng.uniform(90, 140, channels).astype(dtype),
            "scale": rng.uniform(0.01, 0.02, channels).astype(dtype),
            "x": blank((n, h + more, w + more, c), dtype),
            "seed": 7,
            "flip": flip,
            "pad": pad,
            "reflect": reflect,
            "batch": 200,
            "batches": 2,
            "first": [0, 50][i % 2],
            "places": 380,
            "set": count,
            "channels": channels,
            **{"n": n, "h": h, "w": w, "c": c, "oh": h + more, "ow": w + more},
        }


DESCRIPTIONS = [
    {"flip": True, "crop": 4, "cutout": 5},
    {"rotate": 180.0, "zoom": [0.2, 3], "lens": 0.3, "elastic": 20.0, "interpolation": "random", "mixup": 1.0},
    {"shear": 60.0, "stretch": 4.0, "brightness": [0, 2], "contrast": 1.0, "saturation": [0, 3], "hue": 0.5},
    {"rescale": 2.0, "interpolation": "area", "lighting": 3.0, "cutmix": 1.0, "mixup": 0.3, "color_probability": 0.5},
]


def _augmented(rng, dtype):
    """Yield (variant, images, sizes, arguments of transforms_draw with its outputs filled in): 60 of 90 images."""
    h, w, c = 32, 20, 3
    for i, keys in enumerate(DESCRIPTIONS):
        what = Augmentation(**keys)
        mix, elastic, slots = int(what.mixes), int(what.elastic > 0), 70 * (1 + what.mixes)
        moves = slots * 2 * h * w if elastic else 1
        drawn = {
            **{"order": rng.permutation(90).astype(np.int32), "state": state(batch=3, epoch=1)},
            **{"settings": what.table(rng.normal(0, 30, (3, 3))), "weights": what.gaussian},
            **{"geometry": blank((slots, len(GEOMETRY)), np.int64), "color": blank((slots, len(COLOR)), dtype)},
            **{"rows": blank(moves, np.int32), "field": blank(moves, np.int32), "seed": 5},
            **{"mix": mix, "elastic": elastic, "radius": len(what.gaussian) - 1, "batch": 30, "batches": 2},
            **{"first": 0, "places": 90, "n": 70, "h": h, "w": w},
        }
        transforms_draw(**drawn)
        images = rng.integers(0, 256, (90, h, w, c)).astype([np.uint8, np.float32][i == 1])
        yield i, images, {"n": 70, "h": h, "w": w, "c": c}, drawn


@large("batch_warp")
def _warp(rng, dtype, name):
    for i, images, sizes, drawn in _augmented(rng, dtype):
        yield {
            "images": images,
            **{key: drawn[key] for key in ("geometry", "field")},
            "warped": blank((len(drawn["geometry"]), *images.shape[1:]), dtype),
            **{key: drawn[key] for key in ("mix", "elastic")},
            **{"reflect": i % 2, "set": 90, **sizes},
        }


@large("batch_finish")
def _finish(rng, dtype, name):
    for i, images, sizes, drawn in _augmented(rng, dtype):
        channels = images[0].size if i % 2 else 3
        yield {
            "warped": rng.uniform(0, 255, (len(drawn["geometry"]), *images.shape[1:])).astype(dtype),
            **{key: drawn[key] for key in ("geometry", "color")},
            "mean": rng.uniform(90, 140, channels).astype(dtype),
            "scale": rng.uniform(0.01, 0.02, channels).astype(dtype),
            "x": blank((70, *images.shape[1:]), dtype),
            **{"photometric": int(i > 1), "mix": drawn["mix"], "channels": channels, **sizes},
        }


def test_a_batch_changes_with_the_state():
    (arguments, *_) = _crop_flip(np.random.default_rng(0), np.dtype("float32"), "batch_crop_flip")
    call, quick, _ = bound("batch_crop_flip", arguments)
    slow = {k: aligned(v) for k, v in arguments.items()}
    for batch, epoch in ((0, 0), (5, 2), (7, 3)):  # the last of them ends past the places
        quick["state"]["batch"], quick["state"]["epoch"] = batch, epoch
        call()
        definition("batch_crop_flip")(**slow)
        assert_close("x", quick["x"], slow["x"], np.float32)


# Scratch


def test_scratch_hands_out_aligned_views_that_do_not_overlap():
    scratch = Scratch(1000)
    first, second = scratch((3, 5), np.float32), scratch((7,), np.float64)
    assert first.shape == (3, 5) and second.dtype == np.float64
    assert all(v.ctypes.data % ALIGN == 0 for v in (first, second))
    assert not np.shares_memory(first, second)
    scratch.reset()
    assert np.shares_memory(first, scratch((1,), np.uint8))


def test_scratch_that_is_exceeded_says_how_much_there_is():
    scratch = Scratch(1000)
    scratch((900,), np.uint8)
    with pytest.raises(GpunetError, match=r"scratch: expected at most 1000 bytes, got .* with shape \(200,\)"):
        scratch((200,), np.uint8)


@pytest.mark.parametrize("c", [4096, 1 << 16, 1 << 20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_wide_rows_fit_or_are_left_to_the_definition(dtype, c):
    """No size may fail at binding."""
    x, line, pair = np.zeros((3, c), dtype), np.ones(c, dtype), np.zeros((1, 2, c), dtype)
    moments = np.zeros((1, 3, c), dtype)
    scratch = Scratch()
    for name, arguments in {
        "batchnorm_moments": (x, moments, 3, c, 1),
        "batchnorm_forward": (x, line, line, line, line, x, 3, c),
        "batchnorm_backward_sums": (x, x, line, line, pair, 3, c, 1),
        "batchnorm_backward": (x, x, line, line, line, pair, x, 3, 3, c),
        "bias_forward": (line, x, 3, c),
        "column_sum": (x, line, 3, c, 1),
        "maxpool_forward": (x, line, line.astype(np.uint8), 1, 3, 1, c, 1, 1, 3, 1, 1, 1, 0, 0),
        "maxpool_backward": (line, line.astype(np.uint8), x, 1, 3, 1, c, 1, 1, 3, 1, 1, 1, 0, 0),
        "avgpool_forward": (x, line, 1, 3, 1, c, 1, 1, 3, 1, 1, 1, 0, 0, 1),
        "avgpool_backward": (line, x, 1, 3, 1, c, 1, 1, 3, 1, 1, 1, 0, 0, 1),
        "global_average_backward": (line, x, 1, 3, c),
    }.items():
        for twin in kinds(name):
            scratch.reset()
            call = FAST[twin](*arguments, scratch=scratch)
            assert call or (c, dtype) != (4096, np.float32) or twin == "column_sum"  # too small to gain
            if call:
                call()


def test_a_repeated_row_is_whole_rows():
    for c in (1, 3, 512, 700, 40000):
        row = RepeatedRow(Scratch(), c, np.empty((1 << 20,), np.float32))
        row.fill(np.arange(c))
        assert row.flat.size >= c and (row.flat.reshape(-1, c) == np.arange(c, dtype=np.float32)).all()


def test_column_sums_touch_every_row_once():
    for rows, c, parts in ((1, 1, 1), (10, 3, 3), (40001, 5, 2), (300, 700, 7), (64 * 64 * 70, 1, 1)):
        sums = ColumnSums(Scratch(), np.empty((rows, c), np.float32), rows, c, parts, 1)
        seen = np.zeros(rows, int)
        for entries, _ in sums.groups:
            for start, stop, shape, ones, _ in entries:
                seen[start:stop] += 1
                assert shape[0] == ones.size and np.prod(shape) == (stop - start) * c
        assert (seen == 1).all()
