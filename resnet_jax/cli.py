"""`python -m resnet_jax COMMAND`: the command line.

A mistake of the user's ends with one line and exit code 2; a run that diverged with 70; one that a
signal stopped, with everything saved, with 75; one that lost another of its processes with 69.
Where broken images were skipped, it is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import json
import re
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from resnet_jax.errors import ConfigError, DivergedError, ResNetJaxError, StoppedError

SKIPPED, MISTAKE, DIVERGED, STOPPED = 1, 2, 70, 75


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
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    # `train` takes any --config.field=value, which only its own flags know.
    if arguments[:1] == ["plan"]:  # and so does `plan`, beside flags of its own
        options, rest = parser.parse_known_args(arguments)
    else:
        known = arguments[:1] if arguments[:1] == ["train"] else arguments
        options, rest = parser.parse_args(known), arguments[1:]
    options.rest = rest
    try:
        return options.command(options) or 0
    except DivergedError as error:
        return _fail(error, DIVERGED)
    except StoppedError as error:
        return _fail(error, STOPPED, "stopped")
    except KeyboardInterrupt:  # before there was anything to save
        return _fail(Exception("interrupted before the first step"), STOPPED, "stopped")
    except ResNetJaxError as error:
        return _fail(error, MISTAKE)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("resnet_jax"):
            raise
        name = str(error.name).partition(".")[0]
        missing = f"{name} is not installed; pip install {name}, or this package's extra 'train'"
        return _fail(Exception(missing), MISTAKE)


def _fail(error: Exception, code: int, word: str = "error") -> int:
    with contextlib.suppress(OSError):  # a log on a full disk; the exit code still tells
        print(f"{word}: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m resnet_jax", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    # Its own --help, because it lists the fields of the configuration.
    train = commands.add_parser("train", help="train a network", add_help=False)
    train.set_defaults(command=_train)

    summary = commands.add_parser("summary", help="print a network's layers")
    summary.add_argument("model", help="one of resnet_jax.list_models()")
    summary.add_argument("--num_classes", type=int, help="classes of the head")
    summary.add_argument("--image_size", type=int, help="side of the images in pixels")
    summary.add_argument("--channels", type=int, default=3, help="of the images")
    summary.set_defaults(command=_summary)

    _add_plan(
        commands.add_parser(
            "plan",
            help="what a run will need on a TPU slice; needs no TPU",
            description="Compiles a run's training step for a TPU slice, without a TPU, and prints "
            "memory, work and the bounds of its speed. Takes --config and all --config.FIELD=X of "
            "train too; minutes for a large network.",
            allow_abbrev=False,
        )
    )

    export = commands.add_parser("export", help="give a network away: StableHLO, ONNX, the Hub")
    _add_network(export)
    export.add_argument("--format", required=True, help="stablehlo, onnx or hub")
    export.add_argument("--output", required=True, help="file, or for hub folder, to write")
    export.add_argument("--platforms", default="", help="of stablehlo (default: cpu,cuda,tpu)")
    export.add_argument(
        "--fold_batch_norm", action="store_true", help="fold batch norms into the convolutions"
    )
    export.add_argument(
        "--weights", default="", help="of stablehlo: embedded (default), or beside in .safetensors"
    )
    export.add_argument("--push", default="", metavar="OWNER/NAME", help="upload hub's folder")
    export.add_argument("--force", action="store_true", help="replace what is there")
    export.set_defaults(command=_export)

    prepare = commands.add_parser("prepare", help="prepare a TFDS data set")
    prepare.add_argument("name", help="digits, or NAME[:VERSION] of TFDS")
    prepare.add_argument("--data_dir", default="", help="where TFDS keeps its data sets")
    prepare.add_argument("--manual_dir", default="", help="where archives that you fetched lie")
    prepare.set_defaults(command=_prepare)

    report = commands.add_parser("report", help="write a page about a run, or about several")
    report.add_argument("workdirs", nargs="+", metavar="RUN", help="a workdir")
    report.add_argument(
        "--output", help="the HTML file (default: report.html in the run, or here for several)"
    )
    report.add_argument("--images", nargs="+", default=[], help="images to explain, of one run")
    report.add_argument("--force", action="store_true", help="replace a page that is there")
    report.set_defaults(command=_report)

    predict = commands.add_parser("predict", help="say what is on images")
    _add_network(predict)
    _add_images(predict)
    predict.add_argument("--top", type=int, default=5, help="classes of each image")
    predict.add_argument(
        "--format",
        choices=("table", "jsonl", "csv"),
        default="",
        help="default: as the output's name ends, else a table",
    )
    predict.add_argument("--output", default="", help="a file (default: standard output)")
    predict.set_defaults(command=_predict)

    features = commands.add_parser("features", help="write a network's features of images")
    _add_network(features)
    _add_images(features)
    features.add_argument("--output", required=True, help="a .npz or .parquet file")
    features.add_argument(
        "--layer", default="pooled", help="pooled (what the head sees), stem, stage1, stage2, ..."
    )
    features.add_argument("--maps", action="store_true", help="whole maps instead of their means")
    features.set_defaults(command=_features)
    evaluate = commands.add_parser("evaluate", help="measure a network on a data set")
    _add_network(evaluate)
    evaluate.add_argument(
        "--data", default="", help="digits, folder:PATH or tfds:NAME (default: a workdir's own)"
    )
    evaluate.add_argument("--split", default="", help="of the data (default: a workdir's own)")
    evaluate.add_argument("--data_dir", default="", help="where TFDS keeps its data sets")
    evaluate.add_argument(
        "--views",
        default="",
        help="one_crop, flip, ten_crop or multi_scale (default: as the run was evaluated)",
    )
    evaluate.add_argument(
        "--scales", default="", help="shorter sides for multi_scale, such as 224,256,384,480,640"
    )
    evaluate.add_argument(
        "--batch_size", type=int, default=0, help="images a step, on all devices together"
    )
    evaluate.add_argument(
        "--max_corrupt", type=int, help="undecodable images that are skipped (default: 10)"
    )
    evaluate.add_argument("--json", default="", help="write everything to this file; -: print it")
    evaluate.add_argument("--per_class", action="store_true", help="print each class's accuracy")
    evaluate.add_argument("--force", action="store_true", help="replace a file that is there")
    evaluate.set_defaults(command=_evaluate)
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--topology", default="v5e:2x2", help="the slice, CHIP:AxB[xC] (default: v5e:2x2)")
    add("--batch_per_chip", type=int, default=0, help="images (default: the recipe's batch)")
    add("--find_batch", action="store_true", help="plan for the largest batch that fits")
    add("--images", type=int, default=0, help="training images, of a data set not known here")
    add("--num_classes", type=int, default=0, help="classes, of a data set not known here")
    add(
        "--images_per_core",
        type=float,
        default=0.0,
        help="images/s that a host's core delivers (default: as in docs/decoding.md)",
    )
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=_plan)


def _add_network(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that opens a trained network."""
    parser.add_argument(
        "source", help="a workdir, a weight file, a folder in the Hub's form, or OWNER/NAME there"
    )
    parser.add_argument("--model", default="", help="the network's name; for a weight file")
    parser.add_argument(
        "--state", choices=("best", "newest"), default="best", help="of a workdir (default: best)"
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the moving average, where a workdir has one",
    )
    parser.add_argument("--image_size", type=int, default=0, help="side of the crop in pixels")
    parser.add_argument(
        "--crop_fraction",
        type=float,
        default=0.0,
        help="side of the crop as a share of the resized image's shorter side",
    )


