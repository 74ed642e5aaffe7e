"""Fused layers, and what `fuse` replaces: the same numbers, the same weights, nothing else touched."""

from contextlib import closing

import numpy as np
import pytest
from golden.make_golden import starting

from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.models import resnet9
from gpunet.models.resnet import resnet
from gpunet.nn import (
    GELU,
    Add,
    BatchNorm,
    BatchNormAddReLU,
    BatchNormReLU,
    Concat,
    Conv2d,
    Dropout,
    Graph,
    Input,
    LeakyReLU,
    Linear,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
    fuse,
)  # fmt: skip
from gpunet.optim.sgd import SGD
from gpunet.testing import check_gradients
from gpunet.testing.tolerance import assert_close

BATCH = 5


def straight(*layers, shape=(5, 7, 2)):
    image = Input(shape)
    return Graph(image, Sequential(*layers, Linear(3))(image))


def second_summand():
    """The sum's first summand is no BatchNorm, and its weights come before those of the second."""
    image = Input((5, 7, 2))
    left, right = Conv2d(4, 1, name="left")(image), BatchNorm(name="norm")(Conv2d(4, 3, name="right")(image))
    return Graph(image, Linear(3)(ReLU(name="relu")(Add(name="add")(left, right))))


NETS = {  # and how many chains each has
    "resnet8": (lambda: resnet((9, 11, 3), 3, depth=8, widths=(4, 6, 8)), 7),
    "resnet9": (lambda: resnet9((16, 16, 3), 3, widths=(4, 6, 8, 10)), 8),
    "no name, and draws": (lambda: straight(Conv2d(4, 3), ReLU(), Conv2d(4, 3), BatchNorm(), ReLU(), Dropout(0.3),
                                            Conv2d(3, 3), BatchNorm(), GELU(), BatchNorm(), ReLU()), 2),
    "frozen": (lambda: straight(Conv2d(4, 3), BatchNorm(0.3, 1e-2, False, False), ReLU(),
                                Conv2d(4, 3), BatchNorm(shift=False), ReLU()), 2),
    "second summand": (second_summand, 1),
    "gelu": (lambda: straight(Conv2d(4, 3), BatchNorm(), GELU(), Conv2d(4, 3), BatchNorm(), LeakyReLU()), 0),
}  # fmt: skip


def trained(graph, replicas):
    """Return {what: array} of two updates from fixed weights, at float64."""
    rng, found = np.random.default_rng(0), {}
    step = Step(graph, SoftmaxCrossEntropy(), SGD(0.05, momentum=0.9), batch=BATCH, dtype="float64", replicas=replicas,
                keep=("*relu*:output", "*conv*:output", "input:gradient"))  # fmt: skip
    with closing(step):
        for tensors in (step.weights, step.statistics):
            for name, value in tensors.items():
                tensors[name] = starting(name, value.shape)
        x = rng.normal(size=(2, BATCH, *graph.input_shape))
        for number, images in enumerate(x):
            found[f"prediction {number}"] = step.predict(images)
            step.gradient(images, np.arange(BATCH) % 3)
            found[f"loss {number}"] = np.array(step.losses()["loss"])
            for name in (*(f"{w}:gradient" for w in step.weights), *step._replay.kept()):
                found[f"{name} {number}"] = step.read(name)
            step.update()
        found |= {**step.weights, **step.statistics}
    return found


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", NETS)
def test_fused_is_unfused(name, replicas):
    build, chains = NETS[name]
    graph = build()
    fused = fuse(graph)
    kinds = [type(node.layer) for node in fused.nodes]
    assert sum(kind in (BatchNormReLU, BatchNormAddReLU) for kind in kinds) == chains
    expected, got = trained(graph, replicas), trained(fused, replicas)
    assert expected.keys() - got.keys() == {
        key for key in expected for path in {n.path for n in graph.nodes} - {n.path for n in fused.nodes}
        if key.startswith(f"{path}:output")
    }  # fmt: skip
    for key in got:
        assert_close(key, got[key], expected[key], "float64")


