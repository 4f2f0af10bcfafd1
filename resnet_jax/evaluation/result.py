"""What an evaluation found: as fields, as JSON, as a table."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from resnet_jax.evaluation.label_sets import ALEXNET_ERRORS, CORRUPTED, SEVERITIES
from resnet_jax.evaluation.measures import (
    Bin,
    calibration,
    confusion_matrix,
    expected_calibration_error,
)
from resnet_jax.evaluation.multi_label import MultiLabelMeasures
from resnet_jax.terminal import columns, json_text, padded, visible

# Up to so many classes the confusion matrix is printed.
_PRINTED_CLASSES = 20
_LONGEST_NAME = 60  # columns of the table; a longer name stands out


class ClassAccuracy(NamedTuple):
    """The accuracy on the images of one class.

    Args:
      name: Of the class.
      images: Their number.
      top1: The share of hits; None where there are no images.
    """

    name: str
    images: int
    top1: float | None


class ClassMeasures(NamedTuple):
    """How a class is told from the others, where an image has none, one or several.

    Args:
      name: Of the class.
      images: That have it.
      predicted: Images for which it is predicted.
      average_precision: None where no image has it.
      precision: None where it is never predicted.
      recall: None where no image has it.
      f1: None where neither is the case.
    """

    name: str
    images: int
    predicted: int
    average_precision: float | None
    precision: float | None
    recall: float | None
    f1: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """A network measured on a data set. Accuracies and errors are fractions.

    Args:
      network: What it was opened from.
      model: Its registered name.
      step: Completed steps of the run's state; None where it was no run.
      weights: "ema" for the moving average of a run's parameters, else "".
      data: The data set.
      split: Of it.
      views: What the network saw of each image, one of `views.VIEWS`.
      image_size: Side of the crop in pixels.
      resize_size: Shorter side in pixels before the crop.
      scales: Shorter sides in pixels for multi_scale, else ().
      batch_size: On all devices together.
      skipped: Images that could not be decoded.
      unlabelled: Images without a label: a multi-label network's top-1, top-5 and hits leave them
        out, and everything does (ReaL) where another network meets them.
      loss: Softmax cross-entropy in nats an image; of a multi-label network binary cross-entropy,
        the mean over classes; None where another network meets images with several labels.
      top1: Share of images whose highest score is their label, or one of their labels.
      top5: The same for the five highest.
      class_names: Of the classes that competed.
      indices: Each image's place in the data set [N]; the arrays below are in this order.
      labels: Each image's place among the classes [N]; None where it may have several.
      predictions: Likewise, of the highest score [N].
      confidences: Probability of the prediction, float32 [N].
      hits: bool [N], whether the prediction is right.
      seconds: That it took, without opening network and data.
      multi_label: Of a multi-label network: average precision, F1 and what they are made of.
      outputs: Of the network, whether or not they competed.
      matched: How labels were matched to outputs: by "name", "number" or "order".
      assumed: What was taken for granted of the network.
    """

    network: str
    model: str
    step: int | None
    weights: str
    data: str
    split: str
    views: str
    image_size: int
    resize_size: int
    scales: tuple[int, ...]
    batch_size: int
    skipped: int
    unlabelled: int
    loss: float | None
    top1: float
    top5: float
    class_names: tuple[str, ...]
    indices: np.ndarray
    labels: np.ndarray | None
    predictions: np.ndarray
    confidences: np.ndarray
    hits: np.ndarray
    seconds: float
    multi_label: MultiLabelMeasures | None = None
    outputs: int = 0
    matched: str = "name"
    assumed: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """The number of images that were measured."""
        return len(self.predictions)

    @functools.cached_property
    def bins(self) -> tuple[Bin, ...]:
        """Predictions by confidence, in 15 ranges of equal width."""
        return calibration(self.confidences, self.hits)

    @property
    def ece(self) -> float | None:
        """The expected calibration error over those ranges; None of a multi-label network.

        Its highest probability is no share of a whole, so its calibration is another question.
        """
        return None if self.multi_label else expected_calibration_error(self.bins)

    @functools.cached_property
    def confusion(self) -> np.ndarray | None:
        """int64 [classes, classes], a row for each label; None where there are several."""
        if self.labels is None:
            return None
        return confusion_matrix(self.labels, self.predictions, len(self.class_names))

    @property
    def per_class(self) -> tuple[ClassAccuracy, ...] | None:
        """The accuracy on each class; None where an image may have several labels."""
        if self.labels is None:
            return None
        images = np.bincount(self.labels, minlength=len(self.class_names))
        # Not the diagonal of `confusion`: a tie counts as a miss.
        hits = np.bincount(self.labels, weights=self.hits, minlength=len(self.class_names))
        return tuple(
            ClassAccuracy(name, int(n), float(k / n) if n else None)
            for name, n, k in zip(self.class_names, images, hits)
        )

    @property
    def class_measures(self) -> tuple[ClassMeasures, ...] | None:
        """How each class is told from the others; None where the network is not multi-label."""
        found = self.multi_label
        if found is None:
            return None
        shares = (found.average_precision, found.precision, found.recall, found.class_f1)
        known = [[None if np.isnan(x) else float(x) for x in each] for each in shares]
        counts = found.positives.tolist(), found.predicted.tolist()
        return tuple(map(ClassMeasures, self.class_names, *counts, *known))

    def summary(self) -> dict[str, Any]:
        """The measures alone, as JSON has them."""
        measures = {name: getattr(self, name) for name in ("loss", "top1", "top5", "ece")}
        if (found := self.multi_label) is not None:
            measures |= {"map": found.map, "f1": found.f1, "f1_micro": found.f1_micro}
            measures |= {"threshold": found.threshold, "absent_classes": found.absent}
        counts = {name: getattr(self, name) for name in ("images", "skipped", "unlabelled")}
        return {**measures, **counts}

    def to_json(self) -> dict[str, Any]:
        """Everything but each image's own results, in the form of docs/evaluate.md."""
        per_class, confusion = self.class_measures or self.per_class, self.confusion
        return {
            **_setting(self),
            **self.summary(),
            "classes": len(self.class_names),
            "outputs": self.outputs,
            "matched_by": self.matched,
            "assumed": self.assumed,
            "calibration": None if self.multi_label else [each._asdict() for each in self.bins],
            "per_class": None if per_class is None else [each._asdict() for each in per_class],
            "confusion": None
            if confusion is None
            else [
                [int(label), int(prediction), int(confusion[label, prediction])]
                for label, prediction in np.argwhere(confusion)
            ],
            "seconds": self.seconds,
            "images_per_second": self.images / self.seconds,
        }

    def table(self, per_class: bool = False) -> str:
        """For people.

        Args:
          per_class: Also each class's accuracy and what it was taken for.
        """
        rows = [
            ("images", f"{self.images:,}" + self._left_out()),
            ("classes", f"{len(self.class_names):,}{self._matched()}"),
            *(self._multi_label_rows(self.multi_label) if self.multi_label else ()),
            ("top-1", f"{self.top1:.2%}"),
            ("top-5", f"{self.top5:.2%}"),
            (
                "loss",
                "none: images have several labels" if self.loss is None else f"{self.loss:.4f}",
            ),
        ]
        if self.ece is not None:
            rows.append(("ECE", f"{self.ece:.2%}  ({len(self.bins)} bins of equal width)"))
        speed = self.images / self.seconds
        rows.append(("time", f"{self.seconds:.1f} s, {speed:,.0f} images/s"))
        lines = [_title(self), *(f"  {name:<8}{value}" for name, value in rows)]
        if per_class:
            lines += ["", *self._class_lines()]
        return "\n".join(lines)

    def _multi_label_rows(self, found: MultiLabelMeasures) -> list[tuple[str, str]]:
        classes = f"{len(self.class_names) - found.absent:,} classes"
        if found.absent:
            classes += f"; {found.absent:,} more are on no image"
        f1 = f"{found.f1:.2%} macro, {found.f1_micro:.2%} micro"
        return [
            ("mAP", f"{found.map:.2%}  ({classes})"),
            ("F1", f"{f1}  (probability {found.threshold:g} or more)"),
        ]

    def _matched(self) -> str:
        """How many compete is said where it is not the number of outputs."""
        some = f" of {self.outputs:,} outputs" if len(self.class_names) < self.outputs else ""
        how = {"order": "order, not by name", "number": "number"}.get(self.matched, self.matched)
        return f"{some}, matched by {how}"

    def _left_out(self) -> str:
        unlabelled = "of them have no label" if self.multi_label else "more have no label"
        parts = [(self.skipped, "more cannot be decoded"), (self.unlabelled, unlabelled)]
        return "".join(f"; {count:,} {why}" for count, why in parts if count)

    def _class_lines(self) -> Iterator[str]:
        names = [visible(name) for name in self.class_names]
        width = min(_LONGEST_NAME, max(5, *map(columns, names)))
        if self.class_measures is not None:
            yield from _measure_lines(self.class_measures, names, width)
        elif self.per_class is not None and self.confusion is not None:
            yield from _accuracy_lines(self.per_class, self.confusion, names, width)
        else:
            yield "no accuracy of each class: images have several labels"


