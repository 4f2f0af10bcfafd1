"""Measures of images that have none, one or several labels: average precision, F1, loss.

The devices compute logits and the host does the rest, in float64 and image by image, so the
measures do not depend on the batch size, the padding, or the number of devices and hosts.
Average precision ranks all images of a class, so all logits are kept until the end.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from resnet_jax.limits import check_host_memory
from resnet_jax.weights.network import is_predicted

# Logits that are sorted at a time: 16 MiB.
_AT_A_TIME = 2**22


@dataclasses.dataclass(frozen=True)
class MultiLabelMeasures:
    """Measures over a data set, and of each of its classes. Shares are fractions.

    A class that no image has cannot be ranked: it has no average precision and does not enter
    `map`. A class that no image has and that was not predicted either has no F1 and does not
    enter `f1`; one that was predicted for some image has an F1 of 0.

    Args:
      threshold: Probability from which a class is predicted.
      loss: Binary cross-entropy in nats, mean over classes and images.
      top1: Share of the images with labels whose highest logit is one of their labels.
      top5: The same for the five highest.
      positives: Images that have the class, int64 [classes].
      predicted: Images for which it is predicted, int64 [classes].
      true_positives: Images of both kinds, int64 [classes].
      average_precision: [classes], NaN for a class that no image has.
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
        """Share of the predictions of each class that are right; NaN where there are none."""
        return _ratio(self.true_positives, self.predicted)

    @property
    def recall(self) -> np.ndarray:
        """Share of the images of each class that are found; NaN where there are none."""
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
        """Micro F1: that of all pairs of an image and a class together."""
        both = self.positives.sum() + self.predicted.sum()
        return float(2 * self.true_positives.sum() / both)

    def record(self) -> dict[str, float]:
        """What metrics.jsonl has of an evaluation."""
        names = ("loss", "top1", "top5", "map", "f1", "f1_micro")
        return {name: getattr(self, name) for name in names}


class Scores:
    """The logits and labels of a data set's images, batch by batch.

    Example:
      >>> scores = Scores()
      >>> _ = scores.add(np.array([[2.0, -1.0], [1.0, 3.0], [0.5, -2.0]]), np.array([[1, 0]] * 3))
      >>> measures = scores.measure(threshold=0.5)
      >>> measures.average_precision.tolist(), measures.f1, measures.f1_micro, measures.top1
      ([1.0, nan], 0.5, 0.8571428571428571, 0.6666666666666666)
    """

    def __init__(self) -> None:
        self._logits: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._losses: list[np.ndarray] = []
        self._ranks: list[np.ndarray] = []

    def add(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Adds images.

        Args:
          logits: float [N, classes].
          labels: [N, classes] of 0 and 1, or of fewer classes where the head is wider.

        Returns:
          The place of each image's best label, as `rank_of_labels` gives it.
        """
        missing = logits.shape[1] - labels.shape[1]
        labels = np.pad(labels > 0, ((0, 0), (0, missing)))
        self._logits.append(logits)
        self._labels.append(labels)
        self._losses.append(_losses(logits, labels))
        self._ranks.append(rank_of_labels(logits, labels))
        return self._ranks[-1]

    @property
    def ranks(self) -> np.ndarray:
        """The place of each image's best label, as `rank_of_labels` gives it."""
        return np.concatenate(self._ranks) if self._ranks else np.zeros(0, np.int64)

    def measure(self, threshold: float) -> MultiLabelMeasures:
        """The measures of all images so far, of which at least one has a label."""
        ranks, logits, labels = self.ranks, self._logits, self._labels
        known = int((ranks >= 0).sum())
        images, classes = len(ranks), logits[0].shape[1]
        precisions: list[float] = []
        at_a_time = max(1, _AT_A_TIME // images)
        for first in range(0, classes, at_a_time):
            part = slice(first, first + at_a_time)
            # A class in one piece of memory, which is several times faster to sort.
            columns = np.concatenate([each[:, part].T for each in logits], axis=1)
            truths = np.concatenate([each[:, part].T for each in labels], axis=1)
            precisions += map(average_precision, columns, truths)
        counts = np.zeros((3, classes), np.int64)
        for outputs, truth in zip(logits, labels):
            predicted = is_predicted(outputs, threshold)
            counts += [each.sum(0) for each in (truth, predicted, truth & predicted)]
        losses = np.concatenate(self._losses)
        return MultiLabelMeasures(
            threshold=threshold,
            # An exact sum does not depend on the order of the images.
            loss=math.fsum(losses) / images if np.isfinite(losses).all() else math.nan,
            top1=float(((ranks >= 0) & (ranks < 1)).sum() / known),
            top5=float(((ranks >= 0) & (ranks < 5)).sum() / known),
            positives=counts[0],
            predicted=counts[1],
            true_positives=counts[2],
            average_precision=np.array(precisions),
        )


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean over a class's images of the precision at their place in the ranking.

    The area under the curve of precision over recall, by steps and not by trapezoids: sum over
    thresholds n of (R_n - R_(n-1)) P_n. Equal scores share one threshold, so their order does not
    matter. This is the definition of scikit-learn's `average_precision_score`.

    Args:
      scores: [N], of any scale.
      labels: bool [N].

    Returns:
      A fraction; NaN where no label is true.

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


def rank_of_labels(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many wrong classes an image's best label has above it or beside it.

    Args:
      logits: [N, classes].
      labels: bool [N, classes].

    Returns:
      int64 [N]: 0 where the highest logit is a label's, -1 for an image without labels. A tie
      with a wrong class counts against the network, and logits that are not finite come last.

    Example:
      >>> logits = np.array([[3.0, 2.0, 1.0], [3.0, 3.0, 1.0], [3.0, 2.0, 1.0]])
      >>> labels = np.array([[0, 1, 0], [1, 1, 0], [0, 0, 0]], bool)
      >>> rank_of_labels(logits, labels).tolist()
      [1, 0, -1]
    """
    best = np.where(labels, logits, -np.inf).max(1)
    rank = ((logits >= best[:, None]) & ~labels).sum(1)
    rank[~np.isfinite(best)] = logits.shape[1]
    rank[~labels.any(1)] = -1
    return rank


def check_scores_memory(images: int, classes: int, what: str, remedy: str) -> None:
    """Refuses a data set whose logits the host cannot keep.

    Args:
      images: Their number.
      classes: Of the network.
      what: The field or flag that names the data set, with its value.
      remedy: What makes it smaller.

    Raises:
      ConfigError: They take more than the host's memory.
    """
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
