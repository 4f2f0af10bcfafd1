"""`python -m resnet_jax COMMAND`."""

import sys

from resnet_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