def _measure_lines(
    classes: Sequence[ClassMeasures], names: Sequence[str], width: int
) -> Iterator[str]:
    yield f"{'class':<{width}}  images predicted      AP precision  recall      F1"
    for name, each in zip(names, classes):
        shares = (each.average_precision, each.precision, each.recall, each.f1)
        cells = ["-" if x is None else f"{x:.2%}" for x in shares]
        line = f"{padded(name, width)}  {each.images:>6} {each.predicted:>9}"
        yield line + " {:>7} {:>9} {:>7} {:>7}".format(*cells)


def _accuracy_lines(
    classes: Sequence[ClassAccuracy], confusion: np.ndarray, names: Sequence[str], width: int
) -> Iterator[str]:
    yield f"{'class':<{width}}  images   top-1  most often taken for"
    for label, each in enumerate(classes):
        row = confusion[label].copy()
        row[label] = 0
        worst = int(row.argmax())
        taken = f"  {names[worst]} ({row[worst]})" if row[worst] else ""
        top1 = "-" if each.top1 is None else f"{each.top1:.2%}"
        yield f"{padded(names[label], width)}  {each.images:>6} {top1:>7}{taken}"
    if len(names) <= _PRINTED_CLASSES:
        cell = max(4, *(len(str(count)) + 1 for count in confusion.flat))
        yield "\nconfusion matrix: a row for each label, columns in the same order"
        for name, row in zip(names, confusion):
            yield padded(name, width) + "".join(f"{count:>{cell}}" for count in row)


