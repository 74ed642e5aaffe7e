"""`gpunet list`: every entry of every registry, read from the entries themselves."""

import inspect
import sys

import pytest

from gpunet import cli, listing, nn
from gpunet.errors import GpunetError
from gpunet.listing import KINDS, SOURCE, arguments, entry
from gpunet.models import MODELS
from gpunet.nn.init import INITS
from gpunet.optim import OPTIMIZERS
from gpunet.optim.schedules import SCHEDULES

REGISTRIES = {"optimizers": OPTIMIZERS, "schedules": SCHEDULES, "losses": nn.LOSSES, "models": MODELS, "inits": INITS}


def names(kind):
    """The names that a listing begins an entry with."""
    return [line.partition("(")[0] for line in listing.listing(kind).splitlines() if line and line[0] != " "]


@pytest.mark.parametrize("kind", REGISTRIES)
def test_a_listing_has_every_entry_in_the_order_of_its_registry(kind):
    assert names(kind) == list(REGISTRIES[kind])


def test_layers_are_all_that_are_public():
    found = names("layers")
    assert {"Conv2d", "Linear", "ReLU", "MaxPool", "BatchNorm", "Dropout", "Sequential"} <= set(found)
    assert not {"Layer", "Graph", "Input", "Node", "SoftmaxCrossEntropy", "fuse", "LOSSES"} & set(found)
    assert all(issubclass(getattr(nn, name), nn.Layer) for name in found)


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_says_what_it_is(kind):
    """The first line of its docstring, which is a formula or a sentence."""
    text = listing.listing(kind)
    for name, what in KINDS[kind]().items():
        first = inspect.getdoc(what).split("\n")[0]
        assert len(first) > 5, f"{kind} {name}"
        assert f"    {first}\n" in text + "\n"


def test_new_entries_are_listed_without_a_word(monkeypatch):
    def triangle(steps, per_epoch, lr, *, width: float, deep: bool = False, names: list = ("a", "b"), init=len, s="x"):
        """rate = lr * |n % width|.

        After Escher and Penrose (1958), https://example.org/steps.html, and Reutersvaerd et al. 1934.
        """

    monkeypatch.setitem(SCHEDULES, "triangle", triangle)
    assert listing.listing("schedules").endswith(
        "\n\ntriangle(width, deep=False, names=('a', 'b'), init=len, s=\"x\")\n"
        "    rate = lr * |n % width|.\n"
        "    from Escher and Penrose (1958); https://example.org/steps.html; Reutersvaerd et al. 1934"
    )


def test_what_gpunet_gives_itself_is_not_an_argument():
    assert arguments(SCHEDULES["exp"], ("steps", "per_epoch", "lr")).startswith('gamma, unit="epochs", warmup=0')
    assert "per_epoch" not in listing.listing("schedules") and "input_shape" not in listing.listing("models")
    assert entry("Sequential", nn.Sequential).startswith("Sequential(*layers, name=None)\n")
    assert "\nresnet20(widths=(16, 32, 64))\n" in listing.listing("models")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("by Loshchilov and Hutter 2017, and again", ["Loshchilov and Hutter 2017"]),
        ("(He et al. 2016, section 4.2)", ["He et al. 2016"]),
        ("Smith & Topin (2018).", ["Smith & Topin (2018)"]),
        ("see https://arxiv.org/abs/1708.07120; it", ["https://arxiv.org/abs/1708.07120"]),
        ("145,578 parameters of 2000 images, at 1e-4", []),
    ],
)
def test_sources_are_found(text, found):
    assert [match[0] for match in SOURCE.finditer(text)] == found


def test_a_long_entry_is_folded():
    lines = listing.listing("layers").splitlines()
    assert max(len(line) for line in lines if "(" in line and line[0] != " ") <= listing.WIDTH


@pytest.mark.parametrize("kind", [*KINDS, "configs"])
def test_the_command_lists_it(kind, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpunet", "list", kind])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert capsys.readouterr().out == listing.listing(kind) + "\n"


@pytest.mark.parametrize("wrong", ["", "model", "optimisers", "Layers"])
def test_an_unknown_kind_is_told_the_known_ones(wrong):
    with pytest.raises(GpunetError) as caught:
        listing.listing(wrong)
    assert str(caught.value) == (
        "list: expected one of optimizers, schedules, layers, losses, augmentations, models, inits, configs, "
        f"got '{wrong}'"
    )
