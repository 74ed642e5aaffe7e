"""Measurements on outputs: against numbers by hand, closed forms and sets whose answer is known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import SMALL_TOML

from gpunet import data
from gpunet.data import captioned_sheet
from gpunet.errors import GpunetError
from gpunet.train import report
from gpunet.train.evaluation import BINS, SHOWN, calibration, evaluate, ranks, wilson
from gpunet.train.report import write_pictures

LN = math.log


def split(labels, side=4):
    labels = np.asarray(labels, np.int32)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), side, side, 3)).astype(np.uint8)
    return data.Split(images, labels)


def measured(shares, labels, loss="cross_entropy"):
    """The Evaluation of outputs whose softmax is `shares`: their logarithms, and something added to each row."""
    outputs = np.log(shares) + np.arange(len(labels))[:, None]
    return evaluate(outputs, split(labels), loss, "set: test")


def test_four_images_by_hand():
    found = measured([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], [0, 1, 1, 0])
    assert (found.count, found.accuracy, found.top5) == (4, 0.5, None)
    np.testing.assert_array_equal(found.confusion, [[1, 0, 1], [1, 1, 0], [0, 0, 0]])
    nll = -(LN(0.7) + LN(0.25) + LN(0.8) + LN(0.2)) / 4
    assert found.nll == pytest.approx(nll, rel=1e-12) and found.loss == found.nll
    squares = 0.09 + 0.04 + 0.01, 0.25 + 0.5625 + 0.0625, 0.01 + 0.04 + 0.01, 0.64 + 0.04 + 0.36
    assert found.brier == pytest.approx(sum(squares) / 4, rel=1e-12)
    # every image has a bin of its own, so that each adds a quarter of |right - confidence|
    assert found.ece == pytest.approx((0.3 + 0.5 + 0.2 + 0.6) / 4, rel=1e-12)
    assert [(b.count, b.accuracy) for b in found.bins] == [(1, 0), (1, 0), (1, 1), (1, 1)]
    np.testing.assert_allclose([b.confidence for b in found.bins], [0.5, 0.6, 0.7, 0.8])
    assert [(m.image, m.true, m.answer) for m in found.mistakes] == [(3, 0, 2), (1, 1, 0)]
    np.testing.assert_allclose([(m.confidence, m.probability) for m in found.mistakes], [(0.6, 0.2), (0.5, 0.25)])


def test_calibration_by_hand():
    """Three answers of 0.9 in (13/15, 14/15], two of them right, and one of 0.4, wrong: 3/4 * 0.2333 + 1/4 * 0.4."""
    ece, bins = calibration(np.array([0.9, 0.4, 0.9, 0.9]), np.array([True, False, True, False]))
    assert ece == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.4, rel=1e-12)
    assert [(round(b.low * 15), round(b.high * 15), b.count) for b in bins] == [(5, 6, 1), (13, 14, 3)]


def test_a_confidence_on_an_edge_is_in_the_bin_below():
    for i in range(1, BINS + 1):
        _, (only,) = calibration(np.array([i / BINS]), np.array([True]))
        assert only.high == pytest.approx(i / BINS)
        _, (above,) = calibration(np.array([np.nextafter(i / BINS, 2 if i < BINS else 0)]), np.array([True]))
        assert above.high == pytest.approx(min(i + 1, BINS) / BINS)


def test_answers_that_are_right_as_often_as_they_say_are_calibrated():
    """Labels drawn from the very probabilities: ECE is sampling error, of the order of sqrt(bins / n) / 2 or less."""
    rng = np.random.default_rng(1)
    n = 40_000
    shares = rng.dirichlet(np.full(6, 0.5), n)
    labels = (rng.random((n, 1)) > shares.cumsum(axis=1)).sum(axis=1).clip(max=5)
    found = measured(shares, labels)
    assert found.ece < 0.5 * math.sqrt(BINS / n)
    sharper = measured(shares**2 / (shares**2).sum(axis=1, keepdims=True), labels)
    assert sharper.ece > 0.1
    assert sharper.accuracy == found.accuracy
    assert found.nll < sharper.nll and found.brier < sharper.brier  # proper scores: the true probabilities are best


def test_wilson_solves_its_equation():
    """The ends are the shares p whose distance to the measured one is z standard errors of p."""
    z = 1.959963984540054
    for hits, count in ((0, 1), (1, 1), (7, 10), (0, 50), (50, 50), (7912, 10_000)):
        low, high = wilson(hits, count)
        assert 0 <= low <= hits / count <= high <= 1
        for p in (low, high):
            assert abs(p - hits / count) == pytest.approx(z * math.sqrt(p * (1 - p) / count), abs=1e-12)
    assert wilson(7912, 10_000) == pytest.approx((0.783125, 0.799051), abs=1e-5)  # 0.7912 -+ 0.008 or so
    assert wilson(10, 10) == (pytest.approx(1 / (1 + z * z / 10)), 1.0)
    assert wilson(0, 10)[0] == 0.0


def test_wilson_covers_what_it_says():
    rng = np.random.default_rng(0)
    for p in (0.5, 0.95):
        inside = [low <= p <= high for low, high in (wilson(int(h), 200) for h in rng.binomial(200, p, 2000))]
        assert 0.93 < np.mean(inside) < 0.975


def test_ranks_and_top_five():
    outputs = np.array([[9, 8, 7, 6, 5, 4, 3.0]] * 7)
    assert ranks(outputs, np.arange(7)).tolist() == list(range(7))
    found = evaluate(outputs, split(range(7)), "cross_entropy", "")
    assert (found.accuracy, found.top5) == (1 / 7, 5 / 7)
    assert ranks(np.zeros((3, 7)), np.array([0, 4, 6])).tolist() == [0, 4, 6]  # of equal outputs the first counts
    assert evaluate(np.zeros((7, 7)), split(range(7)), "cross_entropy", "").accuracy == 1 / 7
    assert evaluate(np.eye(5), split(range(5)), "cross_entropy", "").top5 is None


def test_logits_of_any_size():
    found = evaluate(np.array([[1e30, 0, 0], [0, -1e30, 5]]), split([0, 1]), "cross_entropy", "")
    assert found.accuracy == 0.5 and found.nll == pytest.approx(5e29) and found.brier == pytest.approx(1, rel=0.02)


def test_all_right_all_wrong_and_one_image():
    right = evaluate(1e3 * np.eye(3), split([0, 1, 2]), "cross_entropy", "")
    assert (right.accuracy, right.ece, right.brier, right.mistakes) == (1, 0, 0, ())
    assert str(right.nll) == "0.0"
    assert right.interval[1] == 1 and 0.43 < right.interval[0] < 0.44
    wrong = evaluate(1e3 * np.eye(3), split([1, 2, 0]), "cross_entropy", "")
    assert (wrong.accuracy, wrong.ece, wrong.brier) == (0, 1, 2)
    assert [m.image for m in wrong.mistakes] == [0, 1, 2]  # of equal ones the first
    one = measured([[0.6, 0.4]], [1])
    assert (one.count, one.accuracy, one.ece) == (1, 0, pytest.approx(0.6))


def test_a_class_without_images():
    found = measured([[0.6, 0.2, 0.2], [0.2, 0.2, 0.6]], [0, 2])
    assert report.class_rows(found.confusion, "abc")[2] == ("b", "0", "0", "no images", "")
    rows = found.numbers(["a", "b", "c"])["per_class"]
    assert rows[1] == {"class": "b", "images": 0, "right": 0, "accuracy": None}
    assert rows[2] == {"class": "c", "images": 1, "right": 1, "accuracy": 1.0}


def test_the_most_confident_mistakes_are_kept():
    rng = np.random.default_rng(2)
    shares = rng.dirichlet(np.ones(4), 400)
    found = measured(shares, rng.integers(0, 4, 400))
    confidence = [m.confidence for m in found.mistakes]
    assert len(confidence) == SHOWN and confidence == sorted(confidence, reverse=True)
    wrong = shares.max(axis=1)[[m.image for m in found.mistakes]]
    np.testing.assert_allclose(wrong, confidence)
    assert all(m.true != m.answer for m in found.mistakes)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite(bad):
    outputs = np.zeros((5, 2))
    outputs[[2, 4], 1] = bad
    with pytest.raises(GpunetError, match=r"halves: test: outputs: expected finite .* for 2 of 5 images, image 2 the"):
        evaluate(outputs, split([0] * 5), "cross_entropy", "halves: test")


def test_values_get_what_applies():
    values = np.array([[1, 2], [3, 4], [5, 9]], np.float32)
    images = np.zeros((3, 2, 2, 1), np.float32)
    found = evaluate(values + np.array([[1, 0], [0, 0], [0, -2]]), data.Split(images, values=values), "mse", "")
    assert found.loss == pytest.approx(5 / 6) and found.rmse == pytest.approx(math.sqrt(5 / 6))
    assert found.r2 == pytest.approx(1 - 5 / (8 + 26))  # squares around the means 3 and 5
    assert found.confusion is found.interval is found.nll is found.ece is None and found.bins == found.mistakes == ()
    assert [what for what, _ in found.lines()] == ["loss", "root mean square error", "R2"]
    assert json.loads(json.dumps(found.numbers([])))["per_class"] is None
    same = evaluate(values * 0, data.Split(images, values=values * 0), "mse", "")
    assert same.r2 is None and ("R2", "the values do not vary") in same.lines()
    halves = data.Split(images[:1], values=np.float32([[0.5, 0.5]]))
    soft = evaluate(np.log([[0.25, 0.75]]), halves, "cross_entropy", "")
    assert soft.loss == pytest.approx(-(LN(0.25) + LN(0.75)) / 2) and soft.rmse is None


def test_labels_fitted_with_mse_have_no_probabilities():
    found = evaluate(np.array([[1.5, 0], [0.8, 0.1]]), split([0, 1]), "mse", "")
    assert found.accuracy == 0.5 and found.loss == pytest.approx((0.25 + 0.64 + 0.81) / 4)
    assert found.nll is found.brier is found.ece is None and found.bins == ()
    assert found.interval == wilson(1, 2)
    assert found.mistakes[0].confidence == 0.8 and found.mistakes[0].probability == 0.1


def config(name="mlp"):
    return type("config", (), {"model": type("model", (), {"name": name})})


def test_pictures_that_apply_are_written_and_others_removed(tmp_path):
    names = ("a$b", "c", "d")
    labels = np.arange(30) % 3
    halves = data.DataSet("set", names, split(labels), test=split(labels), note="a stand-in")
    rng = np.random.default_rng(0)
    found = evaluate(rng.normal(size=(30, 3)), halves.test, "cross_entropy", "")
    folder = tmp_path / "deep" / "folder"
    assert write_pictures(folder, config(), halves, "test", found) == ["confusion", "reliability", "mistakes"]
    for name in report.PICTURES:
        picture = np.asarray(Image.open(folder / f"{name}.png").convert("L"))
        assert picture.std() > 10, name
    sheet = np.asarray(Image.open(folder / "mistakes.png"))
    for column, mistake in enumerate(found.mistakes[:6]):  # pictures of 4 pixels, 36 times enlarged, 154 apart
        shown = sheet[10 : 10 + 144 : 36, 10 + 154 * column : 10 + 154 * column + 144 : 36]
        np.testing.assert_array_equal(shown, halves.test.images[mistake.image])
    right = evaluate(50.0 * np.eye(3)[labels], halves.test, "cross_entropy", "")
    assert write_pictures(folder, config(), halves, "test", right) == ["confusion", "reliability"]
    assert sorted(p.name for p in folder.iterdir()) == ["confusion.png", "reliability.png"]
    squares = evaluate(1.0 * np.eye(3)[labels], halves.test, "mse", "")
    assert write_pictures(folder, config(), halves, "test", squares) == ["confusion"]
    assert write_pictures(tmp_path / "none", config(), halves, "test", None) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GpunetError, match="file: cannot be written: .*--out"):
        write_pictures(tmp_path / "file", config(), halves, "test", found)


@pytest.mark.parametrize(
    ("loss", "said"), [("cross_entropy", "p 0.622, of true 0.378"), ("mse", "output 0.500, of true 0.")]
)
def test_mistakes_say_what_was_answered_and_how_surely(loss, said, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(report, "captioned_sheet", lambda *given: drawn.append(given) or captioned_sheet(*given))
    halves = data.DataSet("set", ("a", "b"), split([0, 1]), test=split([0, 1]))
    found = evaluate(np.array([[0.5, 0], [0.5, 0]]), halves.test, loss, "")
    assert "mistakes" in write_pictures(tmp_path, config(), halves, "test", found)
    ((_, (caption,)),) = drawn
    assert caption[:2] == ("true: b", "answer: a") and caption[2].startswith(said)


@pytest.mark.parametrize("shape", [(32, 32, 3), (5, 9, 1), (300, 200, 3)])
def test_a_captioned_sheet_shows_all_pictures(shape):
    images = np.random.default_rng(0).integers(0, 256, (8, *shape)).astype(np.uint8)
    sheet = captioned_sheet(images, [("a name that is far too long to be shown under a picture", "b", "c")] * 8)
    assert 6 * 144 < sheet.width < 6 * 170 and sheet.height > 2 * 45
    if shape == (32, 32, 3):
        shown = np.asarray(sheet)[10 : 10 + 128, 10 : 10 + 128]
        np.testing.assert_array_equal(shown[::4, ::4], images[0])
    single = captioned_sheet(images[:1].astype(np.float32), [("one",)])
    assert single.width < 200


def test_the_command_and_the_report_tell_the_same(tmp_path, monkeypatch, gpunet):
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(SMALL_TOML)

    assert gpunet("train", "small.toml")[0] == 0
    (folder,) = Path("runs").iterdir()
    text = (folder / "report.md").read_text()
    for picture in (folder / "evaluation-test").iterdir():  # the report's; they are drawn again below
        picture.unlink()
    code, out, _ = gpunet("evaluate", folder, "--json", "numbers.json")
    assert code == 0
    numbers = json.loads(Path("numbers.json").read_text())
    low, high = numbers["interval"]
    for told in (
        f"accuracy{{}}{numbers['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}, Wilson)",
        f"negative log-likelihood{{}}{numbers['nll']:.4f}",
        f"Brier score{{}}{numbers['brier']:.4f} (0 to 2)",
        f"calibration error{{}}{numbers['ece']:.2%} (ECE, 15 equal bins of confidence)",
    ):
        assert told.format(" | ") in text
        assert told.format(" ") in " ".join(out.split())
    assert (numbers["split"], numbers["count"], len(numbers["classes"])) == ("test", 20, len(numbers["confusion"]))
    assert numbers["set"] == "shapes" and numbers["epoch"] == 1 and numbers["note"].startswith("synthetic")
    assert sum(map(sum, numbers["confusion"])) == 20
    assert {m["true"] for m in numbers["mistakes"]} <= set(numbers["classes"])
    for name in report.PICTURES:
        assert f"(evaluation-test/{name}.png)" in text
        assert (folder / "evaluation-test" / f"{name}.png").stat().st_size > 5_000
    assert gpunet("evaluate", folder, "--split", "validation", "--out", "elsewhere")[0] == 0
    assert len(list(Path("elsewhere").iterdir())) >= 2
