"""Files that somebody else made: whatever is in them, nothing of it is run, imported, unpickled or compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import fuzz_targets
import mutate
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Runs commands in a process that notes what a hook of the interpreter is told: code that is run from the folder,
# modules that are imported from it, pickles that look a name up, processes that are started.
WATCHED = """
import json, sys
from pathlib import Path
folder, commands = sys.argv[1], json.loads(sys.argv[2])
seen = []
def hook(event, arguments):
    if event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(folder):
        seen.append([event, arguments[0].co_filename])
    if event == "compile" and str(arguments[1]).startswith(folder):
        seen.append([event, str(arguments[1])])
    if event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        seen.append([event, str(arguments)[:200]])
    if event == "import" and arguments[0].split(".")[0] in ("antigravity", "evil", "torch"):
        seen.append([event, arguments[0]])
import matplotlib.font_manager, gpunet.cli, gpunet.export  # the first lists fonts, once, by a command of the system
sys.path.insert(0, folder)  # as `python -m` has it
sys.addaudithook(hook)
codes = []
for command in commands:
    sys.argv = ["gpunet", *command]
    try:
        gpunet.cli.main()
        codes.append(0)
    except SystemExit as end:
        codes.append(end.code or 0)
foreign = [name for name, m in sys.modules.items() if str(getattr(m, "__file__", "") or "").startswith(folder)]
print(json.dumps([codes, seen, foreign]))
"""
EVIL = "open('ran', 'w').close()"


def watched(folder, *commands):
    """Run commands in the folder; return their exit codes and what they printed, sure that nothing of it was run."""
    for name in ("evil", "os_", "numpy_", "conftest", "sitecustomize", "config"):
        (folder / f"{name}.py").write_text(EVIL)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "GPUNET_CACHE": str(folder / "cache"),
        "MPLCONFIGDIR": str(folder),
    }
    environment.pop("GPUNET_DATA", None)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(folder), json.dumps(commands)],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes, seen, foreign = json.loads(done.stdout.splitlines()[-1])
    assert (seen, foreign) == ([], [])
    assert not (folder / "ran").exists() and "Traceback" not in done.stderr
    return codes, done.stderr


@pytest.fixture(scope="module")
def run_files():
    return fuzz_targets.runs()["mlp"]


def test_the_watch_sees_what_is_run(tmp_path):
    """Else the tests below would prove nothing."""
    code = "import evil, os, pickle; pickle.loads(pickle.dumps(os.path.join)); os.system('true')"
    script = WATCHED.replace("codes = []", f"exec(compile({code!r}, folder + '/x.py', 'exec'))\ncodes = []")
    (tmp_path / "evil.py").write_text(EVIL)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), "[]"], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    _, seen, foreign = json.loads(done.stdout.splitlines()[-1])
    assert {event for event, _ in seen} == {"compile", "exec", "import", "pickle.find_class", "os.system"}
    assert foreign == ["evil"] and (tmp_path / "ran").exists()


PAYLOADS = {
    "a pickle": mutate.pickle.dumps(mutate.Call(exec, EVIL)),
    "a file of torch.save": mutate.torch_zip(),
    "a NumPy file of objects": b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117)
    + b"\n"
    + mutate.pickle.dumps([mutate.Call(exec, EVIL)]),
    "a script": EVIL.encode(),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_checkpoint_that_is_a_program(name, run_files, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for file, content in run_files.items():
        (run / file).write_bytes(PAYLOADS[name] if file.endswith(".safetensors") else content)
    (tmp_path / "weights.pt").write_bytes(PAYLOADS[name])
    (tmp_path / "a.png").write_bytes(PAYLOADS[name])
    start = ["--set", 'start.weights="weights.pt"']
    codes, said = watched(
        tmp_path, ["evaluate", "run"], ["predict", "run", "a.png"], ["export", "run", "a.onnx"],
        ["train", "--resume", "run"],
        ["train", str(run / "config.toml"), *start], ["plot", "run"],
    )  # fmt: skip
    assert codes == [2, 2, 2, 2, 2, 0]
    assert said.count("the file is damaged or none") == 6  # resume tells of both of its checkpoints


NAMES = (
    "os.system",
    "os",
    "evil",
    "ops",
    "__import__('evil')",
    "evil:main",
    "../evil.py",
    "{0.__class__}",
    "antigravity",
    "torch",
)


def test_names_in_a_recipe_are_looked_up_in_tables_only(run_files, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "recipe.toml").write_bytes(mutate.toml(fuzz_targets.SMALL).encode())
    keys = ("model.name", "data.name", "optimizer.name", "schedule.name", "loss.name", "train.backend", "train.dtype",
            "model.hidden", "start.weights", "model.init", "data.fallback")  # fmt: skip
    commands = [["summary" if number % 3 else "train", "recipe.toml", "--set", f"{key}={json.dumps(name)}"]
                for key in keys for number, name in enumerate(NAMES)]  # fmt: skip
    extra = [
        f"{section}.{key}='evil'"
        for section in ("model", "data", "train", "run", "evil")
        for key in ("ops", "__class__", "module")
    ]
    commands += [["train", "recipe.toml", "--set", text] for text in extra]
    commands += [["train", "recipe.toml", "--backend", name] for name in NAMES]
    codes, said = watched(tmp_path, *commands)
    # a plan needs no weights to start from
    assert {code for command, code in zip(commands, codes, strict=True) if "start.weights" not in command[3]} == {2}
    assert said.count("gpunet: ") == codes.count(2)


def test_metadata_of_a_checkpoint_names_nothing_that_is_run(run_files, tmp_path):
    """Names in a checkpoint with a checksum that is right: recipe, classes, pins, keys of tensors."""
    commands = []
    for number, name in enumerate(NAMES):

        def change(rng, about, name=name):
            toml = about["config"]
            about["config"] = (
                toml.replace('"mlp"', json.dumps(name)).replace('"numpy"', json.dumps(name))
                if rng.random() < 0.7
                else toml
            )
            return about | {
                "classes": [name] * 10,
                "pins": {name: name},
                "ops": name,
                "__reduce__": [name],
                "best": {name: name},
            }

        run = tmp_path / f"run{number}"
        run.mkdir()
        for file, content in run_files.items():
            (run / file).write_bytes(mutate.about(Random(number), content, change) if file.endswith("s") else content)
        commands += [
            ["evaluate", run.name],
            ["export", run.name, "a.onnx"],
            ["train", "--resume", run.name, "--inexact"],
        ]
    codes, _ = watched(tmp_path, *commands)
    assert set(codes) <= {0, 2} and codes.count(2) > len(codes) // 2


def test_labels_and_pictures_that_are_programs(tmp_path):
    for stem, content in fuzz_targets.contents("cifar10").items():
        content["data"] = mutate.Call(exec, EVIL)
        (tmp_path / stem).write_bytes(mutate.pickle.dumps(content, protocol=2) + bytes(30_730_000))
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file closefile\n")
    codes, said = watched(tmp_path, ["data", "check", "."], ["data", "show", "cifar10", "--data", "."])
    assert codes == [1, 2] and "it wants to run" in said


def test_the_record_of_a_run_holds_no_variable_that_was_not_chosen(tmp_path):
    """No file that a training leaves has a variable of the environment in it, name or value, but those of a list."""
    (tmp_path / "recipe.toml").write_text(mutate.toml(fuzz_targets.SMALL))
    planted = {
        "GPUNET_TOKEN": "hunter2-a",
        "AWS_SECRET_ACCESS_KEY": "hunter2-b",
        "PASSWORD": "hunter2-c",
        "OMP_NUM_THREADS": "1",
    }
    environment = {**os.environ, **planted, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path)}
    command = [sys.executable, "-m", "gpunet", "train", "recipe.toml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    found = b"".join(path.read_bytes() for path in files) + (done.stdout + done.stderr).encode()
    assert {"report.md", "config.toml", "metrics.jsonl", "last.safetensors"} <= {path.name for path in files}
    assert b"OMP_NUM_THREADS" in found
    for word in ("hunter2", "GPUNET_TOKEN", "AWS_SECRET", "PASSWORD"):
        assert word.encode() not in found
