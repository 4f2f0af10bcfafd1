"""The flags of `train`: a configuration file, its fields, and where the run is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_jax.errors import ConfigError, import_failure, one_line

_PACKAGE = Path(__file__).parents[1]

# No recipe resizes by more than 256 / 224 = 1.14.
_FAR_ABOVE = 1.5

_HELP = """usage: python train.py [--config=RECIPE[:ARG]] [--workdir=DIR] [--config.FIELD=X ...]

Trains the network that a configuration describes; the same command goes on with a stopped run.

  --config   a recipe of this package by its name, such as cifar10:resnet56 (default: digits), or a
             file with get_config(), such as mine.py; a file is run as Python code, so take one from
             a stranger only after reading it
  --workdir  where the run is kept (default: runs/ and the configuration's name)
{several}
Fields of this configuration:
"""


def parse_train_flags(arguments: Sequence[str]) -> tuple[Any, Path]:
    """The flags of train.py.

    Args:
      arguments: Such as ["--config=cifar10:resnet56", "--config.train.epochs=3"].

    Returns:
      (Config, workdir).

    Raises:
      ConfigError: An unknown flag, field or file, or a value that cannot be read.

    Example:
      >>> parse_train_flags(["--config.train.epochs=3"])[0].train.epochs
      3.0
    """
    from absl import flags
    from ml_collections import config_flags

    from resnet_jax.config.schema import Config

    arguments = _with_recipe(arguments)
    # The library wants the file before its fields, wherever a person wrote it.
    argv = ["train.py", *sorted(arguments, key=lambda each: not each.startswith("--config="))]
    values = flags.FlagValues()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it prints before it raises
            config_flags.DEFINE_config_file(
                "config", _recipe_path("digits"), flag_values=values, sys_argv=argv
            )
            flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
            left = values(argv)
        config = values.config
        file, _, argument = config_flags.get_config_filename(values["config"]).partition(":")
    except Exception as error:  # a configuration file is a program, and may raise anything
        raise ConfigError(_flag_fault(error, arguments)) from error
    if len(left) > 1:
        raise ConfigError(f"{left[1]!r} is not a flag; write --config.FIELD=VALUE")
    if isinstance(config, Config) and config.model.shortcut == "None":  # as --help shows it
        config.model.shortcut = None
    if not isinstance(config, Config):
        raise ConfigError(f"--config={file}: {_file_fault(Path(file))}")
    _check_resize(config, arguments)
    name = "-".join(part for part in (Path(file).stem, argument) if part)
    name = re.sub(r"[/:]+", "-", name)  # of an argument such as folder:PATH
    if "://" in (values.workdir or ""):
        raise ConfigError(
            f"--workdir={values.workdir}: must be a folder; for a copy in a "
            "bucket there is --config.checkpoint.copy_to=gs://BUCKET/RUN"
        )
    return config, Path(values.workdir or Path("runs") / name)


def _check_resize(config: Any, arguments: Sequence[str]) -> None:
    """Refuses a recipe's eval_resize for an image size that flags have made much smaller.

    Evaluation would cut small crops out of large images and see a fraction of each.
    """
    given = {each.lstrip("-").partition("=")[0].removeprefix("config.") for each in arguments}
    data = config.data
    field = "data.eval_size" if data.eval_size else "data.image_size"
    side = data.eval_size or data.image_size
    if "data.eval_resize" in given or field not in given or side < 1:
        return
    if data.eval_resize > _FAR_ABOVE * side:
        raise ConfigError(
            f"{field} = {side}: the recipe resizes images to data.eval_resize = "
            f"{data.eval_resize} before the evaluated crop, which would show {side} of "
            f"{data.eval_resize} pixels a side; set data.eval_resize too, such as {side}"
        )


def _with_recipe(arguments: Sequence[str]) -> list[str]:
    """The flags with --config as one word that names a file."""
    found, rest = [], iter(arguments)
    for each in rest:
        if each in ("--config", "-config"):
            each = f"--config={next(rest, '')}"
        if each.startswith("--config="):
            name, _, argument = each.removeprefix("--config=").partition(":")
            path = _recipe_path(name)
            each = f"--config={path}:{argument}" if argument else f"--config={path}"
        found.append(each)
    return found


def _recipe_path(name: str) -> str:
    """The file of a recipe's name, as "cifar10" or "configs/cifar10.py"; else the name itself."""
    path = _recipes() / f"{name.removeprefix('configs/').removesuffix('.py')}.py"
    inside = path.resolve().is_relative_to(_recipes().resolve())
    return str(path) if not Path(name).is_file() and inside and path.is_file() else name


def _recipes() -> Path:
    """The folder of the recipes: in the package, or in the checkout that is being worked on."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def _file_fault(file: Path) -> str:
    if file.is_file():
        return "its get_config() does not return a resnet_jax.config.schema.Config"
    recipes = sorted(_recipes().glob("*.py"))
    return f"no such file; there are {', '.join(f'configs/{path.name}' for path in recipes)}"


def _flag_fault(error: Exception, arguments: Sequence[str]) -> str:
    """One line for what is wrong with a flag: the library's own texts name no alternatives."""
    from absl import flags

    from resnet_jax.config.schema import Config, to_flat

    fields = to_flat(Config())
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        field = name.removeprefix("config.")
        if name.startswith("config.") and field not in fields:
            close = [each for each in fields if each.partition(".")[2] == field]
            close = close or difflib.get_close_matches(field, fields)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see --help"
            return f"unknown field {field!r}; {hint}"
    text = str(error).strip()
    last = text.splitlines()[-1].strip() if text else ""  # `assert` raises without a word
    if fault := _value_fault(str(error), fields):
        return fault
    if isinstance(error, flags.Error) and "Error whilst parsing" not in str(error):
        return one_line(error)
    file = next((each for each in arguments if each.startswith("--config=")), "--config")
    if isinstance(error, ImportError) and not str(error.name).startswith("resnet_jax"):
        return import_failure(error, file)
    kind = [type(error).__name__] if last == text else []  # else the last line names it
    return ": ".join([file, *kind, last]).rstrip(": ")


def _value_fault(text: str, fields: dict[str, Any]) -> str:
    """ "flag --config.FIELD=VALUE: ..." with what the field takes; "" where it is no field's."""
    found = re.match(r"flag --config\.([\w.]+)=(.*?): ", text, re.DOTALL)
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    kind = kinds.get(type(fields.get(found[1]))) if found else None
    return one_line(f"{found[1]} = {found[2]!r}: must be {kind}") if found and kind else ""


def train_help(arguments: Sequence[str], launch_flags: str = "") -> str:
    """What `train --help` says.

    Args:
      arguments: The other flags: the values of the fields are those of their configuration.
      launch_flags: The lines about flags that start several processes.

    Returns:
      Text of many lines.

    Raises:
      ConfigError: As `parse_train_flags`.

    Example:
      >>> "--config.train.batch_size=64" in train_help([])
      True
    """
    config, _ = parse_train_flags(arguments)
    return _HELP.format(several=launch_flags) + _fields_help(config)


def _fields_help(config: Any) -> str:
    """Every field with its value here and what the docstring of its section says of it."""
    lines = []
    for part in dataclasses.fields(config):
        section = getattr(config, part.name)
        text = inspect.getdoc(type(section)) or ""
        meanings = dict(re.findall(r"^  (\w+): (.*(?:\n    .*)*)", text, re.MULTILINE))
        for field in dataclasses.fields(section):
            lines.append(f"\n  --config.{part.name}.{field.name}={getattr(section, field.name)}")
            lines += textwrap.wrap(
                " ".join(meanings[field.name].split()),
                88,
                initial_indent=" " * 6,
                subsequent_indent=" " * 6,
            )
    return "\n".join(lines)
