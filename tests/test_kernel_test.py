"""`gpunet kernel-test`: what it finds in shipped and in users' kernels, what it says, and how it ends."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpunet import cli, resources
from gpunet.backends import emulator
from gpunet.backends.cuda import nvrtc
from gpunet.backends.emulator import build
from gpunet.testing import compile as compiling
from gpunet.testing import kernel_test, parity

ROOT = Path(__file__).resolve().parents[1]
CACHE = os.environ.get("GPUNET_CACHE")
needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") or platform.machine() != "x86_64", reason="the emulator: needs g++ and x86-64"
)
needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC: pip install nvidia-cuda-nvrtc")

# y[i] = x[i] + x[i+1], where i+1 is of the same block and there
PAIRS = """
// launch: blocks=(n+255)//256
KERNEL pairs(const real* x /*n*/, real* y /*n*/, long long n) {
    __shared__ wide tile[THREADS];
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) tile[threadIdx.x] = load(x + i);
    __syncthreads();
    const bool last = threadIdx.x == THREADS - 1 || i + 1 >= n;
    if (i < n) store(y + i, tile[threadIdx.x] + (last ? wide(0) : tile[threadIdx.x + 1]));
}
"""
SPILL = """    wide kept[64];
    for (int j = 0; j < 64; j++) kept[(j + n) % 64] = tile[threadIdx.x];
    if (i < n) store(y + i, kept[i % 64] +"""
BUGS = {  # what is planted: the text it takes the place of, once
    "wrong_value": ("+ (last", "- (last"),
    "no_bounds": ("if (i < n) tile", "tile"),
    "no_barrier": ("    __syncthreads();\n", ""),
    "barrier_in_branch": ("__syncthreads", "if (threadIdx.x < 100) __syncthreads"),
    "with_stack": ("    if (i < n) store(y + i, tile[threadIdx.x] +", SPILL),
}
LOST = {
    "wild": ("load(x + i)", "load(x + (i << 40))"),
    "endless": ("    __syncthreads();\n", "    for (volatile int on = 1; on;) {\n    }\n"),
}
DEFINITION = """
import os
import numpy as np

def pairs(x, y, n):
    if n == 1:
        print("a definition may print")
    for start in range(0, n, 256):
        part = x[start : start + 256].astype(np.float64)
        y[start : start + 256] = part + np.append(part[1:], 0)

def case(rng, size, real, wide):
    if "STARTED" in os.environ:
        open(os.environ["STARTED"], "a").write(f"{os.getpid()} ")
    n = [1, 31, 256, 257, 1009, 1000, 512, 3][size]
    return {"x": rng.normal(size=n).astype(real), "y": np.full(n, np.nan, real), "n": n}

CASES = {"pairs": case}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder with gpunet's headers, and a cache of its own."""
    place = tmp_path_factory.mktemp("own")
    for header in resources.kernels().glob("*.cuh"):
        shutil.copy(header, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPUNET_CACHE", str(place / "cache"))
        patch.chdir(place)
        yield place


@pytest.fixture
def users_cache(folder, monkeypatch):
    """Shipped kernels are compiled once for all tests."""
    monkeypatch.setenv("GPUNET_CACHE", CACHE) if CACHE else monkeypatch.delenv("GPUNET_CACHE")


@pytest.fixture
def test(folder, monkeypatch, capfd):
    """Run `gpunet kernel-test`; return (exit code, standard output, standard error), those of its children too."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpunet", "kernel-test", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capfd.readouterr()

    return run


def write(folder, name, bugs=None, definition=DEFINITION):
    """Write name.cu with pairs and a kernel for each bug, and name.py; return the path of the first."""
    text, names = PAIRS, ["pairs"]
    for bug, (old, new) in (bugs or {}).items():
        assert old in PAIRS
        text += PAIRS.replace(old, new, 1).replace("pairs", bug)
        names.append(bug)
        definition += f'\n{bug} = pairs\nCASES["{bug}"] = case\n'
    (folder / f"{name}.cu").write_text('#include "common.cuh"\n' + text)
    (folder / f"{name}.py").write_text(definition)
    return folder / f"{name}.cu"


def line_of(path, kernel, text):
    lines = path.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if f"KERNEL {kernel}(" in line)
    return next(i for i, line in enumerate(lines[start:], start + 1) if text in line)


def rows_of(out):
    """The table as {kernel: its line}."""
    return {line.split()[0]: line for line in out.partition("\n\n")[0].splitlines()}


@needs_compiler
@needs_nvrtc
def test_a_shipped_family_in_all_parts(test, users_cache):
    code, out, err = test("order")
    assert (code, err) == (0, "")
    rows = rows_of(out)
    for name in ("order_draw", "order_stored", "order_replacement", "order_balanced"):
        cells = rows[name].split()
        assert cells[1:6] == ["0", "0", "0", "0", "clean"] and cells[-2:] == ["0", "0"], rows[name]
        least, most = map(int, cells[6].split("-"))
        assert 0 < least < most < 256
    assert out.splitlines()[-1] == "4 of 4 kernels hold"
    _, out, _ = test(resources.kernels() / "order.cu", "--only", "compile", "order_draw")
    assert out.endswith("4 of 4 kernels hold\n")


@needs_compiler
@needs_nvrtc
def test_planted_bugs_are_found_and_the_right_kernel_is_right(test, folder):
    path = write(folder, "bugs", BUGS)
    code, out, _ = test("bugs.cu")
    assert code == 1
    rows, (_, _, said) = rows_of(out), out.partition("\n\n")
    assert "WRONG" not in rows["pairs"] and "clean" in rows["pairs"] and "pairs" not in said
    assert out.splitlines()[-1] == "1 of 6 kernels hold"

    def found(kernel, *words):
        lines = [line for line in said.splitlines() if line.startswith(f"{kernel}:") or line.startswith(f"{kernel} ")]
        return any(all(word in line for word in words) for line in lines)

    assert found("wrong_value", "in float32, threads forward, few blocks: case 1: y: 30 of 31 elements differ",
                 "; wrong in float64, float16, bfloat16 too")  # fmt: skip
    assert rows["wrong_value"].count("WRONG") == 4
    place = f"bugs.cu:{line_of(path, 'no_bounds', 'load(x + i)')}"
    assert found("no_bounds", "address sanitizer: ", "heap-buffer-overflow", place)
    lines = (line_of(path, "no_barrier", text) for text in ("load(x + i)", "store(y + i"))
    assert found("no_barrier", "thread sanitizer: ", "data race", *(f"bugs.cu:{line}" for line in lines))
    assert rows["no_barrier"].count("WRONG") == 5  # backward, the last pass, happens to be right
    place = f"(bugs.cu:{line_of(path, 'barrier_in_branch', '__syncthreads')})"
    assert found("barrier_in_branch", f"thread 0 waits at __syncthreads {place}, but thread 100 has returned")
    assert rows["barrier_in_branch"].split()[9] == "-"  # no sanitizer sees what is behind the barrier
    assert not found("barrier_in_branch", "sanitizer") and not found("with_stack", "sanitizer")
    assert found("with_stack", "256 bytes of stack a thread", "sm_75 (float, half)")
    assert found("with_stack", "512 bytes of stack a thread", ": sm_80 (double)")
    assert rows["with_stack"].endswith(" 512 WRONG") and rows["with_stack"].count("WRONG") == 1


@needs_compiler
def test_what_a_process_does_not_survive_is_named_and_the_others_go_on(test, folder, monkeypatch):
    monkeypatch.setattr(kernel_test, "SECONDS", 2)
    checks, original = [], kernel_test._checks
    monkeypatch.setattr(kernel_test, "_checks", lambda names: checks.extend(original(names)) or checks)
    code, out, err = test(write(folder, "lost", LOST), "--only", "emulator")
    assert code == 1
    fit = {kind: [check.name for check in checks if check.fits(kind)] for kind in ("address", "thread")}
    assert fit == {"address": ["pairs", "wild"], "thread": ["pairs"]}  # what would have followed
    assert "wild in float32, threads forward, few blocks: the process died: SIGSEGV" in out
    assert "endless in float32, threads forward, few blocks: no end within 2 seconds" in out
    assert rows_of(out)["pairs"].count("WRONG") == 0 and out.endswith("1 of 3 kernels hold\n")
    assert "a definition may print" in err


@needs_compiler
def test_sanitizers_alone_name_what_they_do_not_survive_or_cannot_watch(test, folder, monkeypatch):
    bugs = {"wild": LOST["wild"], "barrier_in_branch": BUGS["barrier_in_branch"]}
    path = write(folder, "alone", bugs)
    code, out, _ = test(path, "--only", "sanitizers")
    assert code == 1
    place = f"alone.cu:{line_of(path, 'wild', 'load(x')}"
    assert re.search(rf"wild: address sanitizer: ERROR: AddressSanitizer: SEGV .*{place}", out)
    assert "barrier_in_branch: address sanitizer: emulator: barrier_in_branch: block 0: thread 0 waits at" in out
    assert rows_of(out)["pairs"].split() == ["pairs", "clean"] and "thread sanitizer" not in out
    assert out.endswith("1 of 3 kernels hold\n")

    # A process is not used again after a kernel that stood still in the middle: TSan would blame the next one.
    write(folder, "alone", {"barrier_in_branch": BUGS["barrier_in_branch"], "after": ("", "")})
    monkeypatch.setitem(kernel_test.PARTS, "sanitizers", ("thread",))
    code, out, _ = test(path, "--only", "sanitizers")
    assert code == 1 and "barrier_in_branch: thread sanitizer: emulator: " in out
    assert rows_of(out)["after"].split() == ["after", "clean"], out


@needs_compiler
def test_a_sanitizer_that_does_not_start_is_no_kernels_fault(test, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "runtime", lambda kind: str(ROOT / "README.md"))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    code, out, _ = test("order_stored", "--only", "sanitizers")
    assert code == 1 and "address sanitizer: it does not start: the process ended with exit code 1" in out


@needs_compiler
def test_control_c_ends_an_endless_kernel(folder, tmp_path):
    write(folder, "hangs", {"endless": LOST["endless"]})
    started = tmp_path / "started"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STARTED": str(started)}
    command = [sys.executable, "-m", "gpunet", "kernel-test", "hangs.cu", "--only", "emulator"]
    options = dict(env=environment, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)
    with subprocess.Popen(command, **options) as parent:
        child = None
        while child is None and parent.poll() is None:
            time.sleep(0.1)
            seen = started.read_text().split() if started.exists() else []
            child = next((int(pid) for pid in seen if int(pid) != parent.pid), None)
        time.sleep(0.5)
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
        _, err = parent.communicate(timeout=30)
    assert parent.returncode == 130 and "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_type_is_as_wrong_as_in_its_worst_pass():
    (subject,) = parity.subjects(["relu_forward"])
    check = kernel_test.Check(subject)
    for error, problem in ((0.0, None), (0.5, "first"), (0.25, "second"), (0.0, None)):
        check.compared("forward", "few", "float32", error, problem)
    assert check.results["float32"] == parity.Result("relu_forward", "float32", 0.5, "first")
    assert list(check.sentences()) == ["relu_forward in float32, threads forward, few blocks: first"]


# Errors of the user


@needs_compiler
@pytest.mark.parametrize("part", [pytest.param("compile", marks=needs_nvrtc), "emulator", "sanitizers"])
def test_a_compile_error_is_one_message_with_its_place(test, folder, part):
    path = write(folder, "broken")
    path.write_text(path.read_text().replace("load(x + i)", "load(nothing + i)"))
    code, out, err = test(path, "--only", part)
    assert (code, out) == (2, "") and err.startswith("gpunet: ") and "Traceback" not in err
    place = line_of(path, "pairs", "nothing")
    assert f"broken.cu({place}): error" in err or f"broken.cu:{place}:" in err
    assert "nothing" in err


def replaced(old, new):
    assert old in DEFINITION
    return DEFINITION.replace(old, new)


@pytest.mark.parametrize(
    ("definition", "expected"),
    [
        (None, "x.cu: expected its definitions and CASES in {}x.py, which is not there"),
        (replaced("def pairs", "def others"), "x.py: expected a function pairs, the definition of the kernel in"),
        (replaced('"pairs": case', ""), "x.py: expected CASES['pairs'], a function(rng, size, real, wide)"),
        (replaced("pairs(x, y, n)", "pairs(y, x, n)"), "x.py: pairs: expected parameters x, y, n, got y, x, n"),
        ("import nothing\n", "x.py: ModuleNotFoundError: No module named 'nothing' (line 1)"),
        ("def pairs(:\n", "x.py: SyntaxError: "),
        (replaced("n = [1,", "m = [1,"), "x.py: case 0 in float32: pairs: NameError: "),
        (replaced('"n": n}', '"m": n}'), "x.py: case 0 in float32: pairs: expected x, y, n, got x, y, m"),
        (replaced('"n": n}', '"n": n + 1}'), "x.py: case 0 in float32: pairs: x: expected n = 2 elements, got 1"),
        (replaced("np.nan, real", "np.nan"), "x.py: case 0 in float32: pairs: y: expected float32, got float64"),
    ],
)
def test_what_is_wrong_with_a_users_definitions_is_said(test, folder, definition, expected):
    path = write(folder, "x")
    path.with_suffix(".py").write_text(definition) if definition else path.with_suffix(".py").unlink()
    code, out, err = test(path)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert expected.format(f"{folder}/") in err


@needs_compiler
def test_a_definition_that_raises_is_said_with_its_line(test, folder):
    definition = replaced("part[1:]", "part[1:], nothing")
    code, out, _ = test(write(folder, "x", definition=definition), "--only", "emulator")
    place = next(i for i, line in enumerate(definition.splitlines(), 1) if "nothing" in line)
    assert code == 1
    assert f"pairs in float32, threads forward, few blocks: NameError: name 'nothing' is not defined (line {place}); " \
        "wrong in float64, float16, bfloat16 too" in out  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rellu_forward"], "kernel 'rellu_forward': expected a kernel or a family of them; nearest: relu_forward, "),
        (["order", "qqqq"], "kernel 'qqqq': expected a kernel or a family of them; families: activation, augment, "),
        (["absent.cu"], "absent.cu: expected a .cu file, there is none"),
        (["order", "--only", "all"], "--only: expected emulator, sanitizers or compile, got 'all'"),
    ],
)
def test_what_is_asked_for_and_is_not_there(test, arguments, expected):
    code, out, err = test(*arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and expected in err


def test_a_header_that_is_not_there(test, tmp_path):
    path = write(tmp_path, "x")
    Path(path).write_text('#include "nothing.cuh"\n' + Path(path).read_text())
    code, out, err = test(path)
    assert (code, out) == (2, "")
    assert 'x.cu:1: expected "nothing.cuh" beside it or among gpunet\'s headers in ' in err


# What is not there to check with


def test_a_part_without_its_tool_is_skipped_with_the_reason(test, monkeypatch):
    monkeypatch.setattr(nvrtc, "available", lambda: False)
    monkeypatch.setattr(emulator, "problem", lambda: "there is no g++")
    code, out, _ = test("order")
    assert code == 0
    assert out.splitlines() == [
        "compile is skipped: there is no libnvrtc; pip install nvidia-cuda-nvrtc",
        "emulator is skipped: there is no g++",
        "address sanitizer is skipped: there is no g++",
        "thread sanitizer is skipped: there is no g++",
        "nothing was tried of 4 kernels",
    ]
    monkeypatch.setattr(emulator, "problem", lambda: None)
    monkeypatch.setattr(build, "runtime", lambda kind: build.RUNTIMES[kind])  # as g++ names a file it has not
    code, out, _ = test("order", "--only", "sanitizers")
    assert code == 0 and "address sanitizer is skipped: g++ has no libasan.so" in out


@needs_nvrtc
def test_an_unknown_architecture_is_skipped_and_progress_is_shown_on_a_terminal(test, monkeypatch):
    monkeypatch.setattr(nvrtc, "architectures", lambda: [75, 80, 90])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = test("order_stored", "--only", "compile")
    assert code == 0 and f"sm_120 is skipped: NVRTC {nvrtc.version()} does not know it" in out
    assert err.endswith("\r\x1b[Kcompiling for GPUs: 8 of 8\r\x1b[K")
    assert list(compiling.matrix()[0]) == ["sm_75", "sm_80", "sm_90a"]
