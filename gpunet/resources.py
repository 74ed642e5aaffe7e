"""Finds the folders that ship with the code. Knows where files are, not what is in them.

A wheel carries them inside the package (gpunet/kernels); a checkout, and an editable install, which is one,
has them one folder above.
"""

from difflib import get_close_matches
from pathlib import Path

from gpunet.errors import GpunetError

PACKAGE = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    beside, above = PACKAGE / name, PACKAGE.parent / name
    for place in (beside, above):
        if place.is_dir():
            return place
    raise GpunetError(f"gpunet: expected a folder {beside} or {above}, found neither; install gpunet again")


def kernels() -> Path:
    """The folder of the CUDA sources, kernels/*.cu and *.cuh."""
    return _folder("kernels")


def configs() -> Path:
    """The folder of the shipped recipes, configs/*.toml."""
    return _folder("configs")


def config(name_or_path: str | Path) -> Path:
    """The file of a recipe: a file that exists, as it is; else a shipped one by name, with or without .toml.

    Raises GpunetError, naming the nearest and listing the known ones, where there is neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = {file.stem: file for file in sorted(configs().glob("*.toml"))}
    name = str(name_or_path).removesuffix(".toml")
    if name in known:
        return known[name]
    nearest = get_close_matches(Path(name).name, known, n=1)
    hint = f"nearest: {nearest[0]}; known: " if nearest else "known: "
    raise GpunetError(f"config: expected a file or a recipe, got '{name_or_path}'; {hint}{', '.join(known)}")
