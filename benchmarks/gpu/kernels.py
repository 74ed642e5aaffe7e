"""Part kernels: what the device can do (copies, products), and how near each kernel comes to it.

Launches are those of real programs, measured where they stand in the list; kernels that none of the nets uses run on
arrays larger than the cache.
"""

import traceback
from functools import partial

import numpy as np

from gpu.bench import Item
from gpu.training import Training
from gpunet.core import sources
from gpunet.core.backend import STORAGE, Types, dtypes_of, evaluate
from gpunet.core.state import STATE, new_state

USED = ("resnet9", "airbench", "cifar10_quick", "resnet20")
BATCHES = (2048, 512)
TYPES = ("float16", "float32")
SHAPING = ("c", "k", "kh", "stride_y")  # sizes that decide how a kernel reads and writes
LAUNCH = 10e-3  # ms: what takes less is bound by its launch
MEASURED_ALONE = {"order_draw", "state_advance"}  # programs that no plan asks for
NEVER = {"order_balanced"}  # it comes to no end on a class without images, which zeros are

COPIES, SQUARES, TALL, KERNELS = (
    "Copies within the device",
    "Square products",
    "Products of the nets",
    "Kernels",
)
ABOUT = {
    COPIES: "cudaMemcpyAsync, the best of several means; bytes read and bytes written are counted.",
    SQUARES: "cuBLAS through gpunet's binding, on normal random numbers.",
    TALL: "Shapes of one training step (m x k @ k x n; T: stored transposed), those with most work in each net.",
    KERNELS: "The largest launch of each kernel, type and shape. Bytes: every tensor once, as the profile counts them, "
    "so that what is updated in place (bias_forward, sgd_update) shows less than it moves. `of copy` is the share of "
    "the best copy above; a launch is repeated on the same memory, so that what fits into the L2 cache is read from "
    "there and may show more than 1.",
}
GENERATED = {  # sizes of kernels that no net uses; all else takes n elements
    "concat_forward": {"rows": 1 << 20, "c": 64, "width": 128, "offset": 64},
    "concat_backward": {"rows": 1 << 20, "c": 64, "width": 128, "offset": 64},
    "dropout_apply": {"n": 1 << 26, "threshold": 13107},
    "mean_squared_error": {"n": 1 << 20, "k": 64},
    "transforms_draw": {"n": 4096, "places": 4096, "batch": 4096, "first": 0, "mix": 0, "h": 32, "w": 32, "radius": 12},
    "batch_warp": {"n": 4096, "set": 4096, "mix": 0, "elastic": 0, "h": 32, "w": 32, "c": 3},
    "batch_finish": {"n": 4096, "mix": 0, "channels": 3, "h": 32, "w": 32, "c": 3},
    "batch_targets_mixed": {"n": 1 << 20, "set": 1 << 20, "k": 64},
    "batch_values": dict.fromkeys(("batch", "places", "set", "n"), 1 << 20) | {"batches": 1, "first": 0, "k": 64},
}
ELEMENTS = 1 << 26
TINY = 64  # a quick run divides sizes of thousands and more until they are about this


def items(options):
    """Return the items, ceilings first."""
    found = [Item("copies", copies)]
    found += [Item(f"squares {dtype}", partial(squares, dtype=dtype)) for dtype in ("float16", "float32")]
    found += [
        Item(f"{net} {batch} {dtype}", partial(sweep, net=net, batch=batch, dtype=dtype), needs=5)
        for batch in BATCHES
        for dtype in TYPES
        for net in USED
    ]
    found += [Item(f"others {dtype}", partial(others, dtype=dtype)) for dtype in TYPES]
    found += [Item(f"squares {dtype}", partial(squares, dtype=dtype)) for dtype in ("bfloat16", "tf32")]
    found += [
        Item(f"products {net} {dtype}", partial(products, net=net, dtype=dtype))
        for dtype in ("float16", "float32", "tf32", "bfloat16")
        for net in ("resnet9", "airbench")
    ]
    return found


