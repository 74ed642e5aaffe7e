"""Caffe's files: their grammar, what they come to here, what is refused and where, and texts that mean harm."""

import os
import re
import shutil
import sys
import time
import tomllib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from caffe_pool import caffe_pool

from gpunet import caffe, cli, models, nn, optim
from gpunet.caffe import prototxt
from gpunet.caffe.net import read_net
from gpunet.caffe.prototxt import Message, Word, parse
from gpunet.caffe.solver import IGNORED, SOLVER
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.optim import schedules
from gpunet.train import Trainer, load_config, parse_config
from gpunet.train.build import build_graph

FILES = Path(__file__).parent / "caffe"


# The grammar


def plain(message):
    """A message as nested lists of (name, value, line)."""
    return [(f.name, plain(f.value) if isinstance(f.value, Message) else f.value, f.line) for f in message.fields]


def test_all_forms_of_a_field():
    text = """a: 1 b{c:"x" 'y'
    d: [1, -2.5e-3, LMDB] } # a comment: { "
    e: -0x1F f < g: true > ; h: { i: .5f, }, k: 017 l: 3. m: ["u", 'v',] n: []
    b {}"""
    assert plain(parse(text, "net")) == [
        ("a", 1, 1),
        ("b", [("c", "xy", 1), ("d", 1, 2), ("d", -0.0025, 2), ("d", Word("LMDB"), 2)], 1),
        ("e", -31, 3), ("f", [("g", Word("true"), 3)], 3), ("h", [("i", 0.5, 3)], 3),
        ("k", 15, 3), ("l", 3.0, 3), ("m", "u", 3), ("m", "v", 3), ("b", [], 4),
    ]  # fmt: skip
    types = [type(f.value) for f in parse("a: 1 b: 1.0 c: 1e0 d: '1'", "").fields]
    assert types == [int, float, float, str]
    assert plain(parse(r"""a: "\"\n\t\\\101\x41\'é" b: '"'""", "")) == [("a", "\"\n\t\\AA'é", 1), ("b", '"', 1)]
    assert plain(parse("", "")) == plain(parse("# nothing\n", "")) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\n\nb", "net:3: expected ':' or '{' behind 'b', got the end of the file"),
        ("a {\n b: 1\n", "net:3: expected '}' for what opens in line 1, got the end of the file"),
        ("a {\n b: 1 >", "net:2: expected the name of a field or '}', got '>'"),
        ("}", "net:1: expected the name of a field, got '}'"),
        ("a:", "net:1: expected a value, got the end of the file"),
        ("a: [1 2]", "net:1: expected ',' or ']', got '2'"),
        ("a: [1,\n2", "net:2: expected ',' or ']', got the end of the file"),
        ("a: -'x'", "net:1: expected a value, got ''x''"),
        ("a: - - 1", "net:1: expected a value, got '-'"),
        ("a: -LMDB", "net:1: expected a number behind '-', got 'LMDB'"),
        ("a: nan", "net:1: expected a finite number, got 'nan'"),
        ("a: 1e999", "net:1: expected a finite number, got '1e999'"),
        ("a: 089", "net:1: expected an octal number, as a leading 0 says, got '089'"),
        ("a: 1.2.3", "net:1: expected a field, got '1.2.3'"),
        ('\na: "x\ny"', "net:2: expected a field, got a text that does not end on its line"),
        ('a: "x\\"', "net:1: expected a field, got a text that does not end on its line"),
        ("a: 1\n<<<<<<< HEAD", "net:2: expected the name of a field, got '<'"),
        ("a: \0", r"net:1: expected a field, got '\x00'"),
        ("é: 1", r"net:1: expected a field, got '\xe9:'"),
        ("[ext.name]: 1", "net:1: expected the name of a field, got '['"),
        ("a: 1 : 2", "net:1: expected the name of a field, got ':'"),
    ],
)
def test_what_is_no_text_format_is_told_by_line(text, complaint):
    with pytest.raises(GpunetError) as caught:
        parse(text, "net")
    assert str(caught.value) == complaint


