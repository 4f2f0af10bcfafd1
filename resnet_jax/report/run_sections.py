"""The sections of a report that follow from the records and the configuration of runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from resnet_jax.config.flags import packaged_recipe
from resnet_jax.config.schema import Augment, Config
from resnet_jax.config.serialization import to_flat
from resnet_jax.errors import ResNetJaxError
from resnet_jax.evaluation.result import EvaluationResult
from resnet_jax.models.summary import summary
from resnet_jax.report import figures
from resnet_jax.report.elements import Link, Picture, Section, Table
from resnet_jax.report.runs import Run
from resnet_jax.terminal import shortened, visible
from resnet_jax.workdirs.description import read_class_names
from resnet_jax.workdirs.metric_writers import duration


def result(run: Run) -> Section:
    """The last evaluation, and the length and speed of the training."""
    final, config = run.final, run.config
    rows = [
        ("held out", f"{config.data.eval_split}, {final.get('images', 0):,} images"),
        ("mAP", _percent(final, "map")),
        ("F1, macro", _percent(final, "f1")),
        ("F1, micro", _percent(final, "f1_micro")),
        ("top-1", _percent(final, "top1") if final else "not evaluated yet"),
        ("top-5", "" if 0 < run.num_classes <= 5 else _percent(final, "top5")),
        ("loss", f"{final['loss']:.4f}" if final else ""),
        ("steps", f"{run.training[-1]['step'] if run.training else 0:,}"),
        ("training time", duration(run.seconds)),
        ("training images/s", f"{run.images_per_second:,.0f}"),
        ("damaged records", f"{run.bad_lines} lines of metrics.jsonl" if run.bad_lines else ""),
    ]
    rows = [row for row in rows if row[1]]
    return Section("result", "Result", tables=[Table(rows)])


def _percent(record: dict[str, Any], name: str) -> str:
    return f"{record[name]:.2%}" if name in record else ""


def comparison(runs: Sequence[Run]) -> Section:
    """A row for each run, and the fields in which they differ."""
    header = (
        *("run", "network", "held-out error", "best", "training error", "held-out loss"),
        *("steps", "time", "images/s"),
    )
    rows = []
    for run in runs:
        final, last = run.final, run.training[-1] if run.training else {}
        rows.append(
            (
                run.title,
                run.config.model.name,
                f"{1 - final['top1']:.2%}" if final else "",
                f"{1 - max(each['top1'] for each in run.ranked):.2%}" if final else "",
                f"{1 - last['top1']:.2%}" if last else "",
                f"{final['loss']:.4f}" if final else "",
                f"{last.get('step', 0):,}",
                duration(run.seconds),
                f"{run.images_per_second:,.0f}",
            )
        )
    tables = [Table(rows, header)]
    if differing := _differing_fields(runs):
        titles = tuple(run.title for run in runs)
        tables.append(Table(differing, ("field", *titles), collapsed="Fields that differ"))
    text = (
        "Held-out errors are those of the last evaluation and the best one; training errors are "
        "means over the steps of the last record."
    )
    return Section("runs", "Runs", text, tables=tables)


def _differing_fields(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The fields of the configuration that differ, with the value in each run."""
    fields = [to_flat(run.config) for run in runs]
    return [
        (name, *(repr(each[name]) for each in fields))
        for name in fields[0]
        if any(each[name] != fields[0][name] for each in fields)
    ]


def curves(runs: Sequence[Run]) -> Section:
    """Errors and losses over steps."""
    drops = any(run.rate_drops() for run in runs)
    pictures = [
        Picture.of_figure(
            "curves",
            figures.learning_curves(runs),
            "Top-1 error over training steps, with the learning rate below",
            "Top-1 error, as in He et al. 2015, Figures 4 and 6."
            + " Dotted lines: drops of the learning rate." * drops,
        ),
        Picture.of_figure(
            "loss",
            figures.loss_curves(runs),
            "Loss over training steps",
            "Loss on training batches and on held-out images.",
        ),
    ]
    if any("map" in record for run in runs for record in run.evaluations):
        pictures.append(
            Picture.of_figure(
                "multi_label",
                figures.multi_label_curves(runs),
                "Mean average precision and macro F1 over training steps",
                "Mean average precision, and F1 at the threshold of each run, on held-out images.",
            )
        )
    return Section("curves", "Learning curves", training_text(runs), pictures=pictures)


