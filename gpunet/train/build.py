"""From a recipe to objects of the floors below: data, graph, normalisation, sources, step."""

from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np

from gpunet import data, models, optim
from gpunet.core.source import Source
from gpunet.core.step import Step
from gpunet.data import cifar, folder, preprocess, shapes
from gpunet.errors import GpunetError
from gpunet.train import start, watch


def build_data(config):
    """Return the DataSet of [data]."""
    with _arguments_of("data", config.data):
        return data.load(config.data.name, **config.data.arguments)


def pick_split(dataset, name):
    """Return a split by its name."""
    if name not in dataset.splits:
        raise GpunetError(f"{dataset.name}: split: expected one of {', '.join(dataset.splits)}, got '{name}'")
    return dataset.splits[name]


def outline(config):
    """Return a DataSet of the sizes of [data] whose pixels were never written: for plans. At most names are read."""
    settings, options = config.data, config.data.model_extra
    with _arguments_of("data", settings):
        data.check_arguments(settings.name, **settings.arguments)
        if settings.name in cifar.SETS:
            layout = cifar.SETS[settings.name]
            classes = layout.classes["coarse_labels" if options.get("coarse") else list(layout.classes)[-1]]
            counts = {"train": len(layout.train) * layout.images["train"], "test": layout.images["test"]}
            shape = (32, 32, 3)
        elif settings.name == "shapes":
            classes, shape = tuple(shapes.SHAPES), (shapes.SIDE, shapes.SIDE, 3)
            counts = {"train": options.get("train", 10_000), "test": options.get("test", 2_000)}
        else:
            classes, listing = folder.list_pictures(folder.Path(settings.directory))
            size, counts = options["size"], {name: len(pictures) for name, pictures in listing.items()}
            shape = (*((size, size) if isinstance(size, int) else size), options.get("channels", 3))
        if "validation" not in counts:
            held = settings.validation
            counts["validation"] = int(held) if held >= 1 else round(held * counts["train"])
            counts["train"] -= counts["validation"]
        counts["train"] = min(counts["train"], settings.limit or counts["train"])
        splits = {
            name: data.Split(np.empty((n, *shape), np.uint8), np.zeros(n, np.int32)) for name, n in counts.items() if n
        }
        return data.DataSet(settings.name, classes, **splits)


def build_graph(config, shape, outputs):
    """Return the network of [model] for images of `shape`; its weights get rates and decays by [optimizer]."""
    with _arguments_of("model", config.model):
        graph = models.build(config.model.name, shape, outputs, **config.model.model_extra)
        for parameter in graph.parameters():
            if parameter.trainable and len(parameter.shape) == 1:
                if not parameter.name.endswith((".gamma", ".slope")):
                    parameter.rate *= config.optimizer.bias_rate
                parameter.decay *= config.optimizer.decay_bias
    for group in config.optimizer.groups:
        names = set(start.matching(graph, group.match, "optimizer.groups: match"))
        for parameter in graph.parameters():
            if parameter.trainable and parameter.name in names:
                parameter.rate *= group.rate
                parameter.decay *= group.decay
    return graph


@contextmanager
def _arguments_of(section, named):
    """Turn what an argument of a wrong type or size causes somewhere below into a sentence for the user."""
    try:
        yield
    except GpunetError:
        raise
    except (TypeError, KeyError, IndexError, AttributeError, ValueError, ArithmeticError, MemoryError) as error:
        given = ", ".join(f"{k} = {v!r}" for k, v in named.model_extra.items())
        raise GpunetError(f"[{section}] {named.name} with {given or 'no arguments'}: {error}") from None


def build_preprocess(config, dataset):
    """Return the Preprocess that [preprocess] describes, fitted on the training images and on nothing else.

    With [start] normalisation = "checkpoint" it is that of the weights that training starts from.
    """
    settings = config.preprocess
    if settings.whiten == "pca_whiten" and config.augment != type(config.augment)():
        raise GpunetError(
            "[augment]: expected no augmentation with preprocess.whiten = 'pca_whiten', whose values are components "
            "and no longer places of an image; 'zca' has places"
        )
    if config.start.normalisation == "checkpoint":
        return start.preprocess(config)
    gcn = None
    if settings.gcn:
        epsilon = {} if settings.gcn is True else {"epsilon": settings.gcn}
        gcn = preprocess.GCN(settings.gcn_scale, settings.gcn_bias, **epsilon)
    return preprocess.fit(
        dataset.train.images,
        gcn=gcn,
        whiten=settings.whiten,
        components=settings.components,
        epsilon=settings.epsilon,
    )