@pytest.mark.parametrize("name", NETS)
def test_weights_are_the_same_objects_and_the_graph_stays(name):
    graph = NETS[name][0]()
    before = [(node, *vars(node).values()) for node in graph.nodes], graph.output, graph.parameters()
    names = [p.name for p in graph.parameters()]
    fused = fuse(graph)
    assert before == ([(node, *vars(node).values()) for node in graph.nodes], graph.output, graph.parameters())
    assert all(a is b for a, b in zip(graph.parameters(), fused.parameters(), strict=True))
    assert [p.name for p in fused.parameters()] == names
    assert {p for node in fused.nodes for p in node.layer.parameters.values()} == set(graph.parameters())
    assert not {*graph.nodes} & {*fused.nodes}
    assert fused.output is fused.nodes[-1] and fused.output_shape == graph.output_shape
    assert fused.size == graph.size == sum(row.parameters for row in fused.summary())
    seen = {fused.input}
    for node in fused.nodes:
        assert seen.issuperset(node.inputs)  # each after what it reads, and no node of the other graph
        seen.add(node)
    before = {row.path: row for row in graph.summary()}
    for row in fused.summary():
        assert row.path in before and row.shape == before[row.path].shape


def test_a_residual_network_in_detail():
    graph = resnet((9, 11, 3), 3, depth=8, widths=(4, 6, 8))
    rows = {row.path: row for row in fuse(graph).summary()}
    kinds = {path: row.kind for path, row in rows.items() if not path.startswith("stage3")}
    assert kinds == {
        "stem.conv": "Conv2d",
        "stem.relu": "BatchNormReLU",
        "stage1_block1.body1.conv": "Conv2d",
        "stage1_block1.body1.relu": "BatchNormReLU",
        "stage1_block1.conv2": "Conv2d",
        "stage1_block1.relu": "BatchNormAddReLU",
        "stage2_block1.body1.conv": "Conv2d",
        "stage2_block1.body1.relu": "BatchNormReLU",
        "stage2_block1.conv2": "Conv2d",
        "stage2_block1.project": "Conv2d",
        "stage2_block1.project_norm": "BatchNorm",
        "stage2_block1.relu": "BatchNormAddReLU",
        "globalavgpool1": "GlobalAvgPool",
        "head": "Linear",
    }
    assert rows["stem.relu"].flops == 2 * 9 * 11 * 4 and rows["stem.relu"].parameters == 8
    (node,) = (node for node in fuse(graph).nodes if node.path == "stage2_block1.relu")
    assert [source.path for source in node.inputs] == ["stage2_block1.conv2", "stage2_block1.project_norm"]
    assert node.layer.parameters["gamma"].name == "stage2_block1.norm2.gamma"


def test_settings_of_the_norm_are_kept():
    (layer,) = (n.layer for n in fuse(NETS["frozen"][0]()).nodes if n.path == "sequential1.relu1")
    assert (layer.momentum, layer.eps, layer.scale, layer.shift) == (0.3, 1e-2, False, False)


def test_fusing_takes_no_more_memory():
    for build, _ in NETS.values():
        graph = build()
        sizes = [Step(g, SoftmaxCrossEntropy(), SGD(0.1), batch=BATCH, replicas=1) for g in (graph, fuse(graph))]
        for step in sizes:
            step._replay.program(("gradient", BATCH, False, True))
        before, after = (step.memory()["scratch"] for step in sizes)
        assert after <= before


def test_what_is_gone_is_not_kept():
    graph = fuse(straight(Conv2d(4, 3), BatchNorm(name="norm"), ReLU(name="relu")))
    with closing(Step(graph, batch=2, keep=("*:output",), replicas=1)) as step:
        step.predict(np.ones((2, 5, 7, 2)))
        assert step.read("sequential1.relu:output").min() == 0
        with pytest.raises(GpunetError, match="'sequential1.norm:output' is not kept"):
            step.read("sequential1.norm:output")


# Left alone


class Own(ReLU):
    """A user's layer, which may be anything."""

    op = "tanh"


def norm_read_twice(x):
    y = BatchNorm()(x)
    return Concat()(ReLU()(y), y)


def norm_called_twice(x):
    norm = BatchNorm()
    return ReLU()(norm(Conv2d(2, 1)(ReLU()(norm(x)))))


def sum_of_three(x):
    return ReLU()(Add()(BatchNorm()(x), x, x))


def sum_read_twice(x):
    y = Add()(BatchNorm()(x), x)
    return Concat()(ReLU()(y), y)


def sum_called_twice(x):
    add = Add()
    return ReLU()(add(BatchNorm()(ReLU()(add(BatchNorm()(x), x))), x))


