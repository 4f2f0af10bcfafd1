"""`python -m resnet_jax COMMAND`, and the script `resnet-jax`."""

import sys

from resnet_jax.errors import check_system


def main() -> int:
    """Runs the command that the process's arguments name; returns its exit code."""
    check_system()  # the import below needs modules that Windows lacks
    from resnet_jax.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
