"""`python -m resnet_jax COMMAND`: the command line.

A mistake of the user's ends with one line and exit code 2; a run that diverged with 70; one that a
signal stopped, with everything saved, with 75; one that lost another of its processes with 69.
Where broken images were skipped, it is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from resnet_jax.cli import commands
from resnet_jax.config.flags import parse_train_flags
from resnet_jax.config.schema import DATA_NAMES
from resnet_jax.distributed.signals import interrupts
from resnet_jax.errors import (
    DIVERGED,
    MISTAKE,
    STOPPED,
    ConfigError,
    DivergedError,
    ResNetJaxError,
    StoppedError,
    import_failure,
    one_line,
)
from resnet_jax.limits import MAX_COUNT
from resnet_jax.terminal import log

__all__ = ["main", "parse_train_flags"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: Command and arguments; None: those of the process.

    Returns:
      The exit code.

    Example:
      >>> main(["summary", "resnet2O"])
      2
    """
    _open_closed_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with interrupts():
            options = _parse(arguments)
            return options.command(options) or 0
    except DivergedError as error:
        return _fail(error, DIVERGED)
    except StoppedError as error:
        return _fail(error, STOPPED, "stopped")
    except KeyboardInterrupt:  # what was begun is removed again
        return _fail(Exception("interrupted; run the command again"), STOPPED, "stopped")
    except ResNetJaxError as error:
        return _fail(error, MISTAKE)
    except ImportError as error:
        return _fail(Exception(import_failure(error)), MISTAKE)
    except RuntimeError as error:
        if "home directory" not in str(error):  # pathlib has no class of its own for it
            raise
        text = "a path begins with ~ and there is no home directory: set HOME, or write it in full"
        return _fail(Exception(text), MISTAKE)
    except OSError as error:
        # The one that any use of a path raises, where the path is a flag's: also to ask if it is.
        if error.errno != errno.ENAMETOOLONG:
            raise
        return _fail(Exception(f"{error.filename}: {error.strerror}"), MISTAKE)


