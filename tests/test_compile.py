"""CUDA accepts every kernel, and what can be known of it without a GPU is as the headers say."""

import ctypes
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gpunet import resources
from gpunet.backends.cuda import nvrtc
from gpunet.core import sources
from gpunet.core.state import STATE
from gpunet.errors import GpunetError
from gpunet.testing import compile as compiling

FILES = sorted(resources.kernels().glob("*.cu"))
TYPES = ("float", "double", "half", "bfloat16")
DOUBLE_IN_FLOAT = {"loss", "optim", "transforms"}  # sums over a batch or an arena, State, draws are in double
# CUDA's exp, log and pow of a double begin in float
FLOAT_IN_DOUBLE = {"activation", "dropconnect", "loss", "lrn", "rules", "softmax", "transforms"}

ARITHMETIC = "add|sub|mul|fma|mad|div|rcp|sqrt|rsqrt|neg|abs|min|max|setp|ex2|lg2"

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC: pip install nvidia-cuda-nvrtc")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")

SHIM = """
#include <algorithm>
#include <cmath>
using std::exp; using std::erf; using std::log; using std::sqrt; using std::tanh; using std::min; using std::max;
#define __global__
#define __device__
#define __shared__ static
struct Index { unsigned x; };
static Index blockIdx, threadIdx, gridDim;
"""


def types_of(path):
    """Every storage type, and for the file that reads a data set the other kind of pixel."""
    kinds = [(f"REAL={real}", "PIXEL=uint8") for real in TYPES]
    return [*kinds, ("REAL=float", "PIXEL=float")] if path.stem == "augment" else kinds


@needs_nvrtc
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_type_compiles_without_a_stack(path):
    text, defines = sources.inlined(path), types_of(path)
    with ThreadPoolExecutor(2) as pool:
        builds = list(pool.map(lambda d: nvrtc.build(text, path.name, defines=d), defines))
    for (real, _), build in zip(defines, builds, strict=True):
        usage = nvrtc.usage(build.log)
        assert usage.keys() == sources.parse(path).keys()
        assert not {kernel: u for kernel, u in usage.items() if u.stack}, f"{real}: spills or indexed arrays"
        assert max(u.registers for u in usage.values()) <= 255 and "warning" not in build.log
        other, exempt = ("f32", FLOAT_IN_DOUBLE) if real == "REAL=double" else ("f64", DOUBLE_IN_FLOAT)
        if path.stem not in exempt:
            assert not re.findall(rf"\b(?:{ARITHMETIC})\.[\w.]*{other}\b.*", build.ptx), f"{real}: computes in {other}"


@needs_nvrtc
@pytest.mark.parametrize("broken", ["activation.cu", "common.cuh"])
def test_an_error_names_the_real_file_and_line(tmp_path, broken):
    for path in resources.kernels().glob("*.cu*"):
        shutil.copy(path, tmp_path)
    lines = (tmp_path / broken).read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("DEVICE"))
    lines.insert(place, "DEVICE int broken() { return nothing; }")
    (tmp_path / broken).write_text("\n".join(lines))
    with pytest.raises(GpunetError, match=re.escape(f"{tmp_path / broken}({place + 1}): error")):
        nvrtc.compile(sources.inlined(tmp_path / "activation.cu"), "activation.cu")


@needs_nvrtc
def test_unknown_types_are_refused():
    text = sources.inlined(resources.kernels() / "activation.cu")
    with pytest.raises(GpunetError, match="REAL must be float, double, half or bfloat16"):
        nvrtc.compile(text, "activation.cu", defines=("REAL=float16",))
    with pytest.raises(GpunetError, match="PIXEL must be uint8 or float"):
        nvrtc.compile(text, "activation.cu", defines=("PIXEL=int8",))


HUNGRY = """
extern "C" __global__ __launch_bounds__(1024) void spills(const float* x, float* y, int n) {
    __shared__ float s[300];
    float a[96];
#pragma unroll
    for (int i = 0; i < 96; i++) a[i] = x[i * n];
    s[threadIdx.x] = a[3];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 96; i++) y[i * n] = a[i] * a[i * 7 % 96] + s[i];
}
static __device__ __noinline__ float indexed(const float* x, int n) {
    float a[50];
    for (int i = 0; i < 50; i++) a[i * n % 50] = x[i];
    return a[n];
}
static __device__ __noinline__ float plain(const float* x, int n) { return x[n]; }
extern "C" __global__ void calls(float* x, int n) {
    float (*way)(const float*, int) = n > 3 ? indexed : plain;
    x[0] = way(x, n);
}
extern "C" __global__ void modest(float* x, int n) { x[n] = 1; }
"""


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_75", "sm_120"])
def test_usage_is_read_from_the_log(architecture):
    usage = nvrtc.usage(nvrtc.compile(HUNGRY, "hungry.cu", architecture))
    assert usage.keys() == {"spills", "calls", "modest"}
    assert usage["spills"].registers == 64 and usage["spills"].shared == 1200
    assert min(usage["spills"][2:]) > 100  # stack, bytes that spills store, and load
    assert usage["calls"].stack >= 200 and usage["calls"][3:] == (0, 0)  # of the function that it calls
    assert 0 < usage["modest"].registers < 64 and usage["modest"][1:] == (0, 0, 0, 0)