@dataclasses.dataclass(frozen=True)
class CorruptionReport:
    """A network measured on ImageNet-C.

    Args:
      reports: By corruption and severity: all that are prepared.
    """

    reports: Mapping[str, Mapping[int, Report]]

    @property
    def _any(self) -> Report:
        return next(iter(next(iter(self.reports.values())).values()))

    @property
    def whole(self) -> bool:
        """Whether the benchmark's 15 corruptions are there at all 5 severities."""
        there = [tuple(sorted(self.reports.get(name, ()))) for name in ALEXNET_ERRORS]
        return all(severities == SEVERITIES for severities in there)

    @property
    def mean_error(self) -> float | None:
        """The mean top-1 error of the benchmark's 75 sets; None where some are missing."""
        if not self.whole:
            return None
        return float(np.mean([self.errors(name) for name in ALEXNET_ERRORS]))

    @property
    def mce(self) -> float | None:
        """The mean over corruptions of error by AlexNet's error, 1 for AlexNet; None likewise."""
        if not self.whole:
            return None
        ratios = [np.mean(self.errors(name)) / alexnet for name, alexnet in ALEXNET_ERRORS.items()]
        return float(np.mean(ratios))

    def errors(self, corruption: str) -> list[float]:
        """Top-1 errors of a corruption, by rising severity."""
        return [1 - report.top1 for _, report in sorted(self.reports[corruption].items())]

    def to_json(self) -> dict[str, Any]:
        """The measures of each set, in the form of docs/evaluate.md."""
        setting = _setting(self._any)
        setting["data"] = f"tfds:{CORRUPTED}"
        return {
            **setting,
            "mean_error": self.mean_error,
            "mce": self.mce,
            "corruptions": {
                name: {str(severity): each.summary() for severity, each in sorted(found.items())}
                for name, found in self.reports.items()
            },
        }

    def table(self, per_class: bool = False) -> str:
        """For people: top-1 errors by corruption and severity.

        Args:
          per_class: Means nothing here.
        """
        lines = [
            f"{_title(self._any, of=CORRUPTED)}: top-1 error in %, by severity",
            f"  {'':<18}" + "".join(f"{severity:>7}" for severity in SEVERITIES) + "   mean",
        ]
        for name, found in self.reports.items():
            cells = [
                f"{100 * (1 - found[each].top1):>7.2f}" if each in found else f"{'-':>7}"
                for each in SEVERITIES
            ]
            mean = 100 * float(np.mean(self.errors(name)))
            lines.append(f"  {name:<18}{''.join(cells)}{mean:>7.2f}")
        if self.mce is None:
            missing = [each for each in ALEXNET_ERRORS if len(self.reports.get(each, ())) < 5]
            lines.append(f"no mCE: not all severities of {', '.join(missing)} are prepared")
        else:
            lines.append(f"mean error {self.mean_error:.2%}, mCE {self.mce:.2%} (AlexNet: 100%)")
        return "\n".join(lines)


def _setting(report: Report) -> dict[str, Any]:
    fields = "network model step weights data split views image_size resize_size scales batch_size"
    return {name: getattr(report, name) for name in fields.split()}


def _title(report: Report, of: str = "") -> str:
    views = {
        "one_crop": "one crop of {size} pixels",
        "flip": "one crop of {size} pixels and its mirror image, logits averaged",
        "ten_crop": "ten crops of {size} pixels, probabilities averaged",
        "multi_scale": "whole images at {scales} pixels, probabilities averaged",
    }[report.views].format(size=report.image_size, scales=", ".join(map(str, report.scales)))
    state = "" if report.step is None else f", step {report.step}"
    state += ", moving average" if report.weights else ""
    network = f"{report.network} ({report.model}{state})"
    return visible(f"{network}: {views}; {report.split} of {of or report.data}")


def dump_json(record: Mapping[str, Any]) -> str:
    """JSON with a field on each line, as `json_text` writes it.

    Args:
      record: Of plain values.

    Returns:
      JSON text.

    Example:
      >>> dump_json({"top1": 0.5, "scales": ()})
      '{\\n  "top1": 0.5,\\n  "scales": []\\n}'
    """
    fields = [f"  {json_text(name)}: {json_text(value)}" for name, value in record.items()]
    return "{\n" + ",\n".join(fields) + "\n}"
