"""What `gpunet list` prints: the entries of a registry, each with its arguments, what it does, and where it is from.

Everything is read from the entries themselves, so that a new one needs no line here.
"""

import inspect
import json
import re
from textwrap import fill

from gpunet import resources
from gpunet.errors import GpunetError

WIDTH = 110
# "Smith and Topin 2018", "He et al. 2016", "Hendrycks & Gimpel 2016", "Polyak 1964", or an address
SOURCE = re.compile(
    r"[A-Z][\w-]+(?:,? (?:et al\.|(?:and|&) [A-Z][\w-]+))?,? (?:\((?:19|20)\d\d\)|(?:19|20)\d\d)|https?://[^\s,;)]+[^\s,;.:)]"
)


def optimizers():
    """Return the update rules."""
    from gpunet.optim import OPTIMIZERS

    return OPTIMIZERS


def schedules():
    """Return the schedules of the learning rate."""
    from gpunet.optim.schedules import SCHEDULES

    return SCHEDULES


def layers():
    """Return the public layers, but not their base class."""
    from gpunet import nn

    public = {name: getattr(nn, name) for name in sorted(nn.__all__)}
    return {n: c for n, c in public.items() if inspect.isclass(c) and issubclass(c, nn.Layer) and c is not nn.Layer}


def losses():
    """Return the losses."""
    from gpunet.nn import LOSSES

    return LOSSES


def augmentations():
    """Return what [augment] can switch on, each with values to begin with."""
    from gpunet.data import AUGMENTATIONS

    return AUGMENTATIONS


def models():
    """Return the networks."""
    from gpunet.models import MODELS

    return MODELS


def inits():
    """Return the initial values."""
    from gpunet.nn.init import INITS

    return INITS


KINDS = {f.__name__: f for f in (optimizers, schedules, layers, losses, augmentations, models, inits)}
GIVEN = {  # arguments that gpunet itself gives
    "schedules": {"steps", "per_epoch", "lr"},
    "models": {"input_shape", "classes"},
}


def listing(kind):
    """Return the text for one of KINDS, or for "configs"; raise GpunetError for another."""
    if kind == "configs":
        files = sorted(resources.configs().glob("*.toml"))
        rows = [(path.stem, path.read_text(encoding="utf-8").split("\n")[0].lstrip("# ")) for path in files]
        return "\n\n".join(f"{name}\n    {text}" for name, text in rows)
    if kind not in KINDS:
        raise GpunetError(f"list: expected one of {', '.join([*KINDS, 'configs'])}, got '{kind}'")
    return "\n\n".join(entry(name, what, GIVEN.get(kind, ())) for name, what in KINDS[kind]().items())


def entry(name, what, given=()):
    """Return the lines for a function or class: its arguments but the given ones, its first line, its sources."""
    first, *rest = (inspect.getdoc(what) or "").split("\n")
    lines = [fill(f"{name}({arguments(what, given)})", WIDTH, subsequent_indent="        ")]
    lines += [f"    {first}"] * bool(first)
    sources = dict.fromkeys(match[0] for match in SOURCE.finditer(" ".join(rest)))
    lines += [f"    from {'; '.join(sources)}"] * bool(sources)
    return "\n".join(lines)


def arguments(what, given=()):
    """Return the arguments of a function or class as a call has them, with their defaults, without annotations.

    Of a transform, the keys of [augment] that it was made with.
    """
    if hasattr(what, "example"):
        return ", ".join(f"{key}={shown(value)}" for key, value in what.example.items())
    texts = []
    for p in inspect.signature(what).parameters.values():
        if p.name not in given:
            star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
            texts.append(star + p.name + (f"={shown(p.default)}" if p.default is not p.empty else ""))
    return ", ".join(texts)


def shown(value):
    """Return a default as TOML or Python would have it; of a function, that it is one."""
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    if isinstance(value, str):
        return json.dumps(value)
    return repr(value)
