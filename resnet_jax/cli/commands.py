"""The commands: each turns its parsed options into calls of the library.

A command imports what it needs itself, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import re
from pathlib import Path
from typing import Any

from resnet_jax.cli.startup import start_backend
from resnet_jax.config.flags import import_recipe, packaged_recipe, parse_train_flags
from resnet_jax.config.help import train_help
from resnet_jax.errors import (
    SKIPPED,
    ConfigError,
    DivergedError,
    ResNetJaxError,
    StoppedError,
    import_failure,
    one_line,
)
from resnet_jax.limits import MAX_CHANNELS, MAX_SIDE
from resnet_jax.terminal import json_text, log, output_width, print_copy, printing, show


def train(options: argparse.Namespace) -> None:
    """Trains a network, or resumes a run."""
    from resnet_jax.distributed.launch import FLAGS, start

    helps = [each for each in options.rest if re.fullmatch(r"-h|--?help(=.*)?", each)]
    if helps:
        wanted = [each for each in options.rest if each not in helps]
        with printing():
            print(train_help(wanted, FLAGS, topic=helps[-1].partition("=")[2]))
        return
    try:
        _train(start(options.rest))
    except KeyboardInterrupt as error:  # the training loop handles signals itself
        raise StoppedError("interrupted before the first step") from error


def _train(wanted: list[str]) -> None:
    from resnet_jax.distributed.process_group import abandon, process_group

    try:
        with process_group() as group:
            if group.count == 1:  # otherwise devices may be missing because a process is lost
                start_backend()
            config, workdir = parse_train_flags(wanted)
            from resnet_jax.training import loop

            result = loop.train(config, workdir)
            # The other processes wait inside the group, however long this takes. JAX's own exit
            # barrier gives up after 30 seconds and aborts every process.
            if group.is_first:
                _record_command(result.workdir, wanted)
            if config.log.report and group.is_first:
                _report_at_the_end(result.workdir)
    except (StoppedError, DivergedError):  # all processes end at the same step
        raise
    except BaseException as error:
        abandon(error)
        raise
    if not group.is_first:
        return
    names = {"map": "mAP", "f1": "F1", "top1": "top-1"}
    found = [f"{names[x]} {result.metrics[x]:.2%}" for x in names if x in result.metrics]
    print_copy(f"{', '.join(found)} after {result.steps} steps; everything is in {result.workdir}")


def _record_command(workdir: Path, arguments: list[str]) -> None:
    """Writes the recipe and the other flags of a run to command.json, for its report."""
    from resnet_jax.files import atomic_write
    from resnet_jax.report.runs import COMMAND_FILE

    recipes = re.findall(r"^--?config[=\n](.+)", "\n".join(arguments), re.MULTILINE)
    command = {"recipe": recipes[-1] if recipes else "digits", "arguments": arguments}
    with contextlib.suppress(OSError):  # the run itself is saved
        atomic_write(workdir / COMMAND_FILE, json_text(command, indent=2) + "\n")


def _report_at_the_end(workdir: Path) -> None:
    """Writes report.html at the end of a run; a failure is only logged."""
    try:
        log("writing report.html")
        from resnet_jax.report.page import write_report

        write_report([workdir], force=True)
    except KeyboardInterrupt:
        log("no report.html: interrupted")
    except Exception as error:
        log(f"no report.html: {_why_no_report(error)}")


def _why_no_report(error: Exception) -> str:
    if isinstance(error, ResNetJaxError | OSError):
        return one_line(error)
    with contextlib.suppress(ImportError):  # a bug of ours, reported below
        if isinstance(error, ImportError):
            return import_failure(error)
    return f"{type(error).__name__}: {one_line(error)}"


def report(options: argparse.Namespace) -> None:
    """Writes a page about runs."""
    import_recipe(options.recipe)
    from resnet_jax.compile_cache import use_compile_cache
    from resnet_jax.report.page import write_report

    start_backend()
    use_compile_cache()
    page = write_report(
        options.workdirs,
        options.output,
        images=options.images,
        data=options.data,
        data_dir=options.data_dir,
        force=options.force,
    )
    print_copy(f"{page} and its pictures in {page.with_suffix('')}")


def summary(options: argparse.Namespace) -> None:
    """Prints the layers of a network."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # no accelerator is needed
    import_recipe(options.recipe)
    _check_is_network(options.model)
    from resnet_jax.models.registry import create_model, model_info
    from resnet_jax.models.summary import summary

    side = options.image_size or model_info(options.model).image_size
    for flag, value, most in (
        ("image_size", side, MAX_SIDE),
        ("channels", options.channels, MAX_CHANNELS),
    ):
        if not 1 <= value <= most:
            raise ConfigError(f"--{flag}={value}: must be from 1 to {most:,}")
    overrides = {} if options.num_classes is None else {"num_classes": options.num_classes}
    model = create_model(options.model, **overrides)
    with printing():
        show(summary(model, (1, side, side, options.channels)))


