"""Recipes: what is accepted, what each mistake is told, and that what is written is what was read."""

import tomllib
from pathlib import Path

import numpy as np
import pytest

from gpunet import resources
from gpunet.errors import GpunetError
from gpunet.optim import schedules
from gpunet.train import Trainer
from gpunet.train.config import Config, load_config, parse_config, to_toml
from gpunet.train.summary import Plan

SMALLEST = {"model": {"name": "mlp"}, "data": {"name": "shapes"}}
CONFIGS = sorted(resources.configs().glob("*.toml"))


def write(folder, **sections):
    file = folder / "a.toml"
    file.write_text(to_toml(parse_config(SMALLEST | sections)), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"optimizer": {"lrate": 1}},
            "unknown key 'lrate' in [optimizer]; did you mean 'lr'? known: name, lr, momentum",
        ),
        ({"optimiser": {"lr": 1.0}}, "unknown section [optimiser]; did you mean 'optimizer'? known: model, data"),
        ({"optimizer": 3}, "optimizer: expected a section [optimizer], got 3"),
        ({"optimizer": {"lr": "fast"}}, "'lr' in [optimizer]: expected a number, got \"fast\""),
        ({"optimizer": {"lr": 0}}, "'lr' in [optimizer]: expected a number above 0, got 0"),
        ({"optimizer": {"lr": float("inf")}}, "'lr' in [optimizer]: expected a finite number, got Infinity"),
        ({"optimizer": {"momentum": 1}}, "'momentum' in [optimizer]: expected a number below 1, got 1"),
        ({"optimizer": {"nesterov": 1}}, "'nesterov' in [optimizer]: expected true or false, got 1"),
        ({"optimizer": {"form": "torch"}}, "'form' in [optimizer]: expected 'pytorch' or 'caffe', got \"torch\""),
        ({"train": {"epochs": 0}}, "'epochs' in [train]: expected at least 1, got 0"),
        ({"train": {"epochs": 1.5}}, "'epochs' in [train]: expected a whole number, got 1.5"),
        ({"train": {"epochs": True}}, "'epochs' in [train]: expected a whole number, got true"),
        ({"train": {"batch": "128"}}, "'batch' in [train]: expected a whole number, got \"128\""),
        ({"train": {"epochs": 0, "batch": 0}}, "got 0 (and 1 more)"),
        ({"schedule": {"name": "stepp"}}, "'name' in [schedule]: expected 'const', 'step', 'multistep', 'exp'"),
        ({"schedule": {"size": 3}}, "'name' in [schedule] is missing"),
        ({"schedule": {"name": "step"}}, "'size' in [schedule] is missing"),
        (
            {"schedule": {"name": "step", "sise": 3}},
            "unknown key 'sise' in [schedule]; did you mean 'size'? known: name, size",
        ),
        ({"schedule": {"name": "step", "size": 0}}, "'size' in [schedule]: expected a number above 0, got 0"),
        ({"schedule": {"name": "const", "final": 0.5}}, "unknown key 'final' in [schedule]"),
        (
            {"schedule": {"name": "multistep", "milestones": ["a"]}},
            "'milestones' in [schedule]: expected a number, got \"a\"",
        ),
        (
            {"preprocess": {"mean": "pixel"}},
            "'mean' in [preprocess]: expected 'channel' or 'image' or a number or a list, got",
        ),
        ({"augment": {"crop": -1}}, "'crop' in [augment]: expected at least 0, got -1"),
        (
            {"train": {"dtype": "half"}},
            "'dtype' in [train]: expected 'float32', 'tf32', 'float64', 'float16' or 'bfloat16', got \"half\"",
        ),
        ({"loss": {"smoothing": 1}}, "'smoothing' in [loss]: expected a number below 1, got 1"),
        ({"model": {}}, "'name' in [model] is missing"),
        ({"data": {"name": "shapes", "limit": 0}}, "'limit' in [data]: expected at least 1, got 0"),
    ],
)
def test_every_mistake_is_named_with_what_would_do(sections, said):
    with pytest.raises(GpunetError) as caught:
        parse_config(SMALLEST | sections, "a.toml")
    assert str(caught.value).startswith("a.toml: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["model", "data"])
def test_model_and_data_have_to_be_named(section):
    with pytest.raises(GpunetError, match=rf"a\.toml: \[{section}\] is missing"):
        parse_config({k: v for k, v in SMALLEST.items() if k != section}, "a.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer.lr", "--set optimizer.lr: expected section.key=value"),
        ("lr=3", "--set lr=3: expected section.key=value"),
        ("optimizer.lr=fast", "--set optimizer.lr=fast: 'lr' in [optimizer]: expected a number, got \"fast\""),
        ("optimizer.lrr=1", "--set optimizer.lrr=1: unknown key 'lrr' in [optimizer]; did you mean 'lr'?"),
        ("optimiser.lr=1", "--set optimiser.lr=1: unknown section [optimiser]"),
        ("model.name=mpl", "--set model.name=mpl: 'name' in [model]: got 'mpl'; did you mean 'mlp'? known: mlp"),
        (
            "model.hiden=[3]",
            "--set model.hiden=[3]: unknown key 'hiden' in [model]; did you mean 'hidden'? known: name, hidden",
        ),
        ("data.name=imagenet", "--set data.name=imagenet: 'name' in [data]: got 'imagenet'; known: cifar10"),
        ("data.size=3", "--set data.size=3: unknown key 'size' in [data]"),
    ],
)
def test_a_mistake_in_an_override_names_the_override(text, said, tmp_path):
    with pytest.raises(GpunetError) as caught:
        load_config(write(tmp_path), [text])
    assert said in str(caught.value)
    assert not str(caught.value).startswith(f"--set {text}: --set")