def resident(config, dataset):
    """Return a DataSet of the type and size that training holds; what [preprocess] makes of its pixels is all zeros."""
    if not config.preprocess.floats:
        return dataset
    splits = dataset.splits.items()
    return replace(dataset, **{n: replace(s, images=np.zeros(s.images.shape, np.float32)) for n, s in splits})


def build_normalisation(config, dataset):
    """Return (mean, scale) of [preprocess] for its DataSet's training images: each one value, one a channel or a pixel.

    With [start] normalisation = "checkpoint" they are those of the weights that training starts from.
    """
    if config.start.normalisation == "checkpoint":
        return start.normalisation(config)
    mean, scale = config.preprocess.affine
    if "channel" in (mean, scale):
        means, deviations = data.channel_statistics(dataset)
        mean = means if mean == "channel" else mean
        if scale == "channel":
            scale = 1 / np.where(deviations > 0, deviations, 1)  # 0: a channel that never changes
    mean = data.mean_image(dataset) if isinstance(mean, str) else mean
    return np.asarray(mean, np.float64), np.asarray(scale, np.float64)


def preprocessed_sheet(config, dataset, name="train"):
    """Return a Pillow image of what [preprocess] makes of a split's first images, class by class in turn."""
    split = pick_split(dataset, name)
    places = range(len(split))
    if split.labels is not None:  # one of each class, then the next of each
        rank = np.zeros(len(split), np.int64)
        for label in range(len(dataset.classes)):
            mine = split.labels == label
            rank[mine] = np.arange(np.count_nonzero(mine))
        places = np.lexsort((split.labels, rank))
    images = split.images[places[:12]]
    made = build_preprocess(config, dataset)
    found = any(isinstance(value, str) for value in config.preprocess.affine)  # else they need no image
    mean, scale = build_normalisation(config, made.of(dataset, ["train"]) if found else dataset)
    return data.preprocess_sheet(images, made, mean, scale, data.mean_image(dataset))


def build_source(config, name, dataset, mean, scale):
    """Return the Source of a split; only "train" is augmented, smoothed and shuffled."""
    return Source(
        dataset.splits[name],
        mean,
        scale,
        smoothing=config.smoothing,
        classes=len(dataset.classes) or None,
        order=config.train.order if name == "train" else "stored",
        window=config.train.window,
        name=name,
        augmentation=config.augment.augmentation if name == "train" else None,
    )


def _rates(config, updates, per_epoch):
    """Return the rates of all updates, which have to be finite."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            rates = config.rates(updates, per_epoch)
    except (ArithmeticError, ValueError, MemoryError) as error:
        train = config.train
        what = f"{train.steps} updates" if train.steps else f"{train.epochs} epochs of {per_epoch} updates"
        raise GpunetError(f"[schedule] {config.schedule.name}: no table of the rates of {what}: {error}") from None
    wrong = np.flatnonzero(~(rates <= np.finfo(np.float32).max))
    if len(wrong):
        raise GpunetError(
            f"[schedule] {config.schedule.name}: expected finite rates, got {rates[wrong[0]]} at update {wrong[0]}"
        )
    return rates


def build_step(config, graph, source=None, backend=None):
    """Return the Step that trains `graph` on a source, but for what [start] freezes; without, one that only predicts.

    backend: an object to run on, in place of a new one by the recipe's name.
    """
    train, settings = config.train, config.optimizer
    optimizer, average, rates, keep = None, None, None, ()
    if source is not None:
        rule, batches = optim.OPTIMIZERS[settings.name], source.batches(train.batch)
        optimizer = rule(**{f.name: getattr(settings, f.name) for f in fields(rule)})
        per_epoch = -(-batches // train.batches_an_update(batches))
        updates = train.steps or train.epochs * per_epoch
        rates = _rates(config, updates, per_epoch)
        average = build_average(config.average, updates / per_epoch, per_epoch)
        keep = watch.keeps(graph, train.watch)
        start.freeze_weights(graph, config.start.freeze, config.start.freeze_statistics)
    return Step(
        graph,
        config.loss_function(),
        optimizer,
        batch=train.batch,
        dtype=train.dtype,
        backend=backend or train.backend,
        replicas=train.replicas,
        seed=train.seed,
        source=source,
        rates=rates,
        keep=keep,
        average=average,
        engine=train.conv_engine,
    )


def build_average(settings, epochs, per_epoch):
    """Return the average of [average], or None; lengths there are in epochs."""
    if settings.name == "ema":
        return optim.EMA(settings.decay)
    if settings.name == "swa":
        start = 0.75 * epochs if settings.start is None else settings.start
        return optim.SWA(round(start * per_epoch), max(1, round(settings.every * per_epoch)))
    return None
