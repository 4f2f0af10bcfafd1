"""The errors a user can cause; everything else that fails is a fault of this package.

All of them are ``ValueError``s, so code that knows nothing of this package can catch them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What the command line ends with: images were skipped, the user's mistake, another process of the
# run is lost, training diverged, stopped with everything saved.
SKIPPED, MISTAKE, LOST, DIVERGED, STOPPED = 1, 2, 69, 70, 75


class ResNetJaxError(ValueError):
    """A mistake that the caller can mend; the message is one line that says how."""


class ModelError(ResNetJaxError):
    """An unknown model or field, a field value that is not allowed, or an unusable input shape."""


class WeightsError(ResNetJaxError):
    """A weight file or state dict that cannot be read, or does not fit the model."""


class ConfigError(ResNetJaxError):
    """A field of a run's configuration, or a workdir, that cannot be used as it is."""


class DataError(ResNetJaxError):
    """A data set that is missing, half-prepared, damaged, or not one to train on."""


class DivergedError(ResNetJaxError):
    """Training has diverged: the loss is no longer a number."""


class ExportError(ResNetJaxError):
    """An export that cannot be made or written, or that disagrees with its source."""


class StoppedError(ResNetJaxError):
    """A signal stopped a run between two steps; the same command goes on with it."""


class PeerError(ResNetJaxError):
    """Another process of the run is lost; the same command on all of them goes on with it."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Says that `name` is unknown and which of the known names come closest.

    Args:
      kind: What was looked up, as a noun: "model", "field of ResNet".
      name: What the user asked for.
      known: The names that exist.

    Returns:
      One line for an error.

    Example:
      >>> unknown_name("model", "resnet5O", ["resnet50", "plain34"])
      "unknown model 'resnet5O'; did you mean 'resnet50'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.6)
    if close:
        return f"unknown {kind} {name!r}; did you mean {' or '.join(map(repr, close))}?"
    return f"unknown {kind} {name!r}; known: {', '.join(known)}"


def one_line(text: object) -> str:
    """Joins the lines of a message from elsewhere.

    Args:
      text: The message, or the error that has it.

    Returns:
      One line; the error's class if it says nothing.

    Example:
      >>> one_line(ValueError("no such file:\\n  a.txt")), one_line(EOFError())
      ('no such file: a.txt', 'EOFError')
    """
    return " ".join(str(text).split()) or type(text).__name__