def _add_images(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that reads images and writes what a network makes of them."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="an image, a folder of images, or - (from standard input an image, or paths)",
    )
    parser.add_argument("--batch_size", type=int, default=0, help="images at a time")
    parser.add_argument("--force", action="store_true", help="replace the output")


def _open_network(options: argparse.Namespace) -> Any:
    from resnet_jax.evaluation.network import open_network

    return open_network(
        options.source,
        model=options.model,
        best=options.state == "best",
        ema=options.ema,
        image_size=options.image_size,
        crop_fraction=options.crop_fraction,
    )


def _train(options: argparse.Namespace) -> None:
    from resnet_jax.training.distributed import abandon, together
    from resnet_jax.training.launch import FLAGS, start

    wanted = [each for each in options.rest if each not in ("-h", "--help")]
    if wanted != options.rest:
        config, _ = parse_train_flags(wanted)
        print(_TRAIN_HELP.format(several=FLAGS) + _fields_help(config))
        return
    wanted = start(wanted)
    try:
        with together() as peers:
            config, workdir = parse_train_flags(wanted)
            from resnet_jax.training.loop import train

            result = train(config, workdir)
    except (StoppedError, DivergedError):  # so all processes end, at the same step
        raise
    except BaseException as error:
        abandon(error)
        raise
    if not peers.is_first:
        return
    if config.log.report:
        _report_at_the_end(result.workdir)
    top1 = result.metrics["top1"]
    print(f"top-1 {top1:.2%} after {result.steps} steps; everything is in {result.workdir}")