HOSTILE = {
    "braces": "a {" * 100_000,
    "brackets": "a: [" * 100_000,
    "angles": "a <" * 100_000,
    "closing": "}" * 100_000,
    "deep but closed": "a {" * 40 + "}" * 40,
    "a text of 50 MB": 'a: "' + "x" * 50_000_000 + '"',
    "a text that never ends": 'a: "' + "x" * 1_000_000,
    "escapes": 'a: "' + "\\" * 1_000_001,
    "digits": "a: 1" + "0" * 1_000_000,
    "hexadecimal": "a: 0x" + "f" * 1_000_000,
    "an exponent": "a: 1e" + "9" * 1_000_000,
    "dots": "a: " + "." * 1_000_000,
    "minus": "a: " + "-" * 1_000_000,
    "quotes": "'" * 1_000_001,
    "a name": "a" * 1_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_end_soon_and_in_one_line(name):
    start = time.process_time()
    with pytest.raises(GpunetError) as caught:
        parse(HOSTILE[name], "net")
    assert time.process_time() - start < 5
    assert re.match(r"net(:1)?: expected ", str(caught.value))
    assert len(str(caught.value)) < 200


def test_long_texts_take_time_in_proportion():
    """A million characters of fields, comments, texts side by side: seconds; anything quadratic would take hours."""
    for text in ("a:1 " * 250_000, "#\n" * 500_000, "a:" + '""' * 499_000, "a:[" + "1," * 499_000 + "]"):
        start = time.process_time()
        parse(text, "net")
        assert time.process_time() - start < 20


def test_depth_is_allowed_as_far_as_it_says():
    parse("a {" * prototxt.DEPTH + "}" * prototxt.DEPTH, "net")
    with pytest.raises(GpunetError, match="^net:1: expected at most 32 messages within each other$"):
        parse("a {" * (prototxt.DEPTH + 1) + "}" * (prototxt.DEPTH + 1), "net")


# The published files


STAGES = {"quick": ("", "_lr1"), "full": ("", "_lr1", "_lr2")}
UPDATES = {"quick": (4000, 5000), "full": (60_000, 65_000, 70_000)}


def solvers(name):
    return [FILES / f"cifar10_{name}_solver{stage}.prototxt" for stage in STAGES[name]]


@pytest.mark.parametrize("name", STAGES)
def test_the_published_nets_are_the_shipped_models(name):
    config = parse_config(caffe.read(solvers(name)[0]).tables)
    got, expected = build_graph(config, (32, 32, 3), 10), models.build(f"cifar10_{name}")
    assert [row.kind for row in got.summary()] == [row.kind for row in expected.summary()]
    assert [row.shape for row in got.summary()] == [row.shape for row in expected.summary()]
    described = [
        [(p.name.removeprefix("sequential1."), p.shape, p.rate, p.decay) for p in graph.parameters()]
        for graph in (got, expected)
    ]
    assert described[0] == described[1]
    for ours, theirs in zip(got.parameters(), expected.parameters(), strict=True):
        draws = [p.initial(np.random.default_rng(3), p.shape) for p in (ours, theirs)]
        np.testing.assert_array_equal(*draws)


@pytest.mark.parametrize("name", STAGES)
def test_three_steps_are_those_of_the_shipped_recipe_bit_for_bit(name):
    small = ["data.name='shapes'", "data.train=300", "data.test=100", "train.replicas=2"]
    trainers = [Trainer(load_config(path, small), show=False) for path in (solvers(name)[0], f"cifar10_{name}")]
    ours, theirs = (trainer.step for trainer in trainers)
    with closing(ours), closing(theirs):
        for mine, given in zip(ours.weights, list(theirs.weights), strict=True):
            rng = np.random.default_rng(len(mine))
            value = theirs.weights[given] + rng.normal(0, 0.02, theirs.weights[given].shape)
            ours.weights[mine] = theirs.weights[given] = value.astype(np.float32)
        before = {mine: ours.weights[mine].copy() for mine in ours.weights}
        for step in (ours, theirs):
            for _ in range(3):
                step()
            step.wait()
        np.testing.assert_array_equal(ours.metrics(), theirs.metrics())
        for mine, given in zip(ours.weights, theirs.weights, strict=True):
            assert not np.array_equal(ours.weights[mine], before[mine])
            np.testing.assert_array_equal(ours.weights[mine], theirs.weights[given], err_msg=mine)


@pytest.mark.parametrize("name", STAGES)
def test_each_published_solver_and_all_of_them_together(name):
    for path, updates in zip(solvers(name), UPDATES[name], strict=True):
        config = load_config(path)
        assert config.train.steps == updates
        assert config.optimizer.lr == {"": 0.001, "_lr1": 0.0001, "_lr2": 0.00001}[path.stem.split("solver")[1]]
        assert config.schedule.name == "const"
    together, shipped = parse_config(caffe.read(*solvers(name)).tables), load_config(f"cifar10_{name}")
    total = UPDATES[name][-1]
    assert together.train.steps == total == shipped.train.epochs * 500
    np.testing.assert_array_equal(together.rates(total, 500), shipped.rates(total, 500))
    for section in ("preprocess", "augment", "optimizer", "loss"):
        assert getattr(together, section) == getattr(shipped, section)
    assert (together.data.name, together.data.validation) == (shipped.data.name, shipped.data.validation)
    assert (together.train.batch, together.train.order, together.train.monitor_test) == (100, "stored", True)
    assert together.train.evaluate_every == {"quick": 1, "full": 2}[name]
    assert together.run.name == f"cifar10_{name}"


def test_stages_that_do_not_follow_each_other_are_refused(tmp_path):
    first, second = solvers("quick")
    for old, new, text in (
        ("max_iter: 5000", "max_iter: 4000", "max_iter: expected more than 4,000 of the stage before it, got 4,000"),
        ("momentum: 0.9", "momentum: 0.8", r"expected \[optimizer\] of .*'momentum': 0.9.*, got .*'momentum': 0.8"),
        ('lr_policy: "fixed"', 'lr_policy: "step" stepsize: 2 gamma: 1', 'expected lr_policy: "fixed" in each stage'),
    ):
        shutil.copy(FILES / "cifar10_quick_train_test.prototxt", tmp_path)
        other = tmp_path / "other.prototxt"
        other.write_text(second.read_text().replace(old, new))
        with pytest.raises(GpunetError, match=f"other.prototxt: {text}"):
            caffe.read(first, other)
    with pytest.raises(
        GpunetError, match=r"lr2\.prototxt: base_lr: expected 0.00001, 0.1 times the stage before it, got 0.00002"
    ):
        one, two, three = solvers("full")
        shutil.copy(FILES / "cifar10_full_train_test.prototxt", tmp_path)
        wrong = tmp_path / "lr2.prototxt"
        wrong.write_text(three.read_text().replace("0.00001", "0.00002"))
        caffe.read(one, two, wrong)


# Nets


DATA = 'layer { name: "d" type: "Data" top: "data" top: "label" data_param { source: "cifar" batch_size: 20 } }\n'
LOSS = 'layer { name: "loss" type: "SoftmaxWithLoss" bottom: "y" bottom: "label" }\n'
HEAD = 'layer { name: "y" type: "InnerProduct" bottom: "x" top: "y" inner_product_param { num_output: 10 } }\n'


def net(*layers, data=DATA, loss=LOSS):
    return read_net(parse("\n".join([data, *layers, loss]), "net"))


def entry(text):
    """What one layer from "data" to "x" comes to."""
    found = net(f'layer {{ name: "a" bottom: "data" top: "x" {text} }}', HEAD).layers
    assert [e["name"] for e in found] == ["a", "y"]
    return {key: value for key, value in found[0].items() if key != "name"}


ZERO = {"weight_init": ["constant", 0.0]}  # Caffe's default


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'type: "Convolution" convolution_param { num_output: 8 kernel_size: 3 }',
            {"layer": "Conv2d", "outputs": 8, "size": 3, "padding": 0, **ZERO},
        ),
        (
            'type: "Convolution" param { lr_mult: 0 } param { decay_mult: 0 lr_mult: 3 } convolution_param { group: 3 '
            "num_output: 6 kernel_h: 3 kernel_w: 5 pad_h: 1 pad_w: 2 stride_h: 2 stride_w: 1 dilation: 2 engine: CUDNN "
            'weight_filler { type: "xavier" } bias_filler { type: "constant" value: 0.1 } }',
            {
                "layer": "Conv2d",
                "outputs": 6,
                "size": [3, 5],
                "stride": [2, 1],
                "padding": [1, 2],
                "dilation": 2,
                "groups": 3,
                "weight_init": ["he", "uniform", 1.0],
                "bias_init": ["constant", 0.1],
                "weight_rate": 0.0,
                "bias_rate": 3.0,
                "bias_decay": 0.0,
            },
        ),
        (
            'type: "Convolution" convolution_param { num_output: 1 kernel_size: [3, 1] pad: 1 pad: 0 bias_term: false '
            'weight_filler { type: "msra" } }',
            {
                "layer": "Conv2d",
                "outputs": 1,
                "size": [3, 1],
                "padding": [1, 0],
                "bias": False,
                "weight_init": ["he", "normal"],
            },
        ),
        (
            'type: "InnerProduct" param { decay_mult: 250 } inner_product_param { num_output: 4 '
            'weight_filler { type: "uniform" min: -0.5 max: 0.5 } }',
            {"layer": "Linear", "outputs": 4, "weight_init": ["uniform", 0.5], "weight_decay": 250.0},
        ),
        (
            'type: "InnerProduct" inner_product_param { num_output: 4 bias_term: 0 '
            'weight_filler { type: "xavier" variance_norm: AVERAGE } }',
            {"layer": "Linear", "outputs": 4, "bias": False, "weight_init": ["xavier", "uniform"]},
        ),
        (
            'type: "Pooling" pooling_param { kernel_size: 3 }',
            {"layer": "MaxPool", "size": 3, "stride": 1, "ceil": True},
        ),
        (
            'type: "Pooling" pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 round_mode: FLOOR }',
            {"layer": "AvgPool", "size": 3, "stride": 2, "padding": 1},
        ),
        ('type: "Pooling" pooling_param { pool: AVE global_pooling: true }', {"layer": "GlobalAvgPool"}),
        ('type: "LRN"', {"layer": "LRN", "alpha": 1.0}),
        (
            'type: "LRN" lrn_param { local_size: 7 alpha: 2 beta: 1 k: 2 }',
            {"layer": "LRN", "size": 7, "alpha": 2.0, "beta": 1.0, "k": 2.0},
        ),
        (
            'type: "LRN" lrn_param { norm_region: WITHIN_CHANNEL local_size: 3 k: 1 }',
            {"layer": "LRN", "size": 3, "alpha": 1.0, "region": "within"},
        ),
        ('type: "ReLU"', {"layer": "ReLU"}),
        ('type: "ReLU" relu_param { negative_slope: 0.1 }', {"layer": "LeakyReLU", "slope": 0.1}),
        ('type: "Sigmoid"', {"layer": "Sigmoid"}),
        ('type: "TanH"', {"layer": "Tanh"}),
        ('type: "Dropout" dropout_param { dropout_ratio: 0.2 }', {"layer": "Dropout", "rate": 0.2}),
        ('type: "Flatten"', {"layer": "Flatten"}),
        (
            'type: "BatchNorm" param { lr_mult: 0 } param { lr_mult: 0 } param { lr_mult: 0 } '
            "batch_norm_param { moving_average_fraction: 0.9 }",
            {"layer": "BatchNorm", "scale": False, "shift": False},
        ),
    ],
)
def test_each_layer_in_gpunets_words(text, expected):
    assert entry(text) == expected


