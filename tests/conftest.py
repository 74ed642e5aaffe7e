"""What all tests share: one BLAS thread (replicas are our threads), calm hypothesis, the real data."""

import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported

from pathlib import Path

import pytest
from hypothesis import settings

from gpunet import cli
from gpunet.train import report

# A loaded machine must not fail a test. The rest stays as it is: with CI set, the same examples each time.
settings.register_profile("gpunet", parent=settings.default, deadline=None)
settings.load_profile("gpunet")


@pytest.fixture
def gpunet(monkeypatch, capsys):
    """The command `gpunet` in this process: returns (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpunet", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def no_pictures(monkeypatch):
    """Trainings that draw nothing: drawing takes longer than they do."""
    monkeypatch.setattr(report, "plot_curves", lambda *arguments: None)
    monkeypatch.setattr(report, "write_pictures", lambda *arguments: [])


@pytest.fixture(scope="session")
def cifar10():
    """The folder that GPUNET_DATA names, with the real CIFAR-10 in it."""
    folder = os.environ.get("GPUNET_DATA")
    if not folder:
        pytest.skip("real data: set GPUNET_DATA to the folder that holds cifar-10-batches-bin")
    if not Path(folder).is_dir():
        pytest.fail(f"GPUNET_DATA: expected a folder, got '{folder}'")
    return Path(folder)
