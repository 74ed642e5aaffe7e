"""The CUDA backend: on an imagined GPU (fake_cuda.py) with the real NVRTC, and, where there is one, on a real one.

The imagined one runs the kernels' text on the CPU. So what it proves is the backend's own work: what is compiled and
loaded; what is launched, with which bytes, where and when; what is captured; what is said when something fails.
"""

import ctypes
import gc
import inspect
import platform
import re
import shutil
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import fake_cuda
import numpy as np
import pytest
from test_device import TYPES, check_products
from test_trajectories import IMAGES, assert_agree, assert_same, everything, source, step_of, trained

from gpunet.backends import cuda, emulator
from gpunet.backends.cuda import detect, nvrtc
from gpunet.backends.numpy import Backend as NumPy
from gpunet.core import sources
from gpunet.core.step import METRICS
from gpunet.core.trace import Base, Tensor
from gpunet.errors import GpunetError
from gpunet.testing import parity
from gpunet.train import Trainer, parse_config, report
from gpunet.train.progress import Progress

MISSING = (
    "the emulator: there is no g++" if not shutil.which("g++")
    else "the emulator's fibers are x86-64" if platform.machine() != "x86_64"
    else "NVRTC: pip install nvidia-cuda-nvrtc" if not nvrtc.available() else None
)  # fmt: skip
CUBLAS = "libcublas.so.13, imagined"
RELU = sources.kernels()["relu_forward"]


# A GPU, imagined or real


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """{code: (path, REAL, PIXEL)} of all that NVRTC builds for this module, in a cache of its own."""
    found, build = {}, nvrtc.build

    def noted(text, name, architecture, defines):
        made = build(text, name, architecture, defines)
        path = re.search(rf'#line \d+ "(.*/{re.escape(name)})"', text)[1]
        found[made.cubin] = Path(path), *(define.partition("=")[2] for define in defines)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPUNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(nvrtc, "build", noted)
        yield found


@pytest.fixture
def gpu(cubins, monkeypatch):
    """An imagined GPU, its CuPy, and its cuBLAS as gpu.cublas."""
    if MISSING:
        pytest.skip(MISSING)
    device = fake_cuda.Gpu()
    device.cubins, device.cublas, device.opened = cubins, fake_cuda.Cublas(device), []
    monkeypatch.setitem(sys.modules, "cupy", fake_cuda.cupy(device))
    monkeypatch.setattr(detect, "holders", lambda: [(77, "python", 900 << 20), (78, "java", None)])
    yield device
    device.close()


def facts(capability=(9, 0), **other):
    """What detect would find there; NVRTC is the real one."""
    devices = (detect.Device("Imagined", capability, 1 << 30),)
    found = detect.Facts(13000, "", devices, (("cupy-cuda13x", "14.2.0"),), CUBLAS, detect.look().nvrtc)
    return replace(found, **other)


@pytest.fixture
def start(gpu):
    """A function that makes a Backend on the imagined GPU."""
    kind, load, usual = cuda.Backend, ctypes.CDLL, facts()

    def opened(name, *mode):
        gpu.opened.append((name, *mode))
        return gpu.cublas if name == CUBLAS else load(name, *mode)

    def make(found=None, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ctypes, "CDLL", opened)
            return kind(facts=found or usual, **options)

    return make


@pytest.fixture
def real():
    """A function that makes a Backend on a real GPU; without one the test is skipped, with the reason."""
    reason = detect.problem(detect.look())
    if reason:
        pytest.skip(f"needs a GPU: {reason}")
    return cuda.Backend


@pytest.fixture(params=["start", "real"])
def anywhere(request):
    """A function that makes a Backend, on either."""
    return request.getfixturevalue(request.param)


def place(backend, array):
    """Return the View of a copy of an array."""
    return backend.view(backend.adopt(array), 0, Tensor(Base(array.nbytes), array.shape, array.dtype))


