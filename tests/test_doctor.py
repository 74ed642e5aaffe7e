"""Whether CUDA can run, told from faked facts and by a faked driver; what `auto` takes; the command `gpunet doctor`."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpunet import backends, doctor
from gpunet.backends import cache, emulator
from gpunet.backends.cuda import detect
from gpunet.backends.cuda.detect import Device, Facts
from gpunet.errors import GpunetError
from gpunet.train import Trainer
from gpunet.train.config import parse_config

ROOT = Path(__file__).resolve().parents[1]
HOPPER, VOLTA = Device("NVIDIA H100", (9, 0), 80 << 30, "GPU-1"), Device("Tesla V100", (7, 0), 16 << 30, "GPU-2")
GOOD = Facts(13000, "", (HOPPER,), (("cupy-cuda13x", "14.2.0"),), "libcublas.so.13", "libnvrtc.so.13")
GOOD12 = replace(GOOD, driver=12040, cupy=(("cupy-cuda12x", "14.2.0"),))
NO_DRIVER = Facts(None, "libcuda.so.1: cannot open shared object file: No such file or directory")
NO_DEVICE = replace(GOOD, devices=(), trouble="cuInit: CUDA_ERROR_NO_DEVICE")


@pytest.mark.parametrize(
    "facts",
    [
        GOOD,
        GOOD12,
        replace(GOOD, cupy=(("cupy-cuda12x", "15.0.0b1"),)),  # an older CUDA than the driver's
        replace(GOOD12, devices=(VOLTA,)),
        replace(GOOD, devices=(HOPPER, VOLTA)),  # the first one computes
        replace(GOOD, cupy=(("cupy", "14.0.0"),)),  # from conda or built here: for whatever was there
        replace(GOOD, visible="1"),
    ],
)
def test_nothing_is_missing(facts):
    assert detect.problem(facts) is None


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (NO_DRIVER, r"no NVIDIA driver: there is no GPU, .* container was started without it; backend numpy .*"),
        (Facts(None, "libcuda.so.1: bad ELF header"), r"no NVIDIA driver: .* \(libcuda.so.1: bad ELF header\); .*"),
        (NO_DEVICE, r"an NVIDIA driver but no GPU: expected one in the list of nvidia-smi -L"),
        (replace(NO_DEVICE, visible=""), r"no GPU is visible: CUDA_VISIBLE_DEVICES is '', which names none; unset it"),
        (replace(NO_DEVICE, visible="-1"), r"no GPU is visible: CUDA_VISIBLE_DEVICES is '-1', .*"),
        (
            replace(NO_DEVICE, trouble="cuInit: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", visible="0"),
            r"the NVIDIA driver does not start \(cuInit: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH\): .*driver again",
        ),
        (
            replace(GOOD, driver=11040, cupy=()),
            r"the NVIDIA driver is too old: it runs CUDA 11.4, CuPy 14 needs 12.0 .*; install driver 525 or newer",
        ),
        (replace(GOOD, cupy=()), r'an NVIDIA driver but no CuPy: pip install "gpunet\[cuda13\]"'),
        (replace(GOOD, driver=13020, cupy=()), r'.* no CuPy: pip install "gpunet\[cuda13\]"'),
        (replace(GOOD, driver=12090, cupy=()), r'.* no CuPy: pip install "gpunet\[cuda12\]"'),
        (replace(GOOD, devices=(VOLTA,), cupy=()), r'.* no CuPy: pip install "gpunet\[cuda12\]"'),
        (
            replace(GOOD, cupy=(*GOOD12.cupy, *GOOD.cupy)),
            r"more than one CuPy \(cupy-cuda12x 14.2.0, cupy-cuda13x 14.2.0\), and each has overwritten .*: "
            r'pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install "gpunet\[cuda13\]"',
        ),
        (
            replace(GOOD, cupy=(("cupy-rocm-7-0", "14.0.0"),)),
            r"cupy-rocm-7-0 is for AMD's GPUs: pip uninstall -y cupy-rocm-7-0 && pip install .*",
        ),
        (
            replace(GOOD12, cupy=(("cupy-cuda12x", "13.6.0"),)),
            r"cupy-cuda12x 13.6.0 is too old, CuPy 14 or newer is needed: "
            r'pip uninstall -y cupy-cuda12x && pip install "gpunet\[cuda12\]"',
        ),
        (replace(GOOD, cupy=(("cupy-cuda11x", "13.6.0"),)), r"cupy-cuda11x 13.6.0 is too old, .*cuda13\]\""),
        (replace(GOOD, cupy=(("cupy", "unknown"),)), r"cupy unknown is too old, .*"),
        (
            replace(GOOD, driver=12040),
            r"the NVIDIA driver is too old for cupy-cuda13x: it runs CUDA 12.4, expected 13.0 or newer; install driver "
            r'580 or newer, or pip uninstall -y cupy-cuda13x && pip install "gpunet\[cuda12\]"',
        ),
        (
            replace(GOOD, cupy=(("cupy-cuda14x", "16.0.0"),)),
            r"the NVIDIA driver is too old for cupy-cuda14x: .* 14.0 or newer; install a driver for CUDA 14 or .*",
        ),
        (
            replace(GOOD, devices=(VOLTA, HOPPER)),
            r"Tesla V100 is sm_70, cupy-cuda13x takes sm_75 or newer: "
            r'pip uninstall -y cupy-cuda13x && pip install "gpunet\[cuda12\]"',
        ),
        (replace(GOOD, cublas=None), r'libcublas of CUDA 13 not found: pip install "nvidia-cublas==13\.\*"'),
        (replace(GOOD, nvrtc=None), r'libnvrtc of CUDA 13 not found: pip install "nvidia-cuda-nvrtc==13\.\*"'),
        (
            replace(GOOD12, cublas=None, nvrtc=None),
            r"libcublas and libnvrtc of CUDA 12 not found: pip install nvidia-cublas-cu12 nvidia-cuda-nvrtc-cu12",
        ),
        (replace(GOOD12, cupy=(("cupy", "14.0.0"),), nvrtc=None), r".* CUDA 12 .* nvidia-cuda-nvrtc-cu12"),
    ],
)
def test_what_is_missing_is_one_line_with_the_way_out(facts, said):
    found = detect.problem(facts)
    assert re.fullmatch(said, found), found


FAKE_DRIVER = """
#include <stddef.h>
#include <string.h>
int cuDriverGetVersion(int *version) { *version = VERSION; return VERSION ? 0 : 34; }
int cuInit(unsigned int flags) { return flags ? 1 : START; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 10 + ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device == 10 ? "Fake A" : "Fake B", length);
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? device - 1 : attribute == 76 ? device - 10 : -1;
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)device << 30; return 0; }
#ifdef UUID
int cuDeviceGetUuid(unsigned char *uuid, int device) { memset(uuid, device, 16); return 0; }
#endif
int cuGetErrorName(int code, const char **text) { *text = code == 100 ? "CUDA_ERROR_NO_DEVICE" : NULL; return !*text; }
"""


@pytest.fixture
def fake_driver(tmp_path, monkeypatch):
    """Make a library with the driver's functions and have it looked for; return its path."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")

    def make(**defines):
        options = [f"-D{name}={value}" for name, value in defines.items()]
        path = tmp_path / f"driver{len(list(tmp_path.iterdir()))}" / "libcuda.so.1"
        path.parent.mkdir()
        command = ["g++", "-xc", "-shared", "-fPIC", *options, "-o", str(path), "-"]
        subprocess.run(command, input=FAKE_DRIVER, text=True, check=True)
        monkeypatch.setattr(detect, "DRIVER", str(path))
        return path

    return make


