"""Recipes: TOML files checked against a model, with one form of error, and written back with all defaults resolved.

Knows which keys there are and what values they take; what they do is the trainer's and the floors' below.
"""

import inspect
import json
import re
import tomllib
from dataclasses import fields
from difflib import get_close_matches
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, field_validator

from gpunet import caffe, resources
from gpunet.core.augmentation import INTERPOLATIONS, Augmentation, check
from gpunet.data import LOADERS
from gpunet.errors import GpunetError
from gpunet.models import MODELS
from gpunet.nn import LOSSES
from gpunet.nn.init import named
from gpunet.optim import OPTIMIZERS
from gpunet.optim import Optimizer as OptimizerBase
from gpunet.optim.schedules import SCHEDULES
from gpunet.train.views import Views

BARE = re.compile("[A-Za-z0-9_-]+")  # a key of TOML without quotes
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Range = float | list[float]


class Section(BaseModel):
    """A table of a recipe: no unknown key, no conversion of types but whole numbers to fractions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_assignment=True)


class Named(BaseModel):
    """A table whose other keys are arguments of what `name` names, which checks them."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, validate_assignment=True)
    name: str


class Data(Named):
    """Arguments of gpunet.data.load; other keys are those of the set's loader."""

    directory: str | None = None
    validation: Annotated[float, Field(ge=0)] = 0.1
    seed: Natural = 0
    fallback: Literal["shapes"] | None = None
    limit: Count | None = None

    @property
    def arguments(self):
        """What is set, but for the name."""
        return self.model_dump(exclude={"name"}, exclude_none=True)


class Preprocess(Section):
    """What is done to every image, in training and ever after: gcn, then whiten, then x = (pixel - mean) * scale.

    All of it is found from the training images. gcn: each image gets mean 0 and deviation `gcn_scale`, by
    gcn_scale * (x - mean) / max(gcn, sqrt(gcn_bias + variance)); true is 1e-8. whiten: "pca", images as their first
    components have them; "pca_whiten", the components over sqrt(variance + epsilon), which are no longer places;
    "zca", images again, whose pixels are uncorrelated. components: how many, or the share of the variance that they
    have, below 1; all unless told. epsilon: in units of the mean variance of a pixel. mean: "channel", "image" or
    values; scale: "channel" for 1/sd, or factors; unless told "channel", but 0 and 1 after "pca_whiten" and "zca".
    """

    gcn: bool | Positive = False
    gcn_scale: Positive = 1.0
    gcn_bias: Annotated[float, Field(ge=0)] = 0.0
    whiten: Literal["none", "pca", "pca_whiten", "zca"] = "none"
    components: Count | Annotated[float, Field(gt=0, lt=1)] | None = None
    epsilon: Positive = 0.1
    mean: Literal["channel", "image"] | float | list[float] | None = None
    scale: Literal["channel"] | float | list[float] | None = None

    @property
    def floats(self):
        """Whether images become float32 numbers before training; else they stay pixels."""
        return bool(self.gcn) or self.whiten != "none"

    @property
    def affine(self):
        """(mean, scale) as set, or what they are unless set."""
        default = (0.0, 1.0) if self.whiten in ("pca_whiten", "zca") else ("channel", "channel")
        return tuple(d if v is None else v for v, d in zip((self.mean, self.scale), default, strict=True))


class Augment(Section):
    """What is done to training images alone, as gpunet.core.augmentation has it; a range is a number or [low, high]."""

    flip: bool | float = False
    flip_vertical: bool | float = False
    alternate: bool = False
    crop: Natural = 0
    reflect: bool = False
    rescale: Range = 1.0
    rotate: Range = 0.0
    shear: Range = 0.0
    stretch: Range = 1.0
    zoom: Range = 1.0
    lens: Range = 0.0
    elastic: float = 0.0
    elastic_sigma: float = 4.0
    interpolation: Literal[INTERPOLATIONS] = "bilinear"
    warp_probability: float = 1.0
    brightness: Range = 0.0
    contrast: Range = 0.0
    saturation: Range = 0.0
    hue: Range = 0.0
    lighting: float = 0.0
    color_probability: float = 1.0
    cutout: Natural = 0
    cutout_probability: float = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0

    @field_validator(*(field.name for field in fields(Augmentation)))
    @classmethod
    def _check(cls, value, info):
        return check(info.field_name, value, info.data)

    @property
    def augmentation(self):
        """What is done to training images, but for mean and scale."""
        return Augmentation(**{field.name: getattr(self, field.name) for field in fields(Augmentation)})


