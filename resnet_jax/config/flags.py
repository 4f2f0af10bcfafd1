"""The flags of `train`: a configuration file, its fields, and the workdir."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resnet_jax.config.suggestions import likely_fields
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

_FLAGS = ("config", "workdir")  # besides the fields of --config
# What other programs call them.
_OTHER_FLAGS = {
    **{"recipe": "config", "cfg": "config", "config_file": "config", "preset": "config"},
    **{"dir": "workdir", "output": "workdir", "output_dir": "workdir", "log_dir": "workdir"},
}

# The largest ratio of data.eval_resize to the crop in any recipe is 256 / 224 = 1.14.
_MAX_RESIZE_RATIO = 1.5


def parse_train_flags(arguments: Sequence[str], *, help_flag: str = "--help") -> tuple[Any, Path]:
    """Parses the flags of `train`.

    Args:
      arguments: Such as ["--config=cifar:resnet56", "--config.train.epochs=3"].
      help_flag: How messages name the flag that lists all fields.

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
        raise ConfigError(_explain_flag_error(error, arguments, help_flag)) from error
    if len(left) > 1:
        raise ConfigError(_explain_word(left[1]))
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
            if not name:
                raise ConfigError(f"--config=: must name a recipe; {_explain_file(Path())}")
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


def packaged_recipe(name: str) -> Path | None:
    """The file of a recipe of this package, such as "cifar:resnet56"; None for any other name.

    The name may come from a stranger's run, so the file is in the folder of recipes or nowhere.
    """
    stem = name.partition(":")[0].removeprefix("configs/").removesuffix(".py")
    path = _recipe_folder() / f"{stem}.py"
    known = bool(re.fullmatch(r"\w{1,99}(/\w{1,99})?", stem)) and path.is_file()
    return path if known else None


def _recipe_folder() -> Path:
    """The folder of the recipes, in the installed package or in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def _explain_file(file: Path) -> str:
    if file.is_file():
        return "its get_config() does not return a resnet_jax.config.Config"
    # A recipe's name works in any folder; a path is answered with a path.
    path = "configs/{}.py" if file.suffix or len(file.parts) > 1 else "{}"
    recipes = {each.stem: path.format(each.stem) for each in sorted(_recipe_folder().glob("*.py"))}
    if close := difflib.get_close_matches(file.stem, recipes, n=1):
        return f"no such file; did you mean {recipes[close[0]]}?"
    return f"no such file; there are {', '.join(recipes.values())}"


def _explain_flag_error(error: Exception, arguments: Sequence[str], help_flag: str) -> str:
    """One line about a wrong flag; the library's own messages suggest no alternatives."""
    from absl import flags

    from resnet_jax.config.schema import Config
    from resnet_jax.config.serialization import to_flat

    fields = to_flat(Config())
    for argument in arguments:
        if unknown := _explain_name(argument, fields, help_flag):
            return unknown
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


def _explain_name(argument: str, fields: Mapping[str, Any], help_flag: str) -> str:
    """Explains a flag that does not exist, with the field that it may mean; "" for other words."""
    dashes, name = re.match(r"(-*)([^=]*)", argument).groups()  # type: ignore[union-attr]
    name = name[:100]
    if not dashes or name in ("", *_FLAGS):
        return ""
    shown = f"{dashes}{name}"
    if name == "resume":
        return f"{shown} is not a flag: to resume a run, repeat its command"
    if name.startswith("config."):
        field = name.removeprefix("config.")
        if field in fields:
            return ""
        if any(each.startswith(f"{field}.") for each in fields) and f"{field}.name" not in fields:
            return f"{field!r} is a section of fields; {help_flag}={field} lists them"
        text, close = f"unknown field {field!r}", likely_fields(field, fields)
    else:
        near = [_OTHER_FLAGS[name]] if name in _OTHER_FLAGS else []
        near = near or difflib.get_close_matches(name, _FLAGS, n=1)
        found = [f"config.{each}" for each in likely_fields(name, fields)]
        text, close = f"unknown flag {shown!r}", [f"--{each}" for each in near or found]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"see {help_flag}=all"
    return f"{text}; {hint}"


def _explain_word(word: str) -> str:
    """Explains a word that is no flag, such as epochs=3."""
    from resnet_jax.config.schema import Config
    from resnet_jax.config.serialization import to_flat

    name, equals, value = word[:100].partition("=")
    found = likely_fields(name, to_flat(Config())) if equals else []
    flag = f"--config.{found[0]}={value}" if found else "--config.FIELD=VALUE"
    return f"{word[:100]!r} is not a flag; write {flag}"


def _explain_value(text: str, fields: dict[str, Any]) -> str:
    """Explains "flag --config.FIELD=VALUE: ..." by the field's type; "" for other messages."""
    found = re.match(r"flag --config\.([\w.]+)=(.*?): ", text, re.DOTALL)
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    kind = kinds.get(type(fields.get(found[1]))) if found else None
    return one_line(f"{found[1]} = {found[2]!r}: must be {kind}") if found and kind else ""
