"""What is fuzzed: a table of targets, each a maker of nearly valid files and the public entry that reads them.

To add one: a function `make(rng) -> {file name: bytes}` and a function `run(folder)`, which is called in a new working
folder with those files in it and may raise nothing but GpunetError; then a line in TARGETS.
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest import mock

import mutate
import numpy as np
from PIL import Image

from gpunet import cli, data
from gpunet.data import cifar, download
from gpunet.errors import GpunetError
from gpunet.optim import OPTIMIZERS
from gpunet.train import Checkpoint, Predictor, Trainer, load_config, parse_config, profile, report

COUNT = 6  # images in a file of the small CIFAR here
STEMS = {"cifar10": [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], "cifar100": ["train", "test"]}
SMALL = {
    "model": {"name": "mlp", "hidden": [4, 3]},
    "data": {"name": "shapes", "train": 60, "test": 20, "validation": 0.2, "seed": 1},
    "preprocess": {"mean": "channel", "scale": [0.01, 0.01, 0.02]},
    "augment": {"flip": True, "crop": 1},
    "loss": {"name": "cross_entropy", "smoothing": 0.1},
    "optimizer": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.001, "bias_rate": 2.0, "clip": 1.0},
    "schedule": {"name": "cosine", "warmup": 0.5, "final": 0.1},
    "train": {
        "epochs": 1,
        "batch": 20,
        "accumulate": 2,
        "replicas": 1,
        "backend": "numpy",
        "watch": ["*1*"],
        "watch_every": 2,
    },
    "start": {"normalisation": "data", "freeze_statistics": False},
    "run": {"directory": "runs", "name": "small", "keep": 2, "checkpoint_steps": 1},
}
MODELS = (
    {"name": "mlp", "hidden": [4, 3]},
    {"name": "vgg", "widths": [2, 2, 2, 2, 3], "dropout": 0.2},
    {"name": "resnet20", "widths": [2, 3, 4]},
    {"name": "resnet9", "widths": [2, 2, 3, 4]},
    {"name": "lenet"},
    {"name": "cifar10_quick", "init": "he", "bias_rate": 1.0},
    {
        "name": "layers",
        "layers": [
            {"layer": "Conv2d", "name": "a", "outputs": 3, "size": 3, "stride": 2, "weight_init": ["normal", 0.1]},
            {"layer": "Dropout", "rate": 0.2},
            {"layer": "Add", "inputs": ["a", "a"]},
            {"layer": "StochasticPool", "size": 2},
            {"layer": "LRN", "size": 3, "region": "within"},
            {"layer": "Linear"},
        ],
    },
)
SCHEDULES = (
    SMALL["schedule"],
    {"name": "step", "size": 1, "gamma": 0.5, "unit": "steps"},
    {"name": "multistep", "milestones": [0.5, 1.0]},
    {"name": "onecycle", "shape": "linear"},
    {"name": "plateau", "patience": 1},
    {"name": "cosine_restarts", "period": 1, "multiplier": 2.0},
)
VARIED = (  # sections in the place of those above
    *({"optimizer": {"name": name}} for name in OPTIMIZERS),
    {"optimizer": {"name": "adam", "groups": [{"match": ["*.bias"], "rate": 2, "decay": 0}], "sam": 0.05}},
    {"augment": {"rotate": 10, "zoom": [0.8, 1.2], "elastic": 3.0, "hue": 0.1, "cutout": 4, "cutmix": 1.0}},
    {"preprocess": {"gcn": True, "gcn_bias": 10.0, "mean": 0.0}},
    {"average": {"name": "swa", "start": 0.5, "every": 0.2}},
    {"init": {"*": ["orthogonal", 1.0], "*.bias": "zeros"}},
    {"loss": {"name": "focal", "gamma": 1.0}},
    {"loss": {"name": "hinge", "squared": True}},
)


@dataclass(frozen=True)
class Target:
    """make(rng) -> {file name: bytes}; run(folder) reads them. share: how many of a thousand inputs it gets."""

    make: Callable
    run: Callable
    share: int


# Settings


def recipe(rng):
    """Return a valid recipe as a tree."""
    made = SMALL | {"model": rng.choice(MODELS + MODELS[:1] * 6), "schedule": rng.choice(SCHEDULES)}
    return made | rng.choice(VARIED + ({},) * len(VARIED))


def make_config(rng):
    return {"recipe.toml": mutate.toml_file(rng, recipe(rng))}


def make_overrides(rng):
    texts = [mutate.override(rng, SMALL) for _ in range(rng.choice((1, 1, 2, 4)))]
    return {"recipe.toml": mutate.toml(recipe(rng)).encode(), "set.json": json.dumps(texts).encode()}


def run_config(folder):
    """Read a recipe, and plan it as `gpunet summary` does."""
    overrides = json.loads((folder / "set.json").read_text()) if (folder / "set.json").exists() else []
    arguments = [part for text in overrides for part in ("--set", text)]
    command("summary", "recipe.toml", "--plan", *arguments)


def run_training(folder):
    """Make all that a recipe names, and train one update."""
    config = load_config("recipe.toml", json.loads((folder / "set.json").read_text()))
    if config.train.backend != "emulator":  # which would compile
        trainer = Trainer(config, show=False)
        try:
            trainer.step()
            if len(trainer.data.test) <= 2000:  # more is right, but takes its time
                trainer.evaluate()
        finally:
            trainer.step.close()


@cache
def prototxts():
    """Return {file name: text} of Caffe's solvers and nets."""
    folder = Path(__file__).resolve().parents[1] / "tests" / "caffe"
    return {path.name: path.read_text() for path in sorted(folder.glob("*.prototxt"))}


