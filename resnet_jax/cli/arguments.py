"""The flags of every command except `train`, whose flags are in config/flags.py."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
from collections.abc import Sequence
from typing import Any, NoReturn

from resnet_jax.cli import commands
from resnet_jax.config.schema import DATA_NAMES
from resnet_jax.errors import ConfigError, unknown_name
from resnet_jax.limits import MAX_COUNT
from resnet_jax.terminal import program

_DESCRIPTION = """ResNets in JAX: training, evaluation, prediction and export.

exit codes:
  0   success
  1   some images could not be read and were skipped
  2   a mistake, reported in one line
  69  another process of the run is lost
  70  training diverged
  75  a signal stopped the command; a run has been saved
"""


# Commands that leave flags which their parsers do not know to others: `train` reads those of a
# configuration itself, `plan` and `find_rate` too, and `doctor` those that connect processes.
_PASS_ON = ("train", "plan", "find_rate", "doctor")
_TRAIN_FLAGS = (
    "The flags of train are accepted too: --config (a file that is run as Python code) and "
    "--config.FIELD=X; see train --help."
)
_WIDEST = 100  # columns of a help text


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses a command and its flags; `rest` has the flags that the command itself reads.

    Raises:
      ConfigError: The command or a flag is unknown, missing or invalid.
    """
    parser = build_parser()
    names = [*commands_of(parser)]
    if not arguments:
        raise ConfigError(f"no command; one of {', '.join(names)}; see {parser.prog} --help")
    command = arguments[0]
    if not command.startswith("-") and command not in names:
        raise ConfigError(unknown_name("command", command, names))
    if command == "train":  # even its --help
        options, rest = parser.parse_args([command]), [*arguments[1:]]
    else:
        options, rest = parser.parse_known_args(arguments)
    if rest and command not in _PASS_ON:
        raise ConfigError(_explain_rest(rest, commands_of(parser)[command]))
    flags = [word for word in rest if word.startswith("--")]
    for word in flags if command != "train" else ():
        of_a_run = word.startswith(("--config", "--workdir"))
        if not of_a_run and (close := _similar_flag(word, commands_of(parser)[command])):
            raise ConfigError(f"unknown flag {word.partition('=')[0]!r}; did you mean {close}?")
    options.rest = rest
    return options


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands by their names."""
    [found] = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(found.choices)


def _explain_rest(rest: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Explains the first word that a command does not know, with the most similar flag."""
    word = next((each for each in rest if each.startswith("-")), rest[0])
    flag, close = word.partition("=")[0][:100], _similar_flag(word, parser)
    hint = f"did you mean {close}?" if close else f"see {parser.prog} --help"
    kind = "flag" if word.startswith("-") else "argument"
    return f"unknown {kind} {flag!r}; {hint}"


def _similar_flag(word: str, parser: argparse.ArgumentParser) -> str:
    """The most similar flag of a command; "" if none is."""
    flag, known = word.partition("=")[0][:100].replace("_", "-"), _spellings(parser)
    close = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
    return known[close[0]] if close else ""