def test_batch_norm_and_scale_are_one_layer():
    norm = 'layer { name: "n" type: "BatchNorm" bottom: "data" top: "n" }'
    for extra, shift in (("scale_param { bias_term: true }", {}), ("", {"shift": False})):
        scale = f'layer {{ name: "s" type: "Scale" bottom: "n" top: "x" {extra} }}'
        found = net(norm, scale, HEAD)
        assert found.layers[0] == {"layer": "BatchNorm", "name": "n", "momentum": 0.001, **shift}
        assert any("BatchNorm" in note for note in found.notes)
    in_place = norm.replace('top: "n"', 'top: "data"'), 'layer { type: "Scale" bottom: "data" top: "data" }'
    assert len(net(*in_place, HEAD.replace('"x"', '"data"')).layers) == 2


BRANCHES = """
layer { name: "left" type: "Convolution" bottom: "data" top: "left" convolution_param { num_output: 2 kernel_size: 1 } }
layer { name: "relu" type: "ReLU" bottom: "left" top: "left" }
layer { name: "right" type: "Convolution" bottom: "data" top: "right"
        convolution_param { num_output: 2 kernel_size: 1 } }
layer { name: "sum" type: "Eltwise" bottom: "left" bottom: "right" top: "sum" eltwise_param { operation: SUM } }
layer { name: "both" type: "Concat" bottom: "sum" bottom: "left" bottom: "data" top: "x" concat_param { axis: 1 } }
"""


def test_who_reads_whom():
    found = net(BRANCHES, HEAD).layers
    assert {e["name"]: e.get("inputs") for e in found} == {
        "left": None, "relu": None, "right": ["input"], "sum": ["relu", "right"], "both": ["sum", "relu", "input"],
        "y": None,
    }  # fmt: skip
    graph = models.build("layers", layers=found)
    assert {n.path: tuple(i.path for i in n.inputs) for n in graph.nodes}["both"] == ("sum", "relu", "input")


