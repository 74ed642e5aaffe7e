"""What CUDA's compiler makes of kernels, for every architecture and type, with no GPU and no driver.

    rows = run(sources.kernels().values())
    for sentence in problems(rows): print(sentence)     # kernels that keep values in memory instead of in registers
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from gpunet.backends.cuda import nvrtc
from gpunet.core import sources

TYPES = ("float", "half", "bfloat16", "double")
COMMON = {"sm_75": TYPES[:2], "sm_80": TYPES, "sm_90a": TYPES[:2], "sm_120": TYPES[:2]}
EVERYTHING = dict.fromkeys(("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120"), TYPES)
COMPILERS = 2  # files compiled at a time


class Target(NamedTuple):
    """What a file is compiled for; real and pixel are storage types by their C names."""

    architecture: str
    real: str
    pixel: str = "uint8"

    @property
    def type(self):
        """Its types in words."""
        return self.real if self.pixel == "uint8" else f"{self.real} with {self.pixel} pixels"


class Row(NamedTuple):
    """What one kernel takes when it is compiled for one target."""

    kernel: sources.Kernel
    target: Target
    usage: nvrtc.Usage

    @property
    def wrong(self):
        """Whether it has a stack: spilled registers, an array that is indexed at run time, a call."""
        return any((self.usage.stack, self.usage.spill_stores, self.usage.spill_loads))


def matrix(everything=False):
    """Return ({architecture: types}, the architectures that this NVRTC does not know)."""
    asked, known = EVERYTHING if everything else COMMON, nvrtc.architectures()
    unknown = [name for name in asked if int(name.strip("sm_a")) not in known]
    return {name: types for name, types in asked.items() if name not in unknown}, unknown


def targets(path, everything=False):
    """Return the Targets of a file: the matrix, and float pixels (on sm_80, or everywhere) where it reads pixels."""
    found = [Target(name, real) for name, types in matrix(everything)[0].items() for real in types]
    if any(a.type == "pixel" for kernel in sources.parse(path).values() for a in kernel.arguments):
        both = [t for t in found if t.real == "float" and (everything or t.architecture == "sm_80")]
        found += [t._replace(pixel="float") for t in both]
    return found


def run(kernels, everything=False, show=None):
    """Return a Row for each kernel and target, two files at a time; `show(done, count)` is called after each build.

    Raises GpunetError with the compiler's words where a file does not compile.
    """
    wanted = {}
    for kernel in kernels:
        wanted.setdefault(kernel.path, {})[kernel.name] = kernel
    jobs = [(path, sources.inlined(path), target) for path in wanted for target in targets(path, everything)]
    rows = []
    with ThreadPoolExecutor(COMPILERS) as pool:  # NVRTC runs without Python's lock
        for done, ((path, _, target), usage) in enumerate(zip(jobs, pool.map(_usage, jobs), strict=True), 1):
            rows += [Row(kernel, target, usage[name]) for name, kernel in wanted[path].items()]
            if show:
                show(done, len(jobs))
    return rows


def problems(rows):
    """Return a sentence for each kernel and each way in which it is wrong, with all the targets where it is."""
    places = {}
    for row in rows:
        if row.wrong:
            where = places.setdefault((row.kernel.name, row.usage[2:]), {})
            where.setdefault(row.target.architecture, []).append(row.target.type)
    return [f"{kernel}: {_stack(*sizes)}: {_places(where)}" for (kernel, sizes), where in places.items()]


def _usage(job):
    path, text, target = job
    defines = (f"REAL={target.real}", f"PIXEL={target.pixel}")
    return nvrtc.usage(nvrtc.compile(text, path.name, target.architecture, defines))


def _stack(stack, stores, loads):
    spills = f"spills store {stores} and load {loads} bytes" if stores or loads else "for arrays indexed at run time"
    return f"{stack} bytes of stack a thread, {spills}"


def _places(types):
    return ", ".join(f"{architecture} ({', '.join(names)})" for architecture, names in types.items())
