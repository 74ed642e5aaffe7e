"""What runs a list: one package a backend, found by name."""

from importlib import import_module

from gpunet.errors import GpunetError

BACKENDS = ("numpy", "cuda", "emulator")


def backend(name):
    """Return the backend called `name`; "auto" is the best one that runs here."""
    chosen, _ = choose(name)
    return import_module(f"gpunet.backends.{chosen}").Backend()


def choose(name):
    """Return (name of the backend, a line that says which one and why) for a name or "auto".

    auto is cuda where it can run, else numpy. Raises GpunetError for an unknown name, or for one that cannot run here.
    """
    if name == "auto":
        return _automatic()
    if name not in BACKENDS:
        raise GpunetError(f"backend: expected one of {', '.join(BACKENDS)}, auto, got {name!r}")
    reason = problem(name)
    if reason:
        raise GpunetError(f"backend {name}: {reason}")
    return name, f"backend: {name}"


def problem(name):
    """Return None where the backend can run here; else one line: what is missing and how to get it."""
    if name == "cuda":
        from gpunet.backends.cuda import detect  # only these names need it

        return detect.problem(detect.look())
    if name == "emulator":
        from gpunet.backends import emulator

        return emulator.problem()
    return None


def _automatic():
    from gpunet.backends.cuda import detect

    facts = detect.look()
    reason = detect.problem(facts)
    if reason is None:
        return "cuda", f"backend: cuda ({facts.devices[0].name})"
    if facts.driver is None:
        reason = reason.partition(":")[0]  # no GPU is no fault: nothing is to be done
    return "numpy", f"backend: numpy ({reason})"