def make_prototxt(rng):
    """Return a solver and its net, one of them changed."""
    texts, kind = prototxts(), rng.choice(("quick", "full"))
    files = {"solver": f"cifar10_{kind}_solver.prototxt", "net": f"cifar10_{kind}_train_test.prototxt"}
    made = {f"{n}.prototxt": re.sub(r'net: "[^"]*"', 'net: "net.prototxt"', texts[f]) for n, f in files.items()}
    name = rng.choice(("solver.prototxt", "net.prototxt", "net.prototxt"))
    return {**{n: t.encode() for n, t in made.items()}, name: mutate.prototxt(rng, made[name])}


def run_prototxt(folder):
    """Plan what it says, and write it as a recipe."""
    command("summary", "solver.prototxt")
    command("convert", "solver.prototxt", "recipe.toml")


# Runs and checkpoints


@cache
def runs():
    """Return {model: {file name: bytes}} of small finished trainings, and of one that was stopped before its end."""
    found = {}
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place), quiet():
        for model in MODELS[:2]:
            config = parse_config(SMALL | {"model": model})
            with mock.patch.object(report, "plot_curves", lambda *arguments: None):
                Trainer(config, show=False).fit()
            (run,) = Path("runs").iterdir()
            for path in run.glob("last*"):  # as it was before the end, so that there is something left to do
                loaded = Checkpoint.load(path)
                loaded.about.pop("finished", None)
                loaded.save(path)
            found[model["name"]] = {
                p.name: p.read_bytes() for p in run.iterdir() if p.suffix in (".toml", ".jsonl", ".safetensors")
            }
            run.rename(model["name"])
    return found


def pixels(count=3):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


def make_run(rng, names=("config.toml", "last.safetensors", "best.safetensors", "last-1.safetensors", "metrics.jsonl")):
    """Return the files of a run, one or two of them changed."""
    files = dict(runs()[rng.choice(sorted(runs()))])
    for name in rng.sample(names, rng.choice((1, 1, 1, min(2, len(names))))):
        if name not in files:
            continue
        if name == "config.toml":
            files[name] = mutate.toml_file(rng, tomllib.loads(files[name].decode()))
        elif name == "metrics.jsonl":
            files[name] = metrics(rng, files[name])
        else:
            files[name] = mutate.checkpoint(rng, files[name])
    if rng.random() < 0.1:
        files.pop(rng.choice(sorted(files)))
    if rng.random() < 0.1:
        odd = (
            "last-x.safetensors",
            "last-999999999.safetensors",
            "last-0.safetensors",
            "config.py",
            "é\n.safetensors",
            "curves.png",
        )
        files[rng.choice(odd)] = rng.choice((b"", files.get("last.safetensors", b"x")))
    return {f"run/{name}": content for name, content in files.items()}