def _spellings(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The long flags of a parser, by their names with hyphens only."""
    return {
        each.replace("_", "-"): each for each in parser._option_string_actions if each[:2] == "--"
    }


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog=program(),
        description=_DESCRIPTION,
        usage="%(prog)s COMMAND [FLAGS]",
        formatter_class=_DescriptionFormatter,
        epilog="%(prog)s COMMAND --help explains a command.",
    )
    parsers = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", prog=parser.prog
    )
    # Its own --help lists the fields of the configuration.
    train = parsers.add_parser("train", help="train a network", add_help=False)
    train.set_defaults(command=commands.train)
    _add_summary(parsers)
    _add_plan(parsers)
    _add_find_rate(parsers)
    _add_export(parsers)
    _add_prepare(parsers)
    _add_report(parsers)
    _add_predict(parsers)
    _add_features(parsers)
    _add_evaluate(parsers)
    _add_doctor(parsers)
    for each in commands_of(parser).values():
        _shorten_usage(each)
    return parser


class _Formatter(argparse.HelpFormatter):
    """Fits the terminal, up to a width that is easy to read."""

    def __init__(self, prog: str, **settings: Any) -> None:
        width = min(_WIDEST, shutil.get_terminal_size().columns) - 2
        super().__init__(prog, **{**settings, "width": width, "max_help_position": 28})


class _DescriptionFormatter(_Formatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and has all commands in one column."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **settings)
        self._action_max_length = 13  # of "find_rate"; argparse forgets how far it is indented


class _Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line instead of after the usage."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **settings})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def _shorten_usage(parser: argparse.ArgumentParser) -> None:
    """Gives a command a usage of one line, and numbers short names: every flag is listed below."""
    words = []
    for each in parser._actions:
        if each.metavar is None and each.type in (_count, _images, float):
            each.metavar = "X" if each.type is float else "N"
        if not each.option_strings:
            name = str(each.metavar or each.dest.upper())
            each.metavar = name
            words.append(f"{name} ..." if each.nargs == "+" else name)
        elif each.required:
            words.append(f"{each.option_strings[-1]}={each.metavar or each.dest.upper()}")
    parser.usage = " ".join(["%(prog)s", *words, "[FLAGS]"])


def _count(text: str) -> int:
    """The type of whole numbers up to `MAX_COUNT`; the commands check the range of each."""
    if not re.fullmatch(r"\s*[-+]?\d{1,20}\s*", text) or abs(int(text)) > MAX_COUNT:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r}: must be a whole number of at most {MAX_COUNT:,}"
        )
    return int(text)


def _images(text: str) -> int:
    """The type of `plan --images`, which may exceed `MAX_COUNT`."""
    if not re.fullmatch(r"[-+]?\d{1,20}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: must be a whole number")
    return int(text)


def _numbers(text: str) -> tuple[float, ...]:
    """The type of comma-separated numbers, one for each channel."""
    try:
        return tuple(map(float, text[:1000].split(",")))
    except ValueError as error:
        shown = text[:40]
        raise argparse.ArgumentTypeError(
            f"{shown!r}: must be numbers separated by commas"
        ) from error


def _add_summary(parsers: Any) -> None:
    parser = parsers.add_parser("summary", help="print the layers of a network")
    add = parser.add_argument
    add("model", help="one of resnet_jax.list_models()")
    add("--num_classes", type=_count, help="classes of the head")
    add("--image_size", type=_count, help="side of the images in pixels")
    add("--channels", type=_count, default=3, help="channels of the images (default: %(default)s)")
    _add_recipe(parser)
    parser.set_defaults(command=commands.summary)


def _add_plan(parsers: Any) -> None:
    parser = parsers.add_parser(
        "plan",
        help="plan a run on TPUs or GPUs that this machine does not have",
        description="Compiles a run's training step for TPUs or GPUs on a machine without them, "
        "and prints the memory and work of a step and bounds of its speed. A large network takes "
        f"minutes. TPUs need the package's extra 'plan', GPUs 'plan-gpu'. {_TRAIN_FLAGS}",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--topology",
        default="v5e:2x2",
        help="a TPU slice, CHIP:AxB[xC] such as v5e:4x4, or GPUs, NAME:GPUS on one host or "
        "NAME:HOSTSxGPUS, such as h100:8 or a100-40:2x8 (default: %(default)s)",
    )
    add(
        "--batch_per_chip",
        type=_count,
        default=0,
        help="images of a step on each TPU chip or GPU (default: divides the recipe's batch)",
    )
    add("--find_batch", action="store_true", help="plan with the largest batch that fits")
    add("--images", type=_images, default=0, help="number of training images of an unknown dataset")
    add("--num_classes", type=_count, default=0, help="number of classes of an unknown dataset")
    add(
        "--images_per_core",
        type=float,
        default=0.0,
        help="images/s that one core of a host decodes (default: see docs/decoding.md)",
    )
    add(
        "--network_gbits",
        type=float,
        default=0.0,
        help="network bandwidth of a GPU host in Gbit/s (default: see docs/plan.md)",
    )
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=commands.plan)


def _add_find_rate(parsers: Any) -> None:
    parser = parsers.add_parser(
        "find_rate",
        help="suggest a learning rate by a learning rate range test",
        description="Trains a new network for some steps while optimizer.learning_rate rises "
        "exponentially, and plots the loss. The suggested rate is where the loss falls fastest. "
        "Data, network, batch size and optimizer are those of the run; no workdir is read or "
        f"written. docs/learning_rate.md explains the plot. {_TRAIN_FLAGS}",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--low",
        type=float,
        default=1e-5,
        help="first learning rate (default: %(default)g)",
    )
    add(
        "--high",
        type=float,
        default=10.0,
        help="last learning rate (default: %(default)g)",
    )
    add("--steps", type=_count, default=200, help="number of training steps (default: %(default)s)")
    add(
        "--output",
        default="rate.png",
        help="a .png file, with the numbers in a .csv file beside it, or a .csv file only "
        "(default: %(default)s)",
    )
    add("--force", action="store_true", help="replace existing files")
    parser.set_defaults(command=commands.find_rate)


def _add_export(parsers: Any) -> None:
    parser = parsers.add_parser(
        "export", help="export a network: StableHLO, ONNX, Hugging Face Hub"
    )
    _add_network(parser)
    add = parser.add_argument
    add("--format", required=True, help="stablehlo, onnx or hub")
    add("--output", required=True, metavar="PATH", help="file to write; for hub, a folder")
    add("--platforms", default="", help="platforms of a StableHLO program (default: cpu,cuda,tpu)")
    add("--fold_batch_norm", action="store_true", help="fold batch norm into the convolutions")
    add("--weights", default="", help="embedded (default), or beside the program or graph")
    add(
        "--input_size",
        default="",
        metavar="HEIGHTxWIDTH|open",
        help="size of the images in pixels, or open for any size (default: a square)",
    )
    add("--opset", type=_count, default=0, help="ONNX opset, 17 or later (default: 21)")
    add(
        "--push",
        default="",
        metavar="OWNER/NAME",
        help="upload the folder of --format=hub to this repository",
    )
    add("--force", action="store_true", help="replace existing files")
    parser.set_defaults(command=commands.export)


def _add_prepare(parsers: Any) -> None:
    parser = parsers.add_parser("prepare", help="download and prepare a TFDS dataset")
    add = parser.add_argument
    add("name", help="digits, or NAME[:VERSION] of a TFDS dataset")
    add("--data_dir", default="", help="folder of TFDS's datasets")
    add("--manual_dir", default="", help="folder of archives that you have downloaded")
    parser.set_defaults(command=commands.prepare)


def _add_report(parsers: Any) -> None:
    parser = parsers.add_parser("report", help="write a page about one or several runs")
    add = parser.add_argument
    add("workdirs", nargs="+", metavar="RUN", help="a workdir")
    add(
        "--output",
        help="HTML file (default: report.html in the workdir; for several runs, in this folder)",
    )
    add("--images", nargs="+", default=[], help="images to explain; only for one run")
    add("--data", default="", help="evaluation data, as for evaluate (default: the run's own)")
    add("--data_dir", default="", help="folder of TFDS's datasets, with --data")
    add("--force", action="store_true", help="replace an existing page")
    _add_recipe(parser)
    parser.set_defaults(command=commands.report)


def _add_predict(parsers: Any) -> None:
    parser = parsers.add_parser("predict", help="predict the classes of images")
    _add_network(parser)
    _add_images(parser)
    add = parser.add_argument
    add(
        "--top",
        type=_count,
        help="number of classes per image (default: 5; multi-label: those that are predicted)",
    )
    add(
        "--format",
        choices=("table", "jsonl", "csv"),
        default="",
        help="output format (default: by the suffix of --output, else a table)",
    )
    add("--output", default="", help="output file (default: standard output)")
    parser.set_defaults(command=commands.predict)


def _add_features(parsers: Any) -> None:
    parser = parsers.add_parser("features", help="write the features of images")
    _add_network(parser)
    _add_images(parser)
    add = parser.add_argument
    add("--output", required=True, help="a .npz or .parquet file")
    add(
        "--layer",
        default="pooled",
        help="pooled (the input of the head, default), stem, stage1, stage2, ...",
    )
    add("--maps", action="store_true", help="write whole feature maps instead of their means")
    parser.set_defaults(command=commands.features)


def _add_evaluate(parsers: Any) -> None:
    parser = parsers.add_parser("evaluate", help="evaluate a network on a dataset")
    _add_network(parser)
    _add_upright(parser, "as the run was evaluated, else no")
    add = parser.add_argument
    add("--data", default="", help=f"{DATA_NAMES} (default: a workdir's own)")
    add(
        "--split",
        default="",
        help="split to evaluate, or parts of splits (default: a workdir's own, or the only one "
        "named test, val, valid or validation)",
    )
    add(
        "--allow_missing_classes",
        action="store_true",
        help="evaluate a run on its own data although some of its classes have no images there",
    )
    add("--data_dir", default="", help="folder of TFDS's datasets")
    add(
        "--views",
        default="",
        help="one_crop, flip, ten_crop or multi_scale (default: as the run was evaluated)",
    )
    add(
        "--scales",
        default="",
        help="shorter sides in pixels for multi_scale, such as 224,256,384,480,640",
    )
    add("--batch_size", type=_count, default=0, help="images per step on all devices together")
    add(
        "--max_corrupt",
        type=_count,
        help="number of undecodable images to skip before the command fails (default: 10)",
    )
    add("--json", default="", help="write all results to this JSON file; -: print them")
    add("--per_class", action="store_true", help="print the metrics of each class")
    add("--force", action="store_true", help="replace an existing file")
    parser.set_defaults(command=commands.evaluate)


def _add_doctor(parsers: Any) -> None:
    parser = parsers.add_parser(
        "doctor",
        help="check whether and how fast training runs on this machine",
        description="Checks packages, devices, speed and processes, and reports problems. For a "
        "run of several processes, start it on each of them like train, with the same flags "
        "(see train --help). Exit code 0: training can run here; 2: it cannot.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object")
    add(
        "--quick",
        action="store_true",
        help="skip everything that computes: training steps and speed",
    )
    add("--network", default="", help="network for the training steps (default: resnet8_cifar)")
    parser.set_defaults(command=commands.doctor)


def _add_network(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of all commands that open a trained network."""
    parser.add_argument(
        "source",
        help="a workdir, a weight file, a folder in the Hub's format, or OWNER/NAME on the Hub",
    )
    network = parser.add_argument_group("network and preprocessing")
    add = network.add_argument
    add("--model", default="", help="name of the network (default: inferred from the weights)")
    _add_recipe(network)
    add(
        "--state",
        choices=("best", "newest"),
        default="best",
        help="state of a workdir to use; best is by its checkpoint.best_metric (default: best)",
    )
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use the moving average, if a workdir or checkpoint file has one",
    )
    add(
        "--prefix",
        default="",
        help="prefix of the names to read, in a weight file with several networks",
    )
    add(
        "--classes",
        default="",
        metavar="FILE",
        help="names of the classes: one on each line, or JSON",
    )
    add("--image_size", type=_count, default=0, help="side of the crop in pixels")
    add(
        "--crop_fraction",
        type=float,
        default=0.0,
        help="side of the crop as a fraction of the resized image's shorter side",
    )
    add("--crop_mode", default="", help="center, or squash: the whole image, resized to a square")
    add("--interpolation", default="", help="bilinear or bicubic")
    add(
        "--mean",
        type=_numbers,
        default=(),
        metavar="R,G,B",
        help="mean of each channel in units of 1, such as 0.485,0.456,0.406",
    )
    add(
        "--std",
        type=_numbers,
        default=(),
        metavar="R,G,B",
        help="standard deviation of each channel in units of 1",
    )
    add(
        "--threshold",
        type=float,
        default=0.0,
        help="lowest probability at which a multi-label network predicts a class (default: its "
        "own)",
    )


def _add_recipe(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--recipe",
        default="",
        metavar="FILE",
        help="a recipe that registers the network, if it is your own; run as Python code",
    )


def _add_upright(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--upright",
        action=argparse.BooleanOptionalAction,
        help=f"rotate images as their EXIF orientation says (default: {default})",
    )


def _add_images(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of all commands that apply a network to images."""
    _add_upright(parser, "yes")
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="an image, a folder of images, or - (an image or paths from standard input)",
    )
    add("--batch_size", type=_count, default=0, help="number of images per batch")
    add("--force", action="store_true", help="replace an existing output")
