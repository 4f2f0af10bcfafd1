"""`python -m resnet_jax COMMAND`."""

import sys

from resnet_jax.errors import check_system

if __name__ == "__main__":
    check_system()  # what follows imports modules that Windows does not have
    from resnet_jax.cli.parser import main

    sys.exit(main())
