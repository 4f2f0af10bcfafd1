"""Names of a network's outputs: ImageNet's, or those in a file that the user passes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import resources
from typing import Any

from resnet_jax.errors import ConfigError
from resnet_jax.files import MIB, read_bytes

IMAGENET_CLASSES = 1000
_MAX_BYTES = 16 * MIB  # the names of ImageNet-21k's classes have 1 MB
_LONGEST_NAME = 1000  # characters


def imagenet_names() -> tuple[str, ...]:
    """ImageNet's 1,000 class names in English, in the order of the labels, as in torchvision."""
    return tuple(line.split(" ", 1)[1] for line in _imagenet_lines())


def imagenet_ids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, in the order of the labels."""
    return tuple(line.split(" ", 1)[0] for line in _imagenet_lines())


def _imagenet_lines() -> list[str]:
    file = resources.files("resnet_jax.weights") / "imagenet_classes.txt"
    return file.read_text(encoding="utf-8").splitlines()


def complete_names(known: tuple[str, ...], classes: int) -> tuple[str, ...]:
    """A name for each class: the known names, else ImageNet's for 1,000 classes, else numbers."""
    if not known and classes == IMAGENET_CLASSES:
        return imagenet_names()
    # A head may be wider than its dataset (model.num_classes).
    return known + tuple(str(number) for number in range(len(known), classes))


def class_names_from(
    classes: str | os.PathLike[str] | Sequence[str],
) -> tuple[tuple[str, ...], str]:
    """(names, how they were passed), for the names themselves or the path of a file of them."""
    if isinstance(classes, str | os.PathLike):
        return read_class_file(classes) if classes else (), f"--classes={os.fspath(classes)}"
    return _checked(classes, "classes"), "classes"


def read_class_file(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Reads class names in the order of the outputs: one per line, or JSON.

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
        text = read_bytes(os.path.expanduser(path), _MAX_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{flag}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # not UTF-8, or a path with NUL in it
        raise ConfigError(f"{flag}: is not text in UTF-8 ({error})") from error
    names = _from_json(text, flag) if text.lstrip()[:1] in ("[", "{") else _from_lines(text)
    if not names:
        raise ConfigError(f"{flag}: is empty; give one name a line, or a JSON list")
    return _checked(names, flag)


def _checked(names: Sequence[Any], flag: str) -> tuple[str, ...]:
    """The names as a tuple; raises ConfigError unless they are text and all different."""
    known: set[str] = set()
    for output, name in enumerate(names):
        if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME:
            raise ConfigError(f"{flag}: the name of output {output} is {str(name)[:100]!r}")
        if name in known:
            raise ConfigError(f"{flag}: {name[:100]!r} is the name of two outputs")
        known.add(name)
    return tuple(names)


def _from_lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _from_json(text: str, flag: str) -> list[Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{flag}: is not whole JSON ({error})") from error
    if isinstance(found, list):
        return found
    names = [found.get(str(output)) for output in range(len(found))]
    if None in names:
        raise ConfigError(
            f'{flag}: has {len(names)} names and none for "{names.index(None)}"; number them '
            f"from 0 to {len(names) - 1}"
        )
    return names
