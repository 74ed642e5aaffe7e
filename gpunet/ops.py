"""Kernels, layers and models from outside of gpunet: softsign.cu and softsign.py in any folder.

    # softsign.py, where softsign_forward(x, y, n) and softsign_backward(dy, y, dx, n) are defined in NumPy
    kernels = ops.declare(__file__, softsign_forward, softsign_backward)

    class Softsign(nn.Layer):
        def forward(self, t, x):
            y = t.empty(x.shape)
            t.launch(kernels.softsign_forward, x, y, x.size)
            return y, y

A program of one's own imports such a file. The command line does where the user names it (--ops PATH), so that recipes
can train its MODELS and lists of its layers; no recipe, run or checkpoint can name a file.
"""

import hashlib
import importlib.util
import inspect
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from gpunet.core import sources
from gpunet.errors import GpunetError


def declare(file, *definitions):
    """Return the kernels of the `.cu` beside a Python file, by name, each with its definition in NumPy.

    Raises GpunetError where the file is missing, a kernel has no definition, or their parameters differ.
    """
    kernels = parse(Path(file).with_suffix(".cu"))
    known = {d.__name__: d for d in definitions}
    for name in known:
        if name not in kernels:
            raise GpunetError(f"{file}: {name}: expected one of the kernels {', '.join(kernels)}")
    return SimpleNamespace(**{name: defined(kernel, known.get(name), file) for name, kernel in kernels.items()})


def parse(path):
    """Return {name: Kernel} of a `.cu` file; GpunetError where there is no file or no kernel in it."""
    if not path.is_file():
        raise GpunetError(f"{path}: expected a .cu file, there is none")
    kernels = sources.parse(path)
    if not kernels:
        raise GpunetError(f"{path}: expected a kernel: // launch: ... and KERNEL name(...) {{")
    return kernels


def defined(kernel, definition, file):
    """Return a Kernel with its definition, a function of `file`."""
    if definition is None:
        raise GpunetError(f"{file}: expected a function {kernel.name}, the definition of the kernel in {kernel.path}")
    names, given = [a.name for a in kernel.arguments], list(inspect.signature(definition).parameters)
    if given != names:
        raise GpunetError(f"{file}: {kernel.name}: expected parameters {', '.join(names)}, got {', '.join(given)}")
    return replace(kernel, definition=definition)


def load(path):
    """Import a Python file, or the one beside a `.cu`, and let recipes train what is in it; return the module.

    That is its subclasses of Layer, which a recipe's list of layers may name (gpunet.models.layers), and its MODELS.

    MODELS is {name: function(input_shape, classes, **arguments) -> Graph}. The file is code that runs: this is for
    files that the user has named. Raises GpunetError with the line where it fails.
    """
    from gpunet.models import MODELS
    from gpunet.models.layers import KINDS
    from gpunet.nn import Layer

    file = Path(path).with_suffix(".py") if Path(path).suffix == ".cu" else Path(path)
    if file.suffix != ".py" or not file.is_file():
        raise GpunetError(f"--ops {path}: expected a Python file, or a .cu with one beside it; {file} is none")
    module = execute(file)
    models, own = getattr(module, "MODELS", {}), vars(module).values()
    kinds = {kind.__name__: kind for kind in own if isinstance(kind, type) and issubclass(kind, Layer)}
    kinds = {name: kind for name, kind in kinds.items() if kind.__module__ == module.__name__}
    if not isinstance(models, dict) or not all(map(callable, models.values())):
        raise GpunetError(f"--ops {path}: MODELS: expected a dict of functions (input_shape, classes, ...) -> Graph")
    if not models and not kinds:
        raise GpunetError(f"--ops {path}: expected a subclass of gpunet.nn.Layer, or MODELS, in it")
    for given, known, what in ((models, MODELS, "model"), (kinds, KINDS, "layer")):
        for name, one in given.items():
            if getattr(known.get(name, one), "__module__", None) != one.__module__:
                raise GpunetError(f"--ops {path}: {name}: there is a {what} of this name; name yours apart")
        known.update(given)
    return module


def execute(file):
    """Run a Python file of the user's and return its module; what it raises becomes one sentence."""
    file = file.resolve()
    name = f"gpunet_user_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, GpunetError) or not isinstance(error, Exception):
            raise
        raise GpunetError(f"{file}: {said(error, file)}") from error
    return module


def said(error, file):
    """Return an exception of a user's Python code as one line, with the line of their file."""
    if isinstance(error, SyntaxError):  # which has the line in its text
        return f"{type(error).__name__}: {error}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == file.name]
    place = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def digests(graph):
    """Return {layer: 12 hex digits of its Python file and the .cu beside it} of a network's layers from elsewhere."""
    kinds = {type(node.layer) for node in graph.nodes}
    foreign = {kind: kind.__module__ for kind in kinds if kind.__module__.partition(".")[0] != "gpunet"}
    found = {}
    for kind, module in foreign.items():
        file = Path(getattr(sys.modules[module], "__file__", None) or "")
        parts = [f.read_bytes() for f in (file, file.with_suffix(".cu")) if f.is_file()]
        found[f"layer {kind.__name__}"] = hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
    return dict(sorted(found.items()))
