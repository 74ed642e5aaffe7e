"""Part parity: whether the device computes what NumPy does, kernel by kernel and over whole trainings, and repeats it.

Also what gpunet doctor says, the tests that need a GPU, and kernels under NVIDIA's compute-sanitizer.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from gpu.bench import Item, Skip
from gpunet.backends import numpy as reference
from gpunet.core import sources
from gpunet.core.source import Source
from gpunet.core.step import Step
from gpunet.nn import (
    BatchNorm,
    Conv2d,
    Dropout,
    GlobalAvgPool,
    Graph,
    Input,
    Linear,
    MaxPool,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
)
from gpunet.optim import SGD
from gpunet.testing import parity

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "test_cuda.py"
STEPS, CLASSES = 50, 5
SAME = 1e-9  # what 50 steps in double precision may differ by: the order of sums, grown from step to step
SANITIZED = (1, 4, 7)  # cases of each kernel under a sanitizer
PATIENCE = 200  # seconds for a process of tests or under a sanitizer
SANITIZERS = ("memcheck", "racecheck")

KERNELS, TRAJECTORY, BITS, SANITIZER, PYTEST = (
    "Kernels against NumPy",
    "A training in double precision against NumPy",
    "Bit for bit",
    "compute-sanitizer",
    "Tests that need a GPU",
)
ABOUT = {
    KERNELS: "The largest |got - expected| / (1 + |expected|) over all cases; allowed are 1e-5, 1e-12, 2e-3 and 1.6e-2 "
    "for float32, float64, float16 and bfloat16.",
    TRAJECTORY: "A small net with batch normalisation, pooling and dropout, on augmented images.",
    BITS: "Weights, statistics and metrics after the steps.",
    SANITIZER: "Some cases of every kernel in float32.",
}


def items(options):
    """Return the items: what all else rests on first, sanitizers, which are slow, last."""
    families = sorted({kernel.stem for kernel in sources.kernels().values()})
    return [
        Item("doctor", doctor),
        *(Item(f"kernels {name}", partial(kernels, family=name)) for name in families),
        Item("trajectory", trajectory),
        Item("repeat", repeat),
        Item("graphs", graphs),
        Item("tests", tests, needs=10),
        *(Item(tool, partial(sanitizer, tool=tool), needs=10) for tool in SANITIZERS),
    ]


def doctor(bench):
    """Return what gpunet doctor says."""
    from gpunet import doctor as probe

    return {"line": "see the report", "text": probe.report()}


def kernels(bench, family):
    """Hold a family of kernels against NumPy in all types."""
    types = ("float32", "float16") if bench.quick else tuple(parity.TYPES)
    results = parity.run(bench.backend, parity.subjects([family]), types)
    rows = []
    for name in dict.fromkeys(r.kernel for r in results):
        rows.append({"kernel": name} | {r.type: r.error for r in results if r.kernel == name})
    problems = [f"{r.kernel} in {r.type}: {r.problem}" for r in results if r.problem]
    line = f"{len(results) - len(problems)} of {len(results)} hold"
    return {"line": line, "problems": problems, "about": ABOUT, "rows": {KERNELS: rows}}


# Trainings


def train(backend, dtype, steps, seed=0, together=1):
    """Train a small net; return {name: array} of weights, statistics and metrics. together: steps a call."""
    rng = np.random.default_rng(1)
    pixels, labels = rng.integers(0, 256, (70, 8, 8, 3), np.uint8), rng.integers(0, CLASSES, 70).astype(np.int32)
    from gpunet.data import Split

    source = Source(Split(pixels, labels), [120.0] * 3, [1 / 60] * 3, flip=True, pad=1, classes=CLASSES)
    step = Step(
        small_net(),
        SoftmaxCrossEntropy(),
        SGD(0.05, 0.9, 5e-4, nesterov=True),
        batch=16,
        dtype=dtype,
        backend=backend,
        replicas=1,
        seed=seed,
        source=source,
    )
    for _ in range(steps // together):
        step(steps=together)
    step.wait()
    found = {"metrics": step.metrics(), **step.weights, **step.statistics}
    step.close()
    return found


def small_net():
    """Return a net with most of what a net is made of: two tails of batches an epoch, odd widths."""
    image = Input((8, 8, 3))
    layers = [
        Conv2d(8, 3, bias=False), BatchNorm(), ReLU(), MaxPool(2),
        Conv2d(12, 3), BatchNorm(), ReLU(), Dropout(0.2), GlobalAvgPool(), Linear(CLASSES),
    ]  # fmt: skip
    return Graph(image, Sequential(*layers)(image))


def trajectory(bench):
    """Train in double precision on the device and in NumPy."""
    steps = 2 if bench.quick else STEPS
    ours, theirs = (train(backend, "float64", steps) for backend in (bench.backend, reference.Backend()))
    parts = {
        "losses": [(ours["metrics"][:, :1], theirs["metrics"][:, :1])],
        "weights and statistics": [(ours[name], theirs[name]) for name in ours if name != "metrics"],
    }
    rows, problems = [], []
    for name, pairs in parts.items():
        worst = max(float(np.abs(a - b).max()) if a.shape == b.shape else np.inf for a, b in pairs)
        rows.append({"steps": steps, "what": name, "largest difference": worst, "allowed": SAME})
        if not worst <= SAME:
            problems.append(f"{name}: expected a difference of at most {SAME}, got {worst:.2g} after {steps} steps")
    worst = max(row["largest difference"] for row in rows)
    line = f"{worst:.1e} after {steps} steps"
    return {"line": line, "problems": problems, "about": ABOUT, "rows": {TRAJECTORY: rows}}


def repeat(bench):
    """Train twice from one seed."""
    return bits(bench, "two runs of one seed", lambda dtype, steps: (train(bench.backend, dtype, steps) for _ in "12"))


def graphs(bench):
    """Train by graphs, launch by launch, and with several steps in a graph."""

    def runs(dtype, steps):
        for on, together in ((True, 1), (False, 1), (True, 2)):
            with bench.graphs(on):
                yield train(bench.backend, dtype, steps, together=together)

    return bits(bench, "a graph, no graph, a graph of two steps", runs)


def bits(bench, what, runs):
    """Return the record of runs(dtype, steps) that should agree bit for bit."""
    rows, problems, steps = [], [], 4 if bench.quick else 20
    for dtype in ("float32",) if bench.quick else ("float32", "tf32", "float16", "bfloat16"):
        first, *others = runs(dtype, steps)
        wrong = sorted({name for other in others for name in first if not same(first[name], other[name])})
        rows.append({"compared": what, "type": dtype, "steps": steps, "same": not wrong})
        if wrong:
            problems.append(f"{what} in {dtype}: {len(wrong)} of {len(first)} arrays differ: {', '.join(wrong[:5])}")
    line = "the same" if not problems else "NOT the same"
    return {"line": line, "problems": problems, "about": ABOUT, "rows": {BITS: rows}}


def same(a, b):
    """Return whether two arrays are the same bit for bit."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


