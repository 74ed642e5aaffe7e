"""The emulator: the kernels' own text against the definitions, and planted bugs that its detectors must find."""

import platform
import shutil

import numpy as np
import pytest

from gpunet import resources
from gpunet.core import sources
from gpunet.core.trace import Base, Tensor
from gpunet.errors import GpunetError
from gpunet.testing import kernel_test, parity, sanitize, user

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="the emulator: there is no g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator's fibers are x86-64"),
]

from gpunet.backends.emulator import ORDERS, Backend  # noqa: E402 - after the reasons to skip

HEAD = '#include "reduce.cuh"\n'
REVERSE = """
// launch: blocks=(n+255)//256
KERNEL reverse(const real* x /*n*/, real* y /*n*/, long long n) {
    __shared__ wide tile[THREADS];
    const long long at = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int count = (int)min(n - (long long)blockIdx.x * THREADS, 256ll);
    if (at < n) tile[threadIdx.x] = load(x + at);
    __syncthreads();
    if (at < n) store(y + at, tile[count - 1 - threadIdx.x]);
}
"""
DEFINITION = """
import numpy as np

def reverse(x, y, n):
    for start in range(0, n, 256):
        y[start : start + 256] = x[start : start + 256][::-1]

def case(rng, size, real, wide):
    n = [1, 31, 256, 257, 1009, 1000, 512, 3][size]
    return {"x": rng.normal(size=n).astype(real), "y": np.full(n, np.nan, real), "n": n}

CASES = {"reverse": case}
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A function(old, new) that writes reverse.cu with a bug in it and returns its path; nobody else's cache has it."""
    monkeypatch.setenv("GPUNET_CACHE", str(tmp_path / "cache"))
    for header in resources.kernels().glob("*.cuh"):
        shutil.copy(header, tmp_path)

    def plant(old="", new="", text=REVERSE):
        assert old in text
        (tmp_path / "reverse.cu").write_text(HEAD + text.replace(old, new, 1))
        (tmp_path / "reverse.py").write_text(DEFINITION)
        return tmp_path / "reverse.cu"

    return plant


