"""The command `gpunet`. Each command imports what it needs when it runs, so that help comes at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gpunet.errors import GpunetError

HELP = {"context_settings": {"help_option_names": ["-h", "--help"]}, "no_args_is_help": True}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, **HELP)
data_app = typer.Typer(help="Fetch, check and look at data sets.", **HELP)
app.add_typer(data_app, name="data")

CONFIG = "A TOML file, a solver.prototxt of Caffe's, or the name of a shipped recipe."
Recipe = Annotated[str, typer.Argument(metavar="CONFIG", help=CONFIG)]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or its name in runs/.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a setting; may be repeated.")
]
Folder = Annotated[str | None, typer.Option("--data", metavar="DIR", help="Where the data set is.")]
Backend = Annotated[
    str | None,
    typer.Option("--backend", metavar="auto|numpy|cuda|emulator", help="What computes, in place of the recipe's."),
]
Seen = Annotated[
    str | None,
    typer.Option(
        "--views",
        metavar="VIEWS",
        help="Average over views of each image: flip, shift[:PIXELS], ten-crop[:SIZE,SIZE...], or flip+shift.",
    ),
]
Which = Annotated[str | None, typer.Option("--checkpoint", metavar="best|last", help="The best if there is one.")]


def _load_ops(paths):
    """Run the files that --ops names."""
    from gpunet import ops

    for path in paths or ():
        ops.load(path)


Ops = Annotated[
    list[str] | None,
    typer.Option("--ops", metavar="FILE.py", callback=_load_ops, help="Your own layers and MODELS."),
]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False):
    """Train convolutional networks: on NumPy anywhere, with CUDA kernels on an NVIDIA GPU."""


@app.command()
def train(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help=CONFIG)] = None,
    overrides: Overrides = None,
    data: Folder = None,
    backend: Backend = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="Where run directories go.")] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="RUN", help="Go on with a run as if it had not ended.")
    ] = None,
    inexact: Annotated[
        bool, typer.Option("--inexact", help="Go on although the weights will not be the same bit for bit.")
    ] = False,
    ops: Ops = None,
):
    """Train a recipe; leave a run directory with checkpoints, metrics, curves and a report."""
    from gpunet.train import Trainer

    if resume is not None:
        _resume(resume, config, overrides or [], data, backend, out, inexact)
        return
    if config is None or inexact:
        expected = "--resume RUN beside --inexact" if inexact else "a CONFIG, or --resume RUN"
        raise GpunetError(f"train: expected {expected}")
    loaded = _load(config, overrides, data, backend)
    if out is not None:
        loaded.run.directory = out
    Trainer(loaded).fit()


@app.command()
def evaluate(
    run: RunPath,
    split: Annotated[str, typer.Option("--split", metavar="train|validation|test")] = "test",
    views: Seen = None,
    checkpoint: Which = None,
    data: Folder = None,
    backend: Backend = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FOLDER", help="Where pictures go; evaluation-SPLIT in the run.")
    ] = None,
    numbers: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write all numbers there.")] = None,
    ops: Ops = None,
):
    """Measure a run's network on a split: accuracy, likelihood, calibration, each class; draw them and its mistakes."""
    import json

    from gpunet.train.build import build_data
    from gpunet.train.checkpoint import write_whole
    from gpunet.train.predictor import Predictor
    from gpunet.train.report import class_rows, write_pictures
    from gpunet.train.run import Run
    from gpunet.train.text import columns

    opened = Run.open(run)
    config = _place(opened.config(), data, backend)
    kept = opened.checkpoint(checkpoint)
    predictor = Predictor.load(kept, config.train.backend)
    dataset = build_data(config)
    if dataset.note:
        print(f"note: {dataset.note}", file=sys.stderr)
    found = predictor.evaluate(dataset, split, views)
    first, *others = found.lines()
    print(f"{split} of {dataset.name}: {' '.join(first)}, {found.count:,} images")
    plain = None if views is None else predictor.evaluate(dataset, split)
    if plain is not None:
        average = "probabilities" if predictor.loss == "cross_entropy" else "outputs"
        print(f"views {views}, their {average} averaged; without views: {' '.join(plain.lines()[0])}")
    if others:
        print(columns(others, 2))
    if found.confusion is not None:
        print(columns(class_rows(found.confusion, predictor.classes), 1))
    if numbers is not None:
        about = {"run": opened.path.name, "checkpoint": kept.place, "epoch": kept.about["epoch"]}
        about |= {"set": dataset.name, "note": dataset.note, "split": split, **found.numbers(predictor.classes)}
        about |= {"views": views, "plain": plain and {"loss": plain.loss, "accuracy": plain.accuracy}}
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items())
        write_whole(Path(numbers), f"{{\n{lines}\n}}\n".encode())
    folder = Path(out) if out is not None else opened.path / f"evaluation-{split}{'-views' * bool(views)}"
    for name in write_pictures(folder, config, dataset, split, found):
        print(folder / f"{name}.png")