def _check_is_network(name: str) -> None:
    """Explains that a file, a folder or a recipe is not the name of a network."""
    from resnet_jax.models.registry import list_models

    kind = "a folder" if os.path.isdir(name) else "a file" if os.path.exists(name) else ""
    kind = kind or ("a recipe" if packaged_recipe(name) else "")
    if kind and name not in list_models():
        raise ConfigError(
            f"{name} is {kind}; give the name of a network, such as resnet50 (rj.list_models() has "
            "all of them)"
        )


def plan(options: argparse.Namespace) -> None:
    """Plans a run on TPUs or GPUs that this machine does not have."""
    import jax

    # Planning does not use an accelerator, even if this machine has one.
    jax.config.update("jax_platforms", "cpu")
    from resnet_jax.planning.plan import make_plan, plan_table

    plan = make_plan(
        parse_train_flags(options.rest, help_flag="train --help")[0],
        options.topology,
        batch_per_chip=options.batch_per_chip,
        find_batch=options.find_batch,
        images=options.images,
        num_classes=options.num_classes,
        images_per_core=options.images_per_core,
        network_gbits=options.network_gbits,
    )
    with printing():
        show(json_text(plan) if options.json else plan_table(plan))


def find_rate(options: argparse.Namespace) -> None:
    """Suggests a learning rate, and writes the curve that it follows from."""
    from resnet_jax.outputs import open_output
    from resnet_jax.training.rate_range import find_rate

    path, flag = Path(options.output), f"--output={options.output}"
    if path.suffix not in (".png", ".csv"):
        raise ConfigError(f"{flag}: must end in .png, or in .csv for the numbers only")
    if path.suffix == ".png":
        try:
            from resnet_jax.report.drawing import to_png
            from resnet_jax.report.figures import rate_curve
        except ImportError as error:
            numbers = f"for the numbers only, use --output={path.with_suffix('.csv')}"
            raise ConfigError(f"{import_failure(error, flag)}; {numbers}") from error
    start_backend()
    config, _ = parse_train_flags(options.rest, help_flag="train --help")
    with contextlib.ExitStack() as stack:
        opened = {
            suffix: stack.enter_context(open_output(path.with_suffix(suffix), options.force))
            for suffix in dict.fromkeys((path.suffix, ".csv"))
        }
        limits = options.low, options.high, options.steps
        curve = find_rate(config, *limits, log=log, bar=True)
        opened[".csv"].write(curve.to_csv().encode())
        if path.suffix == ".png":
            title = f"{config.model.name} on {config.data.name}, {config.train.batch_size} images"
            opened[".png"].write(to_png(rate_curve(curve, f"{title} a step")))
    _report_rate(curve, options.output)


def _report_rate(curve: Any, output: str) -> None:
    """Prints the suggestion of a range test, and logs the rest."""
    if curve.end:
        last = (
            f" after the rate {curve.rates[-1]:.2g}" if len(curve.rates) else " at the first step"
        )
        log(f"ended{last}: {curve.end}")
    if math.isnan(curve.steepest):
        raise ConfigError(
            f"no rate to suggest: the loss does not clearly fall before it rises; see {output}, "
            "and try a lower --low, a higher --high or more --steps"
        )
    log(
        f"the loss falls fastest at {curve.steepest:.2g}; before its first rise it is lowest at "
        f"{curve.lowest:.2g}, a tenth of which is {curve.lowest / 10:.2g}; the curve is in {output}"
    )
    if curve.scale != 1:
        log(
            "these are values of optimizer.learning_rate for optimizer.base_batch images; "
            f"train.batch_size multiplies them by {curve.scale:g}"
        )
    print_copy(f"--config.optimizer.learning_rate={curve.steepest:.2g}")