def sum_with_itself(x):
    y = BatchNorm()(x)
    return ReLU()(Add()(y, y))


def relu_called_twice(x):
    relu = ReLU()
    return relu(BatchNorm()(Conv2d(2, 1)(relu(BatchNorm()(x)))))


def norm_in_both_branches(x):
    y = BatchNorm()(x)
    return Concat()(ReLU()(Add()(y, x)), Conv2d(2, 1)(y))


def other_activation(x):
    return Own()(BatchNorm()(x))


def sum_without_norm(x):
    return ReLU()(Add()(ReLU()(BatchNorm()(Conv2d(2, 1)(x))), x))


@pytest.mark.parametrize(
    ("connect", "fused"),
    [
        (norm_read_twice, []),
        (norm_called_twice, []),
        (sum_of_three, []),
        (sum_read_twice, []),
        (sum_called_twice, []),
        (sum_with_itself, []),
        (relu_called_twice, []),
        (norm_in_both_branches, []),
        (other_activation, []),
        (sum_without_norm, ["relu1"]),
    ],
)
def test_left_alone(connect, fused):
    image = Input((3, 3, 2))
    graph = Graph(image, connect(image))
    new = fuse(graph)
    assert [n.path for n in new.nodes if isinstance(n.layer, BatchNormReLU | BatchNormAddReLU)] == fused
    if not fused:
        assert [(n.path, n.layer) for n in new.nodes] == [(n.path, n.layer) for n in graph.nodes]


def test_of_two_norms_the_first_is_taken():
    image = Input((3, 3, 2))
    one, two = BatchNorm(name="one")(image), BatchNorm(name="two")(image)
    new = fuse(Graph(image, ReLU(name="relu")(Add(name="add")(one, two))))
    assert [node.path for node in new.nodes] == ["two", "relu"]
    assert [source.path for source in new.output.inputs] == ["input", "two"]
    assert [p.name for p in new.parameters()][::4] == ["one.gamma", "two.gamma"]


# The layers by themselves


@pytest.mark.parametrize("replicas", [1, 2])
def test_against_differences(replicas):
    chain = Sequential(Conv2d(3, 3), BatchNormReLU(), Conv2d(3, 3), BatchNormReLU(scale=False), Linear(4))
    assert check_gradients(chain, (5, 7, 2), replicas=replicas, samples=12) < 1e-6
    assert check_gradients(BatchNormReLU(shift=False), (5, 7, 2), replicas=replicas, samples=12) < 1e-6
    image = Input((5, 7, 2))
    first = BatchNormAddReLU()(Conv2d(3, 3)(image), Conv2d(3, 1)(image))
    second = BatchNormAddReLU()(Conv2d(3, 3)(first), first)  # the residual is read twice
    assert check_gradients(Graph(image, Linear(4)(second)), replicas=replicas, samples=12) < 1e-6


def test_a_fused_network_against_differences():
    """Named layers, since a check builds a graph of its own."""
    assert check_gradients(fuse(NETS["resnet8"][0]()), samples=3) < 1e-6
    assert check_gradients(fuse(NETS["second summand"][0]()), samples=12) < 1e-6


def test_summands_of_two_shapes_are_refused():
    image = Input((5, 7, 2))
    with pytest.raises(GpunetError, match=r"expected two inputs of one shape, got \(5, 7, 3\), \(5, 7, 2\) from conv"):
        Graph(image, BatchNormAddReLU()(Conv2d(3, 3)(image), image))


# The command

RESIDUAL = [
    "stem.norm + stem.relu -> BatchNormReLU",
    "stage1_block1.norm2 + stage1_block1.add + stage1_block1.relu -> BatchNormAddReLU",
]


@pytest.mark.parametrize(("model", "lines"), [("resnet20", RESIDUAL), ("lenet", ["none"])])
def test_summary_shows_the_plan(model, lines, gpunet, tmp_path):
    recipe = tmp_path / "a.toml"
    recipe.write_text(f'[model]\nname = "{model}"\n[data]\nname = "shapes"\ntrain = 200\n[optimizer]\nlr = 0.1\n')
    for options in ([], ["--plan"]):
        code, out, _ = gpunet("summary", recipe, *options)
        assert code == 0
        assert all((line in out.splitlines()) == bool(options) for line in lines)