def _report_at_the_end(workdir: Path) -> None:
    """report.html of a run that has ended well, which it still has when this fails."""
    try:
        from resnet_jax.report.page import write_report

        write_report([workdir], force=True)
    except ModuleNotFoundError as error:
        print(f"no report.html: {error.name} is not installed", file=sys.stderr)
    except Exception as error:
        print(f"no report.html: {' '.join(str(error).split())}", file=sys.stderr)


def _report(options: argparse.Namespace) -> None:
    from resnet_jax.report.page import write_report

    page = write_report(
        options.workdirs, options.output, images=options.images, force=options.force
    )
    print(f"{page} and its pictures in {page.with_suffix('')}")


def _summary(options: argparse.Namespace) -> None:
    from resnet_jax.models.registry import create_model, model_info
    from resnet_jax.models.summary import summary

    side = options.image_size or model_info(options.model).image_size
    overrides = {} if options.num_classes is None else {"num_classes": options.num_classes}
    model = create_model(options.model, **overrides)
    print(summary(model, (1, side, side, options.channels)))


def _plan(options: argparse.Namespace) -> None:
    import jax

    # A plan touches no device: not even the TPU of the machine that it is made on.
    jax.config.update("jax_platforms", "cpu")
    from resnet_jax.training.plan import make_plan, plan_table

    plan = make_plan(
        parse_train_flags(options.rest)[0],
        options.topology,
        batch_per_chip=options.batch_per_chip,
        find_batch=options.find_batch,
        images=options.images,
        num_classes=options.num_classes,
        images_per_core=options.images_per_core,
    )
    print(json.dumps(plan) if options.json else plan_table(plan))


def _export(options: argparse.Namespace) -> None:
    from resnet_jax.inference.export import export_network

    agreement = export_network(
        _open_network(options),
        options.format,
        options.output,
        platforms=options.platforms,
        fold_batch_norm=options.fold_batch_norm,
        weights=options.weights,
        push=options.push,
        force=options.force,
    )
    print(agreement)


def _prepare(options: argparse.Namespace) -> None:
    from resnet_jax.data.prepare import prepare

    prepare(options.name, options.data_dir, options.manual_dir)
    print(f"{options.name} is ready")


def _predict(options: argparse.Namespace) -> int:
    from resnet_jax.inference.classifier import Classifier
    from resnet_jax.inference.images import list_images
    from resnet_jax.inference.predictions import write_predictions

    with _stoppable():
        files = list_images(options.inputs)
        skipped = write_predictions(
            lambda: Classifier(_open_network(options), batch_size=options.batch_size),
            files,
            top=options.top,
            form=options.format,
            output=options.output,
            force=options.force,
        )
    return _say_skipped(skipped, len(files))


def _features(options: argparse.Namespace) -> int:
    from resnet_jax.inference.features import write_features
    from resnet_jax.inference.images import list_images

    with _stoppable():
        files = list_images(options.inputs)
        skipped = write_features(
            lambda: _open_network(options),
            files,
            options.output,
            layer=options.layer,
            maps=options.maps,
            batch_size=options.batch_size,
            force=options.force,
        )
    return _say_skipped(skipped, len(files))