def metrics(rng, content):
    """Return rows of metrics, one or some of them changed."""
    rows = content.decode().splitlines()
    lines = [*rows]
    for _ in range(rng.choice((1, 1, 3))):
        at, kind = rng.randrange(len(lines)), rng.randrange(8)
        if kind < 5:
            lines[at] = mutate.json_text(rng, mutate.tree(rng, json.loads(rows[at])))
        else:
            odd = (
                "",
                "null",
                "[]",
                "3",
                '{"split": "train"}',
                "{" * 5000,
                '"' + "x" * 10_000 + '"',
                lines[at][:20],
                "\x00",
                "\u2028",
            )
            lines[at] = rng.choice(odd)
    content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")
    return content if rng.random() < 0.8 else mutate.octets(rng, content)


def make_checkpoint(rng):
    return make_run(rng, ("last.safetensors",)) | {"run/best.safetensors": b""} if rng.random() < 0.02 else _one(rng)


def _one(rng):
    files = runs()[rng.choice(sorted(runs()))]
    return {"a.safetensors": mutate.checkpoint(rng, files["last.safetensors"])}


def run_checkpoint(folder):
    """Read a checkpoint, predict, and put it into the networks that it could belong to."""
    loaded = Checkpoint.load(next(folder.rglob("*.safetensors")))
    predictor = Predictor.load(loaded, "numpy")
    try:
        predictor.predict(np.zeros((2, *predictor.step.graph.input_shape), np.uint8))
    finally:
        predictor.step.close()


def make_start(rng):
    patterns = {
        "start": {
            "freeze": ["*linear1"],
            "replace": ["*head"],
            "freeze_statistics": False,
            "normalisation": "checkpoint",
        }
    }
    table = mutate.tree(rng, patterns) if rng.random() < 0.5 else {}
    table.setdefault("start", {})
    if isinstance(table["start"], dict):
        table["start"].setdefault("weights", "a.safetensors")
    made = SMALL | {"model": rng.choice(MODELS[:2])} | table
    return _one(rng) | {"recipe.toml": mutate.toml(made).encode("utf-8", "surrogatepass"), "set.json": b"[]"}


def run_resume(folder):
    """Go on with a run to its end."""
    with mock.patch.object(report, "plot_curves", lambda *arguments: None):
        trainer = Trainer.resume("run", inexact=True, show=False)
        if (
            trainer.config.train.epochs - trainer.resumed.position.ended > 3
            or trainer.config.train.backend == "emulator"
        ):
            trainer.resumed.run.close()  # right, but it would take its time
            return
        trainer.fit()


def run_evaluate(folder):
    command("evaluate", "run", "--json", "numbers.json", "--out", "pictures")


def run_export(folder):
    command("export", "run", "net.onnx")


def run_plot(folder):
    command("plot", "run")


# Data sets


@cache
def arrays():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (6, COUNT, 3072), np.uint8)


def layouts():
    """Return CIFAR's sets with few images in a file."""
    return {name: replace(layout, images={"train": COUNT, "test": COUNT}) for name, layout in cifar.SETS.items()}


def contents(name, rng=None):
    """Return {stem: what its pickle holds} of a small set."""
    files = {}
    for number, stem in enumerate(STEMS[name]):
        labels = [(number + i) % 10 for i in range(COUNT)]
        kinds = (
            {"labels": labels}
            if name == "cifar10"
            else {"fine_labels": labels, "coarse_labels": labels, "labels": labels}
        )
        files[stem] = {"data": arrays()[number], **kinds, "batch_label": "a batch"}
    return files


def make_python(rng):
    name = rng.choice(("cifar10", "cifar10", "cifar100"))
    made = contents(name)
    changed = rng.choice(STEMS[name])
    plain = {stem: mutate.pickle.dumps(content, protocol=2) for stem, content in made.items()}
    return plain | {changed: mutate.pickled(rng, made[changed])}


