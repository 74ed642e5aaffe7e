"""Reads `.cu` files: their kernels' signatures and launch lines, and their text with every include inlined.

A kernel is declared once, in its source, and this is the only place that reads the declaration:

    // launch: over=n
    KERNEL relu_forward(const real* x /*n*/, real* y /*n*/, long long n)

The comment behind a pointer is its extent: a Python expression over the integer parameters.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gpunet import resources
from gpunet.errors import GpunetError

SCALARS = {
    "int": "i4",
    "unsigned int": "u4",
    "long long": "i8",
    "unsigned long long": "u8",
    "unsigned char": "u1",
    "float": "f4",
    "double": "f8",
}
TYPES = (*SCALARS, "real", "wide", "pixel", "State")
DECLARATION = re.compile(r"(?://\s*launch:\s*(over|blocks)\s*=\s*([^\n]+)\n\s*)?KERNEL\s+(\w+)\s*\(([^{;]*)\)\s*\{")
PARAMETER = re.compile(r"(const\s+)?([\w ]+?)\s*(\*?)\s*\b(\w+)\s*(?:/\*([^*]*(?:\*(?!/)[^*]*)*)\*/)?")


@dataclass(frozen=True)
class Argument:
    """One parameter of a kernel: `type` is a C type or one of real, wide, pixel, State."""

    name: str
    type: str
    pointer: bool
    const: bool
    extent: str | None

    @property
    def output(self):
        """Whether the kernel writes it."""
        return self.pointer and not self.const


@dataclass(frozen=True)
class Kernel:
    """A kernel's declaration: `form` is "over" or "blocks", `count` the expression of how many.

    definition: its NumPy twin, of a kernel from outside of gpunet; those of its own are found by the file's stem.
    """

    name: str
    path: Path
    form: str
    count: str
    arguments: tuple[Argument, ...]
    definition: Callable | None = None

    @property
    def stem(self):
        """The family: the file's name without its ending, shared by kernel, twin and layer."""
        return self.path.stem


def parse(path):
    """Return {name: Kernel} of one `.cu` file."""
    path = Path(path)
    text = path.read_text()
    kernels = {}
    for match in DECLARATION.finditer(text):
        form, count, name, body = match.groups()
        line = text.count("\n", 0, match.start(3)) + 1
        if form is None:
            raise GpunetError(
                f"{path}:{line}: kernel {name} has no '// launch: over=...' or 'blocks=...' line above it"
            )
        arguments = tuple(_argument(piece, path, line, name) for piece in _pieces(body))
        kernels[name] = Kernel(name, path, form, count.strip(), arguments)
        _check_expressions(kernels[name], line)
    return kernels


def _check_expressions(kernel, line):
    """Raise GpunetError where an extent or the launch's count is no expression over the integer parameters."""
    integers = [a.name for a in kernel.arguments if not a.pointer and SCALARS.get(a.type, "f")[0] in "iu"]
    for expression in (kernel.count, *(a.extent for a in kernel.arguments if a.pointer)):
        try:
            unknown = set(compile(expression, kernel.name, "eval").co_names) - {*integers, "min", "max"}
        except SyntaxError:
            unknown = True
        if unknown:
            raise GpunetError(
                f"{kernel.path}:{line}: {kernel.name}: expected an expression over "
                f"{', '.join(integers) or 'no parameter'}, got '{expression}'"
            )


def _pieces(body):
    """Split a parameter list at its commas, leaving those inside extent comments."""
    depth, piece, pieces = False, "", []
    for token in re.split(r"(/\*|\*/|,)", body):
        depth = {"/*": True, "*/": False}.get(token, depth)
        if token == "," and not depth:
            pieces.append(piece)
            piece = ""
        else:
            piece += token
    return [p.strip() for p in [*pieces, piece] if p.strip()]


def _argument(piece, path, line, kernel):
    match = PARAMETER.fullmatch(" ".join(piece.replace("__restrict__", "").split()))
    if not match:
        raise GpunetError(f"{path}:{line}: {kernel}: cannot read the parameter '{piece}'")
    const, kind, star, name, extent = match.groups()
    if kind not in TYPES:
        raise GpunetError(f"{path}:{line}: {kernel}: {name}: expected a type of {', '.join(TYPES)}, got '{kind}'")
    if star and extent is None:
        if kind != "State":
            raise GpunetError(f"{path}:{line}: {kernel}: pointer '{name}' has no extent comment such as /*n*/")
        extent = "1"
    return Argument(name, kind, bool(star), bool(const), extent.strip() if extent else None)


@cache
def kernels():
    """Return {name: Kernel} of all shipped sources; the same name twice is an error."""
    found = {}
    for path in sorted(resources.kernels().glob("*.cu")):
        for name, kernel in parse(path).items():
            if name in found:
                raise GpunetError(f"{path}: kernel {name} is already defined in {found[name].path}")
            found[name] = kernel
    return found


def inlined(path):
    """Return the text of a source with its quoted includes inlined once, and `#line` so that errors name real files."""
    return _inline(Path(path), set())


def _inline(path, seen):
    lines = [f'#line 1 "{path}"']
    for number, line in enumerate(path.read_text().splitlines(), 1):
        include = re.fullmatch(r'\s*#\s*include\s+"([^"]+)".*', line)
        if not include:
            if line.strip() != "#pragma once":
                lines.append(line)
            else:
                lines.append("")
            continue
        target = (path.parent / include[1]).resolve()
        if not target.is_file():  # a user's file takes gpunet's own headers
            target = (resources.kernels() / include[1]).resolve()
        if not target.is_file():
            raise GpunetError(
                f'{path}:{number}: expected "{include[1]}" beside it or among gpunet\'s headers in '
                f"{resources.kernels()}"
            )
        if target not in seen:
            seen.add(target)
            lines.append(_inline(target, seen))
        lines.append(f'#line {number + 1} "{path}"')
    return "\n".join(lines)