def test_the_first_form_is_the_same_net():
    new = net(
        'layer { name: "c" type: "Convolution" bottom: "data" top: "c" param { lr_mult: 1 decay_mult: 2 } '
        "param { lr_mult: 2 decay_mult: 0 } convolution_param { num_output: 2 kernel_size: 3 } }",
        'layer { name: "r" type: "ReLU" bottom: "c" top: "c" }',
        HEAD.replace('"x"', '"c"'),
    )
    old = read_net(
        parse(
            """
            layers { name: "d" type: DATA top: "data" top: "label" data_param { source: "cifar" batch_size: 20 } }
            layers { name: "c" type: CONVOLUTION bottom: "data" top: "c" blobs_lr: 1 blobs_lr: 2 weight_decay: 2
                     weight_decay: 0 convolution_param { num_output: 2 kernel_size: 3 } }
            layers { name: "r" type: RELU bottom: "c" top: "c" }
            layers { name: "y" type: INNER_PRODUCT bottom: "c" top: "y" inner_product_param { num_output: 10 } }
            layers { name: "loss" type: SOFTMAX_LOSS bottom: "y" bottom: "label" }
            """,
            "net",
        )
    )
    assert old == new
    assert new.layers[0]["weight_decay"] == 2.0
    assert new.layers[0]["bias_rate"] == 2.0
    assert new.layers[0]["bias_decay"] == 0.0


def of_data(text, kind="Data", param="data_param"):
    data = f'layer {{ name: "d" type: "{kind}" top: "data" top: "label" {text.replace("PARAM", param)} }}'
    return net(HEAD.replace('"x"', '"data"'), data=data)


def test_data_and_what_is_done_to_it():
    found = of_data('PARAM { batch_size: 7 source: "x/CIFAR-100_lmdb" } transform_param { mirror: true scale: 0.5 }')
    assert (found.data, found.batch) == ({"name": "cifar100", "validation": 0}, 7)
    assert found.images == {"flip": True, "mean": 0.0, "scale": 0.5}
    found = of_data('PARAM { batch_size: 7 source: "cifar" } transform_param { mean_value: 104 crop_size: 32 }')
    assert found.images["mean"] == 104.0
    found = of_data('PARAM { batch_size: 7 source: "cifar" mean_file: "m" mirror: 1 }')  # as the first form has it
    assert found.images == {"flip": True, "mean": "image", "scale": 1.0}
    text = 'PARAM { batch_size: 7 source: "mine.txt" shuffle: true new_height: 20 new_width: 30 } '
    values = "transform_param { mean_value: 1 mean_value: 2 mean_value: 3 }"
    found = of_data(text + values, "ImageData", "image_data_param")
    assert found.data == {"name": "folder", "validation": 0, "size": [20, 30]}
    assert found.images["mean"] == [3.0, 2.0, 1.0]  # Caffe's pictures begin with blue
    assert found.shuffle
    found = of_data('PARAM { batch_size: 7 source: "mine_lmdb" }')
    assert any("data.size" in note for note in found.notes)