def test_the_driver_is_asked(fake_driver):
    fake_driver(VERSION=12040, START=0, UUID=1)
    facts = detect.look()
    assert (facts.driver, facts.trouble) == (12040, "")
    assert facts.devices == (
        Device("Fake A", (9, 0), 10 << 30, "GPU-0a0a0a0a-0a0a-0a0a-0a0a-0a0a0a0a0a0a"),
        Device("Fake B", (10, 1), 11 << 30, "GPU-0b0b0b0b-0b0b-0b0b-0b0b-0b0b0b0b0b0b"),
    )
    fake_driver(VERSION=13000, START=0)
    assert [device.uuid for device in detect.look().devices] == ["", ""]  # worth no more than a missing number


def test_a_driver_that_refuses(fake_driver, tmp_path, monkeypatch):
    fake_driver(VERSION=13000, START=100)
    facts = detect.look()
    assert (facts.driver, facts.trouble, facts.devices) == (13000, "cuInit: CUDA_ERROR_NO_DEVICE", ())
    assert detect.problem(facts).startswith("an NVIDIA driver but no GPU")
    fake_driver(VERSION=13000, START=803)
    assert "does not start (cuInit: error 803)" in detect.problem(detect.look())
    fake_driver(VERSION=0, START=0)  # the toolkit's stand-in for linking
    assert "no NVIDIA driver: " in (found := detect.problem(detect.look())) and "error 34" in found
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.setattr(detect, "DRIVER", str(tmp_path / "broken.so"))
    assert "broken.so" in detect.problem(detect.look())


