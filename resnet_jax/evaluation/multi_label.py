"""Metrics of images that have none, one or several labels: average precision, F1, loss.

The devices compute logits, and the host does the rest in float64 and image by image, so the
metrics do not depend on the batch size, the padding, or the number of devices and hosts. Average
precision ranks all images of a class, so all logits are kept until the end.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from resnet_jax.limits import check_host_memory
from resnet_jax.weights.network import is_predicted

_SORTED_AT_ONCE = 2**22  # logits: 16 MiB


@dataclasses.dataclass(frozen=True)
class MultiLabelMetrics:
    """Metrics over a dataset and of each of its classes; fractions, not percent.

    `loss` is the binary cross-entropy in nats, averaged over classes and images. `top1` and `top5`
    are over the images that have labels; any of an image's labels is a hit. The counts of images
    that have a class (`positives`), for which it is predicted, and both (`true_positives`) are
    int64 [classes].

    A class that no image has cannot be ranked: its `average_precision` [classes] is NaN, and it
    does not enter `map`. A class that no image has and that is never predicted has no F1 and does
    not enter `f1`; if it is predicted for some image, its F1 is 0.
    """

    threshold: float
    loss: float
    top1: float
    top5: float
    positives: np.ndarray
    predicted: np.ndarray
    true_positives: np.ndarray
    average_precision: np.ndarray

    @property
    def map(self) -> float:
        """The mean of the classes' average precisions."""
        return float(np.mean(self.average_precision[self.positives > 0]))

    @property
    def absent(self) -> int:
        """The number of classes that no image has."""
        return int((self.positives == 0).sum())

    @property
    def precision(self) -> np.ndarray:
        """Fraction of the predictions of each class that are right; NaN where there are none."""
        return _ratio(self.true_positives, self.predicted)

    @property
    def recall(self) -> np.ndarray:
        """Fraction of the images of each class that are found; NaN where there are none."""
        return _ratio(self.true_positives, self.positives)

    @property
    def class_f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall, [classes]; NaN where there are neither."""
        return _ratio(2 * self.true_positives, self.positives + self.predicted)

    @property
    def f1(self) -> float:
        """Macro F1: the mean of the classes' F1."""
        return float(np.nanmean(self.class_f1))

    @property
    def f1_micro(self) -> float:
        """Micro F1: over all pairs of an image and a class."""
        both = self.positives.sum() + self.predicted.sum()
        return float(2 * self.true_positives.sum() / both)

    def record(self) -> dict[str, float]:
        """The fields of an evaluation record in metrics.jsonl."""
        names = ("loss", "top1", "top5", "map", "f1", "f1_micro")
        return {name: getattr(self, name) for name in names}