def _open_closed_streams() -> None:
    """Leads standard streams that are closed (`>&-`) to nowhere.

    Else the next file that is opened gets the number of such a stream, and what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if null == number:
            os.set_inheritable(null, True)
        stream = open(null, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)


def _parse(arguments: list[str]) -> argparse.Namespace:
    if any("\0" in each for each in arguments):  # no shell gives one; a program that calls this may
        raise ConfigError("an argument holds the character NUL, which no name may have")
    parser = _parser()
    # `train` takes any --config.field=value, which only its own flags know.
    # So do `plan` and `find_rate`, beside flags of their own; `doctor` takes those by which
    # processes are joined.
    if arguments[:1] in (["plan"], ["find_rate"], ["doctor"]):
        options, rest = parser.parse_known_args(arguments)
    else:
        known = arguments[:1] if arguments[:1] == ["train"] else arguments
        options, rest = parser.parse_args(known), arguments[1:]
    options.rest = rest
    return options


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything here does, instead of after the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def _count(text: str) -> int:
    """The type of whole numbers; their commands know what each may be, at most `MAX_COUNT`."""
    if not re.fullmatch(r"\s*[-+]?\d{1,20}\s*", text) or abs(int(text)) > MAX_COUNT:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r}: must be a whole number of at most {MAX_COUNT:,}"
        )
    return int(text)


def _images(text: str) -> int:
    """The type of `plan --images`, which are more than `_count` takes."""
    if not re.fullmatch(r"[-+]?\d{1,20}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: must be a whole number")
    return int(text)


def _numbers(text: str) -> tuple[float, ...]:
    """The type of a number for each channel, with commas."""
    try:
        return tuple(map(float, text[:1000].split(",")))
    except ValueError as error:
        shown = text[:40]
        raise argparse.ArgumentTypeError(f"{shown!r}: must be numbers with commas") from error


def _fail(error: Exception, code: int, word: str = "error") -> int:
    with contextlib.suppress(OSError):  # a log on a full disk; the exit code still tells
        log(f"{word}: {one_line(error)}")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m resnet_jax", description=__doc__)
    parsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    # Its own --help, because it lists the fields of the configuration.
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
    return parser


def _add_summary(parsers: Any) -> None:
    parser = parsers.add_parser("summary", help="print a network's layers")
    add = parser.add_argument
    add("model", help="one of resnet_jax.list_models()")
    add("--num_classes", type=_count, help="classes of the head")
    add("--image_size", type=_count, help="side of the images in pixels")
    add("--channels", type=_count, default=3, help="of the images")
    parser.set_defaults(command=commands.summary)


def _add_plan(parsers: Any) -> None:
    parser = parsers.add_parser(
        "plan",
        help="what a run will need on TPUs or GPUs that are not here",
        description="Compiles a run's training step for TPUs or GPUs on a machine without them, "
        "and prints the memory and work of a step and the bounds of its speed. Takes minutes for "
        "a large network. All flags of train work too: --config (which is run as Python code) and "
        "--config.FIELD=X. Compiling for TPUs needs the package's extra 'plan', for GPUs "
        "'plan-gpu'.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--topology",
        default="v5e:2x2",
        help="a TPU slice, CHIP:AxB[xC] such as v5e:4x4, or GPUs, NAME:GPUS on one host or "
        "NAME:HOSTSxGPUS, such as h100:8 or a100-40:2x8 (default: v5e:2x2)",
    )
    add(
        "--batch_per_chip",
        type=_count,
        default=0,
        help="images per step on each TPU chip or GPU (default: the recipe's batch over all)",
    )
    add("--find_batch", action="store_true", help="plan for the largest batch that fits")
    add("--images", type=_images, default=0, help="training images of a data set that is not known")
    add("--num_classes", type=_count, default=0, help="classes of a data set that is not known")
    add(
        "--images_per_core",
        type=float,
        default=0.0,
        help="images/s that one core of a host decodes (default: as in docs/decoding.md)",
    )
    add(
        "--network_gbits",
        type=float,
        default=0.0,
        help="Gbit/s from a host of GPUs to other hosts (default: see docs/plan.md)",
    )
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=commands.plan)


def _add_find_rate(parsers: Any) -> None:
    parser = parsers.add_parser(
        "find_rate",
        help="suggest a learning rate, by a short training in which it rises",
        description="Trains a new network for some steps while optimizer.learning_rate rises "
        "exponentially, and writes the loss over it. The suggested rate is where the loss falls "
        "fastest. All flags of train work too: --config (which is run as Python code) and "
        "--config.FIELD=X. Data, network, batch size and optimizer are those of the run; no "
        "workdir is read or written. docs/learning_rate.md shows how to read the picture.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--low", type=float, default=1e-5, help="rate of the first step (default: 1e-5)")
    add("--high", type=float, default=10.0, help="rate of the last step (default: 10)")
    add("--steps", type=_count, default=200, help="training steps (default: 200)")
    add(
        "--output",
        default="rate.png",
        help="a .png, beside which a .csv with the numbers is written, or a .csv alone "
        "(default: rate.png)",
    )
    add("--force", action="store_true", help="replace what is there")
    parser.set_defaults(command=commands.find_rate)


def _add_export(parsers: Any) -> None:
    parser = parsers.add_parser("export", help="give a network away: StableHLO, ONNX, the Hub")
    _add_network(parser)
    add = parser.add_argument
    add("--format", required=True, help="stablehlo, onnx or hub")
    add("--output", required=True, help="file, or for hub folder, to write")
    add("--platforms", default="", help="of stablehlo (default: cpu,cuda,tpu)")
    add("--fold_batch_norm", action="store_true", help="fold batch norms into the convolutions")
    add("--weights", default="", help="embedded (default), or beside the program or graph")
    add(
        "--input_size",
        default="",
        metavar="HEIGHTxWIDTH|open",
        help="size of the images in pixels, or open for any size (default: a square)",
    )
    add("--opset", type=_count, default=0, help="of onnx, from 17 (default: 21)")
    add("--push", default="", metavar="OWNER/NAME", help="upload hub's folder")
    add("--force", action="store_true", help="replace what is there")
    parser.set_defaults(command=commands.export)


def _add_prepare(parsers: Any) -> None:
    parser = parsers.add_parser("prepare", help="prepare a TFDS data set")
    add = parser.add_argument
    add("name", help="digits, or NAME[:VERSION] of TFDS")
    add("--data_dir", default="", help="where TFDS keeps its data sets")
    add("--manual_dir", default="", help="where archives that you fetched lie")
    parser.set_defaults(command=commands.prepare)


def _add_report(parsers: Any) -> None:
    parser = parsers.add_parser("report", help="write a page about a run, or about several")
    add = parser.add_argument
    add("workdirs", nargs="+", metavar="RUN", help="a workdir")
    add("--output", help="the HTML file (default: report.html in the run, or here for several)")
    add("--images", nargs="+", default=[], help="images to explain, of one run")
    add("--data", default="", help="held-out images, as for evaluate (default: the run's own)")
    add("--data_dir", default="", help="where TFDS keeps its data sets; goes with --data")
    add("--force", action="store_true", help="replace a page that is there")
    parser.set_defaults(command=commands.report)


def _add_predict(parsers: Any) -> None:
    parser = parsers.add_parser("predict", help="say what is on images")
    _add_network(parser)
    _add_images(parser)
    add = parser.add_argument
    add(
        "--top",
        type=_count,
        help="classes of each image (default: 5; of a multi-label network those that it predicts)",
    )
    add(
        "--format",
        choices=("table", "jsonl", "csv"),
        default="",
        help="default: as the output's name ends, else a table",
    )
    add("--output", default="", help="a file (default: standard output)")
    parser.set_defaults(command=commands.predict)


def _add_features(parsers: Any) -> None:
    parser = parsers.add_parser("features", help="write a network's features of images")
    _add_network(parser)
    _add_images(parser)
    add = parser.add_argument
    add("--output", required=True, help="a .npz or .parquet file")
    add("--layer", default="pooled", help="pooled (what the head sees), stem, stage1, stage2, ...")
    add("--maps", action="store_true", help="whole maps instead of their means")
    parser.set_defaults(command=commands.features)


def _add_evaluate(parsers: Any) -> None:
    parser = parsers.add_parser("evaluate", help="measure a network on a data set")
    _add_network(parser)
    _add_upright(parser, "as a run was evaluated; else no")
    add = parser.add_argument
    add("--data", default="", help=f"{DATA_NAMES} (default: a workdir's own)")
    add(
        "--split",
        default="",
        help="or parts of it (default: a workdir's own, or the only one that is called test, val, "
        "valid or validation)",
    )
    add(
        "--allow_missing_classes",
        action="store_true",
        help="measure a run on its own data although some of its classes have no images there",
    )
    add("--data_dir", default="", help="where TFDS keeps its data sets")
    add(
        "--views",
        default="",
        help="one_crop, flip, ten_crop or multi_scale (default: as the run was evaluated)",
    )
    add("--scales", default="", help="shorter sides for multi_scale, such as 224,256,384,480,640")
    add("--batch_size", type=_count, default=0, help="images a step, on all devices together")
    add("--max_corrupt", type=_count, help="undecodable images that are skipped (default: 10)")
    add("--json", default="", help="write everything to this file; -: print it")
    add("--per_class", action="store_true", help="print each class's measures")
    add("--force", action="store_true", help="replace a file that is there")
    parser.set_defaults(command=commands.evaluate)


def _add_doctor(parsers: Any) -> None:
    parser = parsers.add_parser(
        "doctor",
        help="check whether training runs on this machine, and how fast",
        description="Checks packages, devices, speed and processes, and says what is wrong. On "
        "several processes, run it on each of them, as train; it takes the same flags to join them "
        "(train --help). Exit code 0: training can run here; 2: it cannot.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object")
    add("--quick", action="store_true", help="compute nothing: no training step, no speed")
    add("--network", default="", help="what to train for a moment (default: resnet8_cifar)")
    parser.set_defaults(command=commands.doctor)


def _add_network(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that opens a trained network."""
    add = parser.add_argument
    add("source", help="a workdir, a weight file, a folder in the Hub's form, or OWNER/NAME there")
    add("--model", default="", help="the network's name (default: as the weights show)")
    add(
        "--state",
        choices=("best", "newest"),
        default="best",
        help="of a workdir; the best by its checkpoint.best_metric (default: best)",
    )
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the moving average, where a workdir or a checkpoint file has one",
    )
    add("--prefix", default="", help="of the names in a weight file with several networks")
    add("--classes", default="", metavar="FILE", help="names of the outputs: a line each, or JSON")
    add("--image_size", type=_count, default=0, help="side of the crop in pixels")
    add(
        "--crop_fraction",
        type=float,
        default=0.0,
        help="side of the crop as a share of the resized image's shorter side",
    )
    add("--crop_mode", default="", help="center, or squash: whole images, made square")
    add("--interpolation", default="", help="bilinear or bicubic")
    add(
        "--mean",
        type=_numbers,
        default=(),
        metavar="R,G,B",
        help="subtracted from each channel, in units of 1, such as 0.485,0.456,0.406",
    )
    add("--std", type=_numbers, default=(), metavar="R,G,B", help="divides each channel, likewise")
    add(
        "--threshold",
        type=float,
        default=0.0,
        help="probability from which a multi-label network predicts a class (default: its own)",
    )


def _add_upright(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--upright",
        action=argparse.BooleanOptionalAction,
        help=f"turn images as their EXIF orientation says (default: {default})",
    )


def _add_images(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that reads images and writes what a network makes of them."""
    _add_upright(parser, "yes")
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="an image, a folder of images, or - (from standard input an image, or paths)",
    )
    add("--batch_size", type=_count, default=0, help="images at a time")
    add("--force", action="store_true", help="replace the output")