def copies(bench):
    """Measure copies of several sizes."""
    rows = [{"copied, MB": n / 1e6, "GB/s": rate} for n, rate in bench.bandwidth.items()]
    best = max(bench.bandwidth.values())
    return {"line": f"{best:,.0f} GB/s", "best_gb_s": best, "about": ABOUT, "rows": {COPIES: rows}}


# Products


def squares(bench, dtype):
    """Measure square products of a type."""
    real, rows = np.dtype(STORAGE[dtype]), []
    for size in (64,) if bench.quick else (4096, 8192):
        a, b, out = (bench.array((size, size), real) for _ in range(3))
        ms = bench.measure(bench.backend.bind_matmul(a, b, out, 0, dtype, None))
        rows.append({"type": dtype, "m = n = k": size, "ms": ms, "TFLOP/s": 2 * size**3 / ms / 1e9})
    best = max(row["TFLOP/s"] for row in rows)
    return {"line": f"{best:,.0f} TFLOP/s", "about": ABOUT, "rows": {SQUARES: rows}}


def products(bench, net, dtype):
    """Measure the largest of a net's products, on memory of their own."""
    count = 4 if bench.quick else 512
    training = Training(bench, net, count, dtype, 4 * count)
    shapes = {}
    for entry in training.entries("matmul"):
        a, b, _ = entry.arguments
        shapes.setdefault((a.shape, b.shape, a.element_strides, b.element_strides), entry)
    largest = sorted(shapes.values(), key=lambda entry: -entry.flops)[: 2 if bench.quick else 10]
    rows = []
    for entry in largest:
        a, b, out = (_like(bench, tensor) for tensor in entry.arguments)
        ms = bench.measure(bench.backend.bind_matmul(a, b, out, 0, dtype, None))
        rows.append(
            {
                "net": f"{net} {count}",
                "type": dtype,
                "product": f"{_matrix(entry.arguments[0])} @ {_matrix(entry.arguments[1])}",
                "ms": ms,
                "TFLOP/s": entry.flops / ms / 1e9,
            }
        )
    best = max(row["TFLOP/s"] for row in rows)
    return {"line": f"best {best:,.0f} TFLOP/s", "about": ABOUT, "rows": {TALL: rows}}


def _like(bench, tensor):
    """Return a View of new random memory with a traced tensor's shape and strides."""
    steps = tensor.element_strides
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, steps, strict=True))
    memory = bench.array((span,), tensor.dtype)
    return type(memory)(memory.memory, memory.pointer, tensor.shape, tensor.dtype, steps)


def _matrix(tensor):
    rows, columns = tensor.shape[-2:]
    transposed = tensor.element_strides[-1] != 1 and columns > 1
    return f"{rows} x {columns}{' T' if transposed else ''}"


# Kernels


def sweep(bench, net, batch, dtype):
    """Measure the largest launch of each kernel and shape in all programs of a net."""
    count = 4 if bench.quick else batch
    training = Training(bench, net, count, dtype, 4 * count).start()
    training.start_evaluation()
    keys = [*training.keys, *training.order]
    largest = {}
    for key in (*keys, *training.evaluation):
        for entry, _ in training.bound(key):
            if entry.kind == "launch":
                known = largest.setdefault(identity(entry), entry)
                largest[identity(entry)] = max(known, entry, key=lambda e: e.nbytes)
    chosen = set(map(id, largest.values()))

    def wanted(entry):
        return id(entry) in chosen

    walked = training.walk(training.keys, wanted)
    applied = training.applied
    rest = [key for key in (*training.order, *training.evaluation) if key not in training.keys]
    walked += [pair for key in rest for pair in training.walk([key], wanted)]
    rows = [row_of(bench, entry, ms, dtype, f"{net} {count}") for entry, ms in walked]
    problems = [] if applied else ["the last update was not applied, so the times of its kernels are too small"]
    return {"line": f"{len(rows)} launches", "problems": problems, "about": ABOUT, "rows": {KERNELS: rows}}


