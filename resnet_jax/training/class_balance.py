"""How many images each class has, and what a run makes of it: its sampler and its class weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from resnet_jax.config.schema import Config, Loss
from resnet_jax.config.validation import parse_class_weights
from resnet_jax.data.pipeline import BalancedSampler, IndexSampler, InMemoryDataset
from resnet_jax.data.sources.base import count_labels
from resnet_jax.data.sources.opening import Source
from resnet_jax.errors import ConfigError
from resnet_jax.terminal import visible

# How many times the images of the smallest class the largest one has, before a run says so.
_IMBALANCED = 3
_NAMED = 8  # classes of a run with several labels an image
_LISTED = 20  # weights of at most so many classes are all shown

Images = InMemoryDataset | Source


def training_order(config: Config, data: Images, log: Callable[[str], None]) -> IndexSampler:
    """The order of a run's images, by data.sampler.

    Args:
      config: The configuration of the run.
      data: Its training images.
      log: Told where reading the labels takes a while.

    Returns:
      The same order on every host.

    Example:
      >>> data = InMemoryDataset(np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 0, 1]))
      >>> type(training_order(Config(), data, print)).__name__
      'Order'
    """
    seed, repeats = config.train.seed, config.data.repeats
    if config.data.sampler == "shuffled":
        return IndexSampler(len(data), seed, repeats)
    if isinstance(data, InMemoryDataset):
        return BalancedSampler(data.labels, seed, repeats)
    _say_reading(data, "data.sampler", log)
    return BalancedSampler(data.labels(), seed, repeats)


def count_classes(
    config: Config, data: Images, order: IndexSampler, classes: int, log: Callable[[str], None]
) -> np.ndarray:
    """Counts the training images of each class.

    Args:
      config: The configuration of the run.
      data: Its training images.
      order: Theirs, from `training_order`.
      classes: Of the data set.
      log: Told where reading the labels takes a while.

    Returns:
      int64 [classes], of labels where an image may have several; [0] where all images would have
      to be read, and nothing in the configuration needs the numbers.
    """
    if isinstance(order, BalancedSampler):
        counts = np.zeros(classes, np.int64)
        counts[order.classes] = order.class_counts
        return counts
    if config.loss.class_weights == "balanced" and isinstance(data, Source):
        _say_reading(data, "loss.class_weights", log)
        return data.class_counts()
    return count_at_hand(data, classes)


def count_at_hand(data: Images, classes: int) -> np.ndarray:
    """Counts the images of each class, int64 [classes]; [0] where they would have to be read."""
    if not isinstance(data, InMemoryDataset):
        return data.class_counts() if _at_hand(data) else np.zeros(0, np.int64)
    return count_labels(data.labels, classes)


def _at_hand(data: Source) -> bool:
    """Whether labels are known without reading images, as by a source with its own labels()."""
    return type(data).labels is not Source.labels


def _say_reading(data: Source, field: str, log: Callable[[str], None]) -> None:
    if not _at_hand(data):
        log(f"reading all {len(data):,} training images for their labels, which {field} needs")


def check_class_weights(loss: Loss, classes: int) -> None:
    """Checks that there are as many given weights as classes.

    Args:
      loss: With `class_weights`.
      classes: Of the data set.

    Raises:
      ConfigError: There are more or fewer.

    Example:
      >>> check_class_weights(Loss(class_weights="1,2.5"), classes=3)
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: loss.class_weights = '1,2.5': has 2 numbers, and the data set \
has 3 classes; give one for each, in the order of classes.json, or 'balanced'
    """
    text = loss.class_weights
    if text in ("", "balanced") or len(parse_class_weights(text)) == classes:
        return
    shown = text if len(text) <= 100 else f"{text[:100]}..."
    raise ConfigError(
        f"loss.class_weights = {shown!r}: has {len(parse_class_weights(text))} numbers, and the "
        f"data set has {classes} classes; give one for each, in the order of classes.json, "
        "or 'balanced'"
    )


def class_weights(loss: Loss, counts: np.ndarray, outputs: int) -> np.ndarray | None:
    """What the loss of each class's own images is multiplied by.

    Args:
      loss: With `class_weights`.
      counts: Training images of each class, for "balanced".
      outputs: Of the network; as many as classes, or more.

    Returns:
      float32 [outputs], 0 for outputs and classes without images; None without weights. Balanced
      ones are N / (K n) for n of N images, where K classes have any: 1 on average over the images.

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
    """What the first lines of a run say of its classes.

    Args:
      config: The configuration of the run.
      names: Of the classes.
      counts: From `count_classes`.
      weights: From `class_weights`.

    Returns:
      A line for the classes of sets of labels, for imbalance, for the sampler and for class
      weights, as far as there are such.

    Example:
      >>> print(*describe(Config(), ["cat", "dog"], np.array([40, 10]), None), sep="\\n")
      imbalance: 40 images of cat, 10 of dog, a ratio of 4; data.sampler = 'balanced' or \
loss.class_weights = 'balanced' evens that out
    """
    lines = []
    balanced = config.data.sampler == "balanced"
    names = [visible(name) for name in names]
    if config.data.multi_label and counts.any():
        shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
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
        lines.append(f"loss.class_weights: {_shown(weights[: len(names)], names)}")
        if counts.any() and config.loss.class_weights != "balanced":
            mean = (weights[: len(names)] * counts).sum() / counts.sum()
            lines[-1] += f"; {mean:.3g} on average over the training images"
    return lines


def _shown(weights: np.ndarray, names: Sequence[str]) -> str:
    if len(names) <= _LISTED:
        return ", ".join(f"{name} {weight:.4g}" for name, weight in zip(names, weights))
    first, last = int(weights.argmin()), int(weights.argmax())
    return f"from {weights[first]:.4g} ({names[first]}) to {weights[last]:.4g} ({names[last]})"