def line_of(path, text):
    return next(i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def outcome(path, order="forward", type_name="float32"):
    (subject,) = user.subjects(path)
    return parity.check(subject, Backend(order, most_blocks=3), type_name)


# The shipped kernels


@pytest.mark.parametrize(
    ("order", "most", "types"),
    [("forward", 2, ("float32", "float16")), ("backward", 1 << 20, ("float32", "float64", "bfloat16"))],
)
def test_every_kernel_computes_what_its_definition_does(order, most, types):
    """All cases, each type, float in both orders and grids; `gpunet kernel-test` crosses them all."""
    results = parity.run(Backend(order, most_blocks=most), parity.subjects(), types)
    assert [f"{r.kernel} {r.type}: {r.problem}" for r in results if r.problem] == []
    assert len(results) == len(types) * len(sources.kernels())


SOME = ("column_sum", "dropout_apply", "fold", "softmax_cross_entropy", "sgd_update")


@pytest.mark.parametrize("kind", sanitize.KINDS)
def test_no_sanitizer_complains(kind):
    """One kernel of each way to use memory; `gpunet kernel-test` does it for all."""
    found = kernel_test.complaints(kind, SOME)
    assert found == {name: [] for name in SOME}


# Planted bugs


@pytest.mark.parametrize("order", ORDERS)
def test_the_right_kernel_is_right(planted, order):
    assert outcome(planted(), order).problem is None


@pytest.mark.parametrize("kind", sanitize.KINDS)
def test_no_sanitizer_complains_of_the_right_kernel(planted, kind):
    assert kernel_test.complaints(kind, [str(planted())]) == {"reverse": []}


def test_a_missing_barrier_is_a_race_whatever_the_result(planted):
    """In the other order of threads the result happens to be wrong; ThreadSanitizer names both lines in any."""
    path = planted("    __syncthreads();\n")
    found = kernel_test.complaints("thread", [str(path)])["reverse"]
    assert found and all("data race" in text for text in found)
    places = {f"reverse.cu:{line_of(path, text)}" for text in ("tile[threadIdx.x] =", "store(y + at")}
    assert any(all(place in text for place in places) for text in found)
    assert any(outcome(path, order).problem for order in ORDERS)


def test_shared_memory_is_never_what_the_last_block_left(planted):
    path = planted("if (at < n) tile[threadIdx.x] = load(x + at);", "if (at == 0) tile[0] = 0;")
    assert "case 0" in outcome(path).problem or "case 1" in outcome(path).problem


def test_a_missing_bounds_guard_is_found_at_its_line(planted):
    path = planted("if (at < n) tile[threadIdx.x] = load(x + at);", "tile[threadIdx.x] = load(x + at);")
    assert outcome(path).problem is None  # the values are right: nobody reads those behind the end
    found = kernel_test.complaints("address", [str(path)])["reverse"]
    assert any("heap-buffer-overflow" in text and f"reverse.cu:{line_of(path, 'load(x')}" in text for text in found)


def test_an_index_outside_of_a_shared_array_is_found(planted):
    path = planted("tile[count - 1 - threadIdx.x]", "tile[count - 1 - threadIdx.x + 256]")
    found = kernel_test.complaints("address", [str(path)])["reverse"]
    assert any("out of bounds" in text and "reverse.cu" in text for text in found)


def test_a_misaligned_vector_load_is_found(planted):
    path = planted("load(x + at);", "at + 4 < n ? ((const Four<real>*)(x + at))->at[0] : x[at];")
    found = kernel_test.complaints("address", [str(path)])["reverse"]
    assert any("misaligned address" in text and f"reverse.cu:{line_of(path, 'Four')}" in text for text in found)


def test_a_barrier_in_a_branch_is_reported_by_kernel_thread_and_line(planted):
    path = planted("    __syncthreads();\n", "    if (threadIdx.x < 100) __syncthreads();\n    else __syncthreads();\n")
    line = line_of(path, "if (threadIdx.x < 100)")
    problem = outcome(path).problem
    assert f"reverse: block 0: thread 0 waits at __syncthreads (reverse.cu:{line})" in problem
    assert f"but thread 100 at __syncthreads (reverse.cu:{line + 1})" in problem


def test_a_return_before_the_last_barrier_is_reported(planted):
    path = planted("    if (at < n) tile[threadIdx.x] =", "    if (at >= n) return;\n    tile[threadIdx.x] =")
    problem = outcome(path).problem
    assert f"thread 0 waits at __syncthreads (reverse.cu:{line_of(path, '__syncthreads')})" in problem
    assert "but thread 1 has returned" in problem


WARPS = """
// launch: blocks=(n+255)//256
KERNEL reverse(const real* x /*n*/, real* y /*n*/, long long n) {
    wide sum = 1;
    BODY
    if (threadIdx.x == 0) store(y, sum);
}
"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("if (threadIdx.x % 32 < 16) sum = warp_sum(sum);", "has returned"),
        ("if (threadIdx.x % 32 < 16) sum = warp_sum(sum); else __syncthreads();", "__syncthreads"),
        ("sum = threadIdx.x % 2 ? __shfl_xor_sync(0xffffffffu, sum, 1)\n : __shfl_xor_sync(0xffffffffu, sum, 2);",
         "but thread"),
        ("sum = __shfl_xor_sync(0x0000fffeu, sum, 1);", "its lane is not in the mask 0000fffe"),
        ("if (threadIdx.x % 32 < 16) sum = __shfl_sync(0xffffu, sum, 20);", "reads lane 20, which is not in the mask"),
    ],
)  # fmt: skip
def test_warp_operations_that_cuda_leaves_undefined_are_errors(planted, body, expected):
    problem = outcome(planted("BODY", body, WARPS)).problem
    assert "reverse: block 0: thread" in problem and expected in problem


def test_the_emulator_goes_on_after_an_error(planted):
    path = planted("if (at < n) tile[threadIdx.x] =", "if (at >= n) return;\n    tile[threadIdx.x] =")
    assert outcome(path).problem
    backend = Backend()
    relu = parity.subjects(["relu_forward"])
    assert all(r.problem is None for r in parity.run(backend, relu))
    assert outcome(path).problem and outcome(path, "backward").problem


def test_a_stack_that_is_too_small_is_reported(planted):
    path = planted("    const long long at", "    volatile char large[66000];\n    LOOP\n    const long long at")
    path.write_text(path.read_text().replace("LOOP", "for (int i = 0; i < 66000; i += 8) large[i] = 0;"))
    for order in ORDERS:
        assert "its local variables take more than the 64 KB of its stack" in outcome(path, order).problem


SHUFFLES = """
// launch: blocks=(n+255)//256
KERNEL reverse(const int* x /*n*/, int* y /*n*/, long long n) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    const unsigned int all = 0xffffffffu;
    const int v = i < n ? x[i] : 0, lane = threadIdx.x % 32;
    const int a = __shfl_sync(all, v, 3), b = __shfl_xor_sync(all, v, 5), c = __shfl_down_sync(all, v, 2),
              d = __shfl_up_sync(all, v, 1);
    const double e = __shfl_sync(all, (double)v / 3, 31);
    const unsigned int votes = __ballot_sync(all, v % 2 != 0);
    __syncwarp();
    if (i < n) y[i] = a + 7 * b + 49 * c + 343 * d + (int)(e * 3) + (int)(votes >> lane & 1) * 5;
}
"""


def test_shuffles_and_votes_are_cudas(planted):
    path = planted(text=SHUFFLES)
    kernel = sources.parse(path)["reverse"]
    backend, x = Backend(), np.random.default_rng(0).integers(0, 99, 512).astype(np.int32)
    memory, out = backend.adopt(x), backend.allocate(x.nbytes)
    views = [backend.view(m, 0, Tensor(Base(x.nbytes), x.shape, x.dtype)) for m in (memory, out)]
    backend.bind_launch(kernel, [*views, 512], None)()
    warps, lane = x.reshape(-1, 32).astype(np.int64), np.arange(32)
    down, up = np.minimum(lane + 2, 31), np.maximum(lane - 1, 0)
    down, up = np.where(lane + 2 < 32, down, lane), np.where(lane >= 1, up, lane)
    expected = (warps[:, 3:4] + 7 * warps[:, lane ^ 5] + 49 * warps[:, down] + 343 * warps[:, up]
                + ((warps[:, 31:] / 3) * 3).astype(np.int32) + warps % 2 * 5)  # fmt: skip
    assert (backend.download(views[1]).reshape(-1, 32) == expected).all()


# Building


def test_a_compile_error_names_the_real_file_and_line(planted):
    path = planted("load(x + at)", "load(nothing + at)")
    place = rf"reverse\.cu:{line_of(path, 'nothing')}"
    with pytest.raises(GpunetError, match=rf"(?s)reverse\.cu: g\+\+ .*{place}:.*nothing"):
        Backend().compile({(path, "float", "uint8")})


def test_what_was_compiled_is_kept_by_its_content(planted, monkeypatch):
    from gpunet.backends.emulator import build

    calls = []
    original = build.subprocess.run
    monkeypatch.setattr(build.subprocess, "run", lambda *a, **k: calls.append(a) or original(*a, **k))
    shown = []
    for expected in (1, 0):
        calls.clear()
        backend = Backend()
        backend.show = lambda done, count: shown.append((done, count))
        backend.compile({(planted(), "float", "uint8")})
        assert sum("-shared" in call[0] for call in calls) == expected
    calls.clear()
    Backend().compile({(planted("256ll", "255ll + 1"), "float", "uint8")})
    assert sum("-shared" in call[0] for call in calls) == 1
    assert shown == [(1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: p.mkdir(parents=True) or p.chmod(0o777), "expected a folder that only you may write, got mode 777"),
        (lambda p: p.parent.write_text(""), "cannot be made"),
    ],
)
def test_a_cache_that_others_could_write_is_refused(tmp_path, monkeypatch, make, expected):
    make(tmp_path / "cache" / "kernels")
    monkeypatch.setenv("GPUNET_CACHE", str(tmp_path / "cache"))
    with pytest.raises(GpunetError, match=expected):
        Backend().compile({(sources.kernels()["relu_forward"].path, "float", "uint8")})