def make_binary(rng):
    name = rng.choice(("cifar10", "cifar10", "cifar100"))
    files = {}
    for stem, content in contents(name).items():
        labels = [np.array(content["labels"], np.uint8)[:, None]] * (1 if name == "cifar10" else 2)
        files[f"{stem}.bin"] = np.hstack([*labels, content["data"]]).tobytes()
    for _ in range(rng.choice((1, 1, 2))):
        stem = rng.choice(sorted(files))
        kind = rng.randrange(4)
        files[stem] = (
            files[stem][: rng.randrange(len(files[stem]) + 1)] if kind == 0 else mutate.octets(rng, files[stem])
        )
        if kind == 1:
            row = len(files[stem]) // COUNT
            files[stem] = b"".join(
                bytes([rng.randrange(12)]) + files[stem][i * row + 1 : (i + 1) * row] for i in range(COUNT)
            )
        if kind == 2 and rng.random() < 0.5:
            files[rng.choice((stem.removesuffix(".bin"), f"{stem}.bin/x"))] = files.pop(stem)
    return files


def run_cifar(folder):
    """Read the folder as both sets and look for what is wrong with it."""
    with mock.patch.dict(cifar.SETS, layouts()):
        data.check(folder)
        name = "cifar100" if list(folder.glob("train*")) else "cifar10"
        data.load(name, folder, validation=0)


def make_archive(rng):
    plain = {stem: mutate.pickle.dumps(content, protocol=2) for stem, content in contents("cifar10").items()}
    return {"archive.tar.gz": mutate.archive(rng, plain, "cifar-10-batches-py")}


def run_archive(folder):
    """Have the archive come from the network; nothing may be written beside the cache folder."""
    content = (folder / "archive.tar.gz").read_bytes()
    known = layouts()
    known["cifar10"] = replace(known["cifar10"], archive=replace(known["cifar10"].archive, size=len(content)))
    before = {p for p in folder.parent.rglob("*") if "cache" not in p.parts}
    try:
        with (
            mock.patch.dict(cifar.SETS, known),
            mock.patch.object(download, "_transfer", lambda archive, file, advice: file.write_bytes(content)),
        ):
            data.load("cifar10")
    finally:
        escaped = {p for p in folder.parent.rglob("*") if "cache" not in p.parts} - before
        assert not escaped and not os.path.lexists("/dev/shm/gpunet-fuzz"), f"outside of the cache folder: {escaped}"


# Pictures


@cache
def pictures():
    """Return {name: bytes} of small valid pictures in the formats and modes that are read."""
    image = Image.fromarray(pixels(1)[0])
    found, wide = {}, image.resize((45, 37))
    for mode, endings in {
        "RGB": ("png", "jpeg", "bmp", "gif", "tiff", "webp", "ppm"), "L": ("png", "jpeg", "tiff", "bmp"),
        "RGBA": ("png", "webp", "tiff"),
        "P": ("png", "gif", "bmp"), "1": ("png", "bmp", "ppm"), "CMYK": ("jpeg", "tiff"),
        "I;16": ("png", "tiff"), "LA": ("png",),
        "F": ("tiff",), "I": ("tiff",),
    }.items():  # fmt: skip
        for ending in endings:
            stream = io.BytesIO()
            made = (
                Image.fromarray(np.asarray(wide.convert("L")).astype(np.uint16) * 257)
                if mode == "I;16"
                else wide.convert(mode)
            )
            exif = Image.Exif()
            exif[0x0112] = 6
            made.save(stream, ending, **({"exif": exif} if ending in ("jpeg", "webp") and mode == "RGB" else {}))
            found[f"{mode}.{ending}"] = stream.getvalue()
    stream = io.BytesIO()
    image.save(stream, "gif", save_all=True, append_images=[wide.rotate(90)])
    return found | {"animated.gif": stream.getvalue()}


