"""The result of an evaluation: as fields, as JSON, as text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from resnet_jax.evaluation.class_tables import ClassAccuracy, ClassMetrics, class_lines
from resnet_jax.evaluation.label_sets import ALEXNET_ERRORS, CORRUPTED, SEVERITIES
from resnet_jax.evaluation.metrics import (
    CalibrationBin,
    calibration,
    confusion_matrix,
    expected_calibration_error,
)
from resnet_jax.evaluation.multi_label import MultiLabelMetrics
from resnet_jax.terminal import json_text, visible


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """An evaluation of a network on a dataset. Accuracies and errors are fractions.

    Args:
      network: Workdir, weight file or repository that the network was opened from.
      model: Registered name of the network.
      step: Completed steps of a run's state; None where it is no run.
      weights: "ema" for the moving average of a run's parameters, else "".
      data: Name of the dataset.
      split: Evaluated split.
      views: What the network saw of each image, one of `views.VIEWS`.
      image_size: Side of the crop in pixels.
      resize_size: Shorter side in pixels before the crop.
      scales: Shorter sides in pixels for multi_scale, else ().
      batch_size: Images in a batch on all devices.
      skipped: Images that could not be decoded.
      unlabeled: Images without a label. A multi-label network's top-1, top-5 and hits leave them
        out; on a dataset with several labels per image (ReaL) every metric of another network
        does.
      loss: Softmax cross-entropy in nats, averaged over images; of a multi-label network binary
        cross-entropy, averaged over classes and images; None for another network where images have
        several labels.
      top1: Fraction of images whose highest logit is their label, or one of their labels.
      top5: Fraction of images with a label among the five highest logits.
      class_names: Names of the classes that competed.
      indices: Position of each image in the dataset [N]; the arrays below are in this order.
      labels: Class of each image [N]; None where an image may have several.
      predictions: Predicted class of each image [N].
      confidences: Probability of the prediction, float32 [N].
      hits: Whether the prediction is right, bool [N].
      seconds: Duration, without opening network and data.
      multi_label: Average precision, F1 and their counts, of a multi-label network.
      outputs: Number of outputs of the network, whether or not they competed.
      matched: How labels were matched to outputs: by "name", "number" or "order".
      assumed: What was assumed of the network, one sentence each.
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
    unlabeled: int
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
    multi_label: MultiLabelMetrics | None = None
    outputs: int = 0
    matched: str = "name"
    assumed: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """The number of evaluated images."""
        return len(self.predictions)

    @functools.cached_property
    def bins(self) -> tuple[CalibrationBin, ...]:
        """Predictions by confidence, in 15 bins of equal width."""
        return calibration(self.confidences, self.hits)

    @property
    def ece(self) -> float | None:
        """The expected calibration error over `bins`; None for a multi-label network.

        The probabilities of its classes do not sum to 1, so its calibration is another question.
        """
        return None if self.multi_label else expected_calibration_error(self.bins)

    @functools.cached_property
    def confusion(self) -> np.ndarray | None:
        """int64 [classes, classes], a row for each label; None where an image may have several."""
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
    def class_metrics(self) -> tuple[ClassMetrics, ...] | None:
        """The metrics of each class; None where the network is not multi-label."""
        found = self.multi_label
        if found is None:
            return None
        fractions = (found.average_precision, found.precision, found.recall, found.class_f1)
        known = [[None if np.isnan(x) else float(x) for x in each] for each in fractions]
        counts = found.positives.tolist(), found.predicted.tolist()
        return tuple(map(ClassMetrics, self.class_names, *counts, *known))

    @property
    def _classes(self) -> tuple[ClassMetrics, ...] | tuple[ClassAccuracy, ...] | None:
        return self.class_metrics or self.per_class

    def record(self) -> dict[str, Any]:
        """The fields of an evaluation record in metrics.jsonl."""
        metrics = {name: getattr(self, name) for name in ("loss", "top1", "top5")}
        if self.multi_label is not None:
            metrics = self.multi_label.record()
        if metrics["loss"] is None:
            del metrics["loss"]
        speed = self.images / self.seconds
        return {**metrics, "images_per_second": speed, "images": self.images}

    def summary(self) -> dict[str, Any]:
        """The metrics and counts, as JSON has them."""
        metrics = {name: getattr(self, name) for name in ("loss", "top1", "top5", "ece")}
        if (found := self.multi_label) is not None:
            metrics = {
                **{"map": found.map, "f1": found.f1, "f1_micro": found.f1_micro},
                **{"threshold": found.threshold, "absent_classes": found.absent},
                **metrics,
            }
        counts = {"images": self.images, "skipped": self.skipped, "unlabeled": self.unlabeled}
        return {**metrics, **counts}

    def to_json(self) -> dict[str, Any]:
        """Everything but the results of each image, in the form of docs/evaluate.md."""
        per_class, confusion = self._classes, self.confusion
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

    def table(self, per_class: bool = False, width: int = 0) -> str:
        """The result as text for a terminal.

        Args:
          per_class: Include the metrics of each class and the confusion matrix.
          width: Columns that the tables of classes have to fit into, for which they shorten names.
            0: any number.
        """
        rows = [
            ("images", f"{self.images:,}{self._excluded()}"),
            ("classes", f"{len(self.class_names):,}{self._matched()}"),
            *(_multi_label_rows(self.multi_label) if self.multi_label else ()),
            ("top-1", f"{self.top1:.2%}"),
        ]
        if len(self.class_names) > 5:  # else every image with a label is a hit
            rows.append(("top-5", f"{self.top5:.2%}"))
        no_loss = "none: images have several labels"
        rows.append(("loss", no_loss if self.loss is None else f"{self.loss:.4f}"))
        if self.ece is not None:
            rows.append(("ECE", f"{self.ece:.2%}  ({len(self.bins)} bins of equal width)"))
        speed = self.images / self.seconds
        rows.append(("time", f"{self.seconds:.1f} s, {speed:,.0f} images/s"))
        lines = [_title(self), *(f"  {name:<8}{value}" for name, value in rows)]
        if per_class:
            names = [visible(name) for name in self.class_names]
            lines += ["", *class_lines(names, self._classes, self.confusion, width)]
        return "\n".join(lines)

    def _matched(self) -> str:
        some = f" of {self.outputs:,} outputs" if len(self.class_names) < self.outputs else ""
        by = {"order": "order, not by name"}.get(self.matched, self.matched)
        return f"{some}, matched by {by}"

    def _excluded(self) -> str:
        unlabeled = "of them have no label" if self.multi_label else "more have no label"
        parts = [(self.skipped, "more cannot be decoded"), (self.unlabeled, unlabeled)]
        return "".join(f"; {count:,} {why}" for count, why in parts if count)


