"""Standard output where it leads to a full disk, or to a reader that has seen enough."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from resnet_jax.errors import ConfigError, one_line


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Brings what is printed in the block to its end.

    A reader that has gone (`| head`) is no mistake.

    Raises:
      ConfigError: It cannot be written.

    Example:
      >>> with printing():
      ...     print("one line")
      one line
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _discard()
    except OSError as error:
        if error.filename is not None:  # of a file, not of this stream
            raise
        _discard()
        raise ConfigError(f"standard output cannot be written ({one_line(error)})") from error


def print_copy(line: str) -> None:
    """Prints a line that is not lost without it: it is also in a file.

    Args:
      line: The line.

    Example:
      >>> print_copy("top-1 98.89%")
      top-1 98.89%
    """
    with contextlib.suppress(ConfigError), printing():
        print(line)


def _discard() -> None:
    """What still waits to be written goes nowhere; else Python would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
