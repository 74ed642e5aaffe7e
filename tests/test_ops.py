"""An op stands in four places: kernel, twin, launcher, case. tests/test_twins.py holds three, here is the launcher."""

import ast
from pathlib import Path

import pytest

import gpunet
from gpunet.core import sources

LAUNCHERS = ("core", "nn", "optim")


def names():
    """Return every text in the launching modules: kernels' names, and ops that get _forward and _backward."""
    files = [path for floor in LAUNCHERS for path in (Path(gpunet.__file__).parent / floor).glob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("kernel", sorted(sources.kernels()))
def test_every_kernel_is_launched(kernel):
    op = kernel.removesuffix("_forward").removesuffix("_backward")
    assert kernel in names() or op in names(), f"{kernel}: no module of {', '.join(LAUNCHERS)} launches it"