# What is imagined of CuPy is what CuPy has


def imagined_parameters(function):
    """Return [(parameter, its default as text, or None)]."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "gpu")]
    return [(p.name, None if p.default is p.empty else repr(p.default)) for p in parameters]


def cupys_parameters(function):
    """Return the same of a compiled function, by the first line of its documentation."""
    inside = re.match(r"[\w.]+\((.*)\)", function.__doc__.split("\n")[0])[1]
    pairs = [piece.partition("=") for piece in inside.split(", ") if piece not in ("", "self")]
    return [(name.split()[-1], default or None) for name, _, default in pairs]


def test_the_imagined_functions_have_cupys_signatures():
    pytest.importorskip("cupy", "14")
    from cupy.cuda import function, graph, stream
    from cupy_backends.cuda.api import driver, runtime

    compared = 0
    for imagined, existing, names in (
        (fake_cuda.Runtime, runtime, ("setDevice", "memGetInfo", "malloc", "hostAlloc", "free", "freeHost",
                                      "memsetAsync", "memcpyAsync")),
        (fake_cuda, driver, ("launchKernel",)),
        (fake_cuda, stream, ("get_elapsed_time",)),
        (fake_cuda.Stream, stream.Stream, ("__init__", "synchronize", "wait_event", "begin_capture", "end_capture")),
        (fake_cuda.Event, stream.Event, ("__init__", "record", "synchronize")),
        (fake_cuda.Graph, graph.Graph, ("launch", "upload")),
        (fake_cuda.Module, function.Module, ("load_file", "get_function")),
        (fake_cuda.CUDARuntimeError, runtime.CUDARuntimeError, ("__init__",)),
    ):  # fmt: skip
        for name in names:
            expected = cupys_parameters(getattr(existing, name))
            assert imagined_parameters(getattr(imagined, name)) == expected, name
            compared += 1
    assert compared == 23
    assert hasattr(function.Function, "ptr")
    assert issubclass(runtime.CUDARuntimeError, RuntimeError) and issubclass(driver.CUDADriverError, RuntimeError)


# Starting


def test_a_backend_takes_its_device_and_prepares_cublas(gpu, start):
    backend = start()
    assert (backend.device.name, backend.architecture, backend.memory()) == ("Imagined", 90, (gpu.free, gpu.total))
    (workspace,) = gpu.blocks
    (handle,) = gpu.cublas.handles.values()
    assert handle.workspace == (workspace, 32 << 20) == (workspace, backend.workspace_bytes)
    assert handle.mode == 16, "CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION"
    assert backend.versions == {
        "device": "Imagined", "cupy": "cupy-cuda13x 14.2.0", "cublas": 130100, "nvrtc": nvrtc.version()
    }  # fmt: skip
    assert backend.stream.ptr != backend.copies.ptr
    assert gpu.opened[:2] == [(path, ctypes.RTLD_GLOBAL) for path in (facts().nvrtc, CUBLAS)], "CuPy finds them loaded"
    del backend
    gc.collect()
    assert not gpu.blocks


def test_a_device_by_number(gpu, start):
    gpu.devices = 2
    devices = (*facts().devices, detect.Device("Another", (8, 9), 1 << 30))
    assert start(facts(devices=devices), device=1).architecture == 89
    assert gpu.selected == 1


def test_what_is_missing_is_told_before_anything_is_loaded(gpu, start):
    with pytest.raises(GpunetError, match="^backend cuda: an NVIDIA driver but no CuPy: pip install"):
        start(facts(cupy=()))
    assert not gpu.counts and not gpu.cublas.calls


KNOWN = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]  # NVRTC 13.5


@pytest.mark.parametrize(
    ("capability", "known", "expected"),
    [
        ((9, 0), KNOWN, 90), ((12, 1), KNOWN, 121), ((12, 0), KNOWN, 120), ((12, 1), [90, 120], 120),
        ((8, 9), KNOWN, 89), ((8, 0), KNOWN, 80), ((8, 7), KNOWN, 87), ((7, 5), KNOWN, 75), ((11, 0), KNOWN, 110),
        ((10, 3), [100, 101], 101),
    ],
)  # fmt: skip
def test_the_architecture_is_the_newest_that_the_device_runs(start, monkeypatch, capability, known, expected):
    monkeypatch.setattr(nvrtc, "architectures", lambda: known)
    assert start(facts(capability)).architecture == expected


@pytest.mark.parametrize(("capability", "known"), [((13, 0), KNOWN), ((12, 1), [75, 90]), ((10, 0), [101, 103])])
def test_a_device_that_nvrtc_does_not_know_is_refused(start, monkeypatch, capability, known):
    monkeypatch.setattr(nvrtc, "architectures", lambda: known)
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    backend = start(facts(capability))
    with pytest.raises(GpunetError) as error:
        backend.compile({(RELU.path, "float", "uint8")})
    assert str(error.value) == (
        "backend cuda: NVRTC 13.0 does not compile for Imagined (sm_{}{}); it knows ".format(*capability)
        + ", ".join(f"sm_{a}" for a in known)
    )


# Compiling


def test_what_was_compiled_comes_from_the_cache(gpu, start, monkeypatch):
    """Once in this process, once ever; and the progress is shown."""
    built, build = [], nvrtc.build
    monkeypatch.setattr(nvrtc, "build", lambda *given: built.append(given) or build(*given))
    paths = {sources.kernels()[name].path for name in ("order_draw", "dropout_apply")}
    wanted = {(path, kind, "uint8") for path in paths for kind in ("float", "half")}
    for cached in (False, True):
        built.clear()
        gpu.counts.clear()
        backend, shown = start(), []
        backend.show = lambda done, count, shown=shown: shown.append((done, count))
        backend.compile(wanted)
        backend.compile(wanted)
        assert shown == [(1, 4), (2, 4), (3, 4), (4, 4)] and gpu.counts["load"] == 4
        assert len(built) == (0 if cached else 4)
    assert {kind for _, kind, _ in backend._modules} == {"float", "half"}
    assert all(given[2] == "sm_90" for given in built)


def test_another_architecture_is_another_file(start, monkeypatch):
    built, build = [], nvrtc.build
    monkeypatch.setattr(nvrtc, "build", lambda *given: built.append(given[2]) or build(*given))
    path = sources.kernels()["dropout_apply"].path
    for capability in ((8, 6), (8, 9), (8, 6)):
        start(facts(capability)).compile({(path, "float", "uint8")})
    assert built == ["sm_86", "sm_89"]


def test_a_kernel_that_does_not_compile_is_told_with_its_place(start, tmp_path):
    path = tmp_path / "wrong.cu"
    path.write_text('// launch: blocks=1\nextern "C" __global__ void wrong() {\n    nothing();\n}\n')
    said = r'(?s)^wrong\.cu: sm_90 REAL=float PIXEL=uint8: .*wrong\.cu\(3\): error: .*"nothing"'
    with pytest.raises(GpunetError, match=said):
        start().compile({(path, "float", "uint8")})


def test_nvrtc_says_what_it_lacks(monkeypatch):
    if nvrtc.available():
        with pytest.raises(GpunetError, match="^NVRTC: NVRTC_ERROR_INVALID_INPUT$"):
            nvrtc._check(3)
    monkeypatch.setattr(nvrtc, "_file", lambda: None)
    assert not nvrtc.available()
    with pytest.raises(GpunetError, match="^NVRTC: there is no libnvrtc; pip install nvidia-cuda-nvrtc$"):
        nvrtc._library.__wrapped__()


# Memory


def test_memory_is_zeroed_and_goes_back(gpu, start):
    backend = start()
    before = gpu.free
    device, shared = backend.allocate(1000), backend.allocate_shared(24)
    tensor = Tensor(Base(1000), (1000,), np.dtype("u1"))
    assert not backend.download(backend.view(device, 0, tensor)).any() and gpu.free < before
    assert not backend.peek(backend.view(shared, 0, Tensor(Base(24), (3,), np.dtype("f8")))).any()
    del device, shared
    assert gpu.free == before and not gpu.hosts


def test_zeros_are_there_whichever_stream_looks(gpu, start):
    """Copies run on a stream of their own; zeros written late would cover what they brought."""
    backend = start()
    gpu.hasty = {backend.copies.ptr}
    after = backend.mark()
    shared = backend.view(backend.allocate_shared(80), 0, Tensor(Base(80), (20,), np.dtype("f4")))
    view = backend.view(backend.allocate(80), 0, Tensor(Base(80), (20,), np.dtype("f4")))
    backend.peek(shared)[:] = 5
    backend.wait(backend.stage([(view, backend.peek(shared))], after))
    assert (backend.download(view) == 5).all()


def test_out_of_memory_is_one_line_that_says_who_holds_it(gpu, start):
    backend = start()
    free = gpu.free
    with pytest.raises(GpunetError) as error:
        backend.allocate(1 << 30)
    assert str(error.value) == (
        f"backend cuda: 1,073,741,824 bytes cannot be had: {free:,} of 1,073,741,824 are free on Imagined; "
        "memory is held by python (77) 900 MiB, java (78)"
    )
    assert error.value.__suppress_context__ and gpu.free == free
    gpu.pinnable = 1000
    with pytest.raises(GpunetError, match="^backend cuda: 2,000 bytes of pinned host memory cannot be had: cudaErrorM"):
        backend.allocate_shared(2000)


def test_holders_that_nvidia_smi_does_not_name(start, monkeypatch):
    monkeypatch.setattr(detect, "holders", lambda: [])
    assert start().holders() == "nobody else is known to hold memory"


def test_other_failures_of_an_allocation_are_not_called_out_of_memory(gpu, start):
    backend = start()
    gpu.broken = 700
    for allocate in (backend.allocate, backend.allocate_shared):
        with pytest.raises(fake_cuda.CUDARuntimeError, match="cudaErrorIllegalAddress"):
            allocate(100)


def test_memory_is_left_to_the_driver_when_the_process_ends(gpu, start, monkeypatch):
    """CuPy may be gone by then."""
    memory = start().allocate(100)
    held = set(gpu.blocks)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "is_finalizing", lambda: True)
        del memory
        gc.collect()
    assert set(gpu.blocks) == held


def test_memory_of_a_broken_device_dies_in_silence(gpu, start, monkeypatch):
    """What broke it was told; a hundred lines about its memory would hide that."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    memory = start().allocate(100)
    gpu.broken = 700
    del memory
    gc.collect()
    assert not said


