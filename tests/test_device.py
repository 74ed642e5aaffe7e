"""What CUDA and the emulator share: views, copies, arguments, grids, products by cuBLAS's rules; the kernel cache."""

import ctypes
import gc
import os
import platform
import shutil
import stat
import weakref
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from fake_cuda import breaks_rules

from gpunet import resources
from gpunet.backends import cache, device, emulator
from gpunet.backends.device import BLOCKS, DeviceBackend, Product, at_address, blocks_of, host_array, pack, variant
from gpunet.core import sources
from gpunet.core.backend import Types, check_launch
from gpunet.core.state import STATE, new_state
from gpunet.core.trace import Base, Share, Tensor, Trace
from gpunet.errors import GpunetError
from gpunet.nn.conv import Unfold
from gpunet.testing import parity

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="the emulator: there is no g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator's fibers are x86-64"),
]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KERNELS = sources.kernels()


class Strict(emulator.Backend):
    """The emulator, which notes each Product and fails where cuBLAS would refuse it."""

    def __init__(self):
        super().__init__()
        self.products = []

    def bind_product(self, product):
        p = product
        assert not breaks_rules(
            p.left_transposed, p.right_transposed, p.m, p.n, p.k, p.left_step, p.right_step, p.out_step
        ), p
        self.products.append(p)
        return super().bind_product(p)


@pytest.fixture(scope="module")
def backend():
    return Strict()


def place(backend, array):
    """Return the View of a copy of an array."""
    return backend.view(backend.adopt(array), 0, Tensor(Base(array.nbytes), array.shape, array.dtype))


# Products

FREE = 99  # what memory beside a matrix holds