def _say_skipped(skipped: int, images: int) -> int:
    if skipped:
        print(f"{skipped} of {images} images could not be read", file=sys.stderr)
    return SKIPPED if skipped else 0


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and Ctrl-C end a command in one line, after it has cleaned up."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as error:
        raise StoppedError("interrupted; run the command again") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _evaluate(options: argparse.Namespace) -> None:
    from resnet_jax.evaluation.evaluator import evaluate_data
    from resnet_jax.evaluation.results import dump_json
    from resnet_jax.inference.files import new_file

    scales = options.scales.split(",") if options.scales else []
    if not all(each.strip().isdecimal() for each in scales):
        raise ConfigError(f"--scales={options.scales}: pixels with commas, such as 224,256,384")
    file: Any = contextlib.nullcontext()
    if options.json not in ("", "-"):
        file = new_file(options.json, options.force, "--json")
    with file as path:
        report = evaluate_data(
            _open_network(options),
            options.data,
            options.split,
            options.data_dir,
            views=options.views,
            scales=tuple(map(int, scales)),
            batch_size=options.batch_size,
            max_corrupt=options.max_corrupt,
            say=functools.partial(print, file=sys.stderr),
            bar=True,
        )
        if path is not None:
            path.write_text(dump_json(report.to_json()) + "\n")
    print(dump_json(report.to_json()) if options.json == "-" else report.table(options.per_class))


_TRAIN_HELP = """usage: python train.py [--config=FILE[:ARG]] [--workdir=DIR] [--config.FIELD=X ...]

Trains the network that a configuration describes; the same command goes on with a stopped run.

  --config   a file with get_config(), such as configs/cifar10.py:resnet56 (default: digits)
  --workdir  where the run is kept (default: runs/ and the configuration's name)
{several}
Fields of this configuration:
"""


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
                meanings[field.name], 88, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines)


def parse_train_flags(arguments: Sequence[str]) -> tuple[Any, Path]:
    """The flags of train.py.

    Args:
      arguments: Such as ["--config=configs/digits.py", "--config.train.epochs=3"].

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

    from resnet_jax.training.config import Config

    default = Path(__file__).parents[1] / "configs" / "digits.py"
    argv = ["train.py", *arguments]
    values = flags.FlagValues()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it prints before it raises
            config_flags.DEFINE_config_file(
                "config", str(default), flag_values=values, sys_argv=argv
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
    name = "-".join(part for part in (Path(file).stem, argument) if part)
    if "://" in (values.workdir or ""):
        raise ConfigError(f"--workdir={values.workdir}: must be a folder; mount the bucket")
    return config, Path(values.workdir or Path("runs") / name)


def _file_fault(file: Path) -> str:
    if file.is_file():
        return "its get_config() does not return a resnet_jax.training.config.Config"
    recipes = sorted(Path(__file__).parents[1].glob("configs/*.py"))
    return f"no such file; there are {', '.join(f'configs/{path.name}' for path in recipes)}"


def _flag_fault(error: Exception, arguments: Sequence[str]) -> str:
    """One line for what is wrong with a flag: the library's own texts name no alternatives."""
    from absl import flags

    from resnet_jax.training.config import Config, to_flat

    fields = to_flat(Config())
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        field = name.removeprefix("config.")
        if name.startswith("config.") and field not in fields:
            close = [each for each in fields if each.partition(".")[2] == field]
            close = close or difflib.get_close_matches(field, fields)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see --help"
            return f"unknown field {field!r}; {hint}"
    last = str(error).strip().splitlines()[-1].strip()
    if isinstance(error, flags.Error) and "Error whilst parsing" not in str(error):
        return " ".join(str(error).split())
    file = next((each for each in arguments if each.startswith("--config=")), "--config")
    return f"{file}: {type(error).__name__ if last == str(error) else ''} {last}".replace("  ", " ")
