"""Contrast normalisation, PCA and whitening: against independent formulas, on real images, and through a whole run."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import Killed, halves, last_run, left, network, new, on, recipe, stop_after

from gpunet import cli, data, models, nn
from gpunet.core.step import Step
from gpunet.data import preprocess
from gpunet.data.preprocess import GCN, Preprocess, fit
from gpunet.errors import GpunetError
from gpunet.export import onnx
from gpunet.train import Checkpoint, Predictor, Trainer, trainer
from gpunet.train.build import build_preprocess
from gpunet.train.summary import Plan

KINDS = ("pca", "pca_whiten", "zca")
EVERY = [{"gcn": True}, {"gcn": 0.5, "gcn_bias": 10.0, "gcn_scale": 2.0}, *({"whiten": kind} for kind in KINDS)]
EVERY += [{"gcn": True, "whiten": "zca", "components": 0.9}, {"whiten": "pca", "components": 20}]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing takes longer than these trainings."""
    monkeypatch.setattr(trainer, "write_report", lambda result: None)


def pictures(n=300, side=4, channels=3, dtype=np.uint8):
    """Images whose pixels are correlated and whose means differ."""
    rng = np.random.default_rng(1)
    d = side * side * channels
    x = rng.normal(0, 1, (n, d)) @ rng.normal(0, 8, (d, d)) * 0.5 ** (np.arange(d) / 8) + 40 + 2 * np.arange(d)
    return x.clip(0, 255).astype(dtype).reshape(n, side, side, channels)


def recipe_of(tmp_path, settings, **sections):
    """`recipe` without augmentation where values are no longer places."""
    plain = {"augment": {"flip": False, "crop": 0}} if settings.get("whiten") == "pca_whiten" else {}
    return recipe(tmp_path, preprocess=settings, **plain, **sections)


# Formulas


@pytest.mark.parametrize(("scale", "bias", "epsilon"), [(1.0, 0.0, 1e-8), (55.0, 10.0, 1e-8), (1.0, 0.0, 30.0)])
def test_contrast_normalisation_image_by_image(scale, bias, epsilon):
    images = pictures(20)
    images[3] = 7  # flat
    made = Preprocess(GCN(scale, bias, epsilon))(images)
    assert made.dtype == np.float32 and made.shape == images.shape
    for x, y in zip(images, made, strict=True):
        values = [float(v) for v in x.ravel()]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        divisor = max(epsilon, (bias + variance) ** 0.5)
        expected = [scale * (v - mean) / divisor for v in values]
        np.testing.assert_allclose(y.ravel(), expected, rtol=1e-6, atol=1e-6 * scale)
    assert not made[3].any()


@pytest.mark.parametrize("k", [1, 5, 40, 48])
def test_pca_is_the_best_approximation_of_rank_k(k):
    """By the singular values of the centred images, another way to the same subspace."""
    images = pictures()
    made = fit(images, whiten="pca", components=k)
    x = images.reshape(300, -1).astype(np.float64)
    u, s, vt = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    expected = (u[:, :k] * s[:k]) @ vt[:k] + x.mean(axis=0)
    np.testing.assert_allclose(made(images).reshape(300, -1), expected, atol=1e-3)
    np.testing.assert_allclose(made.whitening.variances, s[:k] ** 2 / 300, rtol=1e-9)
    assert len(made.whitening.matrices) == (1 if 2 * k > 48 else 2)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_components_by_their_share_of_the_variance(share):
    images = pictures()
    x = images.reshape(300, -1).astype(np.float64)
    variances = np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2
    kept = len(fit(images, whiten="pca", components=share).whitening.variances)
    assert variances[: kept - 1].sum() < share * variances.sum() <= variances[:kept].sum()


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
@pytest.mark.parametrize("gcn", [None, GCN(bias=10.0)])
def test_zca_is_the_inverse_root_of_the_covariance(gcn, epsilon):
    images = pictures()
    made = fit(images, gcn=gcn, whiten="zca", epsilon=epsilon)
    x = (images.astype(np.float64) if gcn is None else gcn(images)).reshape(300, -1)
    covariance = np.cov(x.T, bias=True)
    added = epsilon * np.trace(covariance) / 48
    root, inverse = covariance + added * np.eye(48), np.eye(48)
    for _ in range(40):  # Denman & Beavers 1976: no eigenvectors
        root, inverse = (root + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(root)) / 2
    expected = (x - x.mean(axis=0)) @ inverse
    assert made.whitening.epsilon == pytest.approx(added, rel=1e-9)
    np.testing.assert_allclose(made(images).reshape(300, -1), expected, atol=2e-3)