class Matrices:
    """Matrices (batch, rows, columns), or one (rows, columns), laid out in memory like those that layers multiply."""

    LAYOUTS = ("rows", "columns", "apart", "apart, columns")

    def __init__(self, backend, batch, rows, columns, layout, dtype):
        self.backend, shape = backend, (rows, columns) if batch is None else (batch, rows, columns)
        if layout.endswith("columns"):
            stored = self._stored(batch, columns, rows, layout, dtype)
            self.tensor = stored.T if batch is None else Unfold._transposed(stored)
        else:
            self.tensor = self._stored(batch, rows, columns, layout, dtype)
        assert self.tensor.shape == shape
        host = np.full(self.tensor.base.nbytes // dtype.itemsize, FREE, dtype)
        steps = tuple(8 * s for s in self.tensor.element_strides)
        self.places = np.ndarray(shape, np.int64, np.arange(len(host)), 8 * self.tensor.offset, steps)
        self.memory = backend.adopt(host)
        self.whole = backend.view(self.memory, 0, Tensor(self.tensor.base, host.shape, dtype))

    @staticmethod
    def _stored(batch, rows, columns, layout, dtype):
        """Return a tensor whose rows are runs of neighbours: close together, or apart as groups of channels are."""
        ahead, behind = 3, 2
        groups = 1 if batch is None else batch
        if batch is None and layout.startswith("apart"):
            base = Base((ahead + rows * (columns + 5) + behind) * dtype.itemsize)
            return Tensor(base, (rows, columns), dtype, ahead, (columns + 5, 1))
        base = Base((ahead + groups * rows * columns + behind) * dtype.itemsize)
        if batch is None or layout.startswith(("rows", "columns")):
            return Tensor(base, (rows, columns) if batch is None else (batch, rows, columns), dtype, ahead)
        geometry = SimpleNamespace(groups=groups, outputs=groups * columns)
        return Unfold._by_group(geometry, Tensor(base, (rows, groups * columns), dtype, ahead))

    @property
    def view(self):
        return self.backend.view(self.memory, 0, self.tensor)

    def write(self, values):
        host = np.full(self.whole.shape, FREE, self.whole.dtype)
        host[self.places] = values
        self.backend.upload(self.whole, host)
        return host


def multiply(backend, types, a, b, out, accumulate):
    """Do out = a @ b, or out += a @ b, as a traced program does; return all memory of `out`."""
    t = Trace(types, Share(1, 0, 1), {}, None, training=True, engine="unfold")
    t.matmul(a.tensor, b.tensor, out.tensor, accumulate)
    (entry,) = t.entries
    options = entry.options["accumulate"], entry.options["compute"]
    backend.bind_matmul(a.view, b.view, out.view, *options, backend.workspace())()
    return backend.download(out.whole)


TYPES = [
    ("float64", "float64", "float64"), ("float32", "float32", "float32"), ("tf32", "float32", "float32"),
    ("float16", "float16", "float16"), ("float16", "float16", "float32"), ("float16", "float32", "float32"),
    ("bfloat16", BFLOAT16, BFLOAT16), ("bfloat16", BFLOAT16, "float32"),
]  # fmt: skip


def check_products(backend, name, real, result, sizes=((None, 1, 3), (1, 4), (1, 3), (1, 5))):
    """Multiply small whole numbers, whose sums every type holds, in every layout and of every size (batch, m, k, n):
    the result is exact, and nothing beside it is written.
    """
    types, real, result, rng = Types.of(name), np.dtype(real), np.dtype(result), np.random.default_rng(0)
    layouts = product(Matrices.LAYOUTS, Matrices.LAYOUTS, ("rows", "apart"))
    for (*kinds, kind), batch, m, k, n in product(layouts, *sizes):
        a = Matrices(backend, batch, m, k, kinds[0], real)
        b = Matrices(backend, batch, k, n, kinds[1], real)
        out = Matrices(backend, batch, m, n, kind, result)
        x, y, before = (rng.integers(-4, 5, matrices.places.shape) for matrices in (a, b, out))
        a.write(x), b.write(y)
        for accumulate in (0, 1):
            expected = out.write(before)
            expected[out.places] = x.astype(np.float64) @ y.astype(np.float64) + accumulate * before
            got = multiply(backend, types, a, b, out, accumulate)
            assert got.tobytes() == expected.tobytes(), f"{kinds} -> {kind}: {batch}, {m}, {k}, {n}: {accumulate}"


@pytest.mark.parametrize(("name", "real", "result"), TYPES, ids=str)
def test_products_of_every_layout_and_size(backend, name, real, result):
    backend.products.clear()
    check_products(backend, name, real, result)
    seen = {(p.left_transposed, p.right_transposed, p.batch, p.accumulate) for p in backend.products}
    assert seen == set(product((False, True), (False, True), (1, 3), (False, True)))
    assert {p.compute for p in backend.products} == {name}


@pytest.mark.parametrize(("real", "ones"), [("float16", 2048), (BFLOAT16, 256)])
def test_products_of_16_bits_are_summed_in_float_and_rounded_once(backend, real, ones):
    """In the type itself 2048 + 1 is 2048 (bfloat16: 256)."""
    real = np.dtype(real)
    types = Types.of(real.name)
    a, b = (Matrices(backend, None, *shape, "rows", real) for shape in ((1, 3), (3, 1)))
    a.write([[ones, 1, 1]]), b.write([[1], [1], [1]])
    for result, accumulate, before, expected in (
        (real, 0, 0, ones + 2), ("float32", 0, 0, ones + 2), (real, 1, ones, 2 * ones), ("float32", 1, 1, ones + 3),
    ):  # fmt: skip
        out = Matrices(backend, None, 1, 1, "rows", np.dtype(result))
        out.write(before)
        assert multiply(backend, types, a, b, out, accumulate)[out.places] == expected
    a.write([[1, 1, 0]])
    out = Matrices(backend, None, 1, 1, "rows", real)
    out.write(ones)
    assert multiply(backend, types, a, b, out, 1)[out.places] == ones + 2


def strided(backend, shape, strides, offset=0):
    tensor = Tensor(Base(4000), shape, np.dtype("f4"), offset, strides)
    return backend.view(backend.allocate(4000), 0, tensor)


@pytest.mark.parametrize("strides", [(8, 2), (1, 2), (2, 1), (0, 1), (1, 0), (0, 0), (-4, 1), (4, -1), (1, -3), (4, 3)])
def test_strides_that_cublas_has_no_words_for_are_refused(backend, strides):
    """Elements apart, rows over each other, and rows or columns backwards."""
    good, bad = strided(backend, (4, 4), (4, 1)), strided(backend, (4, 4), strides, 100)
    for name, views in (("b", (good, bad, good)), ("a", (bad, good, good)), ("out", (good, good, bad))):
        with pytest.raises(GpunetError) as error:
            Product.of(*views, 0, "float32")
        assert str(error.value) == (
            f"matmul: {name}: expected rows or columns of neighbours, got strides {strides}"
        )


def test_a_result_is_stored_in_rows(backend):
    good, turned = strided(backend, (4, 3), (3, 1)), strided(backend, (4, 4), (1, 4))
    with pytest.raises(GpunetError, match=r"^matmul: out: expected rows of neighbours, got strides \(1, 4\)$"):
        Product.of(good, strided(backend, (3, 4), (4, 1)), turned, 0, "float32")


@pytest.mark.parametrize(("m", "k", "n"), [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_products_are_refused(backend, m, k, n):
    """cuBLAS with k = 0 would leave the result as it is, NumPy would clear it."""
    views = [strided(backend, shape, (max(shape[1], 1), 1)) for shape in ((m, k), (k, n), (m, n))]
    with pytest.raises(GpunetError, match=rf"^matmul: expected matrices that are not empty, got \({m}, {k}\) @"):
        backend.bind_matmul(*views, 0, "float32", None)


# Views and copies


def test_a_view_knows_its_place_and_keeps_its_memory(backend):
    memory = backend.allocate(480)
    view = backend.view(memory, 40, Tensor(Base(0), (2, 3, 4), np.dtype("f4"), 5))
    assert (view.pointer, view.memory) == (memory.pointer + 40 + 5 * 4, memory)
    assert (view.size, view.nbytes, view.element_strides, view.contiguous) == (24, 96, (12, 4, 1), True)
    turned = backend.view(memory, 0, Tensor(Base(0), (3, 2), np.dtype("f4")).T)
    assert (turned.shape, turned.element_strides, turned.contiguous) == ((2, 3), (1, 2), False)
    scalar = backend.view(memory, 0, Tensor(Base(0), (), STATE))
    assert (scalar.size, scalar.nbytes, scalar.element_strides, scalar.contiguous) == (1, STATE.itemsize, (), True)


def test_rows_of_a_view(backend):
    array = np.arange(5 * 6, dtype=np.int32).reshape(5, 6)
    view = place(backend, array)
    for rows in (slice(0, 5), slice(1, 3), slice(None, 2), slice(2, None), slice(-1, None), slice(4, 9), slice(3, 3),
                 slice(4, 1)):  # fmt: skip
        np.testing.assert_array_equal(backend.download(view[rows]), array[rows])
        np.testing.assert_array_equal(backend.download(view[rows][1:]), array[rows][1:])
    columns = backend.view(view.memory, 0, Tensor(Base(0), (5, 6), array.dtype).T)
    np.testing.assert_array_equal(host_array(columns[2:4]), array.T[2:4])
    for rows in (slice(None, None, 2), slice(None, None, -1)):
        with pytest.raises(GpunetError, match=r"^view: expected a range of rows, got slice\(None, None, "):
            view[rows]


def test_an_upload_is_broadcast_and_converted(backend):
    for dtype in ("f8", "f4", "f2", BFLOAT16, "i4", "u1", "i8"):
        view = place(backend, np.zeros((3, 4), dtype))
        for given in (7, 7.0, np.float64(7), np.arange(4), np.arange(12.0).reshape(3, 4), np.arange(3)[:, None],
                      np.arange(12).reshape(4, 3).T, np.arange(24).reshape(3, 8)[:, ::2], [[1, 2, 3, 4]]):  # fmt: skip
            backend.upload(view, given)
            got = backend.download(view)
            assert got.dtype == dtype
            np.testing.assert_array_equal(got.astype(float), np.broadcast_to(given, (3, 4)))
    backend.upload(view[1:2], 9)
    np.testing.assert_array_equal(backend.download(view)[:, 0], [1, 9, 1])
    state = new_state(8.0)
    record = backend.view(backend.allocate(STATE.itemsize), 0, Tensor(Base(0), (), STATE))
    backend.upload(record, state)
    assert backend.download(record) == state
    with pytest.raises(ValueError, match="broadcast"):
        backend.upload(view, np.zeros(5))


def test_a_download_is_a_copy_of_a_contiguous_view(backend):
    view = place(backend, np.arange(6.0).reshape(2, 3))
    got = backend.download(view)
    got += 1
    assert backend.download(view)[0, 0] == 0
    turned = backend.view(view.memory, 0, Tensor(Base(0), (2, 3), np.dtype("f8")).T)
    with pytest.raises(GpunetError, match=r"^download: expected a contiguous view, got strides \(1, 3\)$"):
        backend.download(turned)


def test_empty_views_take_part(backend):
    memory = backend.allocate(0)
    assert memory.pointer % 256 == 0 and backend.allocate_shared(0).pointer
    view = backend.view(memory, 0, Tensor(Base(0), (0, 3), np.dtype("f4")))
    backend.upload(view, np.zeros((0, 3)))
    backend.upload(view, 5)
    assert backend.download(view).shape == host_array(view).shape == (0, 3)
    assert at_address(view, (0,), (1,)).shape == (0,)
    assert backend.adopt(np.zeros((0, 2))).nbytes == 1


def test_adopted_memory_is_a_copy(backend):
    array = np.arange(12, dtype=np.int64).reshape(3, 4).T
    view = backend.view(backend.adopt(array), 0, Tensor(Base(0), (4, 3), array.dtype))
    np.testing.assert_array_equal(backend.download(view), array)
    array[0, 0] = 77
    assert backend.download(view)[0, 0] == 0


def test_shared_memory_is_seen_as_it_is(backend):
    memory = backend.allocate_shared(24)
    view = backend.view(memory, 0, Tensor(Base(0), (3,), np.dtype("f8")))
    seen = backend.peek(view)
    assert not seen.any()
    backend.upload(view, [1, 2, 3])
    assert seen.tolist() == [1, 2, 3]
    del view, memory
    assert seen.tolist() == [1, 2, 3], "it keeps its memory"


def test_memory_that_cannot_be_had():
    with pytest.raises(GpunetError, match=r"^emulator: 4,611,686,018,427,387,904 bytes cannot be had$"):
        emulator.Backend().allocate(1 << 62)


# Arguments

SCALARS = """#include "common.cuh"
// launch: blocks=1
KERNEL echo(double* y /*9*/, int a, unsigned int b, long long c, unsigned long long d, unsigned char e, float f,
            double g, wide h, real* x /*1*/) {
    if (threadIdx.x) return;
    y[0] = a; y[1] = b; y[2] = (double)c; y[3] = (double)d; y[4] = e; y[5] = f; y[6] = g; y[7] = h; y[8] = load(x);
}
"""


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16"])
def test_a_kernel_receives_what_it_was_given(backend, name, tmp_path, monkeypatch):
    """Every type at its limits: through the door, in the width that the kernel reads."""
    for header in resources.kernels().glob("*.cuh"):
        shutil.copy(header, tmp_path)
    (tmp_path / "echo.cu").write_text(SCALARS)
    monkeypatch.setenv("GPUNET_CACHE", str(tmp_path))
    types, kernel = Types.of(name), sources.parse(tmp_path / "echo.cu")["echo"]
    for numbers in (
        (-(2**31), 2**32 - 1, -(2**63), 2**63, 255, 0.1, 0.1, 0.1),
        (np.int32(2**31 - 1), np.float64(7), 2**62, 2**64 - 2048, np.uint8(9), np.float32(0.1), 1e300, -1e-30),
    ):
        y, x = np.zeros(9), np.array([1.5], types.real)
        tensors = [Tensor(Base(v.nbytes), v.shape, v.dtype) for v in (y, x)]
        *_, cast = [check_launch(kernel, (tensors[0], *numbers, tensors[1]), types, "here")]
        views = [place(backend, y), *cast[1:-1], place(backend, x)]
        backend.bind_launch(kernel, views, backend.workspace())()
        floats = (np.float32(numbers[5]), numbers[6], types.wide.type(numbers[7]), 1.5)
        expected = [*map(float, numbers[:5]), *map(float, floats)]
        assert backend.download(views[0]).tolist() == expected


WIDTHS = {"int": ctypes.c_int32, "unsigned int": ctypes.c_uint32, "long long": ctypes.c_int64,
          "unsigned long long": ctypes.c_uint64, "unsigned char": ctypes.c_uint8, "float": ctypes.c_float,
          "double": ctypes.c_double}  # fmt: skip


@pytest.mark.parametrize("name", parity.TYPES)
def test_every_kernels_arguments_are_packed_in_their_own_types(backend, name):
    for subject in parity.subjects():
        arguments = subject.case(np.random.default_rng(0), 0, *parity.TYPES[name])
        views = parity.on_device(backend, arguments)
        real, pixel = variant(subject.kernel, views)
        addresses, values = pack(subject.kernel, views, real)
        assert [ctypes.addressof(v) for v in values] == list(addresses)
        for declared, given, value in zip(subject.kernel.arguments, views, values, strict=True):
            where = f"{subject.kernel.name}: {declared.name}"
            if declared.pointer:
                assert (type(value), value.value) == (ctypes.c_void_p, given.pointer), where
                kinds = {"real": real, "pixel": pixel, "wide": "double" if real == "double" else "float"}
                kind = kinds.get(declared.type)
                assert kind is None or {"half": "float16", "uint8": "uint8"}.get(kind, kind) in (
                    given.dtype.name, {"float32": "float", "float64": "double"}.get(given.dtype.name)
                ), where  # fmt: skip
            else:
                wide = "double" if name == "float64" else "float"
                kind = wide if declared.type == "wide" else declared.type
                assert type(value) is WIDTHS[kind], where
                assert value.value == WIDTHS[kind](given).value, where


def of(name, shape=(4,)):
    return Tensor(Base(0), shape, np.dtype(name))


@pytest.mark.parametrize(
    ("kernel", "arguments", "expected"),
    [
        ("relu_forward", (of("f4"), of("f4"), 4), ("float", "uint8")),
        ("relu_forward", (of("f8"), of("f8"), 4), ("double", "uint8")),
        ("relu_forward", (of("f2"), of("f2"), 4), ("half", "uint8")),
        ("relu_forward", (of(BFLOAT16), of(BFLOAT16), 4), ("bfloat16", "uint8")),
        ("cast_forward", (of("f4"), of(BFLOAT16), 4), ("bfloat16", "uint8")),  # wide before real
        ("cast_forward", (of("f8"), of("f8"), 4), ("double", "uint8")),
        ("gradient_norm", (of("f4"), of("f8"), 4, 1), ("float", "uint8")),  # wide alone
        ("gradient_norm", (of("f8"), of("f8"), 4, 1), ("double", "uint8")),
        ("order_stored", (of("i4"), 4), ("float", "uint8")),  # neither
        ("state_update", (of(STATE),), ("float", "uint8")),
    ],
)
def test_the_variant_that_arguments_ask_for(kernel, arguments, expected):
    assert variant(KERNELS[kernel], arguments) == expected


@pytest.mark.parametrize("pixel", ["uint8", "float"])
def test_pixels_choose_their_own_variant(pixel):
    kernel = KERNELS["batch_crop_flip"]
    given = {"pixel": of({"uint8": "u1", "float": "f4"}[pixel]), "real": of("f2"), "wide": of("f4"), "State": of(STATE)}
    arguments = [given.get(a.type, of("i4")) if a.pointer else 1 for a in kernel.arguments]
    assert variant(kernel, arguments) == ("half", pixel)


@pytest.mark.parametrize(
    ("form", "count", "n", "expected"),
    [
        ("over", "n", 0, 1), ("over", "n", 1, 1), ("over", "n", 256, 1), ("over", "n", 257, 2),
        ("over", "n", 1 << 40, BLOCKS), ("over", "n", np.int64(600), 3),
        ("over", "(n+3)//4", 1024, 1), ("over", "(n+3)//4", 1025, 2),
        ("blocks", "n", 0, 1), ("blocks", "n", 77, 77), ("blocks", "1", 77, 1),
        ("blocks", "n", (1 << 31) - 1, (1 << 31) - 1),  # not cut: each block has its own work
    ],
)  # fmt: skip
def test_the_grid(form, count, n, expected):
    kernel = replace(KERNELS["relu_forward"], form=form, count=count)
    assert blocks_of(kernel, [None, None, n]) == expected
    if form == "over":
        assert blocks_of(kernel, [None, None, n], most=2) == min(expected, 2)


def test_an_empty_launch_touches_nothing(backend):
    memory = backend.allocate(4)
    backend.upload(whole := backend.view(memory, 0, Tensor(Base(0), (1,), np.dtype("f4"))), 5)
    empty = whole[:0]
    backend.bind_launch(KERNELS["relu_forward"], [empty, empty, 0], None)()
    assert backend.download(whole) == 5


def test_a_launch_is_replayed_on_the_memory_that_it_was_bound_to(backend):
    """The call alone keeps its arguments alive."""
    x = place(backend, np.array([-1, 2, -3], np.float32))
    out = backend.allocate(12)
    y = backend.view(out, 0, Tensor(Base(0), (3,), np.dtype("f4")))
    call = backend.bind_launch(KERNELS["relu_forward"], [x, y, 3], None)
    call()
    assert backend.download(y).tolist() == [0, 2, 0]
    backend.upload(x, [4, -5, 6])
    del x
    call()
    assert backend.download(y).tolist() == [4, 0, 6]


def test_a_call_keeps_the_numbers_that_it_points_to(backend, monkeypatch):
    """A launch on a GPU knows their address only; the memory would soon be another's."""
    alive = []

    def noted(*given):
        addresses, values = pack(*given)
        alive.extend(map(weakref.ref, (addresses, *values)))
        return addresses, values

    monkeypatch.setattr(device, "pack", noted)
    monkeypatch.setattr(backend, "bind_function", lambda *given: lambda: None)
    view = place(backend, np.zeros(3, np.float32))
    call = backend.bind_launch(KERNELS["relu_forward"], [view, view, 3], None)
    gc.collect()
    assert len(alive) == 4 and all(reference() is not None for reference in alive)
    del call
    gc.collect()
    assert not any(reference() for reference in alive)


def test_the_hosts_arrays_are_no_views(backend):
    x, view = np.zeros(3, np.float32), place(backend, np.zeros(3, np.float32))
    for arguments in ([x, view, 3], [view, x, 3]):
        with pytest.raises(AttributeError, match="pointer"):
            backend.bind_launch(KERNELS["relu_forward"], arguments, None)
    matrix = place(backend, np.zeros((2, 2), np.float32))
    with pytest.raises(AttributeError):
        backend.bind_matmul(np.zeros((2, 2), np.float32), matrix, matrix, 0, "float32", None)
    with pytest.raises(ValueError, match="array element"):
        np.asarray(view, np.float32)


def test_what_a_device_must_give():
    """The shared half has nothing of its own to compute with."""
    bare = DeviceBackend()
    for call in (
        lambda: bare.malloc(1), lambda: bare.malloc_shared(1), lambda: bare.copy_in(0, None),
        lambda: bare.copy_out(None, 0), lambda: bare.compile(set()),
        lambda: bare.bind_function(None, "float", "uint8", 1, None), lambda: bare.bind_product(None),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError):
            call()
    assert bare.memory() is None and bare.workspace() is None and bare.synchronize() is None
    assert bare.engine(Types.of("float32")) == "unfold"
    assert bare.holders() == "nobody else is known to hold memory"


def test_sums_are_cut_into_parts_that_are_worth_a_block(backend):
    for rows, tiles, expected in ((1, 1, 1), (63, 1, 1), (128, 1, 2), (1 << 20, 1, 512), (1 << 20, 16, 32),
                                  (1 << 20, 2000, 1)):  # fmt: skip
        assert backend.parts(rows, tiles) == expected


def test_there_are_no_engine_passes_and_one_device(backend):
    view = place(backend, np.zeros(3))
    with pytest.raises(GpunetError, match=r": replicas: expected 1, got 2; it runs on one device$"):
        DeviceBackend.bind_reduce(backend, "sum", [view, view], view)
    with pytest.raises(GpunetError, match=r"^backend emulator: there is no engine pass 'blocked_forward'$"):
        backend.bind_call("blocked_forward", [], {}, None)


def test_replicas_meet_in_their_order(backend):
    """Sums too: (1e20 - 1e20) + 1 is 1, in another order 0. The sum may lie over what is summed."""
    views = [place(backend, np.array([v, v * 2])) for v in (1e20, -1e20, 1.0)]
    out = place(backend, np.zeros((3, 2)))
    backend.bind_reduce("gather", views, out)()
    assert backend.download(out)[:, 0].tolist() == [1e20, -1e20, 1]
    backend.bind_reduce("sum", views, views[1])()
    assert backend.download(views[1]).tolist() == [1, 2]


def test_the_emulator_says_why_it_cannot_run(monkeypatch):
    assert emulator.problem() is None
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(GpunetError, match=r"^backend emulator: there is no g\+\+ to compile kernels with; install it"):
        emulator.Backend()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(GpunetError, match=r"^backend emulator: its fibers .* this machine is aarch64$"):
        emulator.Backend()


# The cache of compiled kernels


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """The folder that GPUNET_CACHE asks for."""
    monkeypatch.setenv("GPUNET_CACHE", str(tmp_path / "mine"))
    return tmp_path / "mine" / "kernels"


def test_the_cache_is_where_it_was_asked_for(kernels, tmp_path, monkeypatch):
    assert cache.folder() == kernels and stat.S_IMODE(kernels.stat().st_mode) == 0o700
    assert cache.folder() == kernels, "it may be there"
    monkeypatch.delenv("GPUNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "gpunet" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home" / ".cache" / "gpunet" / "kernels"


@pytest.mark.parametrize(("mode", "good"), [(0o700, True), (0o755, True), (0o720, False), (0o702, False)])
def test_nobody_else_may_write_the_cache(kernels, mode, good):
    cache.folder().chmod(mode)
    if good:
        assert cache.folder() == kernels
        return
    expected = rf"^kernel cache '{kernels}': expected a folder that only you may write, got mode {mode:o};"
    with pytest.raises(GpunetError, match=expected):
        cache.folder()


def test_the_cache_is_the_users_own(kernels, monkeypatch):
    cache.folder()
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    expected = rf"^kernel cache .*: expected a folder of your own \(user {owner + 1}\), got one of user {owner};"
    with pytest.raises(GpunetError, match=expected):
        cache.folder()


def test_a_cache_that_cannot_be_written_is_told(kernels, monkeypatch):
    cache.folder()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whatever the mode, root may
    with pytest.raises(GpunetError, match=rf"^kernel cache '{kernels}': cannot be written; name another folder"):
        cache.folder()


def test_what_is_kept_is_made_once_and_whole(kernels):
    made = []

    def make(target):
        made.append(target)
        assert target.parent == kernels and target.name.startswith(".making-")
        target.write_text("code")

    path = cache.kept("a.cubin", make)
    assert path == kernels / "a.cubin" and path.read_text() == "code"
    assert cache.kept("a.cubin", make) == path and len(made) == 1
    assert list(kernels.iterdir()) == [path]


def test_what_cannot_be_made_leaves_nothing(kernels, monkeypatch):
    def fail(target):
        target.write_text("half")
        raise GpunetError("does not compile")

    with pytest.raises(GpunetError, match="^does not compile$"):
        cache.kept("a.cubin", fail)
    with pytest.raises(GpunetError, match=rf"^kernel cache '{kernels}/a.cubin': cannot be written: No space left"):
        cache.kept("a.cubin", lambda target: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert list(kernels.iterdir()) == []

    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.tempfile, "mkstemp", full)
    with pytest.raises(GpunetError, match=rf"^kernel cache '{kernels}': cannot be written: No space left on device$"):
        cache.kept("a.cubin", fail)


def test_a_key_is_that_of_all_its_parts():
    keys = {cache.key(*parts) for parts in (("a", "b"), ("ab",), ("ab", ""), ("", "ab"), ("b", "a"), ("a", "b", ""))}
    assert len(keys) == 6 and all(len(key) == 32 for key in keys)
    assert cache.key("a", "b") == cache.key("a", "b")
