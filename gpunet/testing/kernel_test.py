"""What `gpunet kernel-test` does: kernels on the emulator, under sanitizers, and through CUDA's compiler; on a laptop.

A kernel that never ends, or writes where it must not, takes its process with it, so they run in child processes:
`python -m gpunet.testing.kernel_test KIND FILE KERNEL...` is one. It prints a line of JSON when it is ready and after
each pass; the process that started it goes on with another child behind the kernel that one did not survive.
"""

import ctypes
import inspect
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np

from gpunet import ops, resources
from gpunet.backends import emulator
from gpunet.backends.cuda import nvrtc
from gpunet.backends.emulator import build
from gpunet.core import sources
from gpunet.core.backend import Types, check_launch
from gpunet.core.trace import Base, Tensor
from gpunet.errors import GpunetError
from gpunet.testing import compile, parity, sanitize, user
from gpunet.testing.cases import SIZES

PARTS = {"emulator": ("emulator",), "sanitizers": sanitize.KINDS, "compile": ()}  # and the kinds of children
BLOCKS = {"few": 2, "many": 1 << 20}  # of a launch over=n at most
PASSES = {
    "emulator": tuple(product(("forward", "backward"), BLOCKS, parity.TYPES)),
    **dict.fromkeys(sanitize.KINDS, (("mixed", "few", "float32"),)),
}
SECONDS = 120  # for a pass: the longest of the shipped kernels takes three, 14 on a busy machine
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(eq=False)
class Check:
    """A kernel and what is found out about it. own: the user's file that it stands in, None for a shipped one."""

    subject: parity.Subject
    own: Path | None = None
    results: dict = field(default_factory=dict)  # type: parity.Result, the worst of all passes
    problems: list = field(default_factory=list)  # (type, sentence): what each type stumbles over first
    complaints: list | None = None  # of sanitizers
    rows: list = field(default_factory=list)  # compile.Row
    ended: str = ""  # how its process ended, where that did not survive it
    endless: bool = False
    stopped: bool = False  # by the emulator, in the middle: it does what CUDA leaves undefined

    @property
    def name(self):
        """The kernel's."""
        return self.subject.kernel.name

    def fits(self, kind):
        """Whether it is worth trying: AddressSanitizer tells where a process dies, ThreadSanitizer does not."""
        return not (self.endless or self.stopped or (self.ended and kind == "thread"))

    def compared(self, order, blocks, type_name, error, problem):
        """Note what came out of a pass of the emulator."""
        before = self.results.get(type_name, parity.Result(self.name, type_name, 0.0, None))
        self.results[type_name] = replace(before, error=max(error, before.error), problem=before.problem or problem)
        if problem and not before.problem:
            self.problems.append((type_name, f"{type_name}, threads {order}, {blocks} blocks: {problem}"))

    def watched(self, kind, found, problem):
        """Note what a sanitizer found; where the kernel came to no end, what is behind that is not its fault."""
        texts = [problem] if self.stopped else found or ([self.ended] if self.ended else [])
        self.complaints = [*(self.complaints or []), *(f"{kind} sanitizer: {text}" for text in texts)]

    def sentences(self):
        """What is wrong with it."""
        if self.problems:
            too = ", ".join(name for name, _ in self.problems[1:])
            yield f"{self.name} in {self.problems[0][1]}{too and f'; wrong in {too} too'}"
        yield from (f"{self.name}: {text}" for text in self.complaints or ())
        yield from compile.problems(self.rows)


class Progress:
    """One line on a terminal's standard error that says what is being done; nothing elsewhere."""

    def __init__(self):
        self.on = sys.stderr.isatty()

    def __call__(self, text=""):
        if self.on:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def counts(self, what):
        """Return a function(done, count) that says how much of it is done."""
        return lambda done, count: self(f"{what}: {done} of {count}")


def main(names=(), only=None, everything=False):
    """Check shipped kernels by name, by family, all unless told, and those of files; return the exit code 0 or 1.

    only: one of PARTS. everything: compile for all architectures and types.
    """
    if only is not None and only not in PARTS:
        *some, last = PARTS
        raise GpunetError(f"kernel-test: --only: expected {', '.join(some)} or {last}, got '{only}'")
    checks = _checks(names)
    parts, faults, notes, say = ([only] if only else PARTS), [], [], Progress()
    try:  # what does not compile is found first
        if "compile" in parts and not _missing(notes, "compile", nvrtc_problem()):
            notes += [f"{name} is skipped: NVRTC {nvrtc.version()} does not know it"
                      for name in compile.matrix(everything)[1]]  # fmt: skip
            _compile(checks, everything, say.counts("compiling for GPUs"))
        for kind in (kind for part in parts for kind in PARTS[part]):
            if not _missing(notes, _place(kind), emulator.problem() or sanitizer_problem(kind)):
                faults += _run(kind, checks, say)
    finally:
        say()
    return _print(checks, faults, notes)