@cache
def bomb(mode, side):
    """Return a picture of many pixels and few bytes."""
    stream = io.BytesIO()
    made = Image.new("L" if mode == "I;16" else mode, (side, side), 1 if mode in "1LP" else None)
    if mode == "I;16":
        made = Image.fromarray(np.full((side, side), 300, np.uint16))
    options = {"transparency": 0} if mode == "P" else {}
    made.save(
        stream,
        "TIFF" if mode in ("CMYK", "I") else "PNG",
        **({"compression": "tiff_adobe_deflate"} if mode in ("CMYK", "I") else {}),
        **options,
    )
    return stream.getvalue()


def one_picture(rng):
    if rng.random() < 0.006:
        return bomb(rng.choice(("RGB", "RGBA", "P", "LA", "I;16", "1", "CMYK")), rng.choice((7990, 8100)))
    return mutate.picture(rng, pictures())


def make_picture(rng):
    return {f"run/{name}": content for name, content in runs()["mlp"].items()} | {"a.png": one_picture(rng)}


def run_picture(folder):
    command("predict", "run", "a.png")


def make_folder(rng):
    files = {}
    for split in ("train", "test", "validation")[: rng.choice((1, 2, 3))]:
        for name in ("cat", "dog"):
            for number in range(2):
                kept = pictures()[rng.choice(("RGB.png", "L.png", "RGB.jpeg"))]
                files[f"{split}/{name}/{number}.png"] = kept if rng.random() < 0.8 else one_picture(rng)
    for _ in range(rng.choice((0, 1))):
        old = rng.choice(sorted(files))
        odd = (
            "train/cat/x.txt",
            "train/x.png",
            "train/é\udc80/1.png",
            "test/other/1.png",
            "train/cat/.hidden",
            "train/cat/1.png/x",
            "x\n.png",
        )
        files[rng.choice(odd)] = files.pop(old)
    options = mutate.tree(
        rng, {"validation": 0.5, "size": [8, 8], "channels": 3, "skip_unreadable": True, "cache": True}
    )
    return files | {
        "options.json": json.dumps(options).encode(),
        "cache.bin": rng.randbytes(100) if rng.random() < 0.5 else b"",
    }


def run_folder(folder):
    """Read a folder of pictures, again from its packed copy, and again from a damaged one."""
    (folder / "options.json").rename(folder.parent / "options.json")
    options, harm = json.loads((folder.parent / "options.json").read_text()), (folder / "cache.bin").read_bytes()
    data.check(folder)
    options = {key: inner for key, inner in options.items() if key not in ("name", "directory")}
    data.load("folder", folder, **options)
    for packed in (folder.parent / "cache").rglob("*.npz"):
        content = packed.read_bytes()
        packed.write_bytes(content[:40] + harm + content[40 + len(harm) :])
    data.load("folder", folder, **options)


# The command line

COMMANDS = (
    ["train", "recipe.toml", "--set", "train.epochs=1"],
    ["train", "--resume", "run", "--inexact"],
    [
        "evaluate",
        "run",
        "--split",
        "test",
        "--checkpoint",
        "best",
        "--json",
        "n.json",
        "--out",
        "out",
        "--backend",
        "numpy",
    ],
    ["predict", "run", "a.png", "a.png", "--checkpoint", "last"],
    ["export", "run", "net.onnx", "--batch", "2", "--pixels", "float32"],
    ["plot", "run", "--out", "a.png", "--metric", "loss"],
    ["summary", "recipe.toml", "--memory", "8G", "--plan", "--graph", "g.svg", "--data", "x"],
    ["profile", "recipe.toml", "--steps", "1", "--out", "there"],
    ["list", "models"],
    ["data", "check", "run"],
    ["data", "show", "recipe.toml", "--split", "train", "--out", "sheet.png"],
    ["data", "fetch", "cifar10"],
)