# In processes of their own


def tests(bench):
    """Run the tests that need a GPU."""
    if bench.emulated:
        raise Skip("they need a GPU; pytest runs them on their stand-in")
    return run_tests(TESTS, min(bench.left - 5, PATIENCE))


def run_tests(path, seconds):
    """Run a file of tests and return its closing line and what failed."""
    if not path.is_file():
        raise Skip(f"there is no {path.name}")
    command = [sys.executable, "-m", "pytest", str(path), "-p", "no:cacheprovider"]
    code, text = child(command, seconds)
    lines = [line for line in text.splitlines() if line.strip()]
    closing = lines[-1].strip("= ") if lines else "nothing was said"
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    problems = (failed or [f"exit code {code}: {text[-2000:]}"]) if code else []
    rows = [{"file": path.name, "result": closing}]
    return {"line": closing, "problems": problems, "output": text[-6000:], "rows": {PYTEST: rows}}


def sanitizer(bench, tool):
    """Launch some cases of every kernel under a tool of compute-sanitizer."""
    program = find_sanitizer()
    if program is None:
        raise Skip("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    script = str(Path(__file__).resolve().parents[1] / "gpu_report.py")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, script]
    command += ["--part", "parity", "--backend", bench.options.backend, "--launch"]
    code, text = child(command, min(bench.left - 5, PATIENCE))
    summary = re.findall(r"^.*SUMMARY.*$", text, re.M)
    said = summary[-1].strip("= ") if summary else "no summary"
    problems = []
    if code or not summary:
        problems.append(f"{tool}: exit code {code}, {said}: {text[-3000:]}")
    rows = [{"tool": tool, "result": said, "exit code": code}]
    return {
        "line": said,
        "problems": problems,
        "output": text[-6000:],
        "about": ABOUT,
        "rows": {SANITIZER: rows},
    }


def find_sanitizer():
    """Return the path of compute-sanitizer, or None."""
    places = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def launch(backend):
    """Launch the cases that a sanitizer is to see."""
    for subject in parity.subjects():
        for size in SANITIZED:
            arguments = subject.case(np.random.default_rng(size), size, *parity.TYPES["float32"])
            backend.bind_launch(subject.kernel, parity.on_device(backend, arguments), None)()
    backend.synchronize()
    print("launched all")


def child(command, seconds):
    """Run a command in the checkout; return (exit code, what it printed), or raise TimeoutError with the latter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    with tempfile.TemporaryFile() as file:  # a pipe would be held open by those that the command starts
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            process_group=0,
        )  # fmt: skip
        late = False
        try:
            process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        file.seek(0)
        said = file.read().decode(errors="replace")
    if late:
        what = " ".join(command[:4])
        raise TimeoutError(f"{what} took longer than {seconds:.0f} s; its last words: {said[-2000:].strip()}")
    return process.returncode, said