@app.command()
def predict(
    run: RunPath,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Picture files.")],
    views: Seen = None,
    checkpoint: Which = None,
    backend: Backend = None,
    ops: Ops = None,
):
    """Name the three likeliest classes of pictures, which are scaled and cut as in training."""
    import numpy as np

    from gpunet.data import prepare_image
    from gpunet.train.run import Run

    predictor = _predictor(Run.open(run), checkpoint, backend)
    height, width, channels = predictor.step.graph.input_shape
    pixels = np.stack([prepare_image(path, (height, width), channels) for path in images])
    print(f"each picture scaled to cover {height} x {width} pixels, and its middle taken", file=sys.stderr)
    for path, row in zip(images, predictor.predict(pixels, views), strict=True):
        best = row.argsort()[::-1][:3]
        form = ".1%" if predictor.link else ".3g"
        print(f"{path}: " + ", ".join(f"{predictor.classes[i]} {row[i]:{form}}" for i in best))


@app.command()
def export(
    run: RunPath,
    file: Annotated[str, typer.Argument(metavar="FILE.onnx", help="The file to write.")],
    checkpoint: Which = None,
    batch: Annotated[str, typer.Option("--batch", metavar="N|dynamic", help="Images a call.")] = "dynamic",
    pixels: Annotated[
        str, typer.Option("--pixels", metavar="uint8|float32", help="The type of the raw pixels that it takes.")
    ] = "uint8",
    ops: Ops = None,
):
    """Write the network of a run as an ONNX file: raw pixels in, logits and probabilities out."""
    from gpunet.export import IR, OPSET, onnx
    from gpunet.train.run import Run
    from gpunet.train.text import size

    if not file.endswith(".onnx"):
        raise GpunetError(f"export: expected a file name that ends in .onnx, got '{file}'")
    if batch != "dynamic" and not (batch.isascii() and batch.isdigit()):
        raise GpunetError(f"export: --batch: expected a whole number or dynamic, got '{batch}'")
    predictor = _predictor(Run.open(run), checkpoint, "numpy")
    onnx(predictor, file, batch=None if batch == "dynamic" else int(batch), pixels=pixels)
    shape = ", ".join(map(str, predictor.step.graph.input_shape))
    count = "n" if batch == "dynamic" else batch
    outputs = "logits and probabilities" if predictor.link else "logits"
    print(f"{file}: {size(Path(file).stat().st_size)}, ONNX opset {OPSET}, IR version {IR}")
    print(f"images {pixels} ({count}, {shape}), normalised inside -> {outputs}")
    if predictor.classes:
        print(f"classes: {', '.join(predictor.classes)}")


@app.command()
def convert(
    files: Annotated[
        list[str],
        typer.Argument(metavar="SOLVER.prototxt... RECIPE.toml", help="Solvers, one or the stages of one training."),
    ],
):
    """Write Caffe's solver and its net as a recipe; of several, such as solver, solver_lr1, solver_lr2, one of all."""
    from gpunet import caffe
    from gpunet.train.checkpoint import write_whole
    from gpunet.train.config import parse_config, tables_to_toml

    *solvers, out = files
    if not solvers or not out.endswith(".toml") or not all(file.endswith(".prototxt") for file in solvers):
        raise GpunetError(f"convert: expected SOLVER.prototxt... RECIPE.toml, got {' '.join(files)}")
    recipe = caffe.read(*solvers)
    parse_config(recipe.tables, out)
    head = [f"From {', '.join(Path(file).name for file in solvers)}.", *recipe.notes]
    comments = "\n".join(f"# {line if line.isprintable() else ascii(line)}" for line in head)
    write_whole(Path(out), f"{comments}\n{tables_to_toml(recipe.tables)}".encode())
    for note in recipe.notes:
        print(f"note: {note}", file=sys.stderr)
    print(out)


@app.command()
def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories, or their names in runs/.")],
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE.png", help="The picture; else curves.png or compare.png.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="loss|accuracy|norm|rate", help="Draw only this and the rate.")
    ] = None,
):
    """Draw the curves of a run into it, or those of several runs over each other."""
    from gpunet.train import compare

    path, left_out = compare.plot(runs, out, metric)
    for line in left_out:
        print(line, file=sys.stderr)
    print(path)