def identity(entry):
    """Return what makes launches of one type comparable: kernel and shape."""
    return entry.name, shape_of(entry.name, entry.arguments)


def shape_of(name, arguments):
    """Return the sizes that decide how a kernel reads and writes; channels in three classes."""
    words = []
    for declared, given in zip(sources.kernels()[name].arguments, arguments, strict=True):
        if declared.name == "c":
            words.append("c < 16" if given < 16 else "c < 128" if given < 128 else "c >= 128")
        elif declared.name in SHAPING:
            words.append(f"{declared.name.removesuffix('_y')} {given}")
    return ", ".join(words)


def row_of(bench, entry, ms, dtype, where):
    """Return the row of a measured launch; of rows with one `_key` the report keeps that of the largest `_size`."""
    shape = shape_of(entry.name, entry.arguments)
    return kernel_row(bench, entry.name, dtype, shape, where, entry.nbytes, ms)


def kernel_row(bench, name, dtype, shape, where, nbytes, ms):
    """Return a row of the table of kernels."""
    rate = nbytes / ms / 1e6
    note = "launch-bound" if ms < LAUNCH else "fits in L2" if nbytes < bench.l2 else ""
    return {
        "_key": f"{name} {dtype} {shape}",
        "_size": nbytes,
        "kernel": name,
        "type": dtype,
        "shape": shape,
        "net, batch": where,
        "us": 1e3 * ms,
        "MB": nbytes / 1e6,
        "GB/s": rate,
        "of copy": rate / max(bench.bandwidth.values()),
        "note": note,
    }


# Kernels that no net uses


def others(bench, dtype):
    """Measure the kernels that none of the nets launches in this type."""
    used = MEASURED_ALONE | NEVER
    for net in USED:
        used |= Training(bench, net, 4, dtype, 16).names()
    rows, problems = [], []
    for name in sorted(sources.kernels().keys() - used):
        try:
            rows.append(generated(bench, sources.kernels()[name], dtype))
        except Exception:
            problems.append(f"{name}: {traceback.format_exc(limit=-3)}")
    return {"line": f"{len(rows)} kernels", "problems": problems, "about": ABOUT, "rows": {KERNELS: rows}}


def generated(bench, kernel, dtype):
    """Measure a kernel on generated arguments and return its row."""
    values, nbytes = arguments(bench, kernel, dtype)
    ms = bench.measure(bench.backend.bind_launch(kernel, values, None))
    return kernel_row(bench, kernel.name, dtype, shape_of(kernel.name, values), "generated", nbytes, ms)


def arguments(bench, kernel, dtype):
    """Return (arguments, bytes): arrays as large as the kernel's extents say for the sizes above, and numbers."""
    types, values, sizes = Types.of(dtype), {}, GENERATED.get(kernel.name, {"n": ELEMENTS})
    for declared in kernel.arguments:
        if declared.pointer:
            continue
        if dtypes_of(declared.type, types)[0].kind == "f":
            values[declared.name] = 0.5
        else:
            values[declared.name] = _tiny(sizes.get(declared.name, 1), bench.quick)
    nbytes = 0
    for declared in kernel.arguments:
        if declared.pointer:
            dtype_of = dtypes_of(declared.type, types)[0]
            count = evaluate(declared.extent, {k: v for k, v in values.items() if isinstance(v, int)})
            array = bench.array((), STATE, new_state()) if dtype_of == STATE else bench.array((count,), dtype_of)
            values[declared.name] = array
            nbytes += array.nbytes
    return [values[declared.name] for declared in kernel.arguments], nbytes


def _tiny(size, quick):
    while quick and size > 1000:
        size //= TINY
    return size
