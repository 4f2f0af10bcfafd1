"""What the network sees of an image: one crop, its mirror image too, ten crops, several scales.

    one_crop     the center
    flip         the center and its mirror image; their *logits* are averaged, as in a training
                 run's evaluation with evaluate.flip
    ten_crop     four corners, center, and their mirror images, cut from the central square of the
                 resized image; *probabilities* are averaged (Krizhevsky et al. 2012, section 4.1)
    multi_scale  the whole image at several scales, fully convolutional (He et al. 2015, section
                 3.4): *logits* are averaged over the positions of the last map, which is what
                 pooling before a linear head does, and *probabilities* over the scales

The probability of a class is the softmax of the logits, or the logistic function of its logit
where images have sets of labels.

With a mean of probabilities no single view outvotes the rest, however large its logits. Both papers
that section 3.4 compares itself with use it (Simonyan & Zisserman 2015, section 3.2). The mean is
computed from logarithms, where nothing underflows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.distributed.data_parallel import parallel_outputs, parallel_sums, shard_batch
from resnet_jax.evaluation.metrics import (
    Arrays,
    gather,
    make_logits,
    per_example_metrics,
    sum_metrics,
    top_k_hits,
)
from resnet_jax.models.resnet import ResNet

VIEWS = ("one_crop", "flip", "ten_crop", "multi_scale")
# Shorter sides in He et al. 2015, section 3.4, for crops of 224 pixels.
PAPER_SCALES = (224, 256, 384, 480, 640)

Predict = Callable[[Any, jax.Array], jax.Array]  # (variables, images) -> logits
Devices = Sequence[jax.Device] | None
# (variables, a host's images, the rest of the batch on the devices) -> the sums, if they are known
# already, and scores [D, N / D, classes]: logits, or totals of probabilities as logarithms.
ScoreViews = Callable[[Any, Any, dict[str, jax.Array]], tuple[Arrays, jax.Array]]


def default_scales(image_size: int) -> tuple[int, ...]:
    """The paper's scales in pixels, in proportion to the side of a network's crop.

    Example:
      >>> default_scales(224), default_scales(32)
      ((224, 256, 384, 480, 640), (32, 37, 55, 69, 91))
    """
    return tuple(round(scale * image_size / 224) for scale in PAPER_SCALES)


def make_views_step(
    model: ResNet,
    preprocessing: Preprocessing,
    views: str,
    outputs: np.ndarray | None = None,
    devices: Devices = None,
    multi_label: bool = False,
) -> Callable[[Any, dict[str, Any]], dict[str, Arrays]]:
    """Returns the evaluation of a host's batch with one of `VIEWS`.

    Args:
      model: The network.
      preprocessing: How images are normalized, and the side of the crops of ten_crop.
      views: One of `VIEWS`.
      outputs: Outputs of the network that compete. Default: all.
      devices: Devices to use. Default: all of all processes.
      multi_label: The network was trained for sets of labels.

    Returns:
      step(variables, {"images", "labels", "weights"}) -> {"sums", "each"}: sums over all devices as
      in `metrics.make_evaluation_step`; and the weight, label, prediction, confidence and metrics
      of each image of all hosts. With multi_label there are no sums, and each image has its
      "logits", "labels" and "weight".
    """
    predict = make_logits(model, preprocessing, flip=views == "flip")

    def predict_competing(variables: Any, images: jax.Array) -> jax.Array:
        logits = predict(variables, images)
        return logits if outputs is None else logits[:, outputs]

    log_probabilities = _log_outcomes if multi_label else jax.nn.log_softmax
    averages = views in ("ten_crop", "multi_scale")
    if views == "ten_crop":
        side = preprocessing.image_size
        score_views = _score_ten_crops(predict_competing, log_probabilities, side, devices)
    elif views == "multi_scale":
        score_views = _score_scales(predict_competing, log_probabilities, devices)
    else:
        score_views = _score_one_view(predict_competing, devices)
    collect = functools.partial(_logits_of_each, averages=averages) if multi_label else _metrics
    run = parallel_sums(lambda _, batch: collect(batch), devices)
    classes = model.num_classes if outputs is None else len(outputs)
    width = 2 * classes if multi_label and averages else classes

    def step(variables: Any, batch: dict[str, Any]) -> dict[str, Arrays]:
        zero = np.full((len(batch["weights"]), width), -np.inf, np.float32)  # as a logarithm
        on_devices = shard_batch({"scores": zero, **batch, "images": None})
        sums, scores = score_views(variables, batch["images"], on_devices)
        found = run(np.float32(0), {**on_devices, "scores": scores})
        return {**found, "sums": sums or found["sums"]}

    return step


def _score_one_view(predict: Predict, devices: Devices) -> ScoreViews:
    """The training run's evaluation program, which returns its logits too.

    Any other output would change the order in which a CPU's compiler sums, and with it the last
    digit of the loss. On a GPU or TPU the two programs may differ by rounding.
    """

    def step(variables: Any, batch: dict[str, jax.Array]) -> tuple[Arrays, jax.Array]:
        logits, labels = predict(variables, batch["images"]), batch["labels"]
        if labels.ndim == 2:
            return {}, logits
        return sum_metrics(per_example_metrics(logits, labels), batch["weights"]), logits

    run = parallel_sums(step, devices, outputs=True)

    def score_views(
        variables: Any, images: np.ndarray, batch: dict[str, jax.Array]
    ) -> tuple[Arrays, jax.Array]:
        labels = {name: batch[name] for name in ("labels", "weights")}
        return run(variables, {"images": shard_batch(images), **labels})

    return score_views


def _score_ten_crops(
    predict: Predict,
    log_probabilities: Callable[[jax.Array], jax.Array],
    side: int,
    devices: Devices,
) -> ScoreViews:
    def add(arguments: Any, batch: dict[str, jax.Array]) -> jax.Array:
        variables, top, left, mirrored = arguments
        images = lax.dynamic_slice_in_dim(batch["images"], top, side, axis=1)
        images = lax.dynamic_slice_in_dim(images, left, side, axis=2)  # [N, side, side, C]
        images = jnp.where(mirrored, images[:, :, ::-1], images)
        return jnp.logaddexp(batch["total"], log_probabilities(predict(variables, images)))

    run = parallel_outputs(add, devices)  # one program for all ten

    def score_views(
        variables: Any, images: np.ndarray, batch: dict[str, jax.Array]
    ) -> tuple[Arrays, jax.Array]:
        total, on_devices = batch["scores"], shard_batch(images)
        rest = images.shape[1] - side
        middle = round(rest / 2)
        for top, left in ((0, 0), (0, rest), (rest, 0), (rest, rest), (middle, middle)):
            for mirrored in (False, True):
                arguments = (variables, np.int32(top), np.int32(left), np.bool_(mirrored))
                total = run(arguments, {"images": on_devices, "total": total})
        return {}, total

    return score_views


def _score_scales(
    predict: Predict, log_probabilities: Callable[[jax.Array], jax.Array], devices: Devices
) -> ScoreViews:
    def add(variables: Any, batch: dict[str, jax.Array]) -> jax.Array:
        logits = predict(variables, batch["images"])
        return jnp.logaddexp(batch["total"], log_probabilities(logits))

    run = parallel_outputs(add, devices)  # one program for each shape

    def score_views(
        variables: Any, images: list[np.ndarray], batch: dict[str, jax.Array]
    ) -> tuple[Arrays, jax.Array]:
        total = batch["scores"]
        for scaled in images:
            total = run(variables, {"images": shard_batch(scaled), "total": total})
        return {}, total

    return score_views


def _metrics(batch: dict[str, jax.Array]) -> dict[str, Arrays]:
    """Sums over all devices of the axis "batch", and the metrics of each image."""
    logits, labels, weights = batch["scores"], batch["labels"], batch["weights"]
    if labels.ndim == 1:
        each, labeled = per_example_metrics(logits, labels), jnp.ones_like(weights)
    else:
        labeled = labels.any(1)  # an image without labels does not count
        each = {
            "images": jnp.ones_like(weights),
            "top1": top_k_hits(logits, labels > 0, 1),
            "top5": top_k_hits(logits, labels > 0, 5),
        }
    sums = sum_metrics(each, weights * labeled)
    each |= {
        "prediction": logits.argmax(1),
        "confidence": jax.nn.softmax(logits).max(1),
        "finite": jnp.isfinite(logits).all(1),
        "weight": weights,
        "labeled": labeled,
    }
    if labels.ndim == 1:
        each["label"] = labels
    return {"sums": sums, "each": gather(each)}


def _log_outcomes(logits: jax.Array) -> jax.Array:
    """Log probabilities that each class is there, and that it is not: [N, 2 classes].

    Both, because one minus a mean of nearly 1 would have no digits left.
    """
    return jnp.concatenate([jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)], axis=1)


def _logits_of_each(batch: dict[str, jax.Array], averages: bool) -> dict[str, Arrays]:
    """The logits and labels of each image, gathered from all devices of the axis "batch".

    With `averages`, the scores are totals of `_log_outcomes`, and the logits are those of the mean
    probabilities.
    """
    logits = batch["scores"]
    if averages:
        there, not_there = jnp.split(logits, 2, axis=1)
        logits = there - not_there
    each = {"logits": logits, "labels": batch["labels"], "weight": batch["weights"]}
    return {"sums": {}, "each": gather(each)}
