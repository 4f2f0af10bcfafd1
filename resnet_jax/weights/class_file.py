"""Names of a network's outputs, from a file that the user gives."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from resnet_jax.errors import ConfigError
from resnet_jax.files import MIB, read_bytes

_MOST_BYTES = 16 * MIB  # ImageNet-21k's names take 1 MB
_LONGEST_NAME = 1000  # characters


def read_class_file(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Reads names of classes, in the order of the outputs.

    Args:
      path: A text file with a name a line, or JSON: a list of names, or an object from the
        output's number to its name ({"0": "cat", "1": "dog"}).

    Returns:
      The names.

    Raises:
      ConfigError: It cannot be read, or is not of one of these kinds.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "names.json")
      ...     _ = path.write_text('{"1": "dog", "0": "cat"}')
      ...     read_class_file(path)
      ('cat', 'dog')
    """
    flag = f"--classes={os.fspath(path)}"
    try:
        text = read_bytes(os.path.expanduser(path), _MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{flag}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # not UTF-8, or a path with NUL in it
        raise ConfigError(f"{flag}: is not text in UTF-8 ({error})") from error
    names = _in_json(text, flag) if text.lstrip()[:1] in ("[", "{") else _in_lines(text)
    if not names:
        raise ConfigError(f"{flag}: is empty; give one name a line, or a JSON list")
    return check_names(names, flag)


def check_names(names: Sequence[Any], flag: str) -> tuple[str, ...]:
    """Names as a tuple.

    Raises:
      ConfigError: They are not text, or one of them occurs twice.
    """
    seen: set[str] = set()
    for place, name in enumerate(names):
        if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME:
            raise ConfigError(f"{flag}: the name of output {place} is {str(name)[:100]!r}")
        if name in seen:
            raise ConfigError(f"{flag}: {name[:100]!r} is the name of two outputs")
        seen.add(name)
    return tuple(names)


def _in_lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _in_json(text: str, flag: str) -> list[Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{flag}: is not whole JSON ({error})") from error
    if isinstance(found, list):
        return found
    names = [found.get(str(place)) for place in range(len(found))]
    if None in names:
        raise ConfigError(
            f'{flag}: has {len(names)} names and none for "{names.index(None)}"; number them '
            f"from 0 to {len(names) - 1}"
        )
    return names
