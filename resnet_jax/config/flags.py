"""The flags of `train`: a configuration file, its fields, and the workdir."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import re
import runpy
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_jax.errors import ConfigError, import_failure, one_line

_PACKAGE = Path(__file__).parents[1]

# Recipes that became choices of another one: former name -> recipe:choice.
_FORMER_NAMES = {
    "cifar10": "cifar:cifar10",
    "cifar100": "cifar:cifar100",
    "imagenet_timm_a1": "imagenet_timm:a1",
    "imagenet_timm_a2": "imagenet_timm:a2",
    "imagenet_timm_a3": "imagenet_timm:a3",
}

# The largest ratio of data.eval_resize to the crop in any recipe is 256 / 224 = 1.14.
_MAX_RESIZE_RATIO = 1.5

_HELP = """usage: {program} [--config=RECIPE[:ARG]] [--workdir=DIR] [--config.FIELD=X ...]

Trains the network that a configuration describes. To resume a run, repeat its command.

  --config   the name of a recipe of this package, such as cifar:resnet56 (default: digits), or a
             file with get_config(), such as mine.py; the file is run as Python code, so read one
             from a stranger before you use it
  --workdir  folder of the run (default: runs/ and the name of the configuration)
{launch_flags}
Fields of this configuration:
"""


def parse_train_flags(arguments: Sequence[str]) -> tuple[Any, Path]:
    """Parses the flags of `train`.

    Args:
      arguments: Such as ["--config=cifar:resnet56", "--config.train.epochs=3"].

    Returns:
      (Config, workdir).

    Raises:
      ConfigError: A flag, field or file is unknown, or a value cannot be parsed.

    Example:
      >>> parse_train_flags(["--config.train.epochs=3"])[0].train.epochs
      3.0
    """
    from absl import flags
    from ml_collections import config_flags

    from resnet_jax.config.schema import Config

    arguments, run_names = _resolve_recipes(arguments)
    # The library needs the file before its fields; a person may write them in any order.
    argv = ["train.py", *sorted(arguments, key=lambda each: not each.startswith("--config="))]
    values = flags.FlagValues()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the library prints before it raises
            config_flags.DEFINE_config_file(
                "config", _recipe_path("digits"), flag_values=values, sys_argv=argv
            )
            flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
            left = values(argv)
        config = values.config
        file = config_flags.get_config_filename(values["config"])
    except Exception as error:  # a configuration file is a program, and may raise anything
        raise ConfigError(_explain_flag_error(error, arguments)) from error
    if len(left) > 1:
        raise ConfigError(f"{left[1]!r} is not a flag; write --config.FIELD=VALUE")
    if not isinstance(config, Config):
        path = file.partition(":")[0]
        raise ConfigError(f"--config={path}: {_explain_file(Path(path))}")
    if config.model.shortcut == "None":  # as --help shows it
        config.model.shortcut = None
    _check_resize(config, arguments)
    workdir = values.workdir or f"runs/{run_names.get(file, 'digits')}"
    if "://" in workdir:
        raise ConfigError(
            f"--workdir={workdir}: must be a local folder; to copy the run to a bucket, set "
            "--config.checkpoint.copy_to=gs://BUCKET/RUN"
        )
    return config, Path(workdir)


def _check_resize(config: Any, arguments: Sequence[str]) -> None:
    """Refuses a recipe's eval_resize if flags have made the image size much smaller.

    Evaluation would cut small crops out of large images and see a fraction of each.
    """
    given = {each.lstrip("-").partition("=")[0].removeprefix("config.") for each in arguments}
    data = config.data
    field = "data.eval_size" if data.eval_size else "data.image_size"
    side = data.eval_size or data.image_size
    if "data.eval_resize" in given or field not in given or side < 1:
        return
    if data.eval_resize > _MAX_RESIZE_RATIO * side:
        raise ConfigError(
            f"{field} = {side}: the recipe resizes images to data.eval_resize = "
            f"{data.eval_resize} before the evaluated crop, which would show {side} of "
            f"{data.eval_resize} pixels a side; set data.eval_resize too, such as {side}"
        )


def _resolve_recipes(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Replaces the names of recipes by their files.

    Returns:
      The flags, each --config as one word FILE or FILE:ARG, and the name of a run by that word.
    """
    found, run_names, rest = [], {}, iter(arguments)
    for each in rest:
        if each in ("--config", "-config"):
            each = f"--config={next(rest, '')}"
        if each.startswith("--config="):
            name, _, argument = each.removeprefix("--config=").partition(":")
            run_name = "-".join(part for part in (Path(name).stem, argument) if part)
            path = _recipe_path(name)
            former = _FORMER_NAMES.get(Path(name).stem)
            if former and path == name and not Path(name).is_file():
                recipe, _, choice = former.partition(":")
                renamed = _recipe_path(str(Path(name).with_name(recipe)))
                if Path(renamed).is_file():
                    path, argument = renamed, ",".join(filter(None, (choice, argument)))
            value = f"{path}:{argument}" if argument else path
            run_names[value] = re.sub(r"[/:,]+", "-", run_name)
            each = f"--config={value}"
        found.append(each)
    return found, run_names


