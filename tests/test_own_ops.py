"""Kernels, layers and models from outside of the package: the example of kernels/README.md, and what can be wrong."""

import platform
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpunet import GpunetError, Step, models, nn, ops, optim
from gpunet.models.layers import KINDS
from gpunet.testing import check_gradients
from gpunet.train import Trainer
from gpunet.train.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") or platform.machine() != "x86_64", reason="the emulator: needs g++ and x86-64"
)
CONFIG = """
[model]
name = "tiny"

[data]
name = "shapes"
train = 300
test = 50

[train]
epochs = 1
batch = 50
replicas = 2

[run]
name = "tiny"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the example, and MODELS as they are without it afterwards."""
    text = (ROOT / "kernels" / "README.md").read_text().partition("### A kernel of your own")[2]
    (tmp_path / "softsign.cu").write_text(re.search(r"```c\n(.*?)```", text, re.S)[1])
    (tmp_path / "softsign.py").write_text(re.search(r"```python\n(.*?)```", text, re.S)[1])
    (tmp_path / "tiny.toml").write_text(CONFIG)
    before, kinds = dict(models.MODELS), dict(KINDS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    models.MODELS.clear()
    models.MODELS.update(before)
    KINDS.clear()
    KINDS.update(kinds)


def change(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def steps(module, backend, count=3):
    """Return the weights after some steps, in float64."""
    graph = module.MODELS["tiny"]((8, 8, 3), 10)
    step = Step(graph, nn.SoftmaxCrossEntropy(), optim.SGD(0.1, momentum=0.9), batch=6, dtype="float64",
                backend=backend, seed=3)  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(count):
        step.gradient(rng.normal(size=(6, 8, 8, 3)), rng.integers(10, size=6))
        step.update()
        step.advance()
    weights = {name: np.array(value) for name, value in step.weights.items()}
    step.close()
    return weights


def test_gradients_of_a_layer_of_ones_own(folder):
    module = ops.load("softsign.py")
    assert check_gradients(module.Softsign(), (4, 3, 2), samples=20) < 1e-6


@needs_compiler
def test_the_emulator_trains_as_numpy(folder):
    module = ops.load("softsign.py")
    expected, got = (steps(module, backend) for backend in ("numpy", "emulator"))
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-12)


@needs_compiler
def test_kernel_test_holds_and_finds_a_wrong_one(gpunet, folder):
    assert gpunet("kernel-test", "softsign.cu", "--only", "emulator")[0] == 0
    change(folder / "softsign.cu", "v / (1 + fabs(v))", "v / (1 + v)")
    code, out, _ = gpunet("kernel-test", "softsign.cu", "--only", "emulator")
    assert code == 1
    assert "1 of 2 kernels hold" in out


def test_train_evaluate_and_the_rest(gpunet, folder):
    code, out, err = gpunet("train", "tiny.toml", "--ops", "softsign.py", "--out", "runs")
    assert (code, err.count("Traceback")) == (0, 0), err
    (run,) = Path("runs").iterdir()
    pins = Checkpoint.load(run / "last.safetensors").about["pins"]
    assert re.fullmatch("[0-9a-f]{12}", pins["layer Softsign"])
    code, out, err = gpunet("evaluate", run, "--ops", "softsign.cu")
    assert code == 0, err
    assert "accuracy" in out
    assert gpunet("summary", "tiny.toml", "--ops", "softsign.py")[1].count("Softsign") == 1


def test_a_list_of_layers_may_name_it(gpunet, folder):
    change(folder / "softsign.py", 'MODELS = {"tiny": tiny}', "")
    net = 'model.layers=[{layer="Conv2d", outputs=4, size=3, stride=4}, {layer="Softsign"}, {layer="Linear"}]'
    settings = ("--set", "model.name=layers", "--set", net)
    code, out, err = gpunet("summary", "tiny.toml", "--ops", "softsign.py", *settings)
    assert code == 0, err
    assert "softsign1" in out
    KINDS.pop("Softsign")
    assert "unknown layer 'Softsign'" in gpunet("summary", "tiny.toml", *settings)[2]


def test_resume_refuses_changed_kernels(gpunet, folder, monkeypatch):
    def fail(self, *_):
        raise GpunetError("cut here")

    monkeypatch.setattr(Trainer, "evaluate", fail)
    assert "cut here" in gpunet("train", "tiny.toml", "--ops", "softsign.py")[2]
    (run,) = Path("runs").iterdir()
    change(folder / "softsign.cu", "v / (1 + fabs(v))", "v / (fabs(v) + 1)")
    code, _, err = gpunet("train", "--resume", run, "--ops", folder / "softsign.py")
    assert code == 2
    assert "would not give the same bits: layer Softsign was" in err


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("softsign.py", "def softsign_forward(x, y, n)", "def softsign_forward(y, x, n)",
         "softsign_forward: expected parameters x, y, n, got y, x, n"),
        ("softsign.py", "ops.declare(__file__, softsign_forward, softsign_backward)",
         "ops.declare(__file__, softsign_forward)", "expected a function softsign_backward, the definition of the"),
        ("softsign.py", "ops.declare(__file__, softsign_forward, softsign_backward)",
         "ops.declare(__file__, softsign_forward, softsign_backward, tiny)", "NameError: name 'tiny' is not defined"),
        ("softsign.py", 'MODELS = {"tiny": tiny}', "MODELS = [tiny]", "MODELS: expected a dict of functions"),
        ("softsign.py", 'MODELS = {"tiny": tiny}', 'MODELS = {"mlp": tiny}', "there is a model of this name"),
        ("softsign.py", 'MODELS = {"tiny": tiny}', "MODELS = {", "'{' was never closed (softsign.py, line 56)"),
        ("softsign.py", "import numpy as np", "import nonesuch", "No module named 'nonesuch' (line 3)"),
        ("softsign.cu", "const real* x /*n*/", "const real* x", "pointer 'x' has no extent comment"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(gpunet, folder, file, old, new, message):
    change(folder / file, old, new)
    code, _, err = gpunet("train", "tiny.toml", "--ops", "softsign.py")
    assert code == 2
    assert err.count("\n") == 1
    assert message in err


def test_what_is_not_there_is_said(gpunet, folder):
    assert "nowhere.py is none" in gpunet("train", "tiny.toml", "--ops", "nowhere.py")[2]
    assert "--ops FILE.py adds your own" in gpunet("train", "tiny.toml")[2]
    (folder / "softsign.cu").unlink()
    assert "softsign.cu: expected a .cu file, there is none" in gpunet("train", "tiny.toml", "--ops", "softsign.py")[2]


def test_a_kernel_of_ones_own_is_checked_like_any(folder):
    module = ops.load("softsign.py")
    module.Softsign.forward = lambda self, t, x: (t.launch(module.kernels.softsign_forward, x, x, 1.5), x)
    with pytest.raises(GpunetError, match="softsign1: softsign_forward: n: expected long long"):
        steps(module, "numpy", 1)
