"""Kernels that a user writes outside of the package: x.cu, and beside it x.py with the definitions and CASES.

    # x.py: a function of the same name and parameters for each kernel, and
    CASES = {"softplus_forward": lambda rng, size, real, wide: {"x": ..., "y": ..., "n": ...}}
"""

import importlib.util
import inspect
from pathlib import Path

from gpunet.core import sources
from gpunet.errors import GpunetError
from gpunet.testing.parity import Subject


def subjects(path):
    """Return the Subjects of a `.cu` file. It runs the `.py` beside it: for files that the user has named only."""
    path = Path(path)
    if not path.is_file():
        raise GpunetError(f"{path}: expected a .cu file")
    kernels = sources.parse(path)
    if not kernels:
        raise GpunetError(f"{path}: expected a kernel: // launch: ... and KERNEL name(...) {{")
    beside = path.with_suffix(".py")
    if not beside.is_file():
        raise GpunetError(f"{path}: expected its definitions and CASES in {beside}, which is not there")
    spec = importlib.util.spec_from_file_location(f"gpunet_user_{path.stem}", beside)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [_subject(kernel, module, beside) for kernel in kernels.values()]


def _subject(kernel, module, beside):
    definition, case = getattr(module, kernel.name, None), getattr(module, "CASES", {}).get(kernel.name)
    if definition is None:
        raise GpunetError(f"{beside}: expected a function {kernel.name}, the definition of the kernel in {kernel.path}")
    if case is None:
        raise GpunetError(f"{beside}: expected CASES['{kernel.name}'], a function(rng, size, real, wide) of arguments")
    names = [a.name for a in kernel.arguments]
    given = list(inspect.signature(definition).parameters)
    if given != names:
        raise GpunetError(f"{beside}: {kernel.name}: expected parameters {', '.join(names)}, got {', '.join(given)}")
    return Subject(kernel, definition, case)
