"""Images of each class, and what follows from them: the sampler and the class weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from resnet_jax.config.schema import Config, Loss
from resnet_jax.config.validation import parse_class_weights
from resnet_jax.data.pipeline import BalancedSampler, Dataset, IndexSampler
from resnet_jax.errors import ConfigError
from resnet_jax.terminal import visible

# A run reports an imbalance where the largest class has more than this many times the images of the
# smallest one.
_IMBALANCED = 3
_MAX_NAMES = 8  # classes named in the line about sets of labels
_MAX_WEIGHTS = 20  # classes whose weights are all listed


def training_sampler(config: Config, data: Dataset, log: Callable[[str], None]) -> IndexSampler:
    """The sampler that data.sampler names; the same in every process.

    Example:
      >>> from resnet_jax.data.pipeline import InMemoryDataset
      >>> data = InMemoryDataset(np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 0, 1]))
      >>> type(training_sampler(Config(), data, print)).__name__
      'IndexSampler'
    """
    seed, repeats = config.train.seed, config.data.repeats
    if config.data.sampler == "shuffled":
        return IndexSampler(len(data), seed, repeats)
    _log_reading(data, "data.sampler", log)
    return BalancedSampler(data.read_labels(), seed, repeats)


def count_classes(
    config: Config, data: Dataset, sampler: IndexSampler, classes: int, log: Callable[[str], None]
) -> np.ndarray:
    """Training images of each class, int64 [classes]; of sets of labels, the labels of each class.

    [0] where all images would have to be read, and the configuration does not need the counts.
    """
    if isinstance(sampler, BalancedSampler):
        counts = np.zeros(classes, np.int64)
        counts[sampler.classes] = sampler.class_counts
        return counts
    if config.loss.class_weights == "balanced":
        _log_reading(data, "loss.class_weights", log)
        return data.class_counts(classes)
    return known_class_counts(data, classes)


def known_class_counts(data: Dataset, classes: int) -> np.ndarray:
    """Images of each class, int64 [classes]; [0] where all images would have to be read."""
    return data.class_counts(classes) if data.labels_known else np.zeros(0, np.int64)


def _log_reading(data: Dataset, field: str, log: Callable[[str], None]) -> None:
    if not data.labels_known:
        log(f"reading all {len(data):,} training images for their labels, which {field} needs")


def check_class_weights(loss: Loss, classes: int) -> None:
    """Checks that loss.class_weights gives a weight for each class of the dataset.

    Example:
      >>> check_class_weights(Loss(class_weights="1,2.5"), classes=3)
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: loss.class_weights = '1,2.5': has 2 numbers, and the dataset \
has 3 classes; give one for each, in the order of classes.json, or 'balanced'
    """
    text = loss.class_weights
    if text in ("", "balanced") or len(parse_class_weights(text)) == classes:
        return
    shown = text if len(text) <= 100 else f"{text[:100]}..."
    raise ConfigError(
        f"loss.class_weights = {shown!r}: has {len(parse_class_weights(text))} numbers, and the "
        f"dataset has {classes} classes; give one for each, in the order of classes.json, "
        "or 'balanced'"
    )


def class_weights(loss: Loss, counts: np.ndarray, outputs: int) -> np.ndarray | None:
    """Factors of the loss for the outputs of the network, float32 [outputs]; None without.

    Balanced weights are N / (K n) for a class with n of N images, where K classes have any: 1 on
    average over the images, 0 for outputs and classes without images.

    Example:
      >>> class_weights(Loss(class_weights="balanced"), np.array([30, 10, 0]), outputs=4).tolist()
      [0.6666666865348816, 2.0, 0.0, 0.0]
    """
    if not loss.class_weights:
        return None
    if loss.class_weights == "balanced":
        there = counts > 0
        found = np.where(there, counts.sum() / (there.sum() * np.maximum(counts, 1)), 0)
    else:
        found = np.array(parse_class_weights(loss.class_weights))
    weights = np.zeros(outputs, np.float32)
    weights[: len(found)] = found
    return weights


def describe(
    config: Config, names: Sequence[str], counts: np.ndarray, weights: np.ndarray | None
) -> list[str]:
    """Lines for the log about sets of labels, imbalance, the sampler and class weights.

    Example:
      >>> print(*describe(Config(), ["cat", "dog"], np.array([40, 10]), None), sep="\\n")
      imbalance: 40 images of cat, 10 of dog, a ratio of 4; data.sampler = 'balanced' or \
loss.class_weights = 'balanced' evens that out
    """
    lines = []
    balanced = config.data.sampler == "balanced"
    names = [visible(name) for name in names]
    if config.data.multi_label and counts.any():
        shown = ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")
        lines.append(f"classes: {shown}; {counts.sum():,} labels in all")
    if counts.any():
        there = np.flatnonzero(counts)
        most, least = int(counts.argmax()), int(there[counts[there].argmin()])
        ratio = counts[most] / counts[least]
        if ratio > _IMBALANCED:
            advice = "data.sampler = 'balanced' or loss.class_weights = 'balanced' evens that out"
            lines.append(
                f"imbalance: {counts[most]:,} images of {names[most]}, {counts[least]:,} of "
                f"{names[least]}, a ratio of {ratio:.3g}"
                + (f"; {advice}" if not balanced and weights is None else "")
            )
        if balanced:
            each = counts.sum() / len(there)
            lines.append(
                f"data.sampler = 'balanced': {len(there):,} classes, {each:,.5g} images of each an "
                f"epoch: an image of {names[least]} {each / counts[least]:.3g} times, one of "
                f"{names[most]} {each / counts[most]:.3g} times"
            )
    if weights is not None:
        lines.append(f"loss.class_weights: {_list_weights(weights[: len(names)], names)}")
        if counts.any() and config.loss.class_weights != "balanced":
            mean = (weights[: len(names)] * counts).sum() / counts.sum()
            lines[-1] += f"; {mean:.3g} on average over the training images"
    return lines


def _list_weights(weights: np.ndarray, names: Sequence[str]) -> str:
    if len(names) <= _MAX_WEIGHTS:
        return ", ".join(f"{name} {weight:.4g}" for name, weight in zip(names, weights))
    first, last = int(weights.argmin()), int(weights.argmax())
    return f"from {weights[first]:.4g} ({names[first]}) to {weights[last]:.4g} ({names[last]})"