LAYER = 'layer { name: "a" bottom: "data" top: "x" '


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            f'\n{LAYER} type: "Convolution"\n convolution_param {{\n num_output: 2 group_size: 3 }} }}',
            "net:6: layer 'a': unknown field 'group_size' in convolution_param; did you mean 'group'? known: num_",
        ),
        (f'{LAYER} typ: "ReLU" }}', "net:3: layer 'a': unknown field 'typ'; did you mean 'type'? known: name, type, "),
        (f"{LAYER} }}", "net:3: layer 'a': 'type' is missing"),
        (f'{LAYER} type: "Relu" }}', "net:3: layer 'a': unknown type \"Relu\"; known: Data, ImageData, Convolution, "),
        (f'{LAYER} type: "Deconvolution" }}', "net:3: layer 'a': unknown type \"Deconvolution\"; known: "),
        (f'{LAYER} type: "Softmax" }}', "net:3: layer 'a': unknown type \"Softmax\" in phase TRAIN; it is a part of "),
        ("layers { type: POWER }", 'net:3: layer 2: unknown type "POWER"; known: '),
        (f'{LAYER} type: "ReLU" type: "ReLU" }}', "net:3: layer 'a': 'type' is given a second time"),
        (f"{LAYER} type: 3 }}", "net:3: layer 'a': type: expected a text in quotes, got 3"),
        (f'{LAYER} type: "ReLU" relu_param: 3 }}', "net:3: layer 'a': relu_param: expected { ... }, got 3"),
        (
            f'{LAYER} type: "ReLU" include {{ stage: "x" }} }}',
            "net:3: layer 'a': unknown field 'stage' in include; kno",
        ),
        (
            f'{LAYER} type: "ReLU" include {{ phase: TRAINING }} }}',
            "net:3: layer 'a': phase: expected one of TRAIN, TES",
        ),
        (
            f'{LAYER} type: "ReLU" include {{ phase: TRAIN }} }}',
            "net:3: layer 'a': expected a layer of both phases, got",
        ),
        (
            f'{LAYER} type: "Convolution" convolution_param {{ kernel_size: 3 }} }}',
            "net:3: layer 'a': num_output: expected at least 1 in convolution_param, got none",
        ),
        (
            f'{LAYER} type: "Convolution" convolution_param {{ num_output: 3.5 }} }}',
            "net:3: layer 'a': num_output: expected a whole number, got 3.5",
        ),
        (
            f'{LAYER} type: "Convolution" convolution_param {{ num_output: 3 }} }}',
            "net:3: layer 'a': kernel_size: expected one or two whole numbers in convolution_param, got 0",
        ),
        (
            f'{LAYER} type: "Convolution" convolution_param {{ num_output: 3 kernel_h: 3 }} }}',
            "net:3: layer 'a': kernel_size: expected either kernel_size, or both kernel_h and kernel_w",
        ),
        (
            f'{LAYER} type: "Convolution" convolution_param {{ num_output: 3 kernel_size: 3 weight_filler {{\n '
            'type: "bilinear" } } }',
            "net:4: layer 'a': weight_filler: unknown type \"bilinear\"; known: constant, gaussian, uniform, xavier, ",
        ),
        (
            f'{LAYER} type: "InnerProduct" inner_product_param {{ num_output: 3 weight_filler {{ '
            'type: "gaussian" sparse: 3 } } }',
            "net:3: layer 'a': sparse: expected -1, got 3; gpunet has nothing like it",
        ),
        (
            f'{LAYER} type: "InnerProduct" inner_product_param {{ num_output: 3 '
            'weight_filler { type: "uniform" } } }',
            "net:3: layer 'a': weight_filler: uniform: expected min: -a max: a, got 0 and 1",
        ),
        (
            f'{LAYER} type: "InnerProduct" param {{ name: "shared" }} inner_product_param {{ num_output: 3 }} }}',
            "net:3: layer 'a': param: name: weights that layers share, got \"shared\": gpunet has none",
        ),
        (
            f'{LAYER} type: "ReLU" param {{ lr_mult: 2 }} }}',
            "net:3: layer 'a': param: expected none, ReLU has no weights",
        ),
        (
            f'{LAYER} type: "Pooling" pooling_param {{ pool: STOCHASTIC kernel_size: 2 }} }}',
            "net:3: layer 'a': pool: expected MAX or AVE, got STOCHASTIC; gpunet has nothing like it",
        ),
        (
            f'{LAYER} type: "Pooling" pooling_param {{ global_pooling: true }} }}',
            "net:3: layer 'a': global_pooling: expected pool: AVE beside it",
        ),
        (
            f'{LAYER} type: "LRN" lrn_param {{ norm_region: WITHIN_CHANNEL k: 2 }} }}',
            "net:3: layer 'a': k: expected 1.0, got 2; Caffe ignores it within a channel",
        ),
        (
            f'{LAYER} type: "Eltwise" bottom: "data" eltwise_param {{ operation: PROD }} }}',
            "net:3: layer 'a': operation: expected SUM, got PROD; gpunet has nothing like it",
        ),
        (
            f'{LAYER} type: "Eltwise" bottom: "data" eltwise_param {{ coeff: 1 coeff: -1 }} }}',
            "net:3: layer 'a': coeff: expected 1 for each; gpunet has sums without factors",
        ),
        (f'{LAYER} type: "Eltwise" }}', "net:3: layer 'a': bottom: expected 2 or more, got 1"),
        (f'{LAYER} bottom: "data" type: "ReLU" }}', "net:3: layer 'a': bottom: expected 1, got 2"),
        (f'{LAYER} top: "z" type: "ReLU" }}', "net:3: layer 'a': top: expected one, got 2"),
        (f'{LAYER} type: "Scale" }}', "net:3: layer 'a': expected a Scale behind a BatchNorm that nobody else reads"),
        (
            f'{LAYER} type: "BatchNorm" param {{ lr_mult: 1 }} }}',
            "net:3: layer 'a': param: expected lr_mult: 0 without a name",
        ),
        (
            'layer { name: "a" type: "ReLU" bottom: "label" top: "x" }',
            "net:3: layer 'a': bottom: 'label' are the labels, which only a loss reads",
        ),
        (
            'layer { name: "a" type: "ReLU" bottom: "x" top: "x" }',  # its own
            "net:3: layer 'a': bottom: no layer before it has the top 'x'",
        ),
        (
            'layer { name: "a" type: "ReLU" bottom: "b" top: "x" }\n'
            'layer { name: "b" type: "ReLU" bottom: "x" top: "b" }',
            "net:3: layer 'a': bottom: no layer before it has the top 'b'",
        ),
        (
            f'{LAYER} type: "ReLU" }}\nlayer {{ name: "b" type: "ReLU" bottom: "data" top: "x" }}',
            "net:4: layer 'b': top: 'x' is written by a layer before it",
        ),
        (
            f'{LAYER} type: "ReLU" }}\n{LAYER} bottom: "x" type: "Concat" }}',
            "net:4: layer 'a': a layer before it has this name, too",
        ),
        (
            f'{LAYER} type: "ReLU" }}\nlayer {{ name: "b" type: "ReLU" bottom: "x" top: "z" }}',
            "net:4: layer 'b': no layer reads it, and it is not what the loss is of",
        ),
        ("name: 7", "net:3: name: expected a text in quotes, got 7"),
        ('input: "data"', "net:3: input: expected a net to train, with data layers and a loss, got one to deploy"),
        ("layerz {}", "net:3: unknown field 'layerz'; did you mean 'layer'? known: name, layer, "),
        ("layer: 3", "net:3: layer: expected { ... }, got 3"),
    ],
)
def test_what_a_net_may_not_be_is_told_by_line_and_name(text, complaint):
    with pytest.raises(GpunetError) as caught:
        net(text, HEAD)
    assert str(caught.value).startswith(complaint)