class Group(Section):
    """Weights by name, or by the name of a layer or block around them, and what multiplies their rate and decay."""

    match: Annotated[list[str], Field(min_length=1)]
    rate: Annotated[float, Field(ge=0)] = 1.0
    decay: Annotated[float, Field(ge=0)] = 1.0


class NoAverage(Section):
    """The weights as they are."""

    name: Literal["none"] = "none"


class EMA(Section):
    """An exponential average of the weights (gpunet.optim.EMA)."""

    name: Literal["ema"]
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999


class SWA(Section):
    """The mean of the weights every so many epochs after `start` epochs, three quarters of the run unless told."""

    name: Literal["swa"]
    start: Annotated[float, Field(ge=0)] | None = None
    every: Annotated[float, Field(gt=0)] = 1.0


class Train(Section):
    """The loop. `accumulate` batches, or all of an "epoch", make one update; evaluate_every: epochs, of validation.

    steps: updates after which training ends, in the middle of an epoch if need be, whatever `epochs` says.
    steps_per_launch: updates that a GPU is given at a time, as one graph. window: images of a split that lie on it at a
    time, where all are too many. watch: names or patterns of layers and weights, such as "stage1.*", of whose values
    and gradients the metrics get statistics at every `watch_every`-th update (gpunet.train.watch); it costs memory.
    conv_engine: what computes convolutions on NumPy, where it can: "auto" takes the fastest known (`gpunet tune`).

    order: an epoch's images "shuffled", as "stored", drawn with "replacement" or "balanced", every class as often
    (gpunet.Source). patience: the training ends once so many validations in a row were no better than the best by more
    than `min_delta`, by accuracy, or by loss where images have values. lr_rule: optimizer.lr is for `base_batch` images
    an update, and grows with them: "linear" (k times as many, k times the rate; Krizhevsky 2014, Goyal et al. 2017), or
    "sqrt" (the square root of k, which keeps the variance of an update). views: over which the test at the end averages
    (gpunet.train.views); validation, which only chooses, looks at images as they are.
    """

    epochs: Count = 10
    steps: Count | None = None
    batch: Count = 128
    accumulate: Count | Literal["epoch"] = 1
    steps_per_launch: Count = 1
    window: Count | None = None
    seed: Natural = 0
    replicas: Count | None = None
    backend: str = "auto"
    dtype: Literal["float32", "tf32", "float64", "float16", "bfloat16"] = "float32"
    conv_engine: Literal["auto", "unfold", "blocked", "winograd", "direct"] = "auto"
    order: Literal["shuffled", "stored", "replacement", "balanced"] = "shuffled"
    lr_rule: Literal["none", "linear", "sqrt"] = "none"
    base_batch: Count = 128
    evaluate_every: Count = 1
    patience: Count | None = None
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    monitor_test: bool = False
    views: str | None = None
    watch: list[str] = []
    watch_every: Count = 100

    @field_validator("views")
    @classmethod
    def _known(cls, value):
        try:
            return value if value is None else Views(value).text
        except GpunetError as error:
            expected, _, _ = str(error).removeprefix("views: expected ").rpartition("got ")
            raise ValueError(expected.rstrip(",; ")) from None

    def batches_an_update(self, batches):
        """Return how many of an epoch's batches make one update."""
        return batches if self.accumulate == "epoch" else self.accumulate


class Start(Section):
    """Fine-tuning: begin with the weights of another training, a run or a checkpoint file.

    freeze, replace: names of layers or weights, or patterns of them, such as "stage1.*": the first keep their values,
    the second start fresh although the file has them. Running statistics of frozen layers move on, unless
    freeze_statistics; then training uses them as prediction does. normalisation: whose preprocessing of images. Without
    weights, freeze is for those that [init] whitens.
    """

    weights: str | None = None
    freeze: list[str] = []
    replace: list[str] = []
    freeze_statistics: bool = False
    normalisation: Literal["data", "checkpoint"] = "data"


