"""The text of `train --help`: the flags, the fields that are set most often, and every field."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from resnet_jax.config.flags import parse_train_flags
from resnet_jax.config.serialization import to_flat
from resnet_jax.config.suggestions import likely_fields
from resnet_jax.errors import ConfigError
from resnet_jax.terminal import program

_USAGE = "usage: {program} [--config=RECIPE[:ARG]] [--workdir=DIR] [--config.FIELD=X ...]"
_PURPOSE = "Trains the network that a configuration describes. To resume a run, repeat its command."
_FLAGS = (
    (
        "--config",
        "the name of a recipe of this package, such as cifar:resnet56 (default: digits), or a file "
        "with get_config(), such as mine.py; the file is run as Python code, so read one from a "
        "stranger before you use it",
    ),
    ("--workdir", "folder of the run (default: runs/ and the name of the configuration)"),
    (
        "--help=TOPIC",
        "all fields of a section, such as --help=optimizer, or of every section: --help=all",
    ),
)
# The fields that the short help shows.
_COMMON = (
    *("data.name", "data.image_size", "model.name", "model.dtype"),
    *("train.epochs", "train.batch_size", "train.seed"),
    *("optimizer.name", "optimizer.learning_rate", "optimizer.weight_decay", "schedule.name"),
    *("augment.mixup", "loss.label_smoothing", "checkpoint.init_from", "checkpoint.every_steps"),
)
_ALL = "all"
_WIDEST = 100  # longer lines are hard to read


def train_help(arguments: Sequence[str], launch_flags: str = "", topic: str = "") -> str:
    """The text of `train --help`, with the values of the configuration that `arguments` name.

    Args:
      arguments: The flags of `train`, such as --config=cifar.
      launch_flags: Flags that connect processes, a line "  --flag  meaning" each.
      topic: "": the flags and the most common fields; "all": every field; or a section or field,
        such as "optimizer" or "train.seed".

    Raises:
      ConfigError: The topic is unknown; or as `parse_train_flags`.

    Example:
      >>> "--config.train.batch_size=64" in train_help([])
      True
    """
    config, _ = parse_train_flags(arguments)
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    fields = to_flat(config)
    if topic in ("", _ALL):
        lines = [_fill(_usage(), width, indent=7), "", _fill(_PURPOSE, width), ""]
        lines += [*_entries(_FLAGS, width), ""]
        lines += [] if topic else [*_short_help(config, width), ""]
        if launch_flags:
            lines += ["flags of processes and devices:"]
            lines += _entries(_parse_entries(launch_flags), width)
        lines += ["", *_fields_help(config, [*fields], width)] if topic else []
        return "\n".join(lines).rstrip()
    chosen = [each for each in fields if each == topic or each.startswith(f"{topic}.")]
    if not chosen:
        close = likely_fields(topic, fields)
        sections = ", ".join(part.name for part in dataclasses.fields(config))
        hint = f"did you mean {' or '.join(close)}?" if close else f"sections: {sections}"
        raise ConfigError(f"--help={topic[:100]}: no such section or field; {hint}")
    return "\n".join(_fields_help(config, chosen, width)).rstrip()


def _usage() -> str:
    is_script = Path(sys.argv[0]).name == "train.py"
    return _USAGE.format(program="python train.py" if is_script else f"{program()} train")


def _short_help(config: Any, width: int) -> Iterable[str]:
    """The common fields with their values, and what each section is about."""
    fields, meanings = to_flat(config), _meanings(config)
    yield "common fields, with the values of this configuration:"
    common = [(f"--config.{each}={fields[each]}", _sentence(meanings[each])) for each in _COMMON]
    yield from _entries(common, width)
    yield ""
    yield "sections of fields:"
    sections = [
        (part.name, _sentence(inspect.getdoc(type(getattr(config, part.name))) or ""))
        for part in dataclasses.fields(config)
    ]
    yield from _entries(sections, width)


def _fields_help(config: Any, names: Sequence[str], width: int) -> Iterable[str]:
    """Fields with their values and all that the docstring of their section says of them."""
    fields, meanings, section = to_flat(config), _meanings(config), ""
    for name in names:
        if section != (section := name.partition(".")[0]):
            about = _sentence(inspect.getdoc(type(getattr(config, section))) or "")
            yield _fill(f"{section}: {about}", width)
        yield f"\n  --config.{name}={fields[name]}"
        yield _fill(meanings[name], width, indent=6, first=6)
        if name == [each for each in names if each.startswith(f"{section}.")][-1]:
            yield ""


def _meanings(config: Any) -> dict[str, str]:
    """The entry of each field in the docstring of its section."""
    found = {}
    for part in dataclasses.fields(config):
        text = inspect.getdoc(type(getattr(config, part.name))) or ""
        for name, meaning in re.findall(r"^  (\w+): (.*(?:\n    .*)*)", text, re.MULTILINE):
            found[f"{part.name}.{name}"] = " ".join(meaning.split())
    return found


def _sentence(text: str) -> str:
    """The first clause of a text, without its full stop."""
    return re.split(r"\.?\n|\.$|\. (?=[A-Z])|; ", text, maxsplit=1)[0]


def _parse_entries(text: str) -> list[tuple[str, str]]:
    found = re.findall(r"^ {2,4}(--\S+) +(.*(?:\n {8,}.*)*)", text, re.MULTILINE)
    return [(name, " ".join(meaning.split())) for name, meaning in found]


def _entries(entries: Sequence[tuple[str, str]], width: int) -> Iterable[str]:
    """Lines "  name  meaning"; meanings begin in one column, below a name that is too long."""
    column = min(max(len(name) for name, _ in entries) + 4, width * 2 // 5)
    for name, meaning in entries:
        if len(name) + 4 <= column:
            yield _fill(meaning, width, indent=column, first=f"  {name:<{column - 2}}")
        else:
            yield f"  {name}"
            yield _fill(meaning, width, indent=column, first=column)


def _fill(text: str, width: int, indent: int = 0, first: int | str = "") -> str:
    start = " " * first if isinstance(first, int) else first
    return textwrap.fill(
        text,
        width,
        initial_indent=start,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
