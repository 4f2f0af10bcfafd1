"""Loss, top-1, top-5 and calibration over a dataset, each image counted exactly once.

Batches are padded to one size, and weights of 0 and 1 tell images from padding. The devices sum,
and the only division comes at the end, so the result does not depend on the batch size or the
number of devices. Where images have sets of labels, the devices return their logits instead and
the host computes the metrics: see multi_label.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.distributed.data_parallel import shard_batch
from resnet_jax.errors import DataError
from resnet_jax.evaluation.multi_label import MultiLabelAccumulator
from resnet_jax.models.folding import fold_batch_norm
from resnet_jax.models.resnet import ResNet
from resnet_jax.ops.sharding import AXIS

Arrays = dict[str, Any]

# On the devices.


def make_evaluation_step(
    model: ResNet, preprocessing: Preprocessing, flip: bool = False
) -> Callable[[Any, dict[str, jax.Array]], Arrays]:
    """Returns the evaluation step of one device of the axis "batch".

    step(variables, batch) returns sums over all devices: images, loss (softmax cross-entropy in
    nats, whatever loss the network was trained with), top1 and top5. Where a batch's labels are
    sets, [N, classes], it returns the "logits", "labels" and "weights" of the whole batch. With
    `flip`, the logits of each image and its mirror image are averaged.
    """
    predict = make_logits(model, preprocessing, flip)

    def step(variables: Any, batch: dict[str, jax.Array]) -> Arrays:
        logits = predict(variables, batch["images"])
        if batch["labels"].ndim == 2:
            return gather(
                {name: batch[name] for name in ("labels", "weights")} | {"logits": logits}
            )
        return sum_metrics(per_example_metrics(logits, batch["labels"]), batch["weights"])

    return step


def make_logits(
    model: ResNet, preprocessing: Preprocessing, flip: bool = False
) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns predict(variables, uint8 images [N, H, W, C]) -> logits [N, classes]."""

    def predict(variables: Any, images: jax.Array) -> jax.Array:
        images = preprocessing.normalize(images)
        # Here, because a run's variables change; it costs as much as a pass over the weights.
        folded, variables = fold_batch_norm(model, variables)
        apply = functools.partial(folded.apply, variables, train=False)
        logits = jnp.asarray(apply(images))
        if flip:
            logits = (logits + jnp.asarray(apply(images[:, :, ::-1]))) / 2
        return logits

    return predict


def per_example_metrics(logits: jax.Array, labels: jax.Array) -> Arrays:
    """The metrics of each image, for logits [N, classes] and labels int32 [N].

    Returns {"images": 1, "loss": nats, "top1", "top5": whether the label is among them}, each [N].

    Example:
      >>> each = per_example_metrics(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([2]))
      >>> each["top1"].tolist(), round(each["loss"].item(), 3)
      ([False], 1.408)
    """
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {
        "images": jnp.ones_like(loss),
        "loss": loss,
        "top1": top_k_hits(logits, labels, 1),
        "top5": top_k_hits(logits, labels, 5),
    }