@pytest.mark.parametrize("k", [None, 10])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_whitened_components_are_uncorrelated_and_stand_first(dtype, k):
    images = pictures(dtype=dtype)
    made = fit(images, whiten="pca_whiten", components=k, epsilon=0.01)
    y = made(images).reshape(300, -1).astype(np.float64)
    expected = np.zeros(48)
    expected[:k] = made.whitening.covariance
    np.testing.assert_allclose(np.cov(y.T, bias=True), np.diag(expected), atol=1e-5)
    assert not y[:, 48 if k is None else k :].any()
    s = made.whitening.variances
    assert (s[:-1] >= s[1:]).all()
    np.testing.assert_allclose(made.whitening.covariance, s / (s + made.whitening.epsilon))


def test_pieces_make_no_difference(monkeypatch):
    images = pictures()
    whole = fit(images, gcn=GCN(), whiten="zca")
    monkeypatch.setattr(preprocess, "CHUNK", 48 * 7)
    parts = fit(images, gcn=GCN(), whiten="zca")
    np.testing.assert_allclose(parts.whitening.variances, whole.whitening.variances, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(parts(images), whole(images), atol=1e-4)
    np.testing.assert_allclose(parts(images[5:6])[0], parts(images)[5], atol=1e-5)


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_what_a_checkpoint_holds_is_all_there_is(settings):
    settings = dict(settings)
    gcn = GCN(settings.get("gcn_scale", 1.0), settings.get("gcn_bias", 0.0)) if settings.get("gcn") else None
    images = pictures()
    made = fit(images, gcn=gcn, whiten=settings.get("whiten", "none"), components=settings.get("components"))
    arrays = made.arrays()
    if made.whitening:
        assert arrays[f"{settings['whiten']}/components"].dtype == np.float32
    again = Preprocess.from_arrays({"mean": np.zeros(3), **arrays})
    assert (again(images) == made(images)).all()
    assert str(again) == str(made)


def test_nothing_to_do_leaves_images_as_they_are():
    images = pictures(5)
    none = fit(images)
    assert not none and none(images) is images and none.arrays() == {} and str(none) == "none"
    dataset = halves()
    assert none.of(dataset) is dataset


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        (pictures(5), {"whiten": "zac"}, "whiten: expected one of none, pca, pca_whiten, zca, got 'zac'"),
        (
            pictures(5),
            {"whiten": "zca", "components": 49},
            "components: expected at most the 48 values of an image, got",
        ),
        (pictures(5), {"whiten": "zca", "epsilon": 0}, "epsilon: expected a number above 0, got 0"),
        (np.full((5, 4, 4, 3), 9, np.uint8), {"whiten": "zca"}, "expected training images that differ, got 5"),
        (pictures(1), {"whiten": "pca"}, "expected training images that differ, got 1"),
        (
            np.zeros((2, 65, 65, 3), np.uint8),
            {"whiten": "zca"},
            "of at most 12,288 values, so that .* got 12,675 of shape",
        ),
    ],
)
def test_mistakes(images, options, said):
    with pytest.raises(GpunetError, match=said):
        fit(images, **options)


def test_arrays_that_do_not_fit_together():
    arrays = fit(pictures(), whiten="zca").arrays()
    for key, value in (("zca/mean", np.zeros(3)), ("zca/variances", None), ("gcn", np.zeros(2))):
        wrong = {**arrays, key: value}
        if value is None:
            del wrong[key]
        with pytest.raises(GpunetError, match="preprocess: expected the arrays of a preprocessing, got others"):
            Preprocess.from_arrays(wrong)


# Real images


@pytest.fixture(scope="module")
def photographs(cifar10):
    """CIFAR-10 with 6,000 images to train on, more than an image has values."""
    return data.load("cifar10", cifar10, limit=6000)


@pytest.fixture(scope="module")
def whitened(photographs):
    return fit(photographs.train.images, gcn=GCN(), whiten="zca")


def test_whitened_photographs_have_the_covariance_that_is_said(photographs, whitened):
    """Of every component, 3,072 of them, of what training gets."""
    w = whitened.whitening
    y = whitened(photographs.train.images).reshape(6000, -1) @ w.components
    y = y.astype(np.float64) - y.mean(axis=0, dtype=np.float64)
    covariance = y.T @ y / 6000
    s = w.variances
    assert s[0] > 100 and s[-2] < 1e-3 * s[0] and w.epsilon == pytest.approx(0.1 * s.mean())
    assert np.abs(np.diag(covariance) - s / (s + w.epsilon)).max() < 1e-2
    np.fill_diagonal(covariance, 0)
    assert np.abs(covariance).max() < 1e-2


def test_whitening_decorrelates_neighbouring_pixels(photographs, whitened):
    """What the eye sees: next to each other, pixels are alike before and hardly after."""

    def likeness(x):
        return np.corrcoef(x[:, :, :-1].ravel(), x[:, :, 1:].ravel())[0, 1]

    images = photographs.test.images[:500]
    assert likeness(images.astype(np.float64)) > 0.9
    assert abs(likeness(whitened(images).astype(np.float64))) < 0.5