# Launches and products


def test_a_launch_goes_to_the_backends_stream_and_waits_for_nobody(gpu, start):
    backend = start()
    x, y = (place(backend, np.array(v, np.float32)) for v in ([-1, 2, -3], [9, 9, 9]))
    call = backend.bind_launch(RELU, [x, y, 3], backend.workspace())
    gpu.ran.clear()
    gpu.counts.clear()
    del x
    call()
    assert gpu.counts == {"launch": 1} and not gpu.ran
    assert backend.download(y).tolist() == [0, 2, 0]
    assert gpu.ran == [(backend.stream.ptr, "relu_forward", 1)]


def test_grids_are_as_large_as_the_work(gpu, start):
    """Where the emulator makes do with eight blocks."""
    backend, n = start(), 30000
    x = np.random.default_rng(0).normal(size=n).astype(np.float32)
    views = [place(backend, x), place(backend, np.zeros(n, np.float32))]
    backend.bind_launch(RELU, [*views, n], None)()
    np.testing.assert_array_equal(backend.download(views[1]), np.maximum(x, 0))
    assert gpu.ran[-1][2] == -(-n // 4 // 256) == 30


def test_an_empty_launch_has_one_block(gpu, start):
    backend = start()
    view = place(backend, np.full(1, 5, np.float32))
    backend.bind_launch(RELU, [view[:0], view[:0], 0], None)()
    assert backend.download(view) == 5 and gpu.ran[-1][2] == 1


@pytest.mark.parametrize("given", TYPES, ids=str)
def test_products_of_every_layout(gpu, start, given):
    """cuBLAS with its own arithmetic of columns."""
    check_products(start(), *given, sizes=((None, 3), (4,), (1, 3), (1, 5)))
    assert {name for name in gpu.cublas.calls if "Gemm" in name} == {"cublasGemmEx", "cublasGemmStridedBatchedEx"}


def test_a_product_keeps_its_memory(start):
    backend = start()
    a, b, out = (place(backend, np.full((2, 2), v, np.float32)) for v in (1, 2, 0))
    call = backend.bind_matmul(a, b, out, 0, "float32", None)
    del a, b
    gc.collect()
    call()
    assert (backend.download(out) == 4).all()


def test_products_that_cublas_has_not(start):
    """Two operands in float and a result in half; the trace lets it pass, for NumPy can."""
    backend = start()
    a = place(backend, np.ones((2, 2), np.float32))
    out = place(backend, np.ones((2, 2), np.float16))
    with pytest.raises(GpunetError, match="^backend cuda: cublasGemmEx: CUBLAS_STATUS_NOT_SUPPORTED$"):
        backend.bind_matmul(a, a, out, 0, "float16", None)()


def test_a_launch_that_fails_names_the_kernel(gpu, start):
    backend = start()
    kernel = replace(RELU, form="blocks", count="n")
    view = place(backend, np.zeros(4, np.float32))
    call = backend.bind_launch(kernel, [view, view, 1 << 31], None)
    with pytest.raises(GpunetError, match="^backend cuda: relu_forward: CUDA_ERROR_InvalidValue$"):
        call()


@pytest.mark.parametrize(("code", "name"), [(13, "EXECUTION_FAILED"), (99, "99")])
def test_a_product_that_fails_names_function_and_status(gpu, start, code, name):
    backend = start()
    a = place(backend, np.ones((2, 2), np.float32))
    gpu.cublas.fails["cublasGemmEx"] = code
    with pytest.raises(GpunetError, match=f"^backend cuda: cublasGemmEx: CUBLAS_STATUS_{name}$"):
        backend.bind_matmul(a, a, a, 0, "float32", None)()
    gpu.cublas.fails["cublasCreate_v2"] = 1
    with pytest.raises(GpunetError, match="^backend cuda: cublasCreate_v2: CUBLAS_STATUS_NOT_INITIALIZED$"):
        start()


def test_what_goes_wrong_on_the_device_is_told_by_the_next_wait(gpu, start):
    backend = start()
    view = place(backend, np.zeros(4, np.float32))
    gpu.broken = 700
    for wait in (backend.synchronize, lambda: backend.download(view)):
        with pytest.raises(fake_cuda.CUDARuntimeError, match="cudaErrorIllegalAddress"):
            wait()


# Graphs


def test_a_capture_executes_nothing_and_its_launch_everything(gpu, start):
    backend = start()
    x, y = (place(backend, np.array(v, np.float32)) for v in ([-1, 2, -3], [9, 9, 9]))
    a, out = place(backend, np.ones((2, 2), np.float32)), place(backend, np.zeros((2, 2), np.float32))
    calls = [backend.bind_launch(RELU, [x, y, 3], None), backend.bind_matmul(a, a, out, 1, "float32", None)]
    gpu.ran.clear()
    launch = backend.capture(calls)
    assert not gpu.ran and (gpu.counts["capture"], gpu.counts["upload"], gpu.counts["graph"]) == (1, 1, 0)
    assert backend.download(y).tolist() == [9, 9, 9]
    expected = [(backend.stream.ptr, "relu_forward", 1), (backend.stream.ptr, "gemm", 1)]
    del calls, x, a  # a graph keeps no memory alive
    gc.collect()
    for times in (1, 2):
        launch()
        assert (backend.download(out) == 2 * times).all() and gpu.ran == expected * times
    assert backend.download(y).tolist() == [0, 2, 0] and gpu.counts["graph"] == 2


@pytest.mark.parametrize("spoil", [False, True])
def test_what_fails_in_a_capture_is_what_is_told(gpu, start, spoil):
    """Also where the end of the capture fails for it; and the stream is usable again."""
    backend = start()
    a = place(backend, np.ones((2, 2), np.float32))
    product = backend.bind_matmul(a, a, a, 0, "float32", None)
    gpu.cublas.fails["cublasGemmEx"] = 13
    if spoil:
        expected, calls = (fake_cuda.CUDARuntimeError, "StreamCaptureUnsupported"), [backend.synchronize]
    else:
        expected, calls = (GpunetError, "EXECUTION_FAILED"), [product]
    with pytest.raises(expected[0], match=expected[1]):
        backend.capture(calls)
    gpu.cublas.fails.clear()
    backend.capture([product])()
    assert (backend.download(a) == 2).all()


def test_steps_are_graphs_from_the_second_time_on(gpu, start):
    """Three kinds of step here: the first of an epoch draws the order, and the last has fewer images."""
    counts = []
    with closing(step_of(start(), dtype="float32")) as step:
        for _ in range(12):
            step()
            counts.append((gpu.counts["capture"], gpu.counts["graph"]))
        assert counts[:4] == [(0, 0), (0, 0), (1, 1), (1, 1)]
        assert counts[4:] == [(2, 2), (2, 3), (2, 4), (3, 5), (3, 6), (3, 7), (3, 8), (3, 9)]
        assert gpu.counts["upload"] == 3
        launched, products = gpu.counts["launch"], gpu.cublas.calls["cublasGemmEx"]
        step(steps=2)
        step(steps=2)
        step(steps=2)
        step(steps=2)
        assert (gpu.counts["capture"], gpu.counts["graph"]) == (5, 11), "one launch for two steps"
        assert gpu.counts["launch"] > launched
        launched, products = gpu.counts["launch"], gpu.cublas.calls["cublasGemmEx"]
        for _ in range(8):
            step(steps=2)
        assert (gpu.counts["launch"], gpu.cublas.calls["cublasGemmEx"]) == (launched, products), "Python has its peace"
        assert step.state["update"] == 36
    streams = {stream for stream, _, _ in gpu.ran}
    assert streams == {step.backend.stream.ptr}


def test_nothing_waits_while_it_trains(gpu, start):
    """Metrics are read as far as the device has come, each row whole."""
    with closing(step_of(start(), dtype="float32")) as step:
        for _ in range(8):
            step()
        gpu.progress()
        step.wait()
        waits, copies = gpu.counts["synchronize"], gpu.counts["memcpy"]
        before = step.metrics()
        assert len(before) == 8
        for _ in range(6):
            step()
            assert len(step.metrics()) == 8, "nothing has run yet"
        seen = [len(step.metrics())]
        rows = []
        while any(stream.waiting for stream in gpu.streams.values()):
            gpu.progress(1)
            table = step.metrics(8)
            seen.append(8 + len(table))
            rows.append(table)
            assert not step.halted
        assert sorted(set(seen)) == list(range(8, 15)) and seen == sorted(seen)
        assert (gpu.counts["synchronize"], gpu.counts["memcpy"]) == (waits, copies)
        final = step.metrics(8)
        for table in rows:
            np.testing.assert_array_equal(table, final[: len(table)])
        assert (final[:, METRICS.index("batch")] == np.arange(8, 14)).all()
        step.wait()
        assert gpu.counts["synchronize"] == waits + 1


def test_a_larger_program_replaces_memory_and_graphs(gpu, start):
    """Prediction first: its scratch is too small for training, which must not go on in what was freed."""
    found = []
    for backend in (emulator.Backend(), start()):
        with closing(step_of(backend, dtype="float32")) as step:
            for _ in range(3):
                step.predict(IMAGES[:20])
            for _ in range(9):
                step()
            found.append({**everything(step), "prediction": step.predict(IMAGES[:20])})
    assert_same(found[1], found[0])


def test_a_step_leaves_no_memory_behind(gpu, start):
    backend = start()
    before = gpu.free
    with closing(step_of(backend, dtype="float32")) as step:
        for _ in range(7):
            step()
        planned = sum(step.memory().values())
        held = before - gpu.free + sum(memory.nbytes for memory in gpu.hosts.values())
        assert planned * 0.9 < held <= planned
    del step
    gc.collect()
    assert gpu.free == before and not gpu.hosts


# Training


@pytest.mark.parametrize(
    ("dtype", "arguments"),
    [("float64", {}), ("float32", {}), ("float32", {"steps": 2}), ("float32", {"accumulate": 2})],
    ids=str,
)
def test_training_is_the_emulators_bit_for_bit(gpu, start, dtype, arguments):
    """And so NumPy's, to what test_trajectories says."""
    found = trained(start(), 9, dtype=dtype, **arguments)
    assert gpu.counts["graph"] > 3
    assert_same(found, trained(emulator.Backend(), 9, dtype=dtype, **arguments))


def test_a_recipe_trains_on_it(gpu, start, monkeypatch, tmp_path):
    """Found by `auto`, checked for memory, three steps a launch, and a report; the numbers are the emulator's."""
    found, rows, lines = facts(), [], []
    monkeypatch.setattr(cuda, "Backend", start)
    monkeypatch.setattr(detect, "look", lambda: found)
    monkeypatch.setattr(report, "plot_curves", lambda *arguments: None)
    monkeypatch.setattr(Progress, "line", lambda self, text: lines.append(text))
    for backend, name in (("auto", "cuda"), ("emulator", "emulator")):
        table = {
            "model": {"name": "mlp", "hidden": [16]},
            "data": {"name": "shapes", "train": 60, "test": 20},
            "optimizer": {"lr": 0.05},
            "train": {"epochs": 2, "batch": 8, "steps_per_launch": 3, "backend": backend},
            "run": {"directory": str(tmp_path), "name": name},
        }
        trainer = Trainer(parse_config(table), show=False)
        assert trainer.step.backend.name == name
        result = trainer.fit()
        assert result.status == "finished" and f"{name}, float32" in (result.run.path / "report.md").read_text()
        rows.append(list(result.run.metrics()))
    assert rows[0] == rows[1] and len(rows[0]) == 14 + 2 + 1
    assert gpu.counts["graph"] > 0
    assert any("Imagined" in line for line in lines)


@pytest.mark.parametrize("hasty", ["nobody", "the copies", "the computation"])
def test_a_window_of_images_is_filled_beside_the_computation(gpu, start, hasty):
    """Whoever runs ahead: images are neither drawn before they are there nor replaced before they were drawn."""
    found = []
    for backend in (emulator.Backend(), start()):
        if backend.name == "cuda":
            streams = {"nobody": (), "the copies": (backend.copies,), "the computation": (backend.stream,)}
            gpu.hasty = {stream.ptr for stream in streams[hasty]}
        with closing(step_of(backend, dtype="float32", given=source(window=32))) as step:
            for _ in range(11):
                step()
            found.append({**everything(step), "loss": step.evaluate(step.source)["loss"]})
    assert_same(found[1], found[0])


def test_a_call_is_timed_on_the_stream(start):
    """The imagined clock counts what is launched, half a millisecond each."""
    backend, calls = start(), []
    view = place(backend, np.zeros(4, np.float32))
    launch = backend.bind_launch(RELU, [view, view, 4], None)

    def twice():
        calls.append(1)
        launch()
        launch()

    assert backend.time(twice) == 1.0 and len(calls) == 21
    assert backend.time(launch, repeats=3) == 0.5


def test_there_is_one_replica(start):
    """More would be more devices."""
    backend = start()
    assert backend.replicas == 1
    step = step_of(backend, dtype="float32", replicas=2)
    with closing(step), pytest.raises(GpunetError, match="^backend cuda: replicas: expected 1, got 2"):
        step()


def test_every_kernel_in_float(start):
    """With the grids of a GPU; the emulator's own test has the other types."""
    assert_parity(start(), "float32")


def assert_parity(backend, type_name):
    results = parity.run(backend, parity.subjects(), (type_name,))
    assert [f"{r.kernel}: {r.problem}" for r in results if r.problem] == []
    assert len(results) == len(sources.kernels())


# On either


def test_two_runs_of_one_seed_are_the_same_bit_for_bit(anywhere):
    assert_same(trained(anywhere(), 9, dtype="float32"), trained(anywhere(), 9, dtype="float32"))


def test_a_graph_computes_what_single_launches_do(anywhere):
    """Bit for bit."""
    single = anywhere()
    single.graphs = False
    assert_same(trained(anywhere(), 9, dtype="float32"), trained(single, 9, dtype="float32"))


# With a GPU


@pytest.mark.parametrize("type_name", parity.TYPES)
def test_every_kernel_on_a_gpu(real, type_name):
    assert_parity(real(), type_name)


@pytest.mark.parametrize("given", TYPES, ids=str)
def test_products_on_a_gpu(real, given):
    check_products(real(), *given)


def test_fifty_steps_in_double_are_numpys(real):
    assert_agree(trained(real(), 50), trained(NumPy(), 50), bound=1e-8)


@pytest.mark.parametrize("dtype", ["float64", "float32", "tf32", "float16", "bfloat16"])
def test_every_type_trains_and_repeats_bit_for_bit(real, dtype):
    """60 steps, one a call and four a call, learn 54 labels by heart; a few of them may overflow float16."""
    found = []
    for steps in (1, 4):
        with closing(step_of(real(), dtype=dtype)) as step:
            for _ in range(60 // steps):
                step(steps=steps)
            found.append(everything(step))
            assert not step.halted
    assert_same(found[1], found[0])
    losses = found[0]["metrics"][:, 0]
    assert len(losses) >= 50 and losses[-8:].mean() < losses[:8].mean()


def test_a_window_on_a_gpu(real):
    found = []
    for window in (None, 32):
        with closing(step_of(real(), given=source(window=window))) as step:
            for _ in range(40):
                step()
            found.append(everything(step))
    assert_same(found[1], found[0])


def test_the_table_of_metrics_is_seen_while_it_is_written(real):
    """Rows that are there are whole, whoever looks when."""
    with closing(step_of(real(), dtype="float32")) as step:
        tables = []
        for _ in range(200):
            step()
            tables.append(step.metrics())
        step.wait()
        final = step.metrics()
    assert len(final) == 200
    for table in tables:
        np.testing.assert_array_equal(table, final[: len(table)])


def test_a_gradient_that_is_not_finite_halts_on_a_gpu(real):
    with closing(step_of(real(), dtype="float32")) as step:
        for name, value in step.weights.items():
            step.weights[name] = np.full_like(value, np.nan)
        before = everything(step)
        for _ in range(6):
            step()
        step.wait()
        assert step.halted and step.state["halt"] == 0
        after = everything(step)
        assert [name for name in after if after[name].tobytes() != before[name].tobytes()] == ["state"]