def test_looking_raises_nothing_here_and_imports_little():
    code = """
import json, sys
from gpunet.backends import choose
from gpunet.backends.cuda import detect
facts = detect.look()
print(json.dumps([detect.problem(facts), [m for m in ("cupy", "cuda", "matplotlib") if m in sys.modules],
                  choose("auto")[1]]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said, loaded, chosen = json.loads(done.stdout)
    assert loaded == []
    assert "\n" not in (said or "")
    assert chosen.startswith("backend: numpy (" if said else "backend: cuda (")


def test_every_cupy_is_seen(tmp_path, monkeypatch):
    for name in ("cupy-cuda12x", "CuPy", "cupy-rocm-7-0", "amd-cupy", "cupyish", "my-cupy", "gpunet"):
        about = tmp_path / f"{name.replace('-', '_')}-14.1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 14.1\n")
    (tmp_path / "damaged-1.0.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert [name for name, _ in detect._cupy()] == ["amd-cupy", "cupy", "cupy-cuda12x", "cupy-rocm-7-0"]
    assert {number for _, number in detect._cupy()} == {"14.1"}


@pytest.mark.parametrize(("cupy", "major"), [((), None), (GOOD.cupy, 13), (GOOD12.cupy, 12), ((("cupy", "14"),), None)])
def test_the_cuda_of_a_cupy(cupy, major):
    assert Facts(cupy=cupy).cuda == major


def test_libraries_are_found_where_cupy_finds_them(tmp_path, monkeypatch):
    def put(*parts):
        path = tmp_path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return str(path)

    for name in ("CONDA_PREFIX", "LD_LIBRARY_PATH", "CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    linker = tmp_path / "linker"
    said = f"3 libs found\n\tlibcublas.so.77 (libc6,x86-64) => {linker}/libcublas.so.77\n"
    monkeypatch.setattr(detect, "_output", lambda *command: said if command[0] == "/sbin/ldconfig" else "")
    assert detect.library("cublas", 77) is None
    # from the last place to the first: each one comes before those that stand there already
    expected = put("toolkit", "lib64", "libcublas.so.77")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert detect.library("cublas", 77) == expected
    assert detect.library("cublas", 78) is None and detect.library("nvrtc", 77) is None
    expected = put("linker", "libcublas.so.77")
    assert detect.library("cublas", 77) == expected
    expected = put("own", "libcublas.so.77")
    monkeypatch.setenv("LD_LIBRARY_PATH", f":{tmp_path / 'none'}:{tmp_path / 'own'}")
    assert detect.library("cublas", 77) == expected
    expected = put("conda", "lib", "libcublas.so.77")
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "conda"))
    assert detect.library("cublas", 77) == expected
    monkeypatch.syspath_prepend(tmp_path / "site")
    expected = put("site", "nvidia", "cublas", "lib", "libcublas.so.77")
    assert detect.library("cublas", 77) == expected
    expected = put("site", "nvidia", "cu77", "lib", "libcublas.so.77")
    assert detect.library("cublas", 77) == expected
    expected = put("site", "nvidia", "cuda_nvrtc", "lib", "libnvrtc.so.77")
    assert detect.library("nvrtc", 77) == expected


def test_libraries_are_those_of_the_cupy_that_is_there(monkeypatch):
    monkeypatch.setattr(detect, "_cupy", lambda: GOOD12.cupy)
    monkeypatch.setattr(detect, "library", lambda stem, major: f"lib{stem}.so.{major}")
    assert (detect.look().cublas, detect.look().nvrtc) == ("libcublas.so.12", "libnvrtc.so.12")
    monkeypatch.setattr(detect, "_cupy", lambda: (("cupy", "14.0.0"),))  # for which CUDA is not known
    monkeypatch.setattr(detect, "library", lambda stem, major: f"lib{stem}.so.12" if major == 12 else None)
    assert (detect.look().cublas, detect.look().nvrtc) == ("libcublas.so.12", "libnvrtc.so.12")


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a command nvidia-smi with these lines first on the path."""

    def make(lines):
        script = tmp_path / "nvidia-smi"
        script.write_text("#!/bin/sh\n" + lines)
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


