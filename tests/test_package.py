"""The three forms of gpunet (checkout, editable install, wheel), what ships, what an import costs."""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import gpunet
from gpunet import resources
from gpunet.errors import GpunetError

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("gpunet", "kernels", "configs")
HEAVY = ("cupy", "matplotlib", "torch", "scipy")
# A floor imports from itself and from those before it.
FLOORS = ["errors", "resources", "core", "backends", "nn", "optim", "data", "models", "ops", "caffe", "train",
          "search"]  # fmt: skip
FLOORS += ["export", "testing", "doctor", "listing", "cli"]

LOOK = """
import json
from gpunet import resources
folders = {name: getattr(resources, name)() for name in ("kernels", "configs")}
print(json.dumps({
    "package": str(resources.PACKAGE),
    **{name: str(folder) for name, folder in folders.items()},
    "files": sorted(f"{name}/{path.relative_to(folder).as_posix()}" for name, folder in folders.items()
                    for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"),
}))
"""


def child(code, *, path=(), isolated=True, cwd=None):
    """What a fresh python prints as JSON on its last line; isolated: it sees its library and `path` only."""
    head = "import site\n" + "".join(f"site.addsitedir({str(p)!r})\n" for p in path)
    flags = ["-I", "-S"] if isolated else []
    done = subprocess.run(
        [sys.executable, *flags, "-c", head + code], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def files_of(tree):
    """What should ship: every file of the three folders, as folder/path."""
    return {
        path.relative_to(tree).as_posix()
        for folder in SHIPPED
        for path in (tree / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def inside(file):
    """Where a file of the checkout stands in a wheel."""
    return file if file.startswith("gpunet/") else f"gpunet/{file}"


def build(tree, kind, into):
    """The file that setuptools makes of a tree; kind: wheel, editable or sdist. Needs no network."""
    try:
        enough = tuple(map(int, version("setuptools").split(".")[:2])) >= (77, 0)
    except PackageNotFoundError:
        enough = False
    if not enough:
        pytest.skip("nothing can be built: needs setuptools>=77 (pip install 'gpunet[test]')")
    into.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return into / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout, for builds leave folders behind."""
    junk = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.egg-info")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "tree", ignore=junk))


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def elsewhere(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def assert_in_place(seen, tree):
    """The package and its folders are those of `tree`, with all their files."""
    assert {name: seen[name] for name in ("package", "kernels", "configs")} == {
        "package": str(tree / "gpunet"),
        "kernels": str(tree / "kernels"),
        "configs": str(tree / "configs"),
    }
    assert set(seen["files"]) == {file for file in files_of(tree) if not file.startswith("gpunet/")}


def test_bare_checkout(tree, elsewhere):
    assert_in_place(child(LOOK, path=[tree], cwd=elsewhere), tree)


def test_editable_install(tree, elsewhere, tmp_path):
    with zipfile.ZipFile(build(tree, "editable", tmp_path / "built")) as archive:
        archive.extractall(tmp_path / "site")
    assert_in_place(child(LOOK, path=[tmp_path / "site"], cwd=elsewhere), tree)


def test_wheel_installed_elsewhere(wheel, tree, elsewhere, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    seen = child(LOOK, path=[site], cwd=elsewhere)
    assert seen["package"] == str(site / "gpunet")
    assert seen["kernels"] == str(site / "gpunet" / "kernels")
    assert seen["configs"] == str(site / "gpunet" / "configs")
    assert set(seen["files"]) == {file for file in files_of(tree) if not file.startswith("gpunet/")}
    assert any(file.startswith("kernels/") and file.endswith(".cu") for file in seen["files"])
    assert any(file.startswith("configs/") and file.endswith(".toml") for file in seen["files"])


def test_wheel_holds_the_checkout_and_nothing_else(wheel, tree):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        entry = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert {name for name in names if ".dist-info/" not in name} == {inside(file) for file in files_of(tree)}
    assert "gpunet = gpunet.cli:main" in entry
    assert f"Version: {gpunet.__version__}\n" in metadata
    assert "License-Expression: MIT\n" in metadata


def test_sdist_builds_the_same_wheel(wheel, tree, tmp_path):
    shutil.unpack_archive(build(tree, "sdist", tmp_path / "sdist"), tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build(unpacked, "wheel", tmp_path / "again")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert {i.filename: i.CRC for i in first.infolist()} == {i.filename: i.CRC for i in second.infolist()}


def test_import_is_light(capsys):
    code = f"""
import sys, json, time
from importlib.abc import MetaPathFinder
tried = set()
class Watch(MetaPathFinder):  # also sees the import of a package that is not installed
    def find_spec(self, name, path=None, target=None):
        tried.add(name.partition(".")[0])
sys.meta_path.insert(0, Watch())
sys.path.insert(0, {str(ROOT)!r})
start = time.perf_counter()
import gpunet
seconds = time.perf_counter() - start
print(json.dumps([gpunet.__version__, seconds, sorted(tried & set({HEAVY!r}))]))
"""
    said, seconds, heavy = child(code, isolated=False)
    with capsys.disabled():
        print(f"\nimport gpunet: {seconds * 1000:.1f} ms")
    assert heavy == []
    assert said == gpunet.__version__


@pytest.mark.parametrize("name", gpunet.__all__)
def test_every_public_name_is_there(name):
    assert getattr(gpunet, name) is not None
    assert name in dir(gpunet)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'gpunet' has no attribute 'nothing'"):
        _ = gpunet.nothing


def top_level_imports(file):
    """The modules that a file imports on its own import: not those in functions or for type checkers."""
    package = ("gpunet", *file.relative_to(ROOT / "gpunet").parent.parts)
    waiting = list(ast.parse(file.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            waiting += ast.iter_child_nodes(node)


def test_files_import_only_downwards():
    wrong = []
    for file in sorted((ROOT / "gpunet").rglob("*.py")):
        place = file.relative_to(ROOT / "gpunet")
        floor = place.parts[0].removesuffix(".py")
        if floor in ("__init__", "__main__"):
            continue
        assert floor in FLOORS, f"{place}: on which floor does it stand?"
        # "" is gpunet itself, which imports nothing
        allowed = ["", "__version__", *FLOORS[: FLOORS.index(floor) + 1]]
        for name in top_level_imports(file):
            top, rest = [*name.split("."), ""][:2]
            if top == "cupy" and place.parts[:2] != ("backends", "cuda"):
                wrong.append(f"{place}: imports cupy")
            if top == "gpunet" and rest not in allowed:
                wrong.append(f"{place}: imports {name}")
    assert wrong == []


def test_config_by_name_by_file_and_by_mistake(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    for name in ("quickstart", "resnet20"):
        (tmp_path / "configs" / f"{name}.toml").touch()
    monkeypatch.setattr(resources, "configs", lambda: tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / "configs" / "quickstart.toml"
    (tmp_path / "quickstart").mkdir()  # a folder of that name does not hide the recipe
    assert resources.config("quickstart") == shipped
    assert resources.config("quickstart.toml") == shipped
    with pytest.raises(GpunetError, match=r"got 'quikstart'; nearest: quickstart; known: quickstart, res"):
        resources.config("quikstart")
    with pytest.raises(GpunetError, match=r"got 'else/resnet20\.toml'; nearest: resnet20; known"):
        resources.config("else/resnet20.toml")
    with pytest.raises(GpunetError, match=r"got ''; known"):
        resources.config("")
    (tmp_path / "quickstart.toml").touch()  # a file that exists wins
    assert resources.config("quickstart.toml") == Path("quickstart.toml")
    assert resources.config(tmp_path / "quickstart.toml") == tmp_path / "quickstart.toml"
    assert resources.config("quickstart") == shipped


def test_a_package_without_its_folders_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "gpunet")
    with pytest.raises(GpunetError, match="found neither; install gpunet again"):
        resources.kernels()


def test_python_dash_m_is_the_command():
    command = [sys.executable, "-m", "gpunet", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