class Run(Section):
    """Where the run is written: directory/name-date; a checkpoint every so many updates or seconds (0: never).

    keep: checkpoints that stay beside the best one, the newest last.safetensors, then last-1.safetensors and so on.
    tensorboard: write the metrics as TensorBoard's event files too (needs the extra of that name).
    """

    directory: str = "runs"
    name: str | None = None
    tensorboard: bool = False
    checkpoint_steps: Natural = 0
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0
    keep: Count = 2


def _section(name, function, **keywords):
    """Return the section for a schedule or loss: its keyword-only parameters, with their annotations and defaults."""
    keywords |= {
        p.name: (p.annotation, ... if p.default is p.empty else p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }
    return create_model(name, __base__=Section, name=(Literal[name], name), **keywords)


def _optimizer(name, rule):
    """Return the section for one optimizer: its settings, then those that all have, then what is the recipe's own."""
    own, shared = {}, {}
    for p in inspect.signature(rule).parameters.values():
        limit = Annotated[float, Field(gt=0)] if p.name == "lr" else p.annotation
        common = p.name != "lr" and hasattr(OptimizerBase, p.name) and p.name not in rule.__annotations__
        (shared if common else own)[p.name] = (limit, [*p.default] if p.default == () else p.default)
    factors = {
        "bias_rate": (Annotated[float, Field(ge=0)], 1.0),  # multiplies the rate of biases
        "decay_bias": (bool, True),  # whether vectors decay, too
        "groups": (list[Group], []),
    }
    return create_model(name, __base__=Section, name=(Literal[name], name), **own, **shared, **factors)


def _choice(kinds, default=None):
    """Return the type of a section whose keys depend on its `name`, which may be left out where there is a default."""
    return Annotated[
        reduce(or_, kinds.values()),
        Field(discriminator="name"),
        BeforeValidator(lambda given: {"name": default} | given if default and isinstance(given, dict) else given),
    ]


_SMOOTHING = {"smoothing": (Share, 0.0)}  # how much of a target is spread over all classes
KINDS = {  # {section: {name: what it then is}}
    "loss": {name: _section(name, kind, **_SMOOTHING if kind.soft else {}) for name, kind in LOSSES.items()},
    "optimizer": {name: _optimizer(name, rule) for name, rule in OPTIMIZERS.items()},
    "schedule": {name: _section(name, function) for name, function in SCHEDULES.items()},
    "average": {"none": NoAverage, "ema": EMA, "swa": SWA},
}
DEFAULTS = {"loss": "cross_entropy", "optimizer": "sgd"}  # names that may be left out


class Config(Section):
    """A recipe. init: {pattern of weights: init}, such as {"*": "he"}; later ones win (gpunet.train.initial)."""

    model: Named
    data: Data
    init: dict[str, str | list] = {}
    preprocess: Preprocess = Preprocess()
    augment: Augment = Augment()
    loss: _choice(KINDS["loss"], DEFAULTS["loss"]) = KINDS["loss"]["cross_entropy"]()
    optimizer: _choice(KINDS["optimizer"], DEFAULTS["optimizer"]) = KINDS["optimizer"]["sgd"]()
    schedule: _choice(KINDS["schedule"]) = KINDS["schedule"]["const"]()
    average: _choice(KINDS["average"]) = NoAverage()
    train: Train = Train()
    start: Start = Start()
    run: Run = Run()

    @property
    def rate(self):
        """The rate that the schedule starts from: optimizer.lr, by train.lr_rule for the images of an update."""
        train = self.train
        if train.lr_rule == "none":
            return self.optimizer.lr
        if train.accumulate == "epoch":
            raise GpunetError("[train]: lr_rule: expected none beside accumulate = 'epoch', an update by all images")
        factor = train.batch * train.accumulate / train.base_batch
        return self.optimizer.lr * (factor if train.lr_rule == "linear" else factor**0.5)

    @property
    def rate_line(self):
        """What the rate is, in words."""
        train, given = self.train, f"learning rate {self.rate:.4g}, schedule {self.schedule.name}"
        if train.lr_rule == "none":
            return given
        size = f"{train.batch * train.accumulate} images an update"
        return f"{given}: optimizer.lr {self.optimizer.lr:g} is for {train.base_batch}, {train.lr_rule} rule, {size}"

    def rates(self, steps, per_epoch):
        """Return the table of rates of so many updates, of which an epoch has `per_epoch`."""
        name, settings = self.schedule.name, self.schedule.model_dump(exclude={"name"})
        return SCHEDULES[name](steps, per_epoch, self.rate, **settings)

    @property
    def smoothing(self):
        """How much of a target is spread over all classes; 0 for a loss that has no use for it."""
        return getattr(self.loss, "smoothing", 0.0)

    def loss_function(self):
        """Return the loss of [loss]."""
        return LOSSES[self.loss.name](**self.loss.model_dump(exclude={"name", "smoothing"}))


def load_config(name_or_path, overrides=()):
    """Return the Config of a file or a shipped recipe; `overrides` are texts "section.key=value", value in TOML.

    A file is TOML, or a solver of Caffe's, solver.prototxt. Raises GpunetError that names file, section and key, what
    was expected and what is there.
    """
    path = resources.config(name_or_path)
    place = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    table, origin = caffe.read(path).tables if path.suffix == ".prototxt" else read_toml(path.read_bytes(), place), {}
    for text in overrides:
        section, key, value = _override(text)
        origin[section, key if section in table else None] = origin[section, key] = f"--set {text}"
        if isinstance(table.setdefault(section, {}), dict):
            table[section][key] = value
    config = parse_config(table, place, origin)
    _check_arguments("model", config.model, MODELS, place, origin)
    _check_arguments("data", config.data, LOADERS, place, origin)
    _check_inits(config.init, place, origin)
    config.run.name = config.run.name or path.stem
    if config.data.directory is not None:
        config.data.directory = str(Path(config.data.directory).expanduser().absolute())
    if config.start.weights is not None:  # a path or a run's name: the run that is made must not depend on this folder
        places = [Path(config.start.weights).expanduser(), Path("runs") / config.start.weights]
        config.start.weights = str(next((p.absolute() for p in places if p.exists()), config.start.weights))
    return config


def parse_config(table, place="config", origin=None):
    """Return the Config of nested dicts; errors name `place`, or the origin given for a (section, key)."""
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        raise GpunetError(_explain(error.errors(include_url=False), table, place, origin or {})) from None


def to_toml(config):
    """Return the recipe as TOML, defaults included; what is None is left out."""
    return tables_to_toml(config.model_dump())


def tables_to_toml(tables):
    """Return sections {name: {key: value}} as TOML, a list of tables an entry a line; what is None is left out."""
    sections = []
    for section, values in tables.items():
        lines = [f"{_key(key)} = {_toml(value)}" for key, value in values.items() if value is not None]
        sections.append("\n".join([f"[{section}]", *lines]))
    return "\n\n".join(sections) + "\n"


def _key(name):
    return name if BARE.fullmatch(name) else _toml(name)


def _toml(value):
    """Return a value as TOML writes it, which is as JSON does but for numbers like 1e20 and control characters."""
    if isinstance(value, dict):
        pairs = (f"{_key(key)} = {_toml(v)}" for key, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple) and any(isinstance(v, dict) for v in value):
        return "\n".join(["[", *(f"    {_toml(v)}," for v in value), "]"])
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value) if isinstance(value, float) else json.dumps(value)