def complaints(kind, names=()):
    """Return {kernel: what a sanitizer of this kind complains of}, for kernels by name, family or file."""
    checks = _checks(names)
    faults = _run(kind, checks, Progress())
    if faults:
        raise GpunetError("; ".join(faults))
    return {check.name: check.complaints for check in checks}


def _print(checks, faults, notes):
    """Print the table, what is wrong, what was left out, and the count; return the exit code."""
    from gpunet.train.text import columns  # not in every child

    rows = table(checks)
    wrong = [check for check in checks if any(check.sentences())]
    units = [
        any(c.results for c in checks) and "errors: the largest |got - expected| / (1 + |expected|)",
        any(c.rows for c in checks) and "registers and bytes of stack: a thread's, shared bytes: a block's",
    ]
    if len(rows[0]) > 1:
        print(columns(rows, 1), *[unit for unit in units if unit], "", sep="\n")
    for text in [*(s for check in wrong for s in check.sentences()), *faults, *notes]:
        print(text)
    held = f"{len(checks) - len(wrong)} of {len(checks)} kernels hold"
    print(held if len(rows[0]) > 1 else f"nothing was tried of {len(checks)} kernels")
    return int(bool(wrong or faults))


def table(checks):
    """Return rows of text, one a kernel: errors by type, sanitizers, registers, shared bytes, stack; without gaps."""
    parts = [
        (any(c.results for c in checks), tuple(parity.TYPES), _errors),
        (any(c.complaints is not None for c in checks), ("sanitizers",), _complaints),
        (any(c.rows for c in checks), ("registers", "shared", "stack"), _usage),
    ]
    shown = [(header, cells) for there, header, cells in parts if there]
    header = ("kernel", *(name for names, _ in shown for name in names))
    return [header, *((c.name, *(cell for _, cells in shown for cell in cells(c))) for c in checks)]


def _errors(check):
    cells = dict(zip(*parity.table(check.results.values()), strict=True)) if check.results else {}
    return [cells.get(name, "-") for name in parity.TYPES]


def _complaints(check):
    if check.complaints:
        return [f"{len(check.complaints)} WRONG"]
    return ["-" if check.complaints is None else "clean"]


def _usage(check):
    if not check.rows:
        return ["-"] * 3
    usages = [row.usage for row in check.rows]
    least, most = (f(u.registers for u in usages) for f in (min, max))
    shared, stack = (max(getattr(u, name) for u in usages) for name in ("shared", "stack"))
    wrong = " WRONG" if any(row.wrong for row in check.rows) else ""
    return [f"{least}-{most}" if least < most else f"{most}", f"{shared}", f"{stack}{wrong}"]


# What is asked for


def nvrtc_problem():
    """Return None where NVRTC is, or what is missing."""
    return None if nvrtc.available() else "there is no libnvrtc; pip install nvidia-cuda-nvrtc"


def sanitizer_problem(kind):
    """Return None where g++ has what this kind needs, or what is missing."""
    if _sanitizer(kind) is None or Path(build.runtime(kind)).is_absolute():
        return None
    return f"g++ has no {build.RUNTIMES[kind]}"


def _sanitizer(kind):
    return None if kind == "emulator" else kind


def _place(kind):
    return kind if kind == "emulator" else f"{kind} sanitizer"


def _missing(notes, part, problem):
    if problem:
        notes.append(f"{part} is skipped: {problem}")
    return problem


def _checks(names):
    """Return a Check for each kernel that is named, once; raises GpunetError for what is not there or not usable."""
    shipped, own = [], {}
    for name in names:
        path = Path(name)
        if path.suffix != ".cu":
            shipped.append(name)
        elif not path.is_file():
            raise GpunetError(f"{name}: expected a .cu file, there is none")
        elif path.resolve().parent == resources.kernels().resolve():
            shipped.append(path.stem)
        else:
            own[path.resolve()] = path
    found = [Check(s) for s in parity.subjects(shipped)] if shipped or not own else []
    return found + [Check(s, path) for path in own.values() for s in _own(path)]