def import_recipe(name: str) -> None:
    """Runs the file of a recipe, which may register a network; "": none."""
    if not name:
        return
    path = _recipe_path(name)
    if not Path(path).is_file():
        raise ConfigError(f"--recipe={name}: {_explain_file(Path(path))}")
    runpy.run_path(path, run_name=Path(path).stem)


def _recipe_path(name: str) -> str:
    """The file of a recipe such as "digits" or "configs/digits.py"; other names are returned."""
    folder = _recipe_folder()
    path = folder / f"{name.removeprefix('configs/').removesuffix('.py')}.py"
    inside = path.resolve().is_relative_to(folder.resolve())
    return str(path) if not Path(name).is_file() and inside and path.is_file() else name


def _recipe_folder() -> Path:
    """The folder of the recipes, in the installed package or in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def _explain_file(file: Path) -> str:
    if file.is_file():
        return "its get_config() does not return a resnet_jax.config.Config"
    recipes = sorted(_recipe_folder().glob("*.py"))
    return f"no such file; there are {', '.join(f'configs/{path.name}' for path in recipes)}"


def _explain_flag_error(error: Exception, arguments: Sequence[str]) -> str:
    """One line about a wrong flag; the library's own messages suggest no alternatives."""
    from absl import flags

    from resnet_jax.config.schema import Config
    from resnet_jax.config.serialization import to_flat

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
    last = text.splitlines()[-1].strip() if text else ""  # a bare `assert` has no message
    if explanation := _explain_value(str(error), fields):
        return explanation
    if isinstance(error, flags.Error) and "Error whilst parsing" not in str(error):
        return one_line(error)
    file = next((each for each in arguments if each.startswith("--config=")), "--config")
    if isinstance(error, ImportError) and not str(error.name).startswith("resnet_jax"):
        return import_failure(error, file)
    kind = [type(error).__name__] if last == text else []  # otherwise the last line names it
    return ": ".join([file, *kind, last]).rstrip(": ")


def _explain_value(text: str, fields: dict[str, Any]) -> str:
    """Explains "flag --config.FIELD=VALUE: ..." by the field's type; "" for other messages."""
    found = re.match(r"flag --config\.([\w.]+)=(.*?): ", text, re.DOTALL)
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    kind = kinds.get(type(fields.get(found[1]))) if found else None
    return one_line(f"{found[1]} = {found[2]!r}: must be {kind}") if found and kind else ""


def train_help(arguments: Sequence[str], launch_flags: str = "") -> str:
    """The text of `train --help`, with the values of the configuration that `arguments` name.

    Raises:
      ConfigError: As `parse_train_flags`.

    Example:
      >>> "--config.train.batch_size=64" in train_help([])
      True
    """
    config, _ = parse_train_flags(arguments)
    is_script = Path(sys.argv[0]).name == "train.py"
    program = "python train.py" if is_script else "python -m resnet_jax train"
    return _HELP.format(program=program, launch_flags=launch_flags) + _fields_help(config)


def _fields_help(config: Any) -> str:
    """Every field with its value, and its entry in the docstring of its section."""
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
