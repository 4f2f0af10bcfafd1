"""Measures of predictions: each class by itself, confusions, calibration."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CALIBRATION_BINS = 15


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """How many images of each class were taken for which.

    Args:
      labels: [N].
      predictions: [N].
      classes: Their number.

    Returns:
      int64 [classes, classes]; a row is a label, a column a prediction.

    Example:
      >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), classes=2).tolist()
      [[1, 1], [0, 1]]
    """
    flat = labels.astype(np.int64) * classes + predictions
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


class Bin(NamedTuple):
    """The images of one range of confidence.

    Args:
      low: The range is (low, high].
      high: Its end.
      images: Their number.
      confidence: Their mean; None where there are none.
      accuracy: The share of hits among them; None where there are none.
    """

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


def calibration(
    confidences: np.ndarray, hits: np.ndarray, bins: int = CALIBRATION_BINS
) -> tuple[Bin, ...]:
    """Sorts predictions by their confidence into ranges of equal width.

    Args:
      confidences: The highest probability of each image [N].
      hits: bool [N], whether that guess was right.
      bins: Their number; 15 as in Guo et al. 2017, section 5.

    Returns:
      The bins, from the lowest confidence up.

    Example:
      >>> found = calibration(np.array([0.6, 0.9, 1.0]), np.array([True, False, True]), bins=2)
      >>> found[1].images, round(found[1].accuracy, 3)
      (3, 0.667)
    """
    place = np.clip(np.ceil(np.asarray(confidences, float) * bins).astype(int) - 1, 0, bins - 1)
    found = []
    for number in range(bins):
        inside = place == number
        any_there = bool(inside.any())
        found.append(
            Bin(
                low=number / bins,
                high=(number + 1) / bins,
                images=int(inside.sum()),
                confidence=float(confidences[inside].mean(dtype=float)) if any_there else None,
                accuracy=float(hits[inside].mean(dtype=float)) if any_there else None,
            )
        )
    return tuple(found)


def expected_calibration_error(bins: tuple[Bin, ...]) -> float:
    """The distance of confidence and accuracy, averaged over images (Guo et al. 2017, eq. 3).

    Args:
      bins: From `calibration`.

    Returns:
      A fraction; 0 is perfectly calibrated.

    Example:
      >>> expected_calibration_error(calibration(np.array([0.75, 0.75]), np.array([True, False])))
      0.25
    """
    images = sum(each.images for each in bins)
    gaps = [
        each.images * abs(each.accuracy - each.confidence)
        for each in bins
        if each.accuracy is not None and each.confidence is not None
    ]
    return sum(gaps) / images