def _own(path):
    """Return the Subjects of a user's file, whose cases fit the kernels' declarations."""
    beside = path.with_suffix(".py")
    subjects = user.subjects(path)
    sources.inlined(path)
    for subject, type_name, size in product(subjects, parity.TYPES, range(SIZES)):
        place = f"{beside}: case {size} in {type_name}"
        try:
            arguments = subject.case(np.random.default_rng(size), size, *parity.TYPES[type_name])
            given, expected = list(arguments), [a.name for a in subject.kernel.arguments]
        except Exception as error:
            raise GpunetError(f"{place}: {subject.kernel.name}: {ops.said(error, beside)}") from error
        if given != expected:
            raise GpunetError(f"{place}: {subject.kernel.name}: expected {', '.join(expected)}, got {', '.join(given)}")
        check_launch(subject.kernel, [_traced(v) for v in arguments.values()], Types.of(type_name), place)
    return subjects


def _traced(value):
    return Tensor(Base(value.nbytes), value.shape, value.dtype) if isinstance(value, np.ndarray) else value


def _groups(checks):
    """Return {file or None: its checks}: what one process can take."""
    found = {}
    for check in checks:
        found.setdefault(check.own, []).append(check)
    return found


# The parts


def _compile(checks, everything, show):
    by_kernel = {check.subject.kernel: check for check in checks}
    for row in compile.run(by_kernel, everything, show):
        by_kernel[row.kernel].rows.append(row)


def _run(kind, checks, say):
    """Run the passes of this kind; return sentences on what kept it from that."""
    fit = [check for check in checks if check.fits(kind)]
    types = tuple(dict.fromkeys(type_name for _, _, type_name in PASSES[kind]))
    wanted = parity.wanted([check.subject for check in fit], types)
    build.compile_all(wanted, _sanitizer(kind), say.counts(f"compiling for the {_place(kind)}"))
    faults = []
    for own, group in _groups(fit).items():
        while group:
            group = _run_some(kind, own, group, faults, say)
    return faults


def _run_some(kind, own, group, faults, say):
    """Run the passes of these checks in one child; return the checks behind one that it did not survive."""
    command = [sys.executable, "-m", "gpunet.testing.kernel_test", kind, str(own or ""), *(c.name for c in group)]
    environment = dict(os.environ)
    if _sanitizer(kind):
        environment |= {**sanitize.OPTIONS, "LD_PRELOAD": build.runtime(kind), "OPENBLAS_NUM_THREADS": "1"}
    # A process group of its own: Ctrl-C comes to this process, which ends the child whatever that does.
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, bufsize=0, process_group=0,
                         stderr=said if _sanitizer(kind) else None) as process,
    ):  # fmt: skip
        try:
            ready, _, ended = _answer(process)
            if not ready:
                text = os.pread(said.fileno(), 4000, 0).decode(errors="replace")
                faults.append(f"{_place(kind)}: it does not start: {' '.join([ended, *text.split()])}")
                return []
            place = 0
            for check, one in product(group, PASSES[kind]):
                say(f"{_place(kind)}: {check.name}")
                answer, check.endless, check.ended = _answer(process)
                error, problem = answer or (np.inf, check.ended)
                check.stopped = check.stopped or "emulator: " in (problem or "")
                if kind == "emulator":
                    check.compared(*one, error, problem)
                else:
                    text = os.pread(said.fileno(), os.fstat(said.fileno()).st_size - place, place)
                    place += len(text)
                    check.watched(kind, sanitize.found(text.decode(errors="replace")), problem)
                if check.ended or (check.stopped and kind != "emulator"):
                    return group[group.index(check) + 1 :]
        finally:
            process.kill()
    return []


def _answer(process):
    """Return (what a child says next or None, whether the time is over, how it ended or nothing)."""
    if not select.select([process.stdout], [], [], SECONDS)[0]:
        return None, True, f"no end within {SECONDS} seconds"
    line = process.stdout.readline()
    if line:
        return json.loads(line), False, ""
    code = process.wait()
    how = f"died: {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return None, False, f"the process {how}"


def child(kind, path, *names):
    """Run the passes of these kernels, in order; print [error, problem] after each."""
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a user's definitions print is no result
    known = {s.kernel.name: s for s in (user.subjects(path) if path else parity.subjects(names))}
    print("true", file=out, flush=True)
    for name, (order, blocks, type_name) in product(names, PASSES[kind]):
        backend = emulator.Backend(order, _sanitizer(kind), BLOCKS[blocks])
        try:
            result = parity.check(known[name], backend, type_name)
            found = result.error, result.problem
        except Exception as error:
            found = np.inf, ops.said(error, Path(inspect.getfile(known[name].definition)))
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    child(*sys.argv[1:])