def test_who_holds_memory(nvidia_smi):
    nvidia_smi("""
case "$*" in
"--query-compute-apps=pid,process_name,used_memory --format=csv,noheader,nounits")
    printf '12, python, 300\\n345, /opt/a, b, 12\\n6, java, [N/A]\\n';;
"--query-gpu=uuid,memory.free --format=csv,noheader,nounits") printf 'GPU-1, 1024\\nGPU-2, [N/A]\\n';;
*) exit 1;;
esac
""")
    assert detect.holders() == [(12, "python", 300 << 20), (345, "/opt/a, b", 12 << 20), (6, "java", None)]
    assert detect.free() == {"GPU-1": 1 << 30}


@pytest.mark.parametrize("lines", ["exit 9", "echo No devices were found", "exec sleep 60"])
def test_nvidia_smi_without_an_answer(lines, nvidia_smi, monkeypatch):
    monkeypatch.setattr(detect, "PATIENCE", 0.5)
    nvidia_smi(lines)
    assert detect.holders() == [] and detect.free() == {}


def test_no_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect.holders() == [] and detect.free() == {}


@pytest.fixture
def look(monkeypatch):
    """Have these facts found."""
    return lambda facts: monkeypatch.setattr(detect, "look", lambda: facts)


def test_auto_takes_cuda_where_it_can(look):
    look(GOOD)
    assert backends.choose("auto") == ("cuda", "backend: cuda (NVIDIA H100)")
    look(NO_DRIVER)
    assert backends.choose("auto") == ("numpy", "backend: numpy (no NVIDIA driver)")
    assert backends.backend("auto").name == "numpy"
    look(replace(GOOD, cupy=()))  # there is a GPU: say at once how to get to it
    name, line = backends.choose("auto")
    assert (name, line) == ("numpy", 'backend: numpy (an NVIDIA driver but no CuPy: pip install "gpunet[cuda13]")')


def test_a_backend_by_name(look, monkeypatch):
    look(NO_DRIVER)
    assert backends.choose("numpy") == ("numpy", "backend: numpy")
    for function in (backends.choose, backends.backend):
        with pytest.raises(GpunetError, match=r"^backend cuda: no NVIDIA driver: there is no GPU"):
            function("cuda")
        with pytest.raises(GpunetError, match=r"expected one of numpy, cuda, emulator, auto, got 'tpu'"):
            function("tpu")
    monkeypatch.setattr(emulator, "problem", lambda: "there is no g++")
    with pytest.raises(GpunetError, match=r"^backend emulator: there is no g\+\+$"):
        backends.backend("emulator")
    monkeypatch.setattr(emulator, "problem", lambda: None)
    look(GOOD)
    assert [backends.choose(name)[0] for name in backends.BACKENDS] == list(backends.BACKENDS)


def test_a_backend_that_cannot_run_is_told_before_data_is_looked_for(look):
    look(NO_DRIVER)
    data = {"name": "cifar10", "directory": "nowhere"}
    with pytest.raises(GpunetError, match="^backend cuda: no NVIDIA driver"):
        Trainer(parse_config({"model": {"name": "mlp"}, "data": data, "train": {"backend": "cuda"}}))