def _multi_label_rows(found: MultiLabelMetrics) -> list[tuple[str, str]]:
    classes = f"{len(found.positives) - found.absent:,} classes"
    if found.absent:
        classes += f"; {found.absent:,} more are on no image"
    f1 = f"{found.f1:.2%} macro, {found.f1_micro:.2%} micro"
    return [
        ("mAP", f"{found.map:.2%}  ({classes})"),
        ("F1", f"{f1}  (probability {found.threshold:g} or more)"),
    ]


@dataclasses.dataclass(frozen=True)
class CorruptionResult:
    """An evaluation on ImageNet-C: results by corruption and severity, of all that are prepared."""

    results: Mapping[str, Mapping[int, EvaluationResult]]

    @property
    def _first(self) -> EvaluationResult:
        return next(iter(next(iter(self.results.values())).values()))

    @property
    def complete(self) -> bool:
        """Whether the benchmark's 15 corruptions are there at all 5 severities."""
        there = [tuple(sorted(self.results.get(name, ()))) for name in ALEXNET_ERRORS]
        return all(severities == SEVERITIES for severities in there)

    @property
    def mean_error(self) -> float | None:
        """The mean top-1 error of the benchmark's 75 sets; None where some are missing."""
        if not self.complete:
            return None
        return float(np.mean([self.errors(name) for name in ALEXNET_ERRORS]))

    @property
    def mce(self) -> float | None:
        """The mean over corruptions of error / AlexNet's error; None where sets are missing."""
        if not self.complete:
            return None
        ratios = [np.mean(self.errors(name)) / alexnet for name, alexnet in ALEXNET_ERRORS.items()]
        return float(np.mean(ratios))

    def errors(self, corruption: str) -> list[float]:
        """Top-1 errors of a corruption, by increasing severity."""
        return [1 - result.top1 for _, result in sorted(self.results[corruption].items())]

    def to_json(self) -> dict[str, Any]:
        """The metrics of each set, in the form of docs/evaluate.md."""
        return {
            **_setting(self._first),
            "data": f"tfds:{CORRUPTED}",
            "mean_error": self.mean_error,
            "mce": self.mce,
            "corruptions": {
                name: {str(severity): each.summary() for severity, each in sorted(found.items())}
                for name, found in self.results.items()
            },
        }

    def table(self, per_class: bool = False, width: int = 0) -> str:
        """Top-1 errors by corruption and severity, as text for a terminal.

        `per_class` and `width` are ignored: the sets have no table of classes.
        """
        lines = [
            f"{_title(self._first, of=CORRUPTED)}: top-1 error in %, by severity",
            f"  {'':<18}" + "".join(f"{severity:>7}" for severity in SEVERITIES) + "   mean",
        ]
        for name, found in self.results.items():
            cells = [
                f"{100 * (1 - found[each].top1):>7.2f}" if each in found else f"{'-':>7}"
                for each in SEVERITIES
            ]
            mean = 100 * float(np.mean(self.errors(name)))
            lines.append(f"  {name:<18}{''.join(cells)}{mean:>7.2f}")
        if self.mce is None:
            missing = [each for each in ALEXNET_ERRORS if len(self.results.get(each, ())) < 5]
            lines.append(f"no mCE: not all severities of {', '.join(missing)} are prepared")
        else:
            lines.append(f"mean error {self.mean_error:.2%}, mCE {self.mce:.2%} (AlexNet: 100%)")
        return "\n".join(lines)


def _setting(result: EvaluationResult) -> dict[str, Any]:
    fields = "network model step weights data split views image_size resize_size scales batch_size"
    return {name: getattr(result, name) for name in fields.split()}


def _title(result: EvaluationResult, of: str = "") -> str:
    views = {
        "one_crop": "one crop of {size} pixels",
        "flip": "one crop of {size} pixels and its mirror image, logits averaged",
        "ten_crop": "ten crops of {size} pixels, probabilities averaged",
        "multi_scale": "whole images at {scales} pixels, probabilities averaged",
    }[result.views].format(size=result.image_size, scales=", ".join(map(str, result.scales)))
    state = "" if result.step is None else f", step {result.step}"
    state += ", moving average" if result.weights else ""
    network = f"{result.network} ({result.model}{state})"
    return visible(f"{network}: {views}; {result.split} of {of or result.data}")


def dump_json(record: Mapping[str, Any]) -> str:
    """JSON with a field on each line.

    Example:
      >>> dump_json({"top1": 0.5, "scales": ()})
      '{\\n  "top1": 0.5,\\n  "scales": []\\n}'
    """
    fields = [f"  {json_text(name)}: {json_text(value)}" for name, value in record.items()]
    return "{\n" + ",\n".join(fields) + "\n}"