def training_text(runs: Sequence[Run]) -> str:
    """Why training curves may be above held-out ones, from the configurations of runs."""
    configs = [run.config for run in runs]

    def used(*names: str) -> list[str]:
        """The names of fields that any run sets, as text."""
        fields = [to_flat(config) for config in configs]
        words = {each: each.partition(".")[2].replace("_", " ") for each in names}
        return [words[each] for each in names if any(flat[each] for flat in fields)]

    text = "Training values are means over the steps of a record, whose parameters still change"
    text += ", on augmented images" * any(_is_augmented(config) for config in configs) + "."
    reasons = []
    if mixed := used("augment.mixup", "augment.cutmix"):
        names = " and ".join(mixed)
        reasons.append(f"{names} (of a mixed image only the class with the larger share counts)")
    if smoothing := used("loss.label_smoothing"):
        reasons.append(f"{smoothing[0]} (the training loss cannot reach 0)")
    if dropped := used("model.dropout_rate", "model.stochastic_depth_rate"):
        names = " and ".join(each.removesuffix(" rate") for each in dropped)
        reasons.append(f"{names} (off in evaluation)")
    if used("loss.class_weights"):
        reasons.append("class weights (in the training loss only)")
    if reasons:
        text += f" What also raises training error or loss here: {', '.join(reasons)}."
        text += " A training curve above the held-out one is expected."
    return text


def _is_augmented(config: Config) -> bool:
    plain = Augment(mean=config.augment.mean, std=config.augment.std)
    # Fields that need others to take effect.
    names = ("rand_magnitude", "rand_magnitude_std")
    plain = dataclasses.replace(plain, **{each: getattr(config.augment, each) for each in names})
    return config.augment != plain or config.data.crop != "center"


def class_sizes(run: Run, result: EvaluationResult | None = None) -> list[Section]:
    """Images of each class, with accuracies from `result`; [] where the run did not count them."""
    if not run.class_counts.get("train", np.zeros(0)).any():
        return []
    names, counts = read_class_names(run.workdir), run.class_counts["train"]
    known = result and result.class_names == names and result.per_class
    accuracies = [each.top1 for each in known] if known else []
    order, present = np.argsort(-counts, kind="stable"), counts[counts > 0]
    shown = [visible(name) for name in names]
    ends = order[0], order[len(present) - 1]
    largest, smallest = (shortened(shown[index], 40) for index in ends)
    facts = [
        ("largest class", f"{largest}, {present.max():,} training images"),
        ("smallest class", f"{smallest}, {present.min():,} training images"),
        ("ratio", f"{present.max() / present.min():.3g}"),
    ]
    if missing := len(names) - len(present):
        facts.append(("classes without training images", f"{missing:,}"))
    columns = {"training images": [f"{each:,}" for each in counts]}
    if "eval" in run.class_counts:
        columns["held-out images"] = [f"{each:,}" for each in run.class_counts["eval"]]
    if accuracies:
        columns["accuracy"] = ["" if each is None else f"{each:.1%}" for each in accuracies]
    rows = [(names[index], *(column[index] for column in columns.values())) for index in order]
    by_class = Table(rows, ("class", *columns), collapsed="All classes, largest first")
    picture = Picture.of_figure(
        "classes",
        figures.class_sizes(shown, counts, accuracies),
        "Training images of each class, and accuracy on its held-out images",
        "Classes by decreasing number of training images.",
    )
    tables = [Table(facts), by_class]
    return [Section("classes", "Class sizes", pictures=[picture], tables=tables)]


def recipe(run: Run, channels: int = 0) -> list[Section]:
    """The configuration, the source of a packaged recipe, and the machine, where recorded."""
    config = run.config
    try:
        from resnet_jax.config.model import make_model

        model = make_model(config, len(read_class_names(run.workdir))).clone(axis_name=None)
        side = config.data.image_size
        channels = channels or config.data.channels or len(config.augment.mean)
        counts = summary(model, (1, side, side, channels))
        network = [
            ("network", config.model.name),
            ("parameters", f"{counts.parameters:,}"),
            ("multiply-adds per image", f"{counts.multiply_adds:,}"),
        ]
    except ResNetJaxError:
        network = [("network", config.model.name)]
    changed = [(name, repr(value)) for name, value in run.changed_fields.items()]
    every_field = [(name, repr(value)) for name, value in to_flat(config).items()]
    source = packaged_recipe(run.recipe)
    origin = Link(run.recipe, "#source") if source else run.recipe
    recipe = Section(
        "recipe",
        "Recipe",
        "Fields that differ from their defaults; config.json has all of them.",
        tables=[
            Table([*([("recipe", origin)] if origin else []), *network, *changed]),
            Table(every_field, collapsed="All fields"),
        ],
    )
    sections = [recipe]
    if source:
        text = source.read_text(encoding="utf-8")
        heading = f"Source of {source.name}"
        about = "The recipe as it is in the installed package; flags may have changed fields."
        sections.append(Section("source", heading, about, source=text))
    if run.environment:
        machine = Section("machine", "Machine", tables=[Table([*run.environment.items()])])
        sections.append(machine)
    return sections