@app.command()
def summary(
    config: Recipe,
    overrides: Overrides = None,
    data: Folder = None,
    backend: Backend = None,
    memory: Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="Find its largest batch.")] = None,
    fusions: Annotated[bool, typer.Option("--plan", help="Show fused chains of layers, and engines.")] = False,
    picture: Annotated[str | None, typer.Option("--graph", metavar="FILE.svg", help="Draw the network there.")] = None,
    ops: Ops = None,
):
    """Show layers, shapes, weights, FLOPs and planned memory of a recipe; nothing is trained and no image is read."""
    from gpunet.backends import choose
    from gpunet.train.drawing import write_graph
    from gpunet.train.summary import Plan
    from gpunet.train.text import columns, parse_size, size

    limit = None if memory is None else parse_size(memory)
    loaded = _load(config, overrides, data, backend)
    loaded.train.backend, _ = choose(loaded.train.backend)  # once, not for every batch that is tried
    plan = Plan(loaded)
    held, batch = plan.memory(), plan.config.train.batch
    print(plan)
    if fusions:
        print("\n".join(["\nfused, on a backend that fuses", *(plan.fusions() or ["none"])]))
        engines = list(plan.engines().items()) or [("none", "")]
        print(f"\nengines of the convolutions, backend {loaded.train.backend}\n{columns(engines, 2)}")
    print(f"\nplanned memory at batch {batch}, backend {loaded.train.backend}")
    print(columns([*((name, size(n)) for name, n in held.items()), ("peak", size(sum(held.values())))], 1))
    if limit is not None:
        print(f"\nlargest batch for {memory}: {plan.largest_batch(limit) or 'none fits'}")
    if picture is not None:
        write_graph(picture, plan.graph, f"{loaded.model.name}, from {config}")
        print(f"\n{picture}")


@app.command()
def profile(
    config: Recipe,
    overrides: Overrides = None,
    data: Folder = None,
    backend: Backend = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Training steps that are timed.")] = 10,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where trace.json goes.")] = ".",
    ops: Ops = None,
):
    """Time some training steps of a recipe by layer and by kernel, beside what this machine can do.

    trace.json shows every call in chrome://tracing and ui.perfetto.dev. Nothing is trained or fetched: without the data
    set, random images of its size do.
    """
    from gpunet.train.profile import profile as measured

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    report = measured(_load(config, overrides, data, backend), steps)
    print(report)
    report.save(folder / "trace.json")
    print(folder / "trace.json")


@app.command()
def tune(
    config: Recipe,
    overrides: Overrides = None,
    data: Folder = None,
    backend: Backend = None,
    write: Annotated[bool, typer.Option("--write", help="Use the fastest ones on this machine from now on.")] = False,
    ops: Ops = None,
):
    """Time every engine on every convolution of a recipe's network, all its passes together; on NumPy."""
    from gpunet.train.tune import tune as measured

    found = measured(_load(config, overrides, data, backend))
    print(found)
    if write:
        print(f"\n{found.save()}")


@app.command(name="lr-range")
def lr_range(
    config: Recipe,
    overrides: Overrides = None,
    data: Folder = None,
    backend: Backend = None,
    low: Annotated[float, typer.Option("--from", metavar="RATE", help="The rate of the first update.")] = 1e-5,
    high: Annotated[float, typer.Option("--to", metavar="RATE", help="The rate of the last update.")] = 10.0,
    updates: Annotated[int, typer.Option("--updates", metavar="N", help="Updates, if the loss holds so long.")] = 200,
    linear: Annotated[bool, typer.Option("--linear", help="Let the rate grow by equal steps, not factors.")] = False,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where lr-range.png and .json go.")] = "lr-range",
    ops: Ops = None,
):
    """Find a learning rate: train with a growing one until the loss explodes, draw the losses, say what to set."""
    from gpunet.train.lr_range import range_test

    found = range_test(_load(config, overrides, data, backend), low, high, updates, linear=linear, show=True)
    print(found)
    for path in found.save(out):
        print(path)


@app.command(name="list")
def list_known(
    what: Annotated[
        str,
        typer.Argument(metavar="optimizers|schedules|layers|losses|augmentations|models|inits|configs"),
    ],
):
    """List what gpunet has of a kind: names, arguments with their defaults, what each is, and where it is from."""
    from gpunet.listing import listing

    print(listing(what))


@app.command()
def doctor(
    parity: Annotated[bool, typer.Option("--parity", help="Run every kernel and compare it with NumPy.")] = False,
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="cuda|emulator", help="What --parity runs; cuda if it can.")
    ] = None,
):
    """Say what is here: versions, GPUs, folders, and what a backend that cannot run is missing."""
    from gpunet import doctor as probes

    if backend is not None and not parity:
        raise GpunetError("doctor: --backend: expected beside --parity only, which it is for")
    print(probes.report())
    if parity:
        raise typer.Exit(probes.parity(backend))