def read_toml(content, place):
    """Return the table of a recipe in text or bytes; whatever is wrong with that names `place`."""
    try:
        return tomllib.loads(content if isinstance(content, str) else content.decode())
    except UnicodeDecodeError as error:
        raise GpunetError(f"{place}: expected text in UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        raise GpunetError(f"{place}: not TOML: {error}") from None
    except RecursionError:
        raise GpunetError(f"{place}: not TOML: lists or tables in each other, too deep") from None


def _override(text):
    """Split "section.key=value"; a value that is not TOML is taken as text."""
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key) or ("." in key and section != "init"):
        raise GpunetError(f"--set {text}: expected section.key=value, such as optimizer.lr=0.1")
    try:
        text.encode()  # of a command line, bytes that are no UTF-8 arrive as half characters
        return section, key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return section, key, value.strip()
    except (ValueError, RecursionError):
        raise GpunetError(
            f"--set {text}: expected text in UTF-8, numbers of less than 4,300 digits, no deep lists"
        ) from None


_EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "string_type": "a text in quotes",
    "bool_type": "true or false",
    "list_type": "a list",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "union_tag_invalid": "{expected_tags}",
    "too_short": "a list of at least {min_length}",
    "model_type": "a table",
    "value_error": "{error}",
}


def _explain(errors, table, place, origin):
    """Return one line for the first fault, and how many more there are."""
    faults = {}
    for error in errors:
        section, *rest = error["loc"]
        if section in KINDS and rest:
            rest = rest[1:]  # the kind
        if error["type"].startswith("union_tag"):
            rest = ["name"]
        if rest[:1] == ["groups"] and len(rest) > 2:
            section, rest = "optimizer.groups", rest[2:]
        faults.setdefault((section, rest[0] if rest else None), []).append(error)
    unknown = [place for place, found in faults.items() if found[0]["type"] == "extra_forbidden"]
    section, key = next(iter(unknown or faults))  # a misspelt key is often missing, too
    same = faults[section, key]
    place = origin.get((section, key), place)
    kind = same[0]["type"]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if kind == "extra_forbidden":
        if key is None:
            known = Config.model_fields
        elif section == "optimizer.groups":
            known = Group.model_fields
        elif section in KINDS:
            known = KINDS[section][table[section].get("name", DEFAULTS.get(section))].model_fields
        else:
            known = Config.model_fields[section].annotation.model_fields
        return f"{place}: {_unknown(section, key, known)}{more}"
    if kind in ("missing", "union_tag_not_found"):
        what = f"[{section}]" if key is None else f"'{key}' in [{section}]"
        return f"{place}: {what} is missing{more}"
    if key is None:
        return f"{place}: {section}: expected a section [{section}], got {same[0]['input']!r}{more}"
    expected = " or ".join(dict.fromkeys(_EXPECTED.get(e["type"], e["msg"]).format(**e.get("ctx", {})) for e in same))
    value = same[0]["ctx"]["tag"] if kind == "union_tag_invalid" else same[0]["input"]
    got = json.dumps(value, ensure_ascii=False, default=str)
    return f"{place}: '{key}' in [{section}]: expected {expected}, got {got}{more}"


