"""What all tests share: one BLAS thread (replicas are our threads), calm hypothesis, the real data."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported

from pathlib import Path

import pytest
from hypothesis import settings

# A loaded machine must not fail a test. The rest stays as it is: with CI set, the same examples each time.
settings.register_profile("gpunet", parent=settings.default, deadline=None)
settings.load_profile("gpunet")


@pytest.fixture(scope="session")
def cifar10():
    """The folder that GPUNET_DATA names, with the real CIFAR-10 in it."""
    folder = os.environ.get("GPUNET_DATA")
    if not folder:
        pytest.skip("real data: set GPUNET_DATA to the folder that holds cifar-10-batches-bin")
    if not Path(folder).is_dir():
        pytest.fail(f"GPUNET_DATA: expected a folder, got '{folder}'")
    return Path(folder)