@pytest.mark.parametrize(
    ("data", "loss", "complaint"),
    [
        ("", LOSS, "net:1: expected one layer of type Data or ImageData in phase TRAIN, got 0"),
        (DATA + DATA, LOSS, "net:2: expected one layer of type Data or ImageData in phase TRAIN, got 2"),
        (DATA, "", "net:1: expected a layer of type SoftmaxWithLoss, got none"),
        (DATA, LOSS + LOSS, "net:6: layer 'loss': expected one loss, got a second"),
        (DATA, LOSS.replace('"y"', '"label"'), "net:5: layer 'loss': bottom: 'label' are the labels, which only"),
        (DATA, LOSS.replace('"label"', '"x"'), "net:5: layer 'loss': bottom: expected two, a prediction and the "),
        (DATA, LOSS[:-2] + "loss_weight: 0.3 }", "net:5: layer 'loss': loss_weight: expected 1"),
        (DATA, LOSS[:-2] + "loss_param { ignore_label: 3 } }", "net:5: layer 'loss': ignore_label: gpunet has none"),
        (DATA.replace("batch_size: 20", ""), LOSS, "net:1: layer 'd': batch_size: expected at least 1, got none"),
        (DATA.replace("20", "20 rand_skip: 3"), LOSS, "net:1: layer 'd': rand_skip: expected 0, got 3; "),
        (
            DATA.replace("data_param", "transform_param { crop_size: 28 } data_param"), LOSS,
            "net:1: layer 'd': crop_size: expected 0 or 32, got 28; gpunet has no cuts that are smaller",
        ),
        (
            DATA.replace("data_param", 'transform_param { mean_file: "m" mean_value: 3 } data_param'), LOSS,
            "net:1: layer 'd': mean_value: expected either it or mean_file",
        ),
        (
            DATA.replace("top: \"data\"", 'include { phase: TRAIN } top: "data"')
            + DATA.replace("top: \"data\"", 'include { phase: TEST } transform_param { scale: 0.5 } top: "data"'), LOSS,
            "net:2: layer 'd': expected mean and scale of phase TRAIN, mean 0.0 and scale 1, got mean 0.0 and scale",
        ),
    ],
)  # fmt: skip
def test_what_data_and_loss_may_not_be(data, loss, complaint):
    layer = f'{LAYER} type: "ReLU" }}'
    with pytest.raises(GpunetError) as caught:
        net(layer, HEAD.strip(), data=data.strip() or "#", loss=loss)
    assert re.sub(r"^net:\d+", "", str(caught.value)).startswith(re.sub(r"^net:\d+", "", complaint))


@pytest.mark.parametrize("kind", ["MAX", "AVE"])
@pytest.mark.parametrize(
    ("size", "stride", "pad"),
    [((3, 3), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)), ((2, 3), (2, 1), (1, 0)), ((5, 4), (3, 3), (2, 2))],
)
def test_pooling_counts_as_caffe_does(size, stride, pad, kind):
    sides = zip(("kernel", "stride", "pad"), (size, stride, pad), strict=True)
    sides = " ".join(f"{what}_h: {y} {what}_w: {x}" for what, (y, x) in sides)
    found = net(f'{LAYER} type: "Pooling" pooling_param {{ pool: {kind} {sides} }} }}', HEAD).layers[:1]
    for height, width in ((6, 7), (8, 5), (9, 10)):
        x = np.random.default_rng(height).normal(0, 1, (2, height, width, 2))
        node = nn.Input(x.shape[1:])
        layer = getattr(nn, found[0]["layer"])(**{k: v for k, v in found[0].items() if k not in ("layer", "name")})
        step = Step(nn.Graph(node, layer(node)), batch=2, dtype="float64", replicas=1)
        with closing(step):
            expected = np.stack([caffe_pool(image, size, stride, pad, kind) for image in x])
            np.testing.assert_allclose(step.predict(x), expected, rtol=1e-12, atol=1e-14)


def test_shape_errors_name_the_layer(tmp_path):
    found = net(f'{LAYER} type: "Convolution" convolution_param {{ num_output: 2 kernel_size: 64 }} }}', HEAD)
    with pytest.raises(
        GpunetError, match="model layers: a: expected an input of at least 64 pixels, got 32 from input"
    ):
        models.build("layers", layers=found.layers)


# Solvers


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to be in, with a net in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.prototxt").write_text("\n".join([DATA, HEAD.replace('"x"', '"data"'), LOSS]))
    return tmp_path


SHORT = 'net: "net.prototxt" base_lr: 0.1 max_iter: 7 lr_policy: "fixed"\n'


def solver(folder, text, name="s.prototxt"):
    (folder / name).write_text(text)
    return caffe.read(folder / name).tables


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ('"fixed"', {"name": "const"}),
        ('"step" stepsize: 3 gamma: 0.5', {"name": "step", "size": 3, "gamma": 0.5, "unit": "steps"}),
        (
            '"multistep" stepvalue: 3 stepvalue: 5 gamma: 0.5',
            {"name": "multistep", "milestones": [3, 5], "gamma": 0.5, "unit": "steps"},
        ),
    ],
)
def test_policies(folder, policy, expected):
    found = solver(folder, SHORT.replace('"fixed"', policy))["schedule"]
    assert found == expected
    parse_config({"model": {"name": "mlp"}, "data": {"name": "shapes"}, "schedule": found})


def inverse(steps, per_epoch, lr, *, gamma: float, power: float, unit: str = "epochs"):
    """Stands in for a schedule that may not be there yet."""


def sigmoid(steps, per_epoch, lr, *, gamma: float, stepsize: float):
    """The same, with a length that has one unit and Caffe's name."""


def test_policies_map_to_schedules_where_those_are_there(folder, monkeypatch):
    for name in ("exp", "inverse", "poly", "sigmoid"):
        monkeypatch.delitem(schedules.SCHEDULES, name, raising=False)
    text = SHORT.replace('"fixed"', '"inv" gamma: 0.1 power: 0.75')
    with pytest.raises(
        GpunetError, match=r"s.prototxt:1: lr_policy: inv: gpunet has no schedule 'inverse'; it has const"
    ):
        solver(folder, text)
    monkeypatch.setitem(schedules.SCHEDULES, "inverse", inverse)
    monkeypatch.setitem(schedules.SCHEDULES, "sigmoid", sigmoid)
    assert solver(folder, text)["schedule"] == {"name": "inverse", "gamma": 0.1, "power": 0.75, "unit": "steps"}
    text = SHORT.replace('"fixed"', '"sigmoid" gamma: -0.1 stepsize: 9')
    assert solver(folder, text)["schedule"] == {"name": "sigmoid", "gamma": -0.1, "stepsize": 9}