@app.command(name="kernel-test")
def kernel_test(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME|PATH", help="Kernels, families of them, your own x.cu with x.py; else all."),
    ] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="emulator|sanitizers|compile")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Compile for every architecture and type, not only for the commonest.")
    ] = False,
):
    """Prove CUDA kernels on this CPU: against NumPy, under sanitizers, through CUDA's compiler; no GPU is needed."""
    from gpunet.testing.kernel_test import main

    raise typer.Exit(main(names or (), only, everything))


@data_app.command()
def fetch(name: Annotated[str, typer.Argument(metavar="cifar10|cifar100")]):
    """Download a data set into the cache folder, unless it is there."""
    from gpunet import data

    print(data.load(name, validation=0))


@data_app.command()
def check(directory: Annotated[str, typer.Argument(metavar="DIR")]):
    """Look for anything wrong with a folder: CIFAR files, or folders of pictures."""
    from gpunet import data

    report = data.check(directory)
    print(report)
    if report.problems:
        raise typer.Exit(1)


@data_app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|CONFIG", help="A data set, or a recipe that names one.")],
    split: Annotated[str, typer.Option("--split", metavar="train|validation|test")] = "train",
    data: Folder = None,
    out: Annotated[str, typer.Option("--out", metavar="PNG", help="The picture to write.")] = "contact.png",
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="Draw what [preprocess] of a recipe does to them, stage by stage.")
    ] = False,
    augment: Annotated[
        bool, typer.Option("--augment", help="Draw what each transform of [augment] does, with the recipe's settings.")
    ] = False,
    overrides: Overrides = None,
):
    """Draw the first pictures of every class of a data set, or what a recipe makes of them, into a PNG."""
    from gpunet import data as sets
    from gpunet.train.augmented import augmentation_sheet
    from gpunet.train.build import build_data, pick_split, preprocessed_sheet

    known = name in sets.LOADERS
    if known and (preprocess or augment or overrides):
        raise GpunetError(f"data show {name}: --preprocess, --augment, --set: expected a recipe, got a data set")
    if preprocess and augment:
        raise GpunetError("data show: expected --preprocess or --augment, got both")
    config = None if known else _load(name, overrides, data, None)
    dataset = sets.load(name, data) if known else build_data(config)
    if preprocess:
        sheet = preprocessed_sheet(config, dataset, split)
    elif augment:
        classes, what = len(dataset.classes) or None, config.augment.augmentation
        sheet, left_out = augmentation_sheet(pick_split(dataset, split), what, classes, config.train.seed)
        for line in left_out:
            print(line, file=sys.stderr)
    else:
        sheet = sets.contact_sheet(pick_split(dataset, split), dataset.classes)
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise GpunetError(f"--out {out}: cannot be written: {error}") from None
    print(f"{dataset}\n{out}")


def _resume(run, config, overrides, data, backend, out, inexact):
    """Go on with a run; one that has finished is no error."""
    import json

    from gpunet.train import Trainer
    from gpunet.train.resume import Finished

    if out is not None:
        raise GpunetError("train: --out: a run that goes on stays in its directory; leave it out")
    given = None if config is None else _load(config, overrides, data, backend)
    places = [("data.directory", data and str(Path(data).absolute())), ("train.backend", backend)]
    more = [f"{key}={json.dumps(value)}" for key, value in places if value is not None]
    try:
        trainer = Trainer.resume(run, overrides=[*overrides, *more], inexact=inexact, given=given)
    except Finished as end:
        print(end, file=sys.stderr)
    else:
        trainer.fit()


def _load(config, overrides, data, backend):
    from gpunet import caffe
    from gpunet.train.config import load_config

    loaded = _place(load_config(config, overrides or ()), data, backend)
    if config.endswith(".prototxt"):
        for note in caffe.read(config).notes:
            print(f"note: {note}", file=sys.stderr)
    return loaded


def _place(config, data, backend):
    """Put --data and --backend in place of the config's."""
    if data is not None:
        config.data.directory = str(Path(data).absolute())
    if backend is not None:
        config.train.backend = backend
    return config


def _predictor(run, checkpoint, backend):
    from gpunet.train.predictor import Predictor

    return Predictor.load(run.checkpoint(checkpoint), backend)


def main():
    """Run the command; an error of the user is one line and exit code 2, Ctrl-C is 130."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except (GpunetError, OSError) as error:
        if debug:
            raise
        if not isinstance(error, GpunetError):
            error = GpunetError(f"{error.filename}: {error.strerror}" if error.filename else error)
        print(f"gpunet: {error}", file=sys.stderr)
        sys.exit(2)
