"""The entry point of the command line: runs a command and turns errors into exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Sequence

from resnet_jax.cli.arguments import parse
from resnet_jax.config.flags import parse_train_flags
from resnet_jax.distributed.signals import interrupts
from resnet_jax.errors import (
    DIVERGED,
    MISTAKE,
    STOPPED,
    UNREGISTERED,
    ConfigError,
    DivergedError,
    ResNetJaxError,
    StoppedError,
    import_failure,
    one_line,
)
from resnet_jax.terminal import log

__all__ = ["main", "parse_train_flags"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
      argv: The command and its arguments; None: those of the process.

    Example:
      >>> main(["summary", "resnet2O"])
      2
    """
    _open_closed_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = argparse.Namespace()
    try:
        with interrupts():
            options = _parse(arguments)
            return options.command(options) or 0
    except DivergedError as error:
        return _fail(error, DIVERGED)
    except StoppedError as error:
        return _fail(error, STOPPED, "stopped")
    except KeyboardInterrupt:  # incomplete files have been removed
        return _fail(Exception("interrupted; run the command again"), STOPPED, "stopped")
    except ResNetJaxError as error:
        if hasattr(options, "recipe"):  # the library cannot know which commands have the flag
            text = str(error).replace(UNREGISTERED, f"{UNREGISTERED} (--recipe=FILE)")
            return _fail(Exception(text), MISTAKE)
        return _fail(error, MISTAKE)
    except ImportError as error:
        return _fail(Exception(import_failure(error)), MISTAKE)
    except OSError as error:
        # Any use of a path that is too long raises it, even the question whether it exists.
        if error.errno != errno.ENAMETOOLONG:
            raise
        return _fail(Exception(f"{error.filename}: {error.strerror}"), MISTAKE)


def _open_closed_streams() -> None:
    """Connects closed standard streams (`>&-`) to the null device.

    Otherwise the next file that is opened gets the number of the stream, and its output.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if null == number:
            os.set_inheritable(null, True)
        stream = open(null, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)


def _parse(arguments: list[str]) -> argparse.Namespace:
    if any("\0" in each for each in arguments):  # impossible in a shell, but not from Python
        raise ConfigError("an argument contains the character NUL, which names cannot have")
    return parse(arguments)


def _fail(error: Exception, code: int, word: str = "error") -> int:
    message = one_line(error).removeprefix(f"{word} ")  # "stopped: stopped by a signal" repeats it
    with contextlib.suppress(OSError):  # the log may be on a full disk; the exit code remains
        log(f"{word}: {message}")
    return code