@needs_nvrtc
def test_the_matrix_of_architectures_and_types():
    """What `gpunet kernel-test` builds; here only what it would."""
    folder, common = resources.kernels(), ("float", "half")
    expected = {"sm_75": common, "sm_80": TYPES, "sm_90a": common, "sm_120": common}
    for stem in ("conv", "augment"):
        found = compiling.targets(folder / f"{stem}.cu")
        assert len(found) == len(set(found))
        by_type = {(t.architecture, t.real) for t in found if t.pixel == "uint8"}
        assert by_type == {(name, real) for name, types in expected.items() for real in types}
        other = [t for t in found if t.pixel != "uint8"]
        assert other == ([("sm_80", "float", "float")] if stem == "augment" else [])
    everything = compiling.targets(folder / "conv.cu", everything=True)
    names = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
    assert sorted(everything) == sorted((name, real, "uint8") for name in names for real in TYPES)


def test_a_stack_or_a_spill_is_said_by_kernel_architecture_and_type():
    kernel = sources.kernels()["fold"]
    usages = [(40, 0, 0, 0, 0), (64, 0, 16, 0, 0), (64, 0, 16, 12, 8), (32, 0, 16, 0, 0)]
    targets = [("sm_75", "half"), ("sm_80", "half"), ("sm_80", "float", "float"), ("sm_80", "float")]
    rows = [
        compiling.Row(kernel, compiling.Target(*target), nvrtc.Usage(*usage))
        for target, usage in zip(targets, usages, strict=True)
    ]
    assert compiling.problems(rows) == [
        "fold: 16 bytes of stack a thread, for arrays indexed at run time: sm_80 (half, float)",
        "fold: 16 bytes of stack a thread, spills store 12 and load 8 bytes: sm_80 (float with float pixels)",
    ]


@needs_nvrtc
def test_state_has_the_layout_of_the_record():
    checks = [f"static_assert(sizeof(State) == {STATE.itemsize}, {'size'!r});".replace("'", '"')]
    for name, (dtype, offset) in STATE.fields.items():
        checks.append(f'static_assert(__builtin_offsetof(State, {name}) == {offset}, "{name}");')
        checks.append(f'static_assert(sizeof(State::{name}) == {dtype.itemsize}, "{name}");')
    nvrtc.compile(sources.inlined(resources.kernels() / "state.cuh") + "\n" + "\n".join(checks), "state")


def test_kernels_keep_to_the_portable_subset():
    """Intrinsics that g++ needs a substitute for stand in one header each, and what has none stands nowhere."""
    homes = {"__shfl": "reduce.cuh", "__umul64hi": "philox.cuh", "asm(": "common.cuh", "atomic": None}
    homes |= dict.fromkeys(("#include <", "extern __shared__", "__syncwarp", "__half", "printf", "clock"))
    for path in resources.kernels().glob("*.cu*"):
        code = re.sub(r"//.*", "", path.read_text())
        for word, home in homes.items():
            assert word not in code or path.name == home, f"{path}: {word}"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """order.cu, which has no barrier, as a shared library whose threads run one after another."""
    folder = tmp_path_factory.mktemp("host")
    source = folder / "order.cpp"
    source.write_text(
        SHIM
        + sources.inlined(resources.kernels() / "order.cu")
        + """
extern "C" void draw(word seed, unsigned site, word time, word block, word* out) {
    const Draw d = philox(seed, site, time, block);
    for (int j = 0; j < 4; j++) out[j] = d.at[j];
}
extern "C" void order(int* out, long long epoch, word seed, int n) {
    State state = {};
    state.epoch = (int)epoch;
    gridDim.x = 2;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++) order_draw(out, &state, seed, n);
}
"""
    )
    library = folder / "order.so"
    subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def _philox(seed, block, site, time):
    key, counter = np.array([seed, 0], np.uint64), np.array([block, site, time, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter)


@needs_compiler
@pytest.mark.parametrize(
    ("seed", "site", "time", "block"),
    [(0, 0, 0, 0), (1, 2, 3, 4), (2**64 - 1, 2**32 - 1, 2**63 - 1, 2**40), (0xDEADBEEF, 0x61756721, 7, 49999)],
)
def test_philox_is_numpys(host, seed, site, time, block):
    words = np.zeros(4, np.uint64)
    u64 = ctypes.c_uint64
    host.draw(u64(seed), ctypes.c_uint32(site), u64(time), u64(block), words.ctypes.data_as(ctypes.c_void_p))
    expected = _philox(seed, block, site, time).random_raw(4)
    assert words.tolist() == expected.tolist()


@needs_compiler
@pytest.mark.parametrize(("n", "epoch", "seed"), [(1, 0, 0), (256, 1, 5), (257, 2, 5), (5000, 3, 2**64 - 1)])
def test_order_is_the_feistel_permutation(host, n, epoch, seed):
    """Against the definition written out in Python's own integers."""
    half = next(h for h in range(4, 32) if 4**h >= n)
    keys = [int(k) for k in _philox(seed, 0, 0x6F726465, epoch).random_raw(8)]

    def encrypt(i):
        left, right = i >> half, i % 2**half
        for key in keys:
            v = (right + key) % 2**64
            v ^= v >> 29
            v = v * 0xBF58476D1CE4E5B9 % 2**64
            v ^= v >> 32
            left, right = right, left ^ v % 2**half
        i = left << half | right
        return i if i < n else encrypt(i)

    order = np.full(n, -1, np.int32)
    host.order(order.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(epoch), ctypes.c_uint64(seed), n)
    assert order.tolist() == [encrypt(i) for i in range(n)]
    assert sorted(order) == list(range(n))