def test_update_rules(folder, monkeypatch):
    text = SHORT + "momentum: 0.8 weight_decay: 0.01 clip_gradients: 6 iter_size: 3"
    expected = {"name": "sgd", "lr": 0.1, "momentum": 0.8, "weight_decay": 0.01, "clip": 2.0, "form": "caffe"}
    assert solver(folder, text)["optimizer"] == expected
    assert solver(folder, text)["train"]["accumulate"] == 3
    for kind in ('type: "Nesterov"', "solver_type: NESTEROV"):
        assert solver(folder, f"{SHORT} {kind}")["optimizer"] == {
            "name": "sgd", "lr": 0.1, "momentum": 0.0, "form": "caffe", "nesterov": True,
        }  # fmt: skip

    class Adam:
        def __init__(self, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
            """Stands in for an optimizer that may not be there yet."""

    monkeypatch.setattr(optim, "OPTIMIZERS", optim.OPTIMIZERS)
    monkeypatch.delitem(optim.OPTIMIZERS, "adam", raising=False)
    text = SHORT + 'type: "Adam" momentum: 0.5 momentum2: 0.9'
    with pytest.raises(GpunetError, match="s.prototxt:2: type: Adam: gpunet has no optimizer 'adam'; it has sgd"):
        solver(folder, text)
    monkeypatch.setitem(optim.OPTIMIZERS, "adam", Adam)
    expected = {"name": "adam", "lr": 0.1, "beta1": 0.5, "beta2": 0.9, "eps": 1e-8}
    assert solver(folder, text)["optimizer"] == expected
    with pytest.raises(GpunetError, match="s.prototxt:2: rms_decay: expected none beside type Adam"):
        solver(folder, text + " rms_decay: 0.9")


def test_lengths_names_and_what_only_concerns_caffe(folder):
    data = [DATA.replace("top", f"include {{ phase: {phase} }} top", 1) for phase in ("TRAIN", "TEST")]
    (folder / "net.prototxt").write_text("\n".join([*data, HEAD.replace('"x"', '"data"'), LOSS]))
    text = SHORT + (
        'random_seed: 5 snapshot: 3 snapshot_prefix: "/a/../b c/na:me" test_interval: 6250 test_iter: 3 display: 1 '
        "solver_mode: CPU device_id: 3 snapshot_format: HDF5 average_loss: 4 debug_info: true snapshot_diff: true"
    )
    tables = solver(folder, text)
    assert tables["train"] == {
        "steps": 7, "batch": 20, "seed": 5, "order": "stored", "monitor_test": True, "evaluate_every": 2,
    }  # fmt: skip
    assert tables["run"] == {"name": "na_me", "checkpoint_steps": 3}
    assert any("6250 updates are 2.5 epochs" in note for note in caffe.read("s.prototxt").notes)
    assert solver(folder, SHORT + 'snapshot_prefix: "a/.."')["run"] == {"name": "s"}
    assert set(IGNORED) < set(SOLVER)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            SHORT + "\nbase_lrr: 1",
            "s.prototxt:3: unknown field 'base_lrr'; did you mean 'base_lr'? known: net, train_net",
        ),
        (SHORT.replace("base_lr: 0.1", ""), "s.prototxt:1: base_lr: expected a number above 0, got none"),
        (SHORT.replace("0.1", "-0.1"), "s.prototxt:1: base_lr: expected a number above 0, got -0.1"),
        (SHORT.replace("max_iter: 7", ""), "s.prototxt:1: max_iter: expected at least 1, got none"),
        (SHORT.replace("7", "0"), "s.prototxt:1: max_iter: expected at least 1, got 0"),
        (SHORT.replace("7", "7.5"), "s.prototxt:1: max_iter: expected a whole number, got 7.5"),
        (SHORT + "iter_size: 0", "s.prototxt:2: iter_size: expected at least 1, got 0"),
        (
            SHORT.replace('"fixed"', '"wild"'),
            "s.prototxt:1: lr_policy: expected one of fixed, step, multistep, exp, inv, ",
        ),
        (SHORT.replace('lr_policy: "fixed"', ""), "s.prototxt:1: lr_policy: expected one of fixed, step, "),
        (SHORT.replace('"fixed"', '"step" gamma: 1'), 's.prototxt:1: stepsize: is missing, lr_policy "step" needs it'),
        (
            SHORT + 'regularization_type: "L1"',
            's.prototxt:2: regularization_type: expected "L2", got "L1"; gpunet has no',
        ),
        (SHORT + 'type: "LBFGS"', 's.prototxt:2: type: unknown solver "LBFGS"; known: SGD, Nesterov, AdaGrad'),
        (SHORT + "momentum2: 0.5", "s.prototxt:2: momentum2: expected none beside type SGD"),
        (SHORT + "net_param {}", "s.prototxt:2: net_param: expected net: a file"),
        (SHORT + 'train_net: "net.prototxt"', "s.prototxt:2: expected one of net and train_net, got net and train_net"),
        (SHORT.replace('net: "net.prototxt"', ""), "s.prototxt:1: expected one of net and train_net, got none"),
        ("", "s.prototxt:1: expected one of net and train_net, got none"),
        (SHORT.replace("net.", "other."), "s.prototxt:1: net: no file 'other.prototxt' here, in "),
        (
            SHORT.replace("net.", "../../other."),
            "s.prototxt:1: net: no file '../../other.prototxt' as other.prototxt in",
        ),
        (
            SHORT.replace("net.", "/etc/passwd."),
            "s.prototxt:1: net: no file '/etc/passwd.prototxt' as passwd.prototxt in ",
        ),
        (SHORT.replace("net.prototxt", "/etc/passwd"), "s.prototxt:1: net: no file '/etc/passwd' as passwd in "),
        (SHORT.replace("net.prototxt", ".."), "s.prototxt:1: net: no file '..' as .. in "),
        (SHORT.replace("net.prototxt", ""), "s.prototxt:1: net: no file '' "),
        (SHORT.replace("net.prototxt", "a\\000b"), r"s.prototxt:1: net: no file 'a\x00b' "),
        (SHORT.replace("net.prototxt", "n" * 5000), "s.prototxt:1: net: no file 'nnnnnn"),
        (SHORT.replace("net.prototxt", "s.prototxt"), "s.prototxt:1: unknown field 'net'; "),
    ],
)
def test_what_a_solver_may_not_be_is_told_by_line(folder, text, complaint):
    with pytest.raises(GpunetError) as caught:
        solver(folder, text)
    assert str(caught.value).startswith(complaint)
    assert "root:" not in str(caught.value)


