"""`python -m gpunet` is the command `gpunet`."""

import sys

from gpunet.cli import main

if __name__ == "__main__":
    sys.exit(main())