@pytest.mark.parametrize("kind", ["gcn", *KINDS])
def test_onnx_does_the_same_to_photographs(kind, photographs, whitened, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    k = {"pca": 100, "pca_whiten": 500, "zca": 3072, "gcn": 0}[kind]
    w = whitened.whitening
    some = replace(w, kind=kind, components=w.components[:, :k], variances=w.variances[:k]) if k else None
    made = Preprocess(GCN(bias=10.0), some)
    step = Step(models.build("resnet20"), nn.SoftmaxCrossEntropy(), batch=8)
    predictor = Predictor(step, 0.01, np.array([0.5, 1.0, 1.5]), (), "cross_entropy", made)
    images = photographs.test.images[:16]
    for pixels in ("uint8", "float32"):
        onnx(predictor, tmp_path / "net.onnx", pixels=pixels)
        session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], {"images": images.astype(pixels)})
        expected = predictor.outputs(images)
        assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


# Runs


def changed(dataset, name):
    """The same data set but for a pixel of every image of a split."""
    split = dataset.splits[name]
    images = split.images.copy()
    images[:, 1, 2, 0] ^= 0x55
    return replace(dataset, **{name: replace(split, images=images)})


@pytest.mark.parametrize("settings", [{}, {"mean": "image"}, *EVERY[2:]], ids=str)
def test_statistics_are_those_of_the_training_images_alone(settings, tmp_path):
    def found(dataset):
        config = recipe_of(tmp_path, settings)
        return Trainer(config, graph=network(), data=dataset, show=False).checkpoint(0).input

    before = found(halves())
    for name in ("validation", "test"):
        after = found(changed(halves(), name))
        assert {k: v.tobytes() for k, v in after.items()} == {k: v.tobytes() for k, v in before.items()}, name
    after = found(changed(halves(), "train"))
    differ = {name for name in before if not np.array_equal(before[name], after[name])}
    assert differ >= {name for name in before if name.endswith(("components", "variances", "/mean"))}
    assert differ


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_a_run_does_the_same_to_every_split_and_to_new_images(settings, tmp_path):
    """The whole path: float32 images on the device, evaluation, checkpoint, prediction of raw pixels."""
    config, dataset = recipe_of(tmp_path, settings), halves()
    made = Trainer(config, graph=network(), data=dataset, show=False)
    source = made.step.source
    assert source.split.images.dtype == np.float32
    ready = build_preprocess(config, dataset)
    for name in ("train", "validation"):
        images = (source if name == "train" else made.watched[name]).split.images
        np.testing.assert_array_equal(images, ready(dataset.splits[name].images))
    made.fit()
    trained, device = made.evaluate("validation"), made.step.evaluate(made.watched["validation"])
    assert device["loss"] == pytest.approx(trained.loss, rel=1e-4) and device["accuracy"] == trained.accuracy
    checkpoint = Checkpoint.load(last_run(config) / "best.safetensors")
    again = Step(network(), nn.SoftmaxCrossEntropy(), batch=20)
    checkpoint.restore(again)
    images = checkpoint.input
    loaded = Predictor(again, images["mean"], images["scale"], (), "cross_entropy", Preprocess.from_arrays(images))
    raw = dataset.test.images
    np.testing.assert_allclose(loaded.predict(raw), made.predict(raw), rtol=1e-4, atol=1e-6)
    x = (ready(raw) - images["mean"]) * images["scale"]
    np.testing.assert_allclose(loaded.outputs(raw), again.predict(x), rtol=1e-4, atol=1e-5)
    if settings.get("whiten") in ("zca", "pca_whiten"):
        assert (images["mean"], images["scale"]) == (0, 1)


def test_a_loaded_run_preprocesses_what_it_predicts(tmp_path):
    config = recipe(tmp_path, preprocess={"gcn": True, "whiten": "zca"})
    config.data = type(config.data)(name="shapes", train=300, test=40)
    config.model = type(config.model)(name="mlp", hidden=[8])
    config.train.epochs = 1
    dataset = data.load("shapes", train=300, test=40)
    small = replace(
        dataset,
        **{n: replace(s, images=np.ascontiguousarray(s.images[:, ::4, ::4])) for n, s in dataset.splits.items()},
    )
    made = Trainer(config, data=small, show=False)
    made.fit()
    loaded = Predictor.load(Checkpoint.load(last_run(config) / "last.safetensors"))
    loaded_best = Predictor.load(Checkpoint.load(last_run(config) / "best.safetensors"))
    assert str(loaded.preprocess) == str(made.predictor.preprocess) != "none"
    raw = small.test.images
    np.testing.assert_allclose(loaded_best.predict(raw), made.predict(raw), rtol=1e-4, atol=1e-6)


