"""Caffe's solver and net files as recipes: `gpunet train solver.prototxt`, `gpunet convert solver.prototxt out.toml`.

    recipe = read("cifar10_quick_solver.prototxt")
    recipe.tables["model"]["layers"], recipe.notes

Layers, weights' first values, multipliers, update rule, policy and lengths are taken over; whatever gpunet has nothing
like is refused by name and line. Weights (.caffemodel) are not read. After Jia et al. 2014.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gpunet.caffe.net import read_net
from gpunet.caffe.prototxt import LIMIT, parse
from gpunet.caffe.solver import join, net_path, read_stage, solver_values
from gpunet.errors import GpunetError

__all__ = ["Recipe", "read"]


@dataclass
class Recipe:
    """Sections of a config, as TOML would give them, and what to know about how they came about."""

    tables: dict
    notes: list


def read(*solvers):
    """Return the Recipe of a solver file, or of several that go on one from the other, at falling fixed rates.

    A net is looked for from here, from the solver's folder and those above it, as Caffe's own paths begin at its root,
    and beside the solver by its last name. Raises GpunetError with file and line.
    """
    stages = []
    for solver in map(Path, solvers):
        values = solver_values(parse(_text(solver), _place(solver)))
        net = _find(values, solver)
        stages.append(read_stage(values, read_net(parse(_text(net), _place(net))), solver.name))
    return Recipe(*join(stages))


def _find(values, solver):
    """Return the path of a solver's net."""
    name, text = net_path(values)
    path, folder = PurePosixPath(text.replace("\\", "/")), solver.absolute().parent
    below = not path.is_absolute() and ".." not in path.parts and "\0" not in text
    places = [Path(path), *(parent / path for parent in (folder, *folder.parents))] if below else []
    places += [folder / path.name] if path.name not in ("", "..") and "\0" not in text else []
    for place in places:
        try:
            if place.is_file():
                return place
        except OSError:  # a name that no file can have
            continue
    how = (
        f"here, in {_place(folder)} or above it" if below else f"as {path.name} in {_place(folder)}, for it leads away"
    )
    return values.fail(f"{name}: no file '{ascii(text)[1:-1][:200]}' {how}", name)


def _text(path):
    """Return what stands in a file, which must not be longer than a parser takes."""
    try:
        if not path.is_file():
            raise GpunetError(
                f"{_place(path)}: expected a .prototxt file, found {'none' if not path.exists() else 'no file'}"
            )
        with path.open("rb") as file:
            data = file.read(LIMIT + 1)
    except OSError as error:
        raise GpunetError(f"{_place(path)}: cannot be read: {error.strerror}") from None
    if len(data) > LIMIT:
        raise GpunetError(f"{_place(path)}: expected at most {LIMIT:,} bytes, as no network has more")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise GpunetError(f"{_place(path)}: expected text in UTF-8: {error.reason} at byte {error.start}") from None


def _place(path):
    """Return how messages name a file: from here if it lies below."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
