"""Parity: a kernel run by a backend against its NumPy definition, on every case and storage type.

    results = run(Backend(), sources.kernels().values())

The same suite proves the kernels' text on the emulator and the real thing on a GPU.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module

import ml_dtypes
import numpy as np

from gpunet.core import sources
from gpunet.core.trace import Base, Tensor
from gpunet.errors import GpunetError
from gpunet.testing.cases import CASES, SIZES
from gpunet.testing.tolerance import assert_close, largest_error

TYPES = {  # storage type: (real, wide)
    "float32": (np.dtype("float32"), np.dtype("float32")),
    "float64": (np.dtype("float64"), np.dtype("float64")),
    "float16": (np.dtype("float16"), np.dtype("float32")),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), np.dtype("float32")),
}


@dataclass(frozen=True)
class Subject:
    """A kernel with its definition and its cases."""

    kernel: sources.Kernel
    definition: object
    case: object

    @classmethod
    def shipped(cls, kernel):
        """The subject of one of gpunet's own kernels."""
        module = import_module(f"gpunet.backends.numpy.{kernel.stem}")
        return cls(kernel, getattr(module, kernel.name), CASES[kernel.name])


@dataclass(frozen=True)
class Result:
    """What came out for one kernel and storage type: the largest error over all cases, and what was wrong."""

    kernel: str
    type: str
    error: float
    problem: str | None


def subjects(names=()):
    """Return the Subjects of shipped kernels: all, or those whose own name or file's stem is among `names`."""
    kernels = sources.kernels()
    families = sorted({k.stem for k in kernels.values()})
    known = {*kernels, *families}
    for name in names:
        if name not in known:
            nearest = get_close_matches(name, sorted(known), n=3)
            hint = f"nearest: {', '.join(nearest)}; " if nearest else ""
            raise GpunetError(
                f"kernel '{name}': expected a kernel or a family of them; {hint}families: {', '.join(families)}"
            )
    return [Subject.shipped(k) for k in kernels.values() if not names or k.name in names or k.stem in names]


def on_device(backend, arguments):
    """Return the arguments with each array copied to the backend, a piece of memory each, exactly as large."""
    placed = []
    for value in arguments.values():
        if isinstance(value, np.ndarray):
            tensor = Tensor(Base(value.nbytes), value.shape, value.dtype)
            value = backend.view(backend.adopt(value), 0, tensor)
        placed.append(value)
    return placed


def check(subject, backend, type_name, sizes=range(SIZES)):
    """Return the Result of a subject on a backend in a storage type."""
    real, wide = TYPES[type_name]
    worst, problem = 0.0, None
    for size in sizes:
        arguments = subject.case(np.random.default_rng(size), size, real, wide)
        views = on_device(backend, arguments)
        try:
            backend.bind_launch(subject.kernel, views, None)()
            pairs = zip(arguments.items(), views, strict=True)
            got = {name: backend.download(view) for (name, value), view in pairs if isinstance(value, np.ndarray)}
            with np.errstate(all="ignore"):
                subject.definition(**arguments)
            for name, array in got.items():
                worst = max(worst, largest_error(array, arguments[name]))
                assert_close(f"case {size}: {name}", array, arguments[name], arguments[name].dtype)
        except (AssertionError, GpunetError) as error:
            problem = problem or str(error)
    return Result(subject.kernel.name, type_name, worst, problem)


def wanted(subjects, types=tuple(TYPES)):
    """Return {(path, REAL, PIXEL)} that checking these subjects needs compiled."""
    from gpunet.backends.device import variant

    found = set()
    for subject in subjects:
        for name in types:
            for size in range(2):  # both kinds of pixel
                arguments = subject.case(np.random.default_rng(size), size, *TYPES[name])
                found.add((subject.kernel.path, *variant(subject.kernel, tuple(arguments.values()))))
    return found


def run(backend, subjects, types=tuple(TYPES)):
    """Return a Result for each subject and type; compiles everything first."""
    backend.compile(wanted(subjects, types))
    return [check(subject, backend, name) for subject in subjects for name in types]


def table(results):
    """Return rows of text: kernel, then the largest error in each type."""
    types = list(dict.fromkeys(r.type for r in results))
    rows = [("kernel", *types)]
    for kernel in dict.fromkeys(r.kernel for r in results):
        by_type = {r.type: r for r in results if r.kernel == kernel}
        rows.append((kernel, *(_cell(by_type[t]) for t in types)))
    return rows


def _cell(result):
    error = "0" if result.error == 0 else f"{result.error:.1e}"
    return f"{error} WRONG" if result.problem else error


def main(name):
    """Run all kernels on a backend by name, print the table and what is wrong; return the exit code."""
    from gpunet.backends import backend
    from gpunet.train.text import columns

    results = run(backend(name), subjects())
    print(columns(table(results), 1))
    wrong = [r for r in results if r.problem]
    for result in wrong:
        print(f"{result.kernel} in {result.type}: {result.problem}")
    print(f"{len(results) - len(wrong)} of {len(results)} hold; shown: the largest |got - expected| / (1 + |expected|)")
    return int(bool(wrong))
