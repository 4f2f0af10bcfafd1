"""`python -m resnet_jax COMMAND`."""

import sys

from resnet_jax.errors import check_system

if __name__ == "__main__":
    check_system()  # the imports below need modules that Windows lacks
    from resnet_jax.cli import main

    sys.exit(main())