def top_k_hits(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the label is among the k highest logits [N, classes], bool [N].

    Labels are int [N], or sets, bool [N, classes], of which any one is a hit; an image without
    labels is a miss. So is a tie, and so is NaN: a constant output is never right.

    Example:
      >>> top_k_hits(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([2]), k=2).tolist()
      [True]
      >>> top_k_hits(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([[True, False, True]]), k=1).tolist()
      [True]
    """
    if labels.ndim == 2:
        best = jnp.where(labels, logits, -jnp.inf).max(1)
        wrong = ((logits >= best[:, None]) & ~labels).sum(1)
        return (wrong < k) & jnp.isfinite(best)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    as_high = (logits >= own).sum(1)  # includes the label itself
    return (as_high <= k) & jnp.isfinite(own[:, 0])


def sum_metrics(each: Arrays, weights: jax.Array) -> Arrays:
    """Sums arrays [N] over the images with weight 1 of all devices of the axis "batch"."""
    # `where` and not a product: 0 times the NaN of a padded image would be NaN.
    sums = {name: jnp.where(weights > 0, x, 0).sum() for name, x in each.items()}
    return lax.psum(sums, AXIS)


def gather(arrays: Mapping[str, jax.Array]) -> Arrays:
    """Concatenates arrays [N, ...] of all devices of the axis "batch"."""
    return jax.tree.map(functools.partial(lax.all_gather, axis_name=AXIS, tiled=True), dict(arrays))


# On the host.


def evaluate(
    step: Callable[[Any, Any], Arrays],
    variables: Any,
    batches: Iterable[dict[str, np.ndarray]],
    threshold: float = 0.5,
) -> dict[str, float]:
    """Evaluates a network on this host's shard of a dataset.

    Args:
      step: From `make_evaluation_step`, mapped over all devices.
      variables: {"params", "batch_stats"}.
      batches: With weights; every host has equally many.
      threshold: Probability from which a class is predicted, where images have sets of labels.

    Returns:
      {"images", "loss", "top1", "top5"}: a count, nats per image, and fractions. Where images have
      sets of labels also "map", "f1" and "f1_micro", as in `MultiLabelMetrics`.

    Raises:
      DataError: No image can be decoded, or none has a label.
    """
    totals = dict.fromkeys(("images", "loss", "top1", "top5"), 0.0)
    scores = MultiLabelAccumulator()

    def add(outputs: Arrays) -> None:
        found = jax.device_get(outputs)
        if "logits" in found:
            real = found["weights"] > 0
            scores.add(found["logits"][real], found["labels"][real])
            return
        for name, value in found.items():
            totals[name] += float(value)

    # One batch is summed in float64 while the next is computed.
    waiting: Arrays = {}
    for batch in batches:
        outputs = step(variables, shard_batch(batch))
        add(waiting)
        waiting = outputs
    add(waiting)
    images = totals.pop("images") or float(len(scores.ranks))
    if not images:
        raise DataError("data.eval_split: none of its images can be decoded; fix the data")
    if not len(scores.ranks):
        return {"images": images, **{name: total / images for name, total in totals.items()}}
    if (scores.ranks < 0).all():
        raise DataError("data.eval_split: none of its images has a label; take another split")
    return {"images": images, **scores.compute(threshold).record()}


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Counts of each label (row) and prediction (column), int64 [classes, classes].

    Example:
      >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), classes=2).tolist()
      [[1, 1], [0, 1]]
    """
    flat = labels.astype(np.int64) * classes + predictions
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


class CalibrationBin(NamedTuple):
    """The images with a confidence in (low, high]: their number, mean confidence and accuracy.

    The last two are None in an empty bin.
    """

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


def calibration(
    confidences: np.ndarray, hits: np.ndarray, bins: int = 15
) -> tuple[CalibrationBin, ...]:
    """Groups predictions by confidence into bins of equal width (Guo et al. 2017, section 5).

    Takes the highest probability of each image [N] and whether that prediction is right, bool [N].

    Example:
      >>> found = calibration(np.array([0.6, 0.9, 1.0]), np.array([True, False, True]), bins=2)
      >>> found[1].images, round(found[1].accuracy, 3)
      (3, 0.667)
    """
    numbers = np.ceil(np.asarray(confidences, float) * bins).astype(int) - 1
    numbers = np.clip(numbers, 0, bins - 1)
    found = []
    for number in range(bins):
        inside = numbers == number
        images, confidence, accuracy = int(inside.sum()), None, None
        if images:
            confidence = float(confidences[inside].mean(dtype=float))
            accuracy = float(hits[inside].mean(dtype=float))
        low, high = number / bins, (number + 1) / bins
        found.append(CalibrationBin(low, high, images, confidence, accuracy))
    return tuple(found)


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """The mean over images of |confidence - accuracy| of their bin (Guo et al. 2017, eq. 3).

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
