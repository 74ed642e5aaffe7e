"""A network as a list of layers: what it builds, what it refuses and how, and its way through files and runs."""

import inspect
import tomllib
from contextlib import closing

import numpy as np
import pytest

from gpunet import models, nn
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.models.layers import KINDS
from gpunet.train import Checkpoint, Trainer, parse_config
from gpunet.train.config import to_toml
from gpunet.train.resume import differences

BRANCHING = [
    {"layer": "Conv2d", "name": "stem", "outputs": 4, "size": 3, "weight_init": ["normal", 0.05], "bias_rate": 2},
    {"layer": "MaxPool", "name": "pool", "size": [3, 2], "stride": 2, "ceil": True},
    {"layer": "Conv2d", "outputs": 4, "size": 3, "bias": False, "weight_decay": 0.5},
    {"layer": "BatchNorm"},
    {"layer": "ReLU", "name": "relu"},
    {"layer": "Add", "name": "sum", "inputs": ["relu", "pool"]},
    {"layer": "Dropout", "rate": 0.25},
    {"layer": "Linear", "name": "head"},
]


def build(layers, shape=(9, 8, 3), classes=3):
    return models.build("layers", shape, classes, layers=layers)


def test_it_is_the_graph_that_python_would_wire():
    image = nn.Input((9, 8, 3))
    stem = nn.Conv2d(4, 3, weight_init=["normal", 0.05], bias_rate=2, name="stem")(image)
    pool = nn.MaxPool((3, 2), 2, ceil=True, name="pool")(stem)
    y = nn.Conv2d(4, 3, bias=False, weight_decay=0.5)(pool)
    y = nn.ReLU(name="relu")(nn.BatchNorm()(y))
    y = nn.Dropout(0.25)(nn.Add(name="sum")(y, pool))
    expected, got = nn.Graph(image, nn.Linear(3, name="head")(y)), build(BRANCHING)
    assert got.summary() == expected.summary()
    assert [(p.name, p.rate, p.decay) for p in got.parameters()] == [
        (p.name, p.rate, p.decay) for p in expected.parameters()
    ]
    multiplied = {p.name: (p.rate, p.decay) for p in got.parameters() if (p.rate, p.decay) != (1, 1)}
    assert multiplied == {"stem.bias": (2, 1), "conv2d2.weight": (1, 0.5), "batchnorm1.mean": (0.1, 1),
                          "batchnorm1.variance": (0.1, 1)}  # fmt: skip
    assert [[i.path for i in n.inputs] for n in got.nodes] == [[i.path for i in n.inputs] for n in expected.nodes]
    steps = [Step(graph, nn.SoftmaxCrossEntropy(), batch=2, replicas=1, seed=4) for graph in (got, expected)]
    with closing(steps[0]), closing(steps[1]):
        x = np.random.default_rng(0).normal(0, 1, (2, 9, 8, 3)).astype(np.float32)
        np.testing.assert_array_equal(steps[0].predict(x), steps[1].predict(x))


def test_the_head_has_as_many_outputs_as_there_are_classes():
    assert build([{"layer": "Linear"}], classes=7).output_shape == (7,)
    assert build([{"layer": "Linear", "outputs": 7}], classes=7).output_shape == (7,)
    graph = build([{"layer": "Conv2d", "size": 1}, {"layer": "GlobalAvgPool"}, {"layer": "Linear"}][1:], classes=4)
    assert graph.output_shape == (4,)


def test_it_knows_every_layer_but_blocks_and_fused_ones():
    assert {"Conv2d", "LRN", "Add", "Concat", "BatchNorm", "Linear", "Tanh"} <= KINDS.keys()
    assert not {"Layer", "Block", "Sequential", "BatchNormReLU", "BatchNormAddReLU", "Graph", "Node"} & KINDS.keys()


