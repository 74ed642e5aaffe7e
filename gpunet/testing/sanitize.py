"""Kernels under AddressSanitizer with UBSan, or ThreadSanitizer: in a child process, which must load them first.

    complaints = run("thread", ["column_sum"])      # {kernel: [what was found, with its place]}

As a program it is that child: it runs the cases of kernels in float and lets the sanitizer write to stderr.
"""

import json
import os
import re
import subprocess
import sys

from gpunet.errors import GpunetError

KINDS = ("address", "thread")
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0:detect_stack_use_after_return=0:handle_segv=1",
    "UBSAN_OPTIONS": "print_stacktrace=0",
    "TSAN_OPTIONS": "exitcode=0:report_bugs=1:history_size=4",
}
MARK = "gpunet kernel "
FOUND = re.compile(r"(?:ERROR: AddressSanitizer: |WARNING: ThreadSanitizer: |: runtime error: )[^\n]*")
PLACE = re.compile(r"([\w./-]+\.cuh?):(\d+)")
SECONDS = 600  # after which a child is given up


def run(kind, names=(), path=None):
    """Return {kernel: [complaints]} for shipped kernels by name (all unless told), or those of a user's file."""
    from gpunet.backends.emulator.build import runtime

    if kind not in KINDS:
        raise GpunetError(f"sanitizer: expected one of {', '.join(KINDS)}, got '{kind}'")
    command = [sys.executable, "-m", "gpunet.testing.sanitize", kind, str(path or ""), *names]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": runtime(kind), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, errors="replace")
    if done.returncode:
        raise GpunetError(f"{kind} sanitizer: its child failed, exit code {done.returncode}:\n{done.stderr[-4000:]}")
    complaints = {name: [] for name in json.loads(done.stdout.splitlines()[-1])}
    for part in done.stderr.split(MARK)[1:]:
        name, _, text = part.partition("\n")
        complaints[name.strip()] += found(text)
    return complaints


def found(text):
    """Return each thing that a sanitizer reported, once: what it is, and the first places in kernels it names."""
    starts = [m.start() for m in FOUND.finditer(text)]
    complaints = {}
    for start, stop in zip(starts, [*starts[1:], len(text)], strict=False):
        line = text.rfind("\n", 0, start) + 1
        report = text[line:stop]
        what = re.sub(r"^=*\d+=*|\(pid=\d+\)|on address.*|0x[0-9a-f]+|\s+", " ", FOUND.search(report)[0]).strip(" :")
        places = list(dict.fromkeys(f"{m[1].rsplit('/', 1)[-1]}:{m[2]}" for m in PLACE.finditer(report)))
        complaints[f"{what} ({', '.join(places[:3]) or 'no place in a kernel'})"] = None
    return list(complaints)


def main(kind, path, *names):
    """Run every case in float; what the sanitizer says goes to stderr between marks."""
    import numpy as np

    from gpunet.backends.emulator import Backend
    from gpunet.testing import parity, user
    from gpunet.testing.cases import SIZES

    backend = Backend("mixed", sanitizer=kind, most_blocks=3)
    chosen = user.subjects(path) if path else parity.subjects(names)
    backend.compile(parity.wanted(chosen, ("float32",)))
    for subject in chosen:
        print(f"{MARK}{subject.kernel.name}", file=sys.stderr, flush=True)
        for size in range(SIZES):
            arguments = subject.case(np.random.default_rng(size), size, *parity.TYPES["float32"])
            try:
                backend.bind_launch(subject.kernel, parity.on_device(backend, arguments), None)()
            except GpunetError:
                break  # the emulator's own complaint: parity reports it
    print(json.dumps([s.kernel.name for s in chosen]))


if __name__ == "__main__":
    main(*sys.argv[1:])
