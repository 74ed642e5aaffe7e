"""A fixed slice of what benchmarks/fuzz.py tries: nothing but a GpunetError of one line may come of any input."""

import fuzz
import fuzz_targets
import pytest

INPUTS = 200


@pytest.mark.parametrize("target", fuzz_targets.TARGETS)
def test_inputs_are_accepted_or_refused(target, tmp_path):
    count = max(3, INPUTS * fuzz_targets.TARGETS[target].share // 1000)
    for number in range(count):
        files = fuzz.make(target, 0, number)
        _, wrong, _ = fuzz.examine(target, files)
        # the memory of this process is that of all tests before, too
        assert wrong is None or "MiB resident" in wrong, (
            f"{fuzz.save(tmp_path, target, 0, number, wrong, files)}: {wrong}"
        )


@pytest.fixture
def broken(monkeypatch):
    """Targets that do what none may."""

    def target(run):
        return fuzz_targets.Target(lambda rng: {"a": rng.randbytes(3)}, run, 10)

    def say(text):
        raise fuzz_targets.GpunetError(text)

    made = {
        "raises": lambda folder: 1 / 0,
        "is silent": lambda folder: say(""),
        "warns": lambda folder: exec("import warnings; warnings.warn('odd')", {"__name__": "gpunet.x"}),
        "is greedy": lambda folder: bytearray(2 << 30),
        "hangs": lambda folder: fuzz.time.sleep(60) if (folder / "a").read_bytes()[0] < 128 else None,
        "dies": lambda folder: fuzz.os._exit(3) if (folder / "a").read_bytes()[0] < 128 else None,
        "is good": lambda folder: say("a: expected b, got c"),
    }
    monkeypatch.setattr(fuzz_targets, "TARGETS", {name: target(run) for name, run in made.items()})
    monkeypatch.setattr(fuzz, "SECONDS", 1.0)
    monkeypatch.setattr(fuzz, "MEMORY", fuzz._status("VmRSS") + (1 << 30))  # this process has the other tests'


def test_the_harness_sees_what_goes_wrong(broken, tmp_path, capsys, monkeypatch):
    jobs = fuzz.plan(42, list(fuzz_targets.TARGETS))
    assert len(jobs) == 42
    with fuzz.own_folder():
        seen = fuzz.fuzz(jobs, 0, 2, tmp_path)
    said = {line.split("  ")[0].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    for name in ("raises", "is silent", "warns", "is greedy"):
        assert said[name][-5] == "6", name  # of six failed
    for name in ("hangs", "dies"):
        low = sum(fuzz.make(name, 0, number)["a"][0] < 128 for number in range(6))
        assert 0 < low < 6 and said[name][-5] == str(low) and said[name][-7] == str(6 - low), name
    assert said["is good"][-5] == "0" and said["is good"][-6] == "6"
    assert seen == len(list(tmp_path.glob("*.json")))
    monkeypatch.setattr(fuzz, "MEMORY", 64 << 30)  # an input is replayed in this process, which has the other tests'
    assert fuzz.replay(next(tmp_path.glob("raises*"))) and not fuzz.replay(_good(tmp_path))
    assert "ZeroDivisionError" in capsys.readouterr().out


def _good(folder):
    return fuzz.save(folder, "is good", 0, 0, "", {"a": b"\xff\x00"})
