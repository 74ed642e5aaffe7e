"""Initial values: distributions, orthogonality, identity convolutions; LSUV, whitening; [init] of recipes."""

from contextlib import closing

import numpy as np
import pytest
from small_run import halves, last_run, new, on, recipe

from gpunet import nn
from gpunet.core.params import Layout
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn import data_init, init
from gpunet.train import Checkpoint, Trainer, initial, trainer
from gpunet.train.config import load_config, to_toml


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing takes longer than these trainings."""
    monkeypatch.setattr(trainer, "write_report", lambda result: None)


def rng(seed=0):
    return np.random.default_rng(seed)


# Drawn values

CUT = 0.7737413  # variance of a standard normal variable within +-2: 1 - 4 phi(2) / (2 Phi(2) - 1)
SHAPE = (3, 5, 20, 30)
DRAWN = [  # init, variance, fourth moment over the variance's square
    ("normal", 0.01**2, 3),
    (["normal", 0.5], 0.25, 3),
    (["uniform", 0.3], 0.09 / 3, 1.8),
    ("xavier", 2 / (15 * 50), 3),
    (["xavier", "uniform"], 2 / (15 * 50), 1.8),
    ("he", 2 / 300, 3),
    (["he", "uniform", 1 / 3], 1 / 900, 1.8),
    (["truncated_normal", 0.1], 0.01 * CUT, 2.37),
]


@pytest.mark.parametrize(("value", "variance", "kurtosis"), DRAWN, ids=[str(d[0]) for d in DRAWN])
def test_variances(value, variance, kurtosis):
    """Within 4 standard errors; each differs from its neighbours in the table by far more."""
    w = init.named(value)(rng(), SHAPE)
    assert w.dtype == np.float64 and w.shape == SHAPE
    assert abs(w.mean()) < 4 * (variance / w.size) ** 0.5
    assert abs(np.square(w).mean() / variance - 1) < 4 * ((kurtosis - 1) / w.size) ** 0.5


def test_truncated_values_lie_within_their_bound_and_fill_it():
    w = init.truncated_normal(0.5, bound=1.5)(rng(), (100, 100))
    assert 0.74 < np.abs(w).max() <= 0.75


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (3, 3, 2, 40), (20, 5), (5, 20), (7, 7), (1, 1, 8, 8)])
def test_orthogonal(shape):
    w = init.orthogonal(gain=3)(rng(), shape).reshape(-1, shape[-1])
    gram = w.T @ w if len(w) >= shape[-1] else w @ w.T
    np.testing.assert_allclose(gram, 9 * np.eye(len(gram)), atol=1e-12)


def test_every_rotation_is_as_likely_as_its_mirror_image():
    """The QR of LAPACK alone has a rule for its signs."""
    signs = [init.orthogonal()(rng(seed), (1, 1)).item() for seed in range(200)]
    assert abs(sum(signs)) < 60
    corners = [init.orthogonal()(rng(seed), (3, 3))[0, 0] > 0 for seed in range(200)]
    assert 70 < sum(corners) < 130


@pytest.mark.parametrize(("size", "groups", "outputs"), [(3, 1, 9), (5, 1, 4), (3, 2, 8), (3, 2, 12), (1, 1, 6)])
def test_dirac_passes_the_input_on(size, groups, outputs):
    """Through a convolution: in each group the first outputs are the inputs, the others 0."""
    image = nn.Input((6, 7, 4))
    layer = nn.Conv2d(outputs, size, groups=groups, weight_init=["dirac", groups], name="conv")
    graph = nn.Graph(image, nn.Linear(2)(layer(image)))
    x = rng().normal(0, 1, (2, 6, 7, 4))
    with closing(Step(graph, batch=2, dtype="float64", keep=["conv:output"])) as step:
        step.predict(x)
        y = step.read("conv:output")
    given, made = np.split(x, groups, axis=3), np.split(y, groups, axis=3)
    for part, out in zip(given, made, strict=True):
        same = min(part.shape[3], out.shape[3])
        np.testing.assert_allclose(out[..., :same], part[..., :same], atol=1e-15)
        assert not out[..., same:].any()


def test_dirac_leaves_further_filters_to_another_init():
    w = init.named(["dirac", 1, "he"])(rng(), (3, 3, 4, 10))
    assert (w[..., :4] == init.dirac()(rng(), (3, 3, 4, 4))).all()
    assert (w[..., 4:] == init.he()(rng(), (3, 3, 4, 10))[..., 4:]).all()


def test_constants():
    assert (init.named(["constant", 0.5])(rng(), (3,)) == 0.5).all()
    assert not init.named("zeros")(rng(), (2, 3)).any()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("hee", "init: expected one of normal, truncated_normal, uniform"),
        ([], "init: expected a name, or a list of a name and its arguments, got []"),
        (3, "init: expected a name, or a list of a name and its arguments, got 3"),
        ([["he"]], "init: expected one of"),
        (["he", "normal", 2, 3], "init: he: expected the arguments distribution, gain; got ['normal', 2, 3]"),
        (["zeros", 1], "init: zeros: expected the arguments none; got [1]"),
        ("uniform", "init: uniform: expected the arguments limit; got []"),
        (["normal", "big"], "init: normal: sd: expected a number, got 'big'"),
        (["normal", True], "init: normal: sd: expected a number, got True"),
        (["normal", -1], "init: normal: sd: expected a number above 0, got -1"),
        (["uniform", 0], "init: uniform: limit: expected a number above 0, got 0"),
        (["constant", float("nan")], "init: constant: value: expected a number, got nan"),
        (["orthogonal", 0], "init: orthogonal: gain: expected a number above 0, got 0"),
        (["truncated_normal", 1, 0.01], "init: truncated_normal: bound: expected at least 0.1, got 0.01"),
        (["dirac", 1.5], "init: dirac: groups: expected a whole number from 1 on, got 1.5"),
        (["dirac", 1, "her"], "init: expected one of normal"),
        (["lsuv", 0], "init: lsuv: tolerance: expected a number above 0, got 0"),
        (["lsuv", 0.1, 0], "init: lsuv: iterations: expected a whole number from 1 on, got 0"),
        (["whitening", "x"], "init: whitening: epsilon: expected a number, got 'x'"),
    ],
)
def test_mistakes(value, said):
    with pytest.raises(GpunetError) as caught:
        init.named(value)
    assert said in str(caught.value)


def test_inits_that_do_not_fit_a_weight():
    for made in (init.he(), init.xavier(), init.orthogonal()):
        with pytest.raises(GpunetError, match=r"axes for inputs and outputs, got shape \(5,\)"):
            made(rng(), (5,))
    with pytest.raises(GpunetError, match=r"a convolution \(kh, kw, in, out\) whose 3 groups divide out, got"):
        init.dirac(3)(rng(), (3, 3, 4, 8))
    with pytest.raises(GpunetError, match="lsuv needs training images"):
        init.named("lsuv")(rng(), (3, 4))


def test_every_init_says_what_it_is():
    for name, made in init.INITS.items():
        assert len(made.__doc__.split("\n")[0]) > 5, name


# LSUV


def deep(layers=12, kind=nn.Tanh, width=6, bias_init=None):
    image = x = nn.Input((8, 8, 3))
    for number in range(1, layers + 1):
        x = kind()(nn.Conv2d(width, 3, bias_init=bias_init, name=f"conv{number}")(x))
    return nn.Graph(image, nn.Linear(4, name="head")(x))


def variances(graph, images, seed=0):
    """Measured by a Step of its own, one layer after the other."""
    with closing(
        Step(graph, batch=len(images), dtype="float64", keep=["conv*:output", "head:output"], seed=seed)
    ) as step:
        step.predict(images)
        layers = [node.path for node in graph.nodes if node.layer.parameters]
        return {path: step.read(f"{path}:output").var() for path in layers}, step.weights.copy()


@pytest.mark.parametrize("kind", [nn.Tanh, nn.ReLU, nn.Sigmoid])
def test_lsuv_gives_every_layer_of_a_deep_net_variance_1(kind):
    images, graph = rng().normal(0, 3, (16, 8, 8, 3)), deep(kind=kind)
    before, _ = variances(graph, images)
    report = data_init.lsuv(graph, images, tolerance=0.01)
    after, weights = variances(graph, images)
    assert max(abs(v - 1) for v in before.values()) > 0.3
    assert max(abs(v - 1) for v in after.values()) < 0.01
    assert sum(done for done, _ in report.values()) >= 8
    for name, (_, variance) in report.items():
        assert variance == pytest.approx(after[name.removesuffix(".weight")], rel=1e-9)
    for name in report:
        w = weights[name].reshape(-1, weights[name].shape[-1])
        gram = w.T @ w if len(w) >= w.shape[1] else w @ w.T
        np.testing.assert_allclose(gram, gram[0, 0] * np.eye(len(gram)), atol=1e-12 * gram[0, 0])


def test_lsuv_iterates_where_a_bias_adds_to_the_variance_and_ends():
    images = rng().normal(0, 1, (16, 8, 8, 3))
    some = deep(2, bias_init=["uniform", 0.8])
    report = data_init.lsuv(some, images, tolerance=1e-3, iterations=30)
    after, _ = variances(some, images)
    assert all(1 < done < 30 for done, _ in list(report.values())[:2])
    assert max(abs(v - 1) for v in after.values()) < 1e-3
    much = data_init.lsuv(deep(1, bias_init=["uniform", 10]), images, iterations=3)
    assert much["conv1.weight"][0] == 3 and much["conv1.weight"][1] > 2


def test_lsuv_of_a_step_changes_its_weights_and_those_that_are_named_alone():
    images = rng().normal(0, 1, (16, 8, 8, 3))
    with closing(Step(deep(4), batch=4, seed=3)) as step:
        step.weights["conv1.weight"] = 5 * step.weights["conv1.weight"]
        before = step.weights.copy()
        data_init.lsuv(step, images, ["conv2.weight", "conv4.weight"])
        after = step.weights.copy()
        changed = {name for name in after if (after[name] != before[name]).any()}
        assert changed == {"conv2.weight", "conv4.weight"}
        with closing(Step(step.graph, batch=16, keep=["conv?:output"])) as other:
            other.weights.update(after)
            other.predict(images)
            assert [abs(other.read(f"conv{i}:output").var() - 1) < 0.02 for i in (1, 2, 4)] == [False, True, True]


def test_lsuv_draws_as_the_seed_says():
    images = rng().normal(0, 1, (4, 8, 8, 3))
    made = []
    for seed in (1, 1, 2):
        graph = deep(2)
        data_init.lsuv(graph, images, seed=seed)
        made.append(Layout(graph.parameters()).initial(0, np.float64))
    assert (made[0] == made[1]).all() and (made[0] != made[2]).any()


def test_lsuv_refuses_what_cannot_be_scaled():
    graph = deep(2)
    with pytest.raises(
        GpunetError, match="init: lsuv: conv1: expected outputs that differ and are finite, got variance 0"
    ):
        data_init.lsuv(graph, np.zeros((4, 8, 8, 3)))
    for images in (np.zeros((4, 8, 8, 3), np.uint8), np.zeros((4, 8, 3)), np.zeros((0, 8, 8, 3))):
        with pytest.raises(GpunetError, match=r"init: images: expected floats of shape \(n, 8, 8, 3\)"):
            data_init.lsuv(graph, images)
    with pytest.raises(GpunetError, match="init: images: expected finite numbers"):
        data_init.lsuv(graph, np.full((4, 8, 8, 3), np.nan))
    with pytest.raises(GpunetError, match=r"init: lsuv: conv1\.bias: expected the name of a weight of two axes"):
        data_init.lsuv(graph, np.ones((4, 8, 8, 3)), ["conv1.bias"])


# Whitening


def blurred(n=40, side=9, channels=3):
    """Images whose neighbouring pixels and channels are alike, of a mean that is not 0."""
    noise = rng().normal(0, 1, (n, side + 2, side + 2, channels))
    x = sum(noise[:, dy : dy + side, dx : dx + side] for dy in range(3) for dx in range(3))
    return x + 0.5 * x[..., ::-1] + np.arange(channels)


@pytest.mark.parametrize(("size", "dilation", "epsilon"), [(2, 1, 5e-4), (3, 1, 0.1), (2, 2, 1e-3)])
def test_whitened_patches_have_the_covariance_that_is_said(size, dilation, epsilon, monkeypatch):
    monkeypatch.setattr(data_init, "CHUNK", 2000)  # several pieces
    images, half = blurred(), size * size * 3
    image = nn.Input((9, 9, 3))
    conv = nn.Conv2d(2 * half, size, padding=0, dilation=dilation, name="stem")
    graph = nn.Graph(image, nn.Linear(2)(conv(image)))
    values = data_init.whitening(graph, images, epsilon=epsilon)
    reach, patches = dilation * (size - 1), []
    for x in images:  # the definition, patch by patch
        for top in range(9 - reach):
            for left in range(9 - reach):
                patches.append(x[top : top + reach + 1 : dilation, left : left + reach + 1 : dilation].ravel())
    np.testing.assert_allclose(values, np.linalg.eigvalsh(np.cov(np.array(patches).T, bias=True))[::-1], rtol=1e-9)
    with closing(Step(graph, batch=40, dtype="float64", keep=["stem:output"])) as step:
        step.predict(images)
        y = step.read("stem:output").reshape(-1, 2 * half)
    np.testing.assert_allclose(np.cov(y[:, :half].T, bias=True), np.diag(values / (values + epsilon)), atol=1e-9)
    np.testing.assert_allclose(y[:, half:], -y[:, :half], atol=1e-12)


def test_whitening_a_step_whose_network_has_other_readers_of_the_images():
    image = nn.Input((9, 9, 3))
    stem, other = nn.Conv2d(24, 2, padding=0, name="stem"), nn.Conv2d(24, 2, padding=0, name="other")
    graph = nn.Graph(image, nn.Linear(2)(nn.Add()(stem(image), other(image))))
    with pytest.raises(
        GpunetError, match=r"init: whitening: weight: expected .* reads the images: stem\.weight, other"
    ):
        data_init.whitening(graph, blurred())
    with closing(Step(graph, batch=4)) as step:
        before = step.weights["other.weight"]
        data_init.whitening(step, blurred(), "stem.weight")
        w = step.weights["stem.weight"]
        assert (w[..., 12:] == -w[..., :12]).all() and w.any()
        assert (step.weights["other.weight"] == before).all()


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([nn.Conv2d(16, 2, padding=0, name="stem")], r"stem\.weight: expected 24 filters, .* the layer has 16"),
        ([nn.ReLU(), nn.Conv2d(24, 2, padding=0, name="stem")], "reads the images: there is none"),
        ([nn.Conv2d(24, 3, groups=3, name="stem")], "reads the images: there is none"),
    ],
)
def test_whitening_refuses_what_is_no_such_convolution(layers, said):
    image = nn.Input((9, 9, 3))
    graph = nn.Graph(image, nn.Sequential(*layers, nn.Linear(2), name="net")(image))
    with pytest.raises(GpunetError, match=said):
        data_init.whitening(graph, blurred())


# Recipes


def stemmed():
    """A network whose first layer can be whitened, with a normalisation that patterns must not hit."""
    image = nn.Input((6, 6, 3))
    stem = nn.Conv2d(24, 2, padding=0, name="stem")(image)
    x = nn.ReLU()(nn.BatchNorm(name="norm")(nn.Conv2d(4, 3, name="conv")(stem)))
    return nn.Graph(image, nn.Linear(2, name="head")(x))


def trainer_of(tmp_path, inits, graph=None, **sections):
    config = recipe(tmp_path, init=inits, **sections)
    return Trainer(config, graph=graph or stemmed(), data=halves(), show=False)


def test_later_patterns_win_and_vectors_stay(tmp_path):
    made = trainer_of(tmp_path, {"*": ["normal", 1e-3], "head": ["constant", 0.25], "*.bias": ["constant", 0.5]})
    weights = made.step.weights
    assert 5e-4 < weights["conv.weight"].std() < 2e-3
    assert (weights["head.weight"] == 0.25).all()
    assert (weights["head.bias"] == 0.5).all() and (weights["stem.bias"] == 0.5).all()
    assert (weights["norm.gamma"] == 1).all() and not weights["norm.beta"].any()
    turned = trainer_of(tmp_path, {"head": ["constant", 0.25], "*": ["normal", 1e-3]}).step.weights
    assert turned["head.weight"].std() > 0 and not turned["head.bias"].any()


def test_whitening_and_lsuv_by_recipe_look_at_images_as_the_network_takes_them(tmp_path):
    made = trainer_of(tmp_path, {"*": ["lsuv", 1e-3], "stem": ["whitening", 1e-3]})
    source = made.step.source
    images = source.normalise(source.split.images)
    assert abs(images.mean()) < 1e-6 and abs(images.std() - 1) < 1e-6
    with closing(Step(made.graph, batch=90, dtype="float64", keep=["*:output"])) as step:
        step.weights.update(made.step.weights.copy())
        step.predict(images)
        y = step.read("stem:output").reshape(-1, 24)[:, :12]
        assert np.abs(np.cov(y.T, bias=True) - np.eye(12)).max() < 0.05
        assert [abs(step.read(f"{path}:output").var() - 1) < 2e-3 for path in ("stem", "conv", "head")] == [
            True,
            True,
            True,
        ]
    assert [line.split(":")[1].strip() for line in made.inits] == ["stem.weight", "lsuv of 2 weights; farthest from 1"]


def test_whitened_weights_may_be_frozen_and_no_others(tmp_path):
    made = trainer_of(tmp_path, {"stem": ["whitening", 1e-3]}, start={"freeze": ["stem.weight"]})
    before = made.step.weights.copy()
    assert (before["stem.weight"][..., 12:] == -before["stem.weight"][..., :12]).all()
    made.fit()
    after = Checkpoint.load(last_run(made.config) / "last.safetensors").weights
    assert (after["stem.weight"] == before["stem.weight"]).all()
    assert (after["stem.bias"] != before["stem.bias"]).any()
    for inits, freeze in (({"stem": "whitening"}, ["stem"]), ({"*": "lsuv"}, ["stem.weight"]), ({}, ["stem.weight"])):
        with pytest.raises(GpunetError, match=r"\[start\]: freeze: expected beside weights"):
            trainer_of(tmp_path, inits, start={"freeze": freeze})


def test_a_later_plain_init_takes_a_weight_from_lsuv(tmp_path):
    made = trainer_of(tmp_path, {"*": "lsuv", "head": ["constant", 0.25]})
    assert (made.step.weights["head.weight"] == 0.25).all()
    assert made.inits[0].startswith("init: lsuv of 2 weights")


def test_weights_to_start_from_are_stronger(tmp_path):
    first = trainer_of(tmp_path, {"*": ["constant", 0.125]}).fit()
    weights = first.run.checkpoint("last").weights
    start = {"weights": str(first.run.path / "last.safetensors"), "replace": ["conv"]}
    made = trainer_of(tmp_path, {"*": "lsuv", "stem": "whitening"}, start=start)
    for name, value in made.step.weights.items():
        assert (value == weights[name]).all() == (not name.startswith("conv.")), name
    assert made.inits == ["init: lsuv of 1 weights; farthest from 1: variance 1 of conv.weight's outputs"]


def test_a_run_records_its_inits_and_resume_does_not_find_them_again(tmp_path, monkeypatch):
    inits = {"*": ["lsuv", 0.01], "net.head.*": ["normal", 0.1]}
    config = recipe(tmp_path, init=inits)
    whole = new(config).fit()
    assert whole.run.config().init == inits
    path = trainer.Run.create(config)
    path.close()
    made = new(config)
    made.step(2, 2)
    progress = trainer.Position(steps=2, seen=2).model_dump(exclude={"best"})
    path.save(made.checkpoint(1, best=None, progress=progress), "last")
    monkeypatch.setattr(initial, "fit", lambda graph, pending, *others: pending and pytest.fail("found again"))
    after = on(path.path)
    for name, value in after.step.weights.items():
        np.testing.assert_array_equal(value, made.step.weights[name])


@pytest.mark.parametrize(
    ("inits", "said"),
    [
        ({"stam": "he"}, r"\[init\]: 'stam' matches no weight; nearest: stem"),
        (
            {"*.gamma": "lsuv"},
            r"\[init\] '\*\.gamma': lsuv: expected a weight of two axes or more, got \['norm\.gamma'\]",
        ),
        ({"*.bias": "he"}, r"\[init\] '\*\.bias': stem\.bias: expected a weight with axes for inputs and outputs"),
        ({"head": "dirac"}, r"\[init\] 'head': head\.weight: dirac: expected a convolution"),
        ({"conv": "whitening"}, r"init: whitening: conv\.weight: expected the weight of a convolution without groups"),
    ],
)
def test_mistakes_of_a_recipe(inits, said, tmp_path):
    with pytest.raises(GpunetError, match=said):
        trainer_of(tmp_path, inits)
    assert not (tmp_path / "runs").exists()


def test_a_recipe_is_read_and_written_with_its_patterns(tmp_path):
    file = tmp_path / "a.toml"
    text = '[model]\nname = "mlp"\n[data]\nname = "shapes"\n[init]\n"*" = "lsuv"\n'
    file.write_text(text + '"a.*b".c = "he"\n')
    with pytest.raises(GpunetError, match=r"'a\.\*b' in \[init\]: expected a text in quotes or a list, got"):
        load_config(file)
    file.write_text(text + 'head = ["he", "uniform", 0.1]\n')
    config = load_config(file, ["init.head.weight=zeros", "init.*=he"])
    assert list(config.init.items()) == [("*", "he"), ("head", ["he", "uniform", 0.1]), ("head.weight", "zeros")]
    again = tmp_path / "b.toml"
    again.write_text(to_toml(config))
    assert list(load_config(again).init.items()) == list(config.init.items())
    for override, said in (
        ("init.head=hee", r"--set init\.head=hee: 'head' in \[init\]: expected one of normal"),
        ("init.head=3", r"--set init\.head=3: 'head' in \[init\]: expected a text in quotes or a list, got 3"),
        ("optimizer.lr.x=3", r"--set optimizer\.lr\.x=3: expected section\.key=value"),
    ):
        with pytest.raises(GpunetError, match=said):
            load_config(file, [override])