def test_where_nets_are_looked_for(folder):
    """As Caffe's paths begin at its root; else beside the solver, by the last name."""
    deep = folder / "caffe" / "examples" / "mine"
    deep.mkdir(parents=True)
    for path in ("examples/mine/net.prototxt", "net.prototxt", "/home/somebody/net.prototxt", "../x/net.prototxt",
                 "C:\\\\caffe\\\\net.prototxt"):  # fmt: skip
        shutil.copy(folder / "net.prototxt", deep)
        (deep / "s.prototxt").write_text(SHORT.replace("net.prototxt", path))
        assert caffe.read(deep / "s.prototxt").tables["train"]["batch"] == 20


def test_files_that_are_none(folder):
    os.mkfifo(folder / "pipe.prototxt")
    (folder / "folder.prototxt").mkdir()
    (folder / "large.prototxt").write_bytes(b"# " + b"x" * 2_000_000)
    (folder / "bytes.prototxt").write_bytes(b"\xff\xfe")
    for name, text in (
        ("pipe", "pipe.prototxt: expected a .prototxt file, found no file"),
        ("folder", "folder.prototxt: expected a .prototxt file, found no file"),
        ("none", "none.prototxt: expected a .prototxt file, found none"),
        ("large", "large.prototxt: expected at most 1,048,576 bytes"),
        ("bytes", "bytes.prototxt: expected text in UTF-8"),
    ):
        with pytest.raises(GpunetError) as caught:
            caffe.read(f"{name}.prototxt")
        assert str(caught.value).startswith(text)


def test_a_net_of_as_many_layers_as_fit_takes_seconds():
    layers = "".join(f'layer{{name:"r{i}" type:"ReLU" bottom:"data" top:"data"}}' for i in range(15_000))
    start = time.process_time()
    found = read_net(parse("\n".join([DATA, layers, HEAD.replace('"x"', '"data"'), LOSS]), "net"))
    assert time.process_time() - start < 20
    assert len(found.layers) == 15_001


# The commands


@pytest.fixture
def gpunet(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpunet", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def test_a_solver_trains_real_images_and_the_run_needs_it_no_more(gpunet, folder, cifar10, monkeypatch):
    monkeypatch.setattr("gpunet.train.report.plot_curves", lambda *arguments: None)
    monkeypatch.setattr("gpunet.train.report.write_pictures", lambda *arguments: [])
    for path in (solvers("full")[0], FILES / "cifar10_full_train_test.prototxt"):
        shutil.copy(path, folder)
    short = "--set", "train.steps=3", "--set", "train.monitor_test=false", "--set", "run.checkpoint_steps=1"
    code, _, said = gpunet("train", "cifar10_full_solver.prototxt", "--data", cifar10, *short)
    assert code == 0
    assert 'note: source "examples/cifar10/cifar10_train_lmdb": taken for data set cifar10' in said
    assert "note: mean_file: the mean image of the training set, which is computed and not read" in said
    assert "layers: 89,578 weights" in said
    for file in folder.glob("*.prototxt"):
        file.unlink()
    (run,) = (folder / "runs").iterdir()
    assert run.name.startswith("cifar10_full-")
    config = tomllib.loads((run / "config.toml").read_text())
    assert [layer["layer"] for layer in config["model"]["layers"]].count("LRN") == 2
    assert config["train"]["steps"] == 3
    code, _, said = gpunet("train", "--resume", run)
    assert (code, "has finished" in said) == (0, True)


def test_convert_writes_a_recipe_that_trains_the_same(gpunet, folder):
    code, out, said = gpunet("convert", *solvers("quick"), "quick.toml")
    assert (code, out) == (0, "quick.toml\n")
    assert "note: mean_file" in said
    text = (folder / "quick.toml").read_text()
    assert text.startswith("# From cifar10_quick_solver.prototxt, cifar10_quick_solver_lr1.prototxt.\n# source ")
    assert '\n    {layer = "LRN"' not in text
    assert '\n    {layer = "ReLU", name = "relu1"},\n' in text
    config = load_config("quick.toml")
    assert config == parse_config(caffe.read(*solvers("quick")).tables)
    assert gpunet("summary", "quick.toml")[1].count("145,578 weights") == 1


def test_a_comment_of_a_recipe_cannot_become_a_setting(folder):
    hostile = folder / "net.prototxt"
    hostile.write_text(hostile.read_text().replace('"cifar"', '"cifar\\n[run]\\ndirectory = 1"'))
    solver(folder, SHORT)
    recipe = caffe.read("s.prototxt")
    assert all(note.isprintable() for note in recipe.notes)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["s.prototxt"], "convert: expected SOLVER.prototxt... RECIPE.toml, got s.prototxt"),
        (["out.toml"], "convert: expected SOLVER.prototxt... RECIPE.toml, got out.toml"),
        (["s.prototxt", "out.json"], "convert: expected SOLVER.prototxt... RECIPE.toml, got s.prototxt out.json"),
        (["s.toml", "out.toml"], "convert: expected SOLVER.prototxt... RECIPE.toml, got s.toml out.toml"),
        (["s.prototxt", "out.toml"], "s.prototxt: expected a .prototxt file, found none"),
    ],
)
def test_convert_says_what_it_expects(gpunet, folder, arguments, complaint):
    code, out, said = gpunet("convert", *arguments)
    assert (code, out) == (2, "")
    assert said == f"gpunet: {complaint}\n"
    assert not (folder / "out.toml").exists()