def _check_arguments(section, named, functions, place, origin):
    """Check that `name` is one of `functions` and that every other key is an argument of it."""
    if named.name not in functions:
        where, hint = origin.get((section, "name"), place), nearest(named.name, functions)
        own = "; --ops FILE.py adds your own" if section == "model" else ""
        known = ", ".join(functions)
        raise GpunetError(f"{where}: 'name' in [{section}]: got '{named.name}'; {hint}known: {known}{own}")
    arguments = inspect.signature(functions[named.name]).parameters
    own = [a for a in arguments if a not in ("input_shape", "classes", "directory")]
    known = list(dict.fromkeys([*type(named).model_fields, *own]))
    for key in named.model_extra:
        if key not in known:
            raise GpunetError(f"{origin.get((section, key), place)}: {_unknown(section, key, known)}")


def _check_inits(inits, place, origin):
    """Check that each is one that there is, with arguments that it has."""
    for pattern, value in inits.items():
        try:
            named(value)
        except GpunetError as error:
            where, text = origin.get(("init", pattern), place), str(error).removeprefix("init: ")
            raise GpunetError(f"{where}: '{pattern}' in [init]: {text}") from None


def _unknown(section, key, known):
    """Return what to say of a section (key None), or of a key in one, that does not exist."""
    what = f"unknown section [{section}]" if key is None else f"unknown key '{key}' in [{section}]"
    return f"{what}; {_elsewhere(key) or nearest(key or section, known)}known: {', '.join(known)}"


def _elsewhere(key):
    """Return "[preprocess] has it; " for a key of another section, or nothing."""
    found = [
        name for name, field in Config.model_fields.items() if key in getattr(field.annotation, "model_fields", ())
    ]
    return f"[{found[0]}] has it; " if found else ""


def nearest(wrong, known):
    """Return "did you mean 'x'? " for the nearest of the known names, or nothing."""
    close = get_close_matches(str(wrong), known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'? " if close else ""