class MultiLabelAccumulator:
    """Collects the logits and labels of a dataset, batch by batch.

    Example:
      >>> scores = MultiLabelAccumulator()
      >>> _ = scores.add(np.array([[2.0, -1.0], [1.0, 3.0], [0.5, -2.0]]), np.array([[1, 0]] * 3))
      >>> metrics = scores.compute(threshold=0.5)
      >>> metrics.average_precision.tolist(), metrics.f1, metrics.f1_micro, metrics.top1
      ([1.0, nan], 0.5, 0.8571428571428571, 0.6666666666666666)
    """

    def __init__(self) -> None:
        self._logits: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._losses: list[np.ndarray] = []
        self._ranks: list[np.ndarray] = []

    def add(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Adds logits [N, classes] and labels of 0 and 1, and returns the images' `best_ranks`.

        Labels may have fewer classes than the head: no image has the others.
        """
        missing = logits.shape[1] - labels.shape[1]
        labels = np.pad(labels > 0, ((0, 0), (0, missing)))
        self._logits.append(logits)
        self._labels.append(labels)
        self._losses.append(_losses(logits, labels))
        self._ranks.append(best_ranks(logits, labels))
        return self._ranks[-1]

    @property
    def ranks(self) -> np.ndarray:
        """The `best_ranks` of all images so far."""
        return np.concatenate(self._ranks) if self._ranks else np.zeros(0, np.int64)

    def compute(self, threshold: float) -> MultiLabelMetrics:
        """The metrics of all images so far, at least one of which has a label."""
        ranks, losses = self.ranks, np.concatenate(self._losses)
        images, labeled = len(ranks), int((ranks >= 0).sum())
        positives, predicted, true_positives = self._counts(threshold)
        return MultiLabelMetrics(
            threshold=threshold,
            # An exact sum does not depend on the order of the images.
            loss=math.fsum(losses) / images if np.isfinite(losses).all() else math.nan,
            top1=float(((ranks >= 0) & (ranks < 1)).sum() / labeled),
            top5=float(((ranks >= 0) & (ranks < 5)).sum() / labeled),
            positives=positives,
            predicted=predicted,
            true_positives=true_positives,
            average_precision=self._average_precisions(images),
        )

    def _counts(self, threshold: float) -> np.ndarray:
        counts = np.zeros((3, self._logits[0].shape[1]), np.int64)
        for logits, labels in zip(self._logits, self._labels):
            predicted = is_predicted(logits, threshold)
            counts += [each.sum(0) for each in (labels, predicted, labels & predicted)]
        return counts

    def _average_precisions(self, images: int) -> np.ndarray:
        classes, precisions = self._logits[0].shape[1], list[float]()
        classes_at_once = max(1, _SORTED_AT_ONCE // images)
        for first in range(0, classes, classes_at_once):
            part = slice(first, first + classes_at_once)
            # Contiguous columns are several times faster to sort.
            logits = np.concatenate([each[:, part].T for each in self._logits], axis=1)
            labels = np.concatenate([each[:, part].T for each in self._labels], axis=1)
            precisions += map(average_precision, logits, labels)
        return np.array(precisions)


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """The area under a class's curve of precision over recall, for scores [N] and labels bool [N].

    By steps and not by trapezoids, as in scikit-learn's `average_precision_score`: the sum over
    thresholds n of (R_n - R_(n-1)) P_n. Equal scores share one threshold, so their order does not
    matter. NaN where no label is true.

    Example:
      >>> average_precision(np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, False, True, False]))
      0.8333333333333333
    """
    if not labels.any():
        return math.nan
    order = np.argsort(-scores)
    ordered = scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of each run of ties
    found = np.cumsum(labels[order], dtype=np.int64)[ends]
    precision = found / (ends + 1)
    return float((np.diff(found, prepend=0) * precision).sum() / found[-1])


def best_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The number of wrong classes that are ranked above an image's best label, int64 [N].

    0 where the highest logit [N, classes] is a label, bool [N, classes]; -1 for an image without
    labels. A tie with a wrong class counts against the network, and logits that are not finite
    come last.

    Example:
      >>> logits = np.array([[3.0, 2.0, 1.0], [3.0, 3.0, 1.0], [3.0, 2.0, 1.0]])
      >>> best_ranks(logits, np.array([[0, 1, 0], [1, 1, 0], [0, 0, 0]], bool)).tolist()
      [1, 0, -1]
    """
    best = np.where(labels, logits, -np.inf).max(1)
    rank = ((logits >= best[:, None]) & ~labels).sum(1)
    rank[~np.isfinite(best)] = logits.shape[1]
    rank[~labels.any(1)] = -1
    return rank


def check_scores_memory(images: int, classes: int, what: str, remedy: str) -> None:
    """Raises a ConfigError that starts with `what` where the host cannot keep all logits."""
    needed = images * classes * 5  # a float32 and a bool
    what = f"{what}: mean average precision over {images:,} images of {classes:,} classes"
    check_host_memory(needed, what, remedy)


def _losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Binary cross-entropy of each image, float64 [N]: -log of the right outcome's probability."""
    wrong = np.where(labels, -logits, logits).astype(np.float64)
    losses = np.maximum(wrong, 0) + np.log1p(np.exp(-np.abs(wrong)))
    return np.asarray(np.where(np.isfinite(wrong), losses, np.nan).mean(1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