def one(**entry):
    return [entry, {"layer": "Linear"}]


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ((), 'layers: expected a list of tables such as {layer = "Linear"}, got ()'),
        ("Linear", "layers: expected a list of tables"),
        ([3], 'layer 1: expected a table such as {layer = "ReLU"}, got 3'),
        (one(name="a"), "layer 1 'a': 'layer' is missing; known: "),
        (one(layer="conv2d"), "layer 1: unknown layer 'conv2d'; did you mean 'Conv2d'? known: "),
        (one(layer="__class__"), "layer 1: unknown layer '__class__'; "),
        (one(layer="Sequential"), "layer 1: unknown layer 'Sequential'; "),
        (one(layer=["ReLU"]), "layer 1: unknown layer ['ReLU']; "),
        (one(layer="ReLU", slope=1), "layer 1: unknown key 'slope' of ReLU; known: layer, name, inputs"),
        (one(layer="Conv2d", channels=3, size=3), "layer 1: unknown key 'channels' of Conv2d; "),
        (
            one(layer="MaxPool", siz=2),
            "layer 1: unknown key 'siz' of MaxPool; did you mean 'size'? known: size, stride",
        ),
        (one(layer="MaxPool"), "layer 1: MaxPool needs size"),
        (one(layer="Conv2d", name="c"), "layer 1 'c': Conv2d needs outputs, size"),
        (one(layer="Linear", outputs="7"), "layer 1: outputs: expected a whole number, got '7'"),
        (one(layer="Linear", outputs=2.0), "layer 1: outputs: expected a whole number, got 2.0"),
        (one(layer="Linear", outputs=True), "layer 1: outputs: expected a whole number, got True"),
        (one(layer="Linear", outputs=[1, 2]), "layer 1: outputs: expected a whole number, got [1, 2]"),
        (one(layer="Linear", outputs=0), "layer 1: Linear: outputs: expected a whole number from 1"),
        (one(layer="MaxPool", size=[1, 2, 3]), "layer 1: size: expected a whole number, or two of them, got [1, 2, 3]"),
        (one(layer="MaxPool", size=0), "layer 1: pool: expected size and stride of at least 1"),
        (one(layer="MaxPool", size=2, stride="x"), "layer 1: pool: stride: expected one or two whole numbers, got 'x'"),
        (one(layer="MaxPool", size=2, ceil=1), "layer 1: ceil: expected true or false, got 1"),
        (one(layer="Dropout", rate="half"), "layer 1: rate: expected a finite number, got 'half'"),
        (one(layer="Dropout", rate=float("nan")), "layer 1: rate: expected a finite number, got nan"),
        (one(layer="Dropout", rate=10**400), "layer 1: rate: expected a finite number, got 1000"),
        (one(layer="Dropout", rate=1.0), "layer 1: Dropout: rate: expected 0 <= rate < 1, got 1.0"),
        (one(layer="Linear", outputs=2, bias_rate=-1), "layer 1: bias_rate: expected 0 or more, got -1"),
        (one(layer="Linear", outputs=2, weight_init=3), "layer 1: weight_init: expected a name, or a list such as"),
        (one(layer="Linear", outputs=2, weight_init=[]), "layer 1: weight_init: expected a name, or a list such as"),
        (one(layer="Linear", outputs=2, weight_init="hee"), "layer 1: init: expected one of normal, "),
        (one(layer="Linear", outputs=2, weight_init=["normal", 1, 2]), "layer 1: init: normal: expected the arguments"),
        (one(layer="Linear", outputs=2, weight_init=["normal", -1]), "layer 1: init: normal: sd: expected a number a"),
        (one(layer="Linear", outputs=2, weight_init=["normal", "x"]), "layer 1: init: normal: sd: expected a number"),
        (
            one(layer="Linear", outputs=2, bias_init=["constant", float("inf")]),
            "layer 1: init: constant: value: expected a number, got inf",
        ),
        (one(layer="ReLU", name="input"), "layer 1: name: expected letters, digits and _ / + . - but not 'input'"),
        (one(layer="ReLU", name="a:b"), "layer 1: name: expected letters, digits"),
        (one(layer="ReLU", name=""), "layer 1: name: expected letters, digits"),
        (one(layer="ReLU", name=7), "layer 1: name: expected letters, digits"),
        (one(layer="ReLU", inputs=[]), "layer 1: inputs: expected names of layers, got []"),
        (one(layer="ReLU", inputs=[1]), "layer 1: inputs: expected names of layers, got [1]"),
        (one(layer="ReLU", inputs="later"), "layer 1: inputs: 'later' is no layer before this one; nearest: input"),
        (one(layer="ReLU", name="a", inputs="a"), "layer 1 'a': inputs: 'a' is no layer before this one"),
        (one(layer="ReLU", inputs=["input", "input"]), "layer 1: inputs: ReLU reads 1, got 2"),
        (one(layer="Add", inputs="input"), "add1: expected two or more inputs of one shape, got (9, 8, 3)"),
        ([{"layer": "ReLU", "name": "a"}] * 2, "layer 2 'a': a layer before it has this name, too"),
        (
            [{"layer": "ReLU", "name": "a"}, {"layer": "Linear", "inputs": "input"}],
            "layer 1 'a': no layer reads it, and it is not the last",
        ),
        (
            [{"layer": "ReLU"}, {"layer": "Linear", "inputs": "input"}],
            "layer 1: no layer reads it, and it is not the last",
        ),
        (
            [{"layer": "GlobalAvgPool"}, {"layer": "MaxPool", "name": "p", "size": 2}, {"layer": "Linear"}],
            "p: expected an input of shape (height, width, channels), got (3,) from globalavgpool1 of shape (3,)",
        ),
        (
            one(layer="Linear", outputs=2)[:1],
            "expected an output of shape (3,), one value a class, got (2,) from the l",
        ),
        ([{"layer": "ReLU"}], "expected an output of shape (3,), one value a class, got (9, 8, 3) from the last layer"),
    ],
)
def test_mistakes_are_told_by_place(layers, text):
    with pytest.raises(GpunetError) as caught:
        build(layers)
    assert str(caught.value).startswith(f"model layers: {text}")