def test_overrides_are_toml_or_text(tmp_path):
    overrides = [
        "optimizer.lr=1e-3",
        "model.hidden=[3, 4]",
        "run.name=first try",
        "train.order=stored",
        "train.seed=7",
    ]
    config = load_config(write(tmp_path), overrides)
    assert config.optimizer.lr == 1e-3
    assert config.model.model_extra == {"hidden": [3, 4]}
    assert config.run.name == "first try"
    assert config.train.order == "stored"
    assert config.train.seed == 7


def test_a_file_that_is_no_toml_is_named_with_the_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text("[model]\nname = mlp\n")
    with pytest.raises(GpunetError, match=r"^a\.toml: not TOML: .*line 2, column 8"):
        load_config("a.toml")
    Path("a.toml").write_bytes(b"# \xff\n")
    with pytest.raises(GpunetError, match=r"^a\.toml: expected text in UTF-8: .* at byte 2"):
        load_config("a.toml")


def test_a_config_that_is_not_there_names_the_nearest():
    with pytest.raises(GpunetError, match="nearest: quickstart"):
        load_config("quikstart")


def test_what_is_written_reads_the_same():
    sections = {
        "model": {"name": "mlp", "hidden": [3, 4]},
        "data": {"name": "folder", "directory": 'C:\\päth "x"\n\t\x7f', "size": 32},
        "optimizer": {"lr": 1e-20, "momentum": 0},
        "schedule": {"name": "multistep", "milestones": [1, 2.5]},
        "preprocess": {"mean": [1.0, 2, 3], "scale": 0.5},
        "train": {"replicas": 3, "seed": 2**62},
    }
    config = parse_config(sections)
    again = parse_config(tomllib.loads(to_toml(config)))
    assert again == config
    assert again.optimizer.momentum == 0


def test_no_two_configs_share_a_section():
    one, other = parse_config(SMALLEST), parse_config(SMALLEST)
    one.train.epochs, one.schedule.warmup, one.model.name = 77, 5, "lenet"
    assert (other.train.epochs, other.schedule.warmup, other.model.name) == (10, 0, "mlp")


def test_defaults_are_resolved_in_what_is_written():
    written = tomllib.loads(to_toml(parse_config(SMALLEST)))
    assert set(written) == set(Config.model_fields)
    assert written["optimizer"]["form"] == "pytorch"
    assert written["schedule"] == {"name": "const", "unit": "epochs", "warmup": 0, "warmup_from": 0.1}


def test_the_schedule_becomes_a_table_of_rates():
    config = parse_config(SMALLEST | {"optimizer": {"lr": 0.5}, "schedule": {"name": "step", "size": 2, "gamma": 0.1}})
    assert (config.rates(50, 10) == schedules.step(50, 10, 0.5, size=2, gamma=0.1)).all()
    assert (parse_config(SMALLEST).rates(5, 1) == np.full(5, 0.01)).all()


