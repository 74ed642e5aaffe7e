"""What gpunet is tested with and a user's own layers and kernels can be: gradient checks, kernel cases, compilers."""

from gpunet.testing.gradients import check_gradients

__all__ = ["check_gradients"]