def config_of(layers, **sections):
    table = {"model": {"name": "layers", "layers": layers}, "data": {"name": "shapes", "train": 60, "test": 20}}
    return parse_config({**table, "train": {"epochs": 1, "batch": 20, "replicas": 1}, **sections})


def test_toml_holds_it_a_layer_a_line_and_gives_it_back():
    strange = [{"layer": "ReLU", "a key": 'q"uote\n', "list": [1, 2.5, True], "table": {"x": [{"y": 1e20}]}}]
    for layers in (BRANCHING, strange):
        text = to_toml(config_of(layers))
        assert tomllib.loads(text)["model"]["layers"] == layers
    lines = to_toml(config_of(BRANCHING)).splitlines()
    assert lines[:3] == ["[model]", 'name = "layers"', "layers = ["]
    assert lines[3].startswith(
        '    {layer = "Conv2d", name = "stem", outputs = 4, size = 3, weight_init = ["normal", 0.'
    )
    assert lines[3 + len(BRANCHING)] == "]"


def test_a_run_keeps_it_and_goes_on_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr("gpunet.train.trainer.write_report", lambda result: None)
    layers = [{"layer": "AvgPool", "size": 8}, *BRANCHING]
    where = {"run": {"directory": str(tmp_path), "checkpoint_seconds": 0.0}}
    run = Trainer(config_of(layers, **where), show=False).fit().run
    assert run.config().model.layers == layers
    kept = Checkpoint.load(run.path / "last.safetensors")
    assert "stem.weight" in kept.weights
    assert tomllib.loads(kept.about["config"])["model"]["layers"] == layers


def test_resume_says_which_layer_was_changed():
    layers = [{"layer": "AvgPool", "size": 8}, {"layer": "Dropout", "rate": 0.25}, {"layer": "Linear"}]
    given = config_of([layers[0], {"layer": "Dropout", "rate": 0.5}, {"layer": "Linear", "name": "x"}])
    found = differences(config_of(layers), given, "here")
    assert found == [
        "model.layers 2.rate is 0.25 in the run, 0.5 here",
        "model.layers 3.name is unset in the run, 'x' here",
    ]


def test_every_layer_can_stand_in_a_list():
    for name, kind in KINDS.items():
        kinds = {p.kind for p in inspect.signature(kind).parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}, name
    made = [{"layer": "DropConnect", "outputs": 5, "rate": 0.2, "bias_rate": 2}, {"layer": "Linear"}]
    assert models.build("layers", (4, 4, 3), 7, layers=made).output_shape == (7,)