def test_a_run_is_named_after_its_recipe_and_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(write(tmp_path, data={"name": "folder", "directory": "pictures", "size": 8}))
    assert config.run.name == "a"
    assert config.data.directory == str(tmp_path / "pictures")


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_recipes_are_right_short_and_say_what_they_are(path):
    config = load_config(path.stem)
    assert config.run.name == path.stem
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("# ")
    assert not config.train.monitor_test


def test_caffes_recipe_has_caffes_settings():
    config = load_config("cifar10_quick")
    rates = config.rates(5000, 500)
    assert config.train.epochs * 50_000 // config.train.batch == 5000
    assert (rates[0], rates[3999], rates[4000]) == (0.001, 0.001, pytest.approx(1e-4))
    assert (config.optimizer.momentum, config.optimizer.weight_decay, config.optimizer.form) == (0.9, 0.004, "caffe")
    assert (config.preprocess.affine, config.augment.crop) == (("image", 1), 0)
    assert config.train.order == "stored" and not config.augment.flip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x = " + "[" * 5000, "not TOML: lists or tables in each other, too deep"),
        ("x = " + "9" * 5000, "not TOML: Exceeds the limit"),
        ("a" * 100_000 + " = 1", "unknown section [aaa"),
        ('"\\u001b[31m" = 1', r"unknown section [\x1b[31m]"),
    ],
)
def test_a_hostile_file_is_one_short_printable_line(content, said, tmp_path):
    (tmp_path / "a.toml").write_text(content + "\n")
    with pytest.raises(GpunetError) as caught:
        load_config(tmp_path / "a.toml")
    assert said in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000


@pytest.mark.parametrize("text", ["model.\udcff=1", "model.x=" + "9" * 5000, "model.x=" + "[" * 5000])
def test_a_hostile_override_is_one_short_printable_line(text, tmp_path):
    with pytest.raises(GpunetError, match=r"^--set model\..*: expected text in UTF-8, numbers of less") as caught:
        load_config(write(tmp_path), [text])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"train": "many"}}, "data shapes: train: expected a whole number, got 'many'"),
        ({"data": {"train": 10**13}}, r"\[data\] shapes with train = 10000000000000, test = 20: "),
        ({"data": {"train": 10**30}}, r"\[data\] shapes with train = 10+, test = 20: "),
        ({"model": {"name": "vgg", "widths": [1, 2]}}, r"vgg: widths: expected 5, one a stage, got \[1, 2\]"),
        ({"model": {"name": "resnet20", "widths": []}}, r"\[model\] resnet20 with widths = \[\]: "),
        ({"model": {"name": "cifar10_quick", "bias_rate": [1]}}, r"\[model\] cifar10_quick with bias_rate = \[1\]: "),
        ({"schedule": {"name": "step", "size": 1e308}}, r"\[schedule\] step: no table of the rates of 10 epochs"),
        (
            {"schedule": {"name": "step", "size": 1, "gamma": 1e308}},
            r"\[schedule\] step: expected finite rates, got \S+ at",
        ),
        ({"train": {"epochs": 10**15}}, r"\[schedule\] const: no table of the rates of 1000000000000000 epochs"),
    ],
)
def test_extreme_settings_are_refused_by_the_plan(sections, said):
    made = {"model": {"name": "mlp"}, "data": {"name": "shapes", "train": 100, "test": 20}}
    with pytest.raises(GpunetError, match=said):
        Plan(parse_config({**made, **{k: made.get(k, {}) | v for k, v in sections.items()}})).memory()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optimizer": {"lr": 1e39}}, r"\[schedule\] const: expected finite rates, got 1e\+39 at update 0"),
        ({"preprocess": {"mean": 1e39}}, r"source \w+: mean or scale: expected finite numbers that float32 can hold"),
        ({"preprocess": {"scale": [0.1, 0.1, 1e308]}}, r"source \w+: mean or scale: expected finite numbers that"),
    ],
)
def test_numbers_beyond_float32_are_refused_by_a_training(sections, said):
    made = {"model": {"name": "mlp", "hidden": [3]}, "data": {"name": "shapes", "train": 100, "test": 20}}
    with pytest.raises(GpunetError, match=said):
        Trainer(parse_config(made | {"train": {"batch": 20, "backend": "numpy"}} | sections), show=False)
