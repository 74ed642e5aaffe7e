"""The command: what it prints, how it ends, and how fast it is when it only has to tell."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import SMALL_TOML

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A fresh folder with small.toml to be in."""
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(SMALL_TOML)


@pytest.fixture
def trained(gpunet, tmp_path):
    """A run of small.toml."""
    assert gpunet("train", "small.toml")[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def started(*arguments, **options):
    """Start the command as users do."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "gpunet", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_train_then_evaluate_then_predict(gpunet, trained, tmp_path):
    code, out, err = gpunet("evaluate", trained)
    assert code == 0
    assert out.startswith("test of shapes: accuracy ")
    assert "circle" in out and "20 images" in out
    assert "note: synthetic pictures" in err
    assert gpunet("evaluate", trained.name, "--split", "validation", "--checkpoint", "last")[1].startswith("validation")

    for name, shape in (("grey", (40, 30)), ("large", (200, 100, 3))):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)).save(f"{name}.png")
    code, out, err = gpunet("predict", trained, "grey.png", "large.png")
    assert code == 0
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["grey.png", "large.png"]
    shares = [float(part.split()[-1].rstrip("%")) for part in lines[0].split(": ")[1].split(", ")]
    assert len(shares) == 3 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.2
    assert "scaled to cover 32 x 32" in err


def test_predict_gives_what_evaluate_counts(gpunet, trained):
    """Pixels of a test image, saved as PNG, get the class that the confusion matrix has."""
    from gpunet import data
    from gpunet.train import Predictor
    from gpunet.train.run import Run

    test = data.load("shapes", train=100, test=20).test
    predictor = Predictor.load(Run(trained).checkpoint())
    for i in range(3):
        Image.fromarray(test.images[i]).save(f"{i}.png")
    out = gpunet("predict", trained, "0.png", "1.png", "2.png")[1]
    expected = [predictor.classes[k] for k in predictor.predict(test.images[:3]).argmax(axis=1)]
    assert [line.split(": ")[1].split()[0] for line in out.splitlines()] == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "quikstart"], "got 'quikstart'; nearest: quickstart; known:"),
        (["train", "small.toml", "--set", "train.epochs=0"], "'epochs' in [train]: expected at least 1, got 0"),
        (["train", "small.toml", "--set", "optimizer.lrate=1"], "key 'lrate' in [optimizer]; did you mean 'lr'?"),
        (["train", "small.toml", "--set", "optimizer.lr=fast"], 'expected a number, got "fast"'),
        (["train", "small.toml", "--set", "train.batch=99"], "batch: expected at most 90, the images of train"),
        (["train", "small.toml", "--backend", "tpu"], "backend: expected"),
        (["train", "small.toml", "--out", "file"], "cannot be made"),
        (["train", "small.toml", "--data", "."], "directory: expected none"),
        (["train", "cifar10_quick", "--data", "nowhere"], "cifar10: not found in "),
        (["summary", "nothing.toml"], "got 'nothing.toml'"),
        (["summary", "small.toml", "--memory", "much"], "--memory much: expected a size such as 8G"),
        (["evaluate", "nothing"], "run 'nothing': expected a directory with a config.toml"),
        (["list", "nothing"], "list: expected one of optimizers, schedules, "),
        (["data", "check", "nothing"], "expected a folder, found nothing"),
        (["data", "fetch", "cifer10"], "got 'cifer10'"),
        (["data", "show", "small.toml", "--out", "no/where.png"], "--out no/where.png: cannot be written"),
        (["data", "show", "small.toml", "--split", "tset"], "split: expected one of train, validation, test, got"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, said, gpunet):
    Path("file").write_text("in the way")
    code, out, err = gpunet(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("gpunet: ") and err.count("\n") == 1
    assert said in err


def test_mistakes_with_a_run(gpunet, trained):
    Path("text.png").write_text("no picture")
    for arguments, said in (
        (["predict", trained, "none.png"], "none.png: cannot be read"),
        (["predict", trained, "text.png"], "text.png: cannot be read: no picture in a format known here"),
        (["evaluate", trained, "--split", "tset"], "split: expected one of train, validation, test, got 'tset'"),
        (["evaluate", trained, "--checkpoint", "first"], "checkpoint: expected best or last, got 'first'"),
        (["evaluate", trained.name[:-1]], f"did you mean '{trained.name}'?"),
    ):
        code, _, err = gpunet(*arguments)
        assert code == 2
        assert said in err.splitlines()[-1]
    (trained / "best.safetensors").write_bytes((trained / "best.safetensors").read_bytes()[:-5])
    code, _, err = gpunet("evaluate", trained)
    assert code == 2
    assert "best.safetensors: expected a checkpoint; the file is damaged or none" in err.splitlines()[-1]


def test_debug_shows_the_traceback(gpunet):
    from gpunet.errors import GpunetError

    with pytest.raises(GpunetError):
        gpunet("train", "nothing", "--debug")


def test_a_wrong_option_is_the_users_too(gpunet):
    assert gpunet("train", "--fast")[0] == 2
    assert gpunet("evaluate")[0] == 2


def test_summary_tells_layers_and_memory(gpunet):
    code, out, _ = gpunet("summary", "small.toml", "--memory", "20M")
    assert code == 0
    assert f"{3072 * 8 + 8 + 80 + 10:,} weights" in out
    (images,) = (line for line in out.splitlines() if line.startswith("images"))
    assert images.split()[1:] == ["360.5", "KiB"]  # 120 images of 3,072 + 4 bytes
    assert 10 < int(out.splitlines()[-1].removeprefix("largest batch for 20M: ")) <= 90


def test_the_largest_batch_fits_and_one_more_does_not():
    from gpunet.train.config import load_config
    from gpunet.train.summary import Plan

    plan = Plan(load_config("mlp_shapes", ["model.hidden=[8]"]))
    limit = 60 * 2**20
    best = plan.largest_batch(limit)
    assert sum(plan.memory(best).values()) <= limit < sum(plan.memory(best + 1).values())
    assert plan.largest_batch(1) == 0
    assert plan.largest_batch(10**12) == 9000  # all training images


@pytest.mark.parametrize("name", ["quickstart", "cifar10_quick", "cifar10_resnet9", "cifar10_fast_cpu"])
def test_summaries_need_no_data(name, gpunet):
    code, out, _ = gpunet("summary", name)
    assert code == 0
    assert "peak" in out


def test_lists(gpunet):
    assert "resnet9" in gpunet("list", "models")[1]
    out = gpunet("list", "configs")[1]
    assert "mlp_shapes" in out and "quickstart" in out


def test_data_show_draws_a_sheet(gpunet):
    assert gpunet("data", "show", "small.toml", "--out", "sheet.png")[0] == 0
    assert Image.open("sheet.png").width > 500


def test_data_check_tells_problems_by_its_exit_code(gpunet, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red" if name == "a" else "blue").save(tmp_path / "set" / "train" / name / "1.png")
    assert gpunet("data", "check", tmp_path / "set")[0] == 0
    (tmp_path / "set" / "train" / "a" / "2.png").write_text("none")
    code, out, _ = gpunet("data", "check", tmp_path / "set")
    assert code == 1
    assert "problem: " in out


def test_telling_is_light_and_quick():
    """Neither help nor summary imports what only training needs; their times are printed, not held to a limit."""
    for arguments in (["--help"], ["summary", "quickstart"]):
        code = f"""
import json, sys
sys.argv = ['gpunet', *{arguments!r}]
from gpunet import cli
try:
    cli.main()
except SystemExit:
    pass
print(json.dumps([m for m in ('matplotlib', 'numpy', 'cupy', 'pydantic') if m in sys.modules]))
"""
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        print(f"{' '.join(arguments)}: {time.perf_counter() - start:.2f} s")
        assert done.returncode == 0, done.stderr
        loaded = json.loads(done.stdout.splitlines()[-1])
        assert loaded == ([] if arguments == ["--help"] else ["numpy", "pydantic"])


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_process_with_a_checkpoint(kind, code, tmp_path):
    (tmp_path / "small.toml").write_text(SMALL_TOML)
    process = started("train", "small.toml", "--set", "train.epochs=100000", cwd=tmp_path)
    try:
        for line in process.stderr:
            if line.startswith("epoch   3"):
                break
        process.send_signal(kind)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert f"interrupted by {kind.name}" in err
    assert "Traceback" not in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert {"last.safetensors", "best.safetensors", "report.md", "curves.png"} <= {p.name for p in folder.iterdir()}