def make_command(rng):
    files = {f"run/{name}": content for name, content in runs()["mlp"].items()}
    files |= {"recipe.toml": mutate.toml(SMALL).encode(), "a.png": pictures()["RGB.png"]}
    made = [*rng.choice(COMMANDS)]
    for _ in range(rng.choice((1, 1, 2))):
        at, kind = rng.randrange(min(1, len(made) - 1), len(made)), rng.randrange(6)
        text = str(
            rng.choice(
                (
                    rng.choice(mutate.TEXTS),
                    rng.choice(mutate.KEYS),
                    mutate.number(rng),
                    "run",
                    "recipe.toml",
                    "--",
                    "-",
                    "--debug",
                )
            )
        )
        text = text.replace("emulator", "numpy").replace("\x00", "")  # a NUL cannot stand in a command line
        if kind < 3:
            made[at] = text
        elif kind == 3:
            made.insert(at, text)
        elif kind == 4:
            del made[at]
        else:
            made[at] = (
                mutate.octets(rng, made[at].encode("utf-8", "surrogateescape"), 1)
                .decode("utf-8", "surrogateescape")
                .replace("\x00", "")
            )
        if not made:
            break
    return files | {"command.json": json.dumps(made).encode()}


def run_command(folder):
    # what `gpunet profile` measures a machine by takes 1 GB whatever the input is
    with mock.patch.object(profile, "COPIES", (2**16,)), mock.patch.object(profile, "PRODUCTS", (64,)):
        command(*json.loads((folder / "command.json").read_text()))


def command(*arguments):
    """Run the command; what it refuses with one line and exit code 2 is raised as GpunetError."""
    said = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["gpunet", *(a for a in arguments if a != "--debug")]),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
    ):
        try:
            cli.main()
        except SystemExit as end:
            if not end.code:
                return
            lines = [line for line in said.getvalue().splitlines() if line.strip()]
            assert lines, f"exit code {end.code} and no word"
            last = next((line for line in reversed(lines) if line.startswith("gpunet: ")), lines[0])
            raise GpunetError(last) from None


# What surrounds an input


@contextlib.contextmanager
def quiet():
    """Without output, without a network, without colours that depend on who looks."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        mock.patch.object(download, "_transfer", _offline),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("error", module=r"gpunet(\..+)?")  # a user would see them
        yield


def _offline(archive, file, advice):
    raise data.DataNotFound(f"{archive.url}: not downloaded: no network here; {advice}")


def run(name, files):
    """Give a target its files in a new folder; return what GpunetError says, or None where they are accepted."""
    with tempfile.TemporaryDirectory(prefix="gpunet-fuzz-") as place:
        folder = Path(place, "a", "b", "c")
        folder.mkdir(parents=True)
        environment = {
            "GPUNET_CACHE": str(folder.parent / "cache"),
            "HOME": place,
            "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", place),
        }
        for file, content in files.items():
            path = Path(os.fsdecode(os.fsencode(folder)) + "/" + file)
            with contextlib.suppress(OSError):  # names that exclude each other
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        with mock.patch.dict(os.environ, environment), contextlib.chdir(folder), quiet():
            os.environ.pop("GPUNET_DATA", None)
            try:
                TARGETS[name].run(folder)
            except GpunetError as error:
                return str(error)
    return None


def warm():
    """Make what all inputs are made from, and have imported what they import."""
    import matplotlib.figure  # noqa: F401
    import onnx.checker  # noqa: F401
    import requests  # noqa: F401

    runs(), arrays(), pictures()


TARGETS = {
    "config": Target(make_config, run_config, 150),
    "overrides": Target(make_overrides, run_config, 120),
    "training": Target(make_overrides, run_training, 50),
    "prototxt": Target(make_prototxt, run_prototxt, 100),
    "checkpoint": Target(make_checkpoint, run_checkpoint, 170),
    "start": Target(make_start, run_training, 60),
    "resume": Target(make_run, run_resume, 40),
    "evaluate": Target(make_run, run_evaluate, 10),
    "export": Target(make_run, run_export, 30),
    "plot": Target(make_run, run_plot, 10),
    "cifar pickles": Target(make_python, run_cifar, 110),
    "cifar binary": Target(make_binary, run_cifar, 50),
    "cifar archive": Target(make_archive, run_archive, 50),
    "picture": Target(make_picture, run_picture, 90),
    "picture folder": Target(make_folder, run_folder, 35),
    "command": Target(make_command, run_command, 15),
}