def started(*arguments, cwd=None, **environment):
    """What the command, run as users do on a machine whose GPUs are hidden, prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-m", "gpunet", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


SMALL = ("mlp_shapes", "--set", "model.hidden=[8]", "--set", "data.train=100", "--set", "data.test=20",
         "--set", "train.epochs=1", "--set", "train.batch=30")  # fmt: skip


@pytest.mark.parametrize("command", ["train", "summary"])
def test_cuda_without_a_gpu_is_one_line_and_exit_code_2(command, tmp_path):
    done = started(command, *SMALL, "--backend", "cuda", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"gpunet: backend cuda: (no NVIDIA driver|no GPU is visible): .*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_training_says_what_computes(tmp_path):
    done = started("train", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^backend: numpy \(no ", done.stderr, re.M)
    (folder,) = (tmp_path / "runs").iterdir()
    assert 'backend = "auto"' in (folder / "config.toml").read_text()  # so that it evaluates anywhere
    assert "numpy, float32" in (folder / "report.md").read_text()
    done = started("evaluate", str(folder), "--backend", "auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert started("summary", *SMALL, cwd=tmp_path).stdout.count(", backend numpy\n") == 1


def test_doctor_tells_what_is_here(tmp_path):
    done = started("doctor", GPUNET_CACHE=str(tmp_path / "cache"), GPUNET_DATA=str(tmp_path), OMP_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = dict(line.split(None, 1) for line in done.stdout.splitlines() if line[:1].strip())
    assert rows["numpy"] == "works"  # after the row of its version
    assert re.match("no NVIDIA driver: |no GPU is visible: ", rows["cuda"])
    assert rows["auto"].startswith("numpy (no ")
    assert "emulator" in rows
    assert f"cache  {tmp_path / 'cache'}" in done.stdout
    assert f"{tmp_path}, writable" in done.stdout
    assert "OMP_NUM_THREADS=3" in rows["threads"]
    assert "cannot tell" not in done.stdout


def test_doctor_lists_gpus(look, monkeypatch):
    look(replace(GOOD, devices=(HOPPER, VOLTA), visible="0,1", cupy=()))
    monkeypatch.setattr(detect, "free", lambda: {"GPU-1": 3 << 30})
    monkeypatch.setattr(detect, "holders", lambda: [(7, "python", 2 << 30), (8, "java", None)])
    said = doctor.report()
    assert "0: NVIDIA H100, sm_90, 80 GiB, 3 GiB of it free\n" in said
    assert "1: Tesla V100, sm_70, 16 GiB\n" in said
    assert "runs CUDA up to 13.0; CUDA_VISIBLE_DEVICES='0,1'\n" in said
    assert "python (process 7): 2 GiB\n" in said and "java (process 8): unknown\n" in said
    assert re.search(r"^cuda +an NVIDIA driver but no CuPy: pip install", said, re.M)


def test_doctor_survives_every_probe(monkeypatch):
    """Whatever fails is a line of its own, and the others are still there."""

    def fail(*arguments):
        raise RuntimeError("two\nlines")

    def refuse():
        raise GpunetError("kernel cache 'x': cannot be made")

    monkeypatch.setattr(detect, "look", fail)
    monkeypatch.setattr(detect, "holders", fail)
    monkeypatch.setattr(backends, "backend", fail)
    monkeypatch.setattr(emulator, "problem", fail)
    monkeypatch.setattr(os, "sched_getaffinity", fail)
    monkeypatch.setattr(cache, "folder", refuse)
    said = doctor.report()
    rows = [line.split(None, 1) for line in said.splitlines() if line]
    failed = "cannot tell: RuntimeError: two lines"
    assert ["driver", "none; RuntimeError: two lines"] in rows
    for label in ("numpy", "emulator", "cuda", "auto", "threads"):
        assert [label, failed] in rows
    assert re.search(f"^used by +{failed}$", said, re.M)
    assert ["kernel", "cache  cannot tell: kernel cache 'x': cannot be made"] in rows


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    assert doctor._folder(tmp_path) == f"{tmp_path}, writable"
    assert doctor._folder(tmp_path / "a" / "b") == f"{tmp_path / 'a' / 'b'}, writable, not there yet"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert doctor._folder(tmp_path) == f"{tmp_path}, not writable"


def test_doctor_runs_the_parity_suite(gpunet, look, monkeypatch):
    ran = []
    suite = SimpleNamespace(main=lambda name: ran.append(name) or len(ran) - 1)
    monkeypatch.setitem(sys.modules, "gpunet.testing.parity", suite)
    monkeypatch.setattr(doctor, "report", lambda: "the report")
    monkeypatch.setattr(emulator, "problem", lambda: None)
    look(GOOD)
    assert gpunet("doctor") == (0, "the report\n", "") and ran == []
    assert gpunet("doctor", "--parity") == (0, "the report\n", "") and ran == ["cuda"]
    assert gpunet("doctor", "--parity", "--backend", "emulator")[0] == 1  # the suite's own exit code
    look(NO_DRIVER)
    assert gpunet("doctor", "--parity")[0] == 2
    assert ran == ["cuda", "emulator", "emulator"]
    for arguments, said in (
        (["--parity", "--backend", "cuda"], "gpunet: backend cuda: no NVIDIA driver: "),
        (["--parity", "--backend", "numpy"], "gpunet: doctor: --backend: expected cuda or emulator, got 'numpy'"),
        (["--backend", "cuda"], "gpunet: doctor: --backend: expected beside --parity only"),
    ):
        code, _, err = gpunet("doctor", *arguments)
        assert code == 2 and err.startswith(said) and err.count("\n") == 1
    assert len(ran) == 3