def test_a_killed_run_goes_on_by_the_images_that_it_began_with(tmp_path, monkeypatch):
    settings = {"gcn": True, "whiten": "zca"}
    config = recipe(tmp_path / "whole", preprocess=settings)
    new(config).fit()
    whole = left(last_run(config))
    config = recipe(tmp_path / "parts", preprocess=settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 5)
        new(config).fit()
    monkeypatch.setattr(preprocess, "fit", lambda *given, **more: pytest.fail("fitted again"))
    on(last_run(config)).fit()
    assert left(last_run(config)) == whole


def test_fine_tuning_on_images_of_the_first_training(tmp_path):
    settings = {"gcn": True, "whiten": "zca"}
    first = Trainer(recipe(tmp_path, preprocess=settings), graph=network(), data=halves(), show=False).fit()
    place = str(first.run.path / "last.safetensors")
    start = {"weights": place, "normalisation": "checkpoint"}
    other = changed(halves(), "train")
    made = Trainer(recipe(tmp_path, preprocess=settings, start=start), graph=network(), data=other, show=False)
    before, after = first.run.checkpoint("last").input, made.checkpoint(0).input
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)
    for wrong in ({}, {"whiten": "zca"}, {"gcn": True, "whiten": "pca"}):
        with pytest.raises(
            GpunetError, match=r"^\[preprocess\]: expected gcn and whiten as in .*: True and 'zca'; got"
        ):
            Trainer(recipe(tmp_path, preprocess=wrong, start=start), graph=network(), data=other, show=False)


def test_augmentation_of_components_is_refused(tmp_path):
    config = recipe(tmp_path, preprocess={"whiten": "pca_whiten"})
    with pytest.raises(GpunetError, match=r"^\[augment\]: expected no augmentation with preprocess\.whiten"):
        Trainer(config, graph=network(), data=halves(), show=False)


def test_pixels_given_to_a_step_of_floats_are_refused(tmp_path):
    made = Trainer(recipe(tmp_path, preprocess={"gcn": True}), graph=network(), data=halves(), show=False)
    pixels = halves().test.images
    for call in (lambda: made.step.predict(pixels), lambda: made.step.gradient(pixels, halves().test.labels)):
        with pytest.raises(GpunetError, match="train: x: expected floats as the network takes them"):
            call()
    assert made.step.predict(made.predictor.preprocess(pixels)).shape == (20, 2)


def test_planned_memory_counts_floats(tmp_path):
    plain, floats = (
        Plan(recipe(tmp_path, preprocess=settings), data=halves(), graph=network()).memory()["images"]
        for settings in ({}, {"gcn": True})
    )
    pixels = sum(split.images.nbytes for split in halves().splits.values())
    assert floats - plain == 3 * pixels


# The picture


def test_a_sheet_shows_every_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = '[model]\nname = "mlp"\n[data]\nname = "folder"\ndirectory = "pictures"\nsize = 6\nvalidation = 0\n'
    Path("a.toml").write_text(text + '[preprocess]\ngcn = true\nwhiten = "zca"\n')
    dataset = halves()
    for name in ("train", "test"):
        split = dataset.splits[name]
        for i, (pixels, label) in enumerate(zip(split.images, split.labels, strict=True)):
            folder = Path("pictures") / name / dataset.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i:03}.png")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpunet", "data", "show", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            assert end.code in (0, None), capsys.readouterr().err

    heights = {}
    for setting in ("zca", "pca", "none"):
        run("a.toml", "--preprocess", "--out", f"{setting}.png", "--set", f"preprocess.whiten={setting}")
        with Image.open(f"{setting}.png") as picture:
            heights[setting] = picture.height
    row = 6 * (64 // 6) + 2
    assert heights["zca"] == heights["pca"] == 7 * row + 2  # images, gcn, zca, input, mean, 2 of eigenvectors
    assert heights["none"] == 4 * row + 2
    with Image.open("zca.png") as picture:
        pixels = np.asarray(picture)
    assert (pixels[4 * row + 10 : 5 * row - 10, -30:] == 255).all()  # one mean image
    stages = [pixels[2 + i * row : (i + 1) * row, -62:-2].astype(int) for i in range(3)]
    assert all(np.abs(a - b).mean() > 5 for a, b in pairwise(stages))


def test_a_sheet_of_a_data_set_has_no_stages(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for more in (["--preprocess"], ["--set", "preprocess.gcn=true"]):
        monkeypatch.setattr(sys, "argv", ["gpunet", "data", "show", "shapes", *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        assert "--preprocess, --augment, --set: expected a recipe, got a data set" in capsys.readouterr().err
