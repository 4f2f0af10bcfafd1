"""Top-1, top-5 and loss over a data set, each image counted exactly once.

Batches are padded to one size and carry weights of 0 and 1; devices add up, and the one division
comes at the end. The result does not depend on the batch size or the number of devices. Where
images have sets of labels, the devices give their logits away instead: see multi_label.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.distributed.data_parallel import shard_batch
from resnet_jax.errors import DataError
from resnet_jax.evaluation.multi_label import Scores
from resnet_jax.models.resnet import ResNet
from resnet_jax.ops.sharding import AXIS

Sums = dict[str, Any]


def make_evaluation_step(
    model: ResNet, preprocessing: Preprocessing, flip: bool = False
) -> Callable[[Any, dict[str, jax.Array]], Sums]:
    """The evaluation step of one device of the axis "batch".

    Args:
      model: The network.
      preprocessing: How images are normalized.
      flip: Average the logits of each image and its mirror image.

    Returns:
      step(variables, batch) -> sums over all devices: images, loss (softmax cross-entropy in
      nats, whatever the network was trained with), top1, top5. Where a batch's labels are sets,
      [N, classes]: the "logits", "labels" and "weights" of the whole batch.
    """

    predict = make_logits(model, preprocessing, flip)

    def step(variables: Any, batch: dict[str, jax.Array]) -> Sums:
        logits = predict(variables, batch["images"])
        if batch["labels"].ndim == 2:
            return gather({**batch, "logits": logits}, ("logits", "labels", "weights"))
        return sum_metrics(per_example_metrics(logits, batch["labels"]), batch["weights"])

    return step


def gather(arrays: Mapping[str, jax.Array], names: Sequence[str]) -> dict[str, jax.Array]:
    """Named arrays of all devices, [N, ...] each; for use under the axis "batch"."""
    chosen = {name: arrays[name] for name in names}
    return jax.tree.map(functools.partial(lax.all_gather, axis_name=AXIS, tiled=True), chosen)


def make_logits(
    model: ResNet, preprocessing: Preprocessing, flip: bool = False
) -> Callable[[Any, jax.Array], jax.Array]:
    """What a network makes of uint8 images.

    Args:
      model: The network.
      preprocessing: How images are normalized.
      flip: Average the logits of each image and its mirror image.

    Returns:
      predict(variables, images [N, H, W, C]) -> logits [N, classes].
    """

    def predict(variables: Any, images: jax.Array) -> jax.Array:
        images = preprocessing.normalize(images)
        apply = functools.partial(model.apply, variables, train=False)
        logits = jnp.asarray(apply(images))
        if flip:
            logits = (logits + jnp.asarray(apply(images[:, :, ::-1]))) / 2
        return logits

    return predict


def top_k_hits(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the label is among the k highest logits.

    A tie counts against the network, and so does NaN: a constant output is never right.

    Args:
      logits: [N, classes].
      labels: [N], or sets of labels, bool [N, classes]: any of an image's is a hit, and an image
        without labels is none.
      k: How many guesses an image has.

    Returns:
      bool [N].

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
    as_high = (logits >= own).sum(1)  # the label itself too
    return (as_high <= k) & jnp.isfinite(own[:, 0])


def per_example_metrics(logits: jax.Array, labels: jax.Array) -> Sums:
    """Each image's part in the measures.

    Args:
      logits: [N, classes].
      labels: int32 [N].

    Returns:
      {"images": 1, "loss": nats, "top1", "top5": whether it is a hit}, each [N].

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


def sum_metrics(each: Sums, weights: jax.Array) -> Sums:
    """Sums over the images of all devices; for use under the axis "batch".

    Args:
      each: Arrays [N] by name.
      weights: [N], 0 for an image that does not count.

    Returns:
      Scalars by name.
    """
    # `where` and not a product: 0 times the NaN of a padded image would be NaN.
    sums = {name: jnp.where(weights > 0, x, 0).sum() for name, x in each.items()}
    return lax.psum(sums, AXIS)


def evaluate(
    step: Callable[[Any, Any], Sums],
    variables: Any,
    batches: Iterable[dict[str, np.ndarray]],
    threshold: float = 0.5,
) -> dict[str, float]:
    """Measures a network on a data set.

    Args:
      step: `make_evaluation_step`'s, over all devices.
      variables: {"params", "batch_stats"}.
      batches: This host's part, with weights; equally many on every host.
      threshold: Probability from which a class is predicted, where images have sets of labels.

    Returns:
      {"images", "loss", "top1", "top5"}: a count, nats an image, and fractions. Where images have
      sets of labels also "map", "f1" and "f1_micro", as `MultiLabelMeasures` has them.

    Raises:
      DataError: No image has a weight: none could be decoded. Or none of them has a label.
    """
    total, scores = dict.fromkeys(("images", "loss", "top1", "top5"), 0.0), Scores()
    waiting: Sums | None = None
    # One batch is summed up in float64 while the next is computed.
    for batch in batches:
        measured = step(variables, shard_batch(batch))
        _add(total, scores, waiting)
        waiting = measured
    _add(total, scores, waiting)
    images = total.pop("images") or float(len(scores.ranks))
    if not images:
        raise DataError("data.eval_split: none of its images can be decoded; mend the data")
    if not len(scores.ranks):
        return {"images": images, **{name: value / images for name, value in total.items()}}
    if (scores.ranks < 0).all():
        raise DataError("data.eval_split: none of its images has a label; take another split")
    return {"images": images, **scores.measure(threshold).record()}


def _add(total: dict[str, float], scores: Scores, measured: Sums | None) -> None:
    found = jax.device_get(measured or {})
    if "logits" in found:
        real = found["weights"] > 0
        scores.add(found["logits"][real], found["labels"][real])
        return
    for name, value in found.items():
        total[name] += float(value)