def export(options: argparse.Namespace) -> None:
    """Gives a network away."""
    from resnet_jax.export.exporter import export_network

    network = _open_network(options)
    agreement = export_network(
        network,
        options.format,
        options.output,
        platforms=options.platforms,
        fold_batch_norm=options.fold_batch_norm,
        weights=options.weights,
        input_size=options.input_size,
        opset=options.opset,
        push=options.push,
        force=options.force,
    )
    _log_assumptions(network)
    print_copy(str(agreement))


def prepare(options: argparse.Namespace) -> None:
    """Downloads and prepares a dataset."""
    from resnet_jax.data.prepare import prepare

    prepare(options.name, options.data_dir, options.manual_dir)
    print_copy(f"{options.name} is ready")


def predict(options: argparse.Namespace) -> int:
    """Predicts the classes of images; returns the exit code."""
    from resnet_jax.inference.classifier import Classifier
    from resnet_jax.inference.images import list_images
    from resnet_jax.inference.writers import write_predictions
    from resnet_jax.weights.network import require_head

    def open_classifier() -> Classifier:
        network = _open_network(options)
        require_head(network, "predict")
        classifier = Classifier(network, batch_size=options.batch_size)
        _log_assumptions(network)
        return classifier

    files = list_images(options.inputs)
    skipped = write_predictions(
        open_classifier,
        files,
        top=options.top,
        form=options.format,
        output=options.output,
        force=options.force,
    )
    return _log_skipped(skipped, len(files))


def features(options: argparse.Namespace) -> int:
    """Writes the features of images; returns the exit code."""
    from resnet_jax.inference.features import write_features
    from resnet_jax.inference.images import list_images

    files = list_images(options.inputs)
    open_once = functools.cache(lambda: _open_network(options))
    skipped = write_features(
        open_once,
        files,
        options.output,
        layer=options.layer,
        maps=options.maps,
        batch_size=options.batch_size,
        force=options.force,
    )
    _log_assumptions(open_once())
    return _log_skipped(skipped, len(files))


def evaluate(options: argparse.Namespace) -> None:
    """Measures a network on a dataset."""
    from resnet_jax.evaluation.held_out import evaluate_data
    from resnet_jax.evaluation.result import dump_json
    from resnet_jax.outputs import open_output

    scales = options.scales.split(",") if options.scales else []
    if not all(re.fullmatch(r"\s*\d{1,6}\s*", each) for each in scales) or len(scales) > 100:
        shown = options.scales[:100]
        raise ConfigError(f"--scales={shown}: must be pixels, separated by commas")
    file: Any = contextlib.nullcontext()
    if options.json not in ("", "-"):
        file = open_output(options.json, options.force, "--json", stream=True)
    with file as stream:
        result = evaluate_data(
            _open_network(options),
            options.data,
            options.split,
            options.data_dir,
            options.allow_missing_classes,
            views=options.views,
            scales=tuple(map(int, scales)),
            batch_size=options.batch_size,
            max_corrupt=options.max_corrupt,
            log=log,
            bar=True,
        )
        if stream is not None:
            stream.write(f"{dump_json(result.to_json())}\n".encode())
    with printing():
        if options.json == "-":
            show(dump_json(result.to_json()))
        else:
            show(result.table(options.per_class, output_width()))


def doctor(options: argparse.Namespace) -> int:
    """Checks this machine; returns the exit code."""
    from resnet_jax.doctor.command import doctor

    arguments = ["--quick"] if options.quick else []
    if options.network:
        arguments.append(f"--network={options.network}")
    with printing():
        return doctor([*arguments, *options.rest], as_json=options.json)


def _open_network(options: argparse.Namespace) -> Any:
    import_recipe(options.recipe)
    start_backend()
    from resnet_jax.compile_cache import use_compile_cache
    from resnet_jax.weights.source import open_network

    use_compile_cache()
    return open_network(
        options.source,
        model=options.model,
        best=options.state == "best",
        ema=options.ema,
        image_size=options.image_size,
        crop_fraction=options.crop_fraction,
        threshold=options.threshold,
        mean=options.mean,
        std=options.std,
        interpolation=options.interpolation,
        crop_mode=options.crop_mode,
        classes=options.classes,
        prefix=options.prefix,
        upright=getattr(options, "upright", None),  # no flag of export
    )


def _log_assumptions(network: Any) -> None:
    """Logs what was assumed about a network; called last, so that an error remains one line."""
    for line in network.assumed:
        log(f"assumed: {line}")


def _log_skipped(skipped: int, images: int) -> int:
    if skipped:
        log(f"{skipped} of {images} images could not be read")
    return SKIPPED if skipped else 0
