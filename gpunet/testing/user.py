"""Kernels that a user writes outside of the package: x.cu, and beside it x.py with the definitions and CASES.

    # x.py: a function of the same name and parameters for each kernel, and
    CASES = {"softsign_forward": lambda rng, size, real, wide: {"x": ..., "y": ..., "n": ...}}
"""

from pathlib import Path

from gpunet import ops
from gpunet.errors import GpunetError
from gpunet.testing.parity import Subject


def subjects(path):
    """Return the Subjects of a `.cu` file. It runs the `.py` beside it: for files that the user has named only."""
    path = Path(path)
    kernels = ops.parse(path)
    beside = path.with_suffix(".py")
    if not beside.is_file():
        raise GpunetError(f"{path}: expected its definitions and CASES in {beside}, which is not there")
    module = ops.execute(beside)
    return [_subject(kernel, module, beside) for kernel in kernels.values()]


def _subject(kernel, module, beside):
    definition, case = getattr(module, kernel.name, None), getattr(module, "CASES", {}).get(kernel.name)
    ops.defined(kernel, definition, beside)
    if case is None:
        raise GpunetError(f"{beside}: expected CASES['{kernel.name}'], a function(rng, size, real, wide) of arguments")
    return Subject(kernel, definition, case)
