"""What of an image the network sees: one crop, its mirror image too, ten crops, several scales.

    one_crop     the centre
    flip         the centre and its mirror image; their *logits* are averaged, as by the trainer's
                 evaluate.flip
    ten_crop     four corners, centre, and their mirror images, cut from the central square of the
                 resized image; *probabilities* are averaged (Krizhevsky et al. 2012, section 4.1)
    multi_scale  the whole image at several scales, fully convolutional (He et al. 2015, section
                 3.4): *logits* are averaged over the positions of the last map, which is what
                 pooling before a linear head does, and *probabilities* over the scales

Where images have sets of labels, the probability of a class is the logistic function of its logit,
and else the softmax.

A mean of probabilities lets no single view outvote the rest, however large its logits; it is the
form of the two papers that the networks of section 3.4 are compared with (Simonyan & Zisserman
2015, section 3.2). It is computed from their logarithms, where nothing underflows.
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
from resnet_jax.distributed import data_parallel
from resnet_jax.evaluation.metrics import (
    Sums,
    gather,
    make_logits,
    per_example_metrics,
    sum_metrics,
    top_k_hits,
)
from resnet_jax.models.resnet import ResNet

VIEWS = ("one_crop", "flip", "ten_crop", "multi_scale")
# Shorter sides in He et al. 2015, section 3.4, by the side of the training crop.
PAPER_SCALES = (224, 256, 384, 480, 640)


def default_scales(image_size: int) -> tuple[int, ...]:
    """The paper's scales for networks of another image size.

    Args:
      image_size: Side of the crop in pixels.

    Returns:
      Shorter sides in pixels.

    Example:
      >>> default_scales(224), default_scales(32)
      ((224, 256, 384, 480, 640), (32, 37, 55, 69, 91))
    """
    return tuple(round(scale * image_size / 224) for scale in PAPER_SCALES)


def make_measuring_step(
    model: ResNet,
    preprocessing: Preprocessing,
    views: str,
    side: int,
    outputs: np.ndarray | None = None,
    devices: Sequence[jax.Device] | None = None,
    multi_label: bool = False,
) -> Callable[[Any, dict[str, Any]], dict[str, Sums]]:
    """The evaluation of one batch on several devices.

    Args:
      model: The network.
      preprocessing: How images are normalized.
      views: One of `VIEWS`.
      side: Of a crop in pixels, for ten_crop.
      outputs: The network's outputs that compete; None: all.
      devices: Which; None: all, of all processes.
      multi_label: The network was trained for sets of labels.

    Returns:
      measure(variables, batch) -> {"sums", "each"}: as the trainer's step, summed over all
      devices, and for each image of the whole batch its weight, label, prediction, confidence
      and measures. With multi_label there are no sums, and each image has its "logits", "labels"
      and "weight". A batch is of the host's arrays: {"images", "labels", "weights"}.
    """
    predict = make_logits(model, preprocessing, flip=views == "flip")

    def compete(variables: Any, images: jax.Array) -> jax.Array:
        logits = predict(variables, images)
        return logits if outputs is None else logits[:, outputs]

    shares = _log_outcomes if multi_label else jax.nn.log_softmax
    if views == "ten_crop":
        look = _look_at_crops(compete, shares, side, devices)
    elif views == "multi_scale":
        look = _look_at_scales(compete, shares, devices)
    else:
        look = _look_once(compete, devices)
    averages = views in ("ten_crop", "multi_scale")
    judge_batch = functools.partial(_gathered, averages=averages) if multi_label else _judged
    judged = data_parallel.parallel_sums(lambda _, batch: judge_batch(batch), devices)
    classes = model.num_classes if outputs is None else len(outputs)
    width = 2 * classes if multi_label and averages else classes

    def measure(variables: Any, batch: dict[str, Any]) -> dict[str, Sums]:
        nothing = np.full((len(batch["weights"]), width), -np.inf, np.float32)
        placed = data_parallel.shard_batch({"scores": nothing, **batch, "images": None})
        sums, scores = look(variables, batch["images"], placed)
        found = judged(np.float32(0), {**placed, "scores": scores})
        return {**found, "sums": sums or found["sums"]}

    return measure


# (variables, a host's images, the rest of the batch on the devices) -> sums, if it knows them
# already, and what orders the classes and normalises to their probabilities [D, N / D, classes].
Look = Callable[[Any, Any, dict[str, jax.Array]], tuple[Sums, jax.Array]]
Compete = Callable[[Any, jax.Array], jax.Array]
Shares = Callable[[jax.Array], jax.Array]  # logits to logarithms of probabilities
Devices = Sequence[jax.Device] | None


def _look_once(compete: Compete, devices: Devices) -> Look:
    """The trainer's program, which gives its logits away as well.

    Anything else that this program had to give away would change how a CPU's compiler adds up, and
    with it the last digit of the loss. On a GPU or TPU the two may differ by rounding.
    """

    def step(variables: Any, batch: dict[str, jax.Array]) -> tuple[Sums, jax.Array]:
        logits, labels = compete(variables, batch["images"]), batch["labels"]
        known = labels.ndim == 1
        return sum_metrics(
            per_example_metrics(logits, labels), batch["weights"]
        ) if known else {}, logits

    run = data_parallel.parallel_sums(step, devices, outputs=True)

    def look(
        variables: Any, images: np.ndarray, batch: dict[str, jax.Array]
    ) -> tuple[Sums, jax.Array]:
        facts = {name: batch[name] for name in ("labels", "weights")}
        return run(variables, {"images": data_parallel.shard_batch(images), **facts})

    return look


def _look_at_crops(compete: Compete, shares: Shares, side: int, devices: Devices) -> Look:
    def add(arguments: Any, batch: dict[str, jax.Array]) -> jax.Array:
        variables, top, left, mirrored = arguments
        images = lax.dynamic_slice_in_dim(batch["images"], top, side, axis=1)
        images = lax.dynamic_slice_in_dim(images, left, side, axis=2)  # [N, side, side, C]
        images = jnp.where(mirrored, images[:, :, ::-1], images)
        return jnp.logaddexp(batch["total"], shares(compete(variables, images)))

    run = data_parallel.parallel_outputs(add, devices)  # one program for all ten

    def look(
        variables: Any, images: np.ndarray, batch: dict[str, jax.Array]
    ) -> tuple[Sums, jax.Array]:
        total = batch["scores"]
        placed, rest = data_parallel.shard_batch(images), images.shape[1] - side
        middle = round(rest / 2)
        for top, left in ((0, 0), (0, rest), (rest, 0), (rest, rest), (middle, middle)):
            for mirrored in (False, True):
                arguments = (variables, np.int32(top), np.int32(left), np.bool_(mirrored))
                total = run(arguments, {"images": placed, "total": total})
        return {}, total

    return look


def _look_at_scales(compete: Compete, shares: Shares, devices: Devices) -> Look:
    def add(variables: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return jnp.logaddexp(batch["total"], shares(compete(variables, batch["images"])))

    run = data_parallel.parallel_outputs(add, devices)  # one program for each shape

    def look(
        variables: Any, images: list[np.ndarray], batch: dict[str, jax.Array]
    ) -> tuple[Sums, jax.Array]:
        total = batch["scores"]
        for scaled in images:
            total = run(variables, {"images": data_parallel.shard_batch(scaled), "total": total})
        return {}, total

    return look


def _judged(batch: dict[str, jax.Array]) -> dict[str, Sums]:
    """Sums over all devices, and every image's measures; for use under the axis "batch"."""
    logits, labels, weights = batch["scores"], batch["labels"], batch["weights"]
    if labels.ndim == 1:
        each, labelled = per_example_metrics(logits, labels), jnp.ones_like(weights)
    else:
        labelled = labels.any(1)  # of an image without labels nothing counts
        each = {
            "images": jnp.ones_like(weights),
            "top1": top_k_hits(logits, labels > 0, 1),
            "top5": top_k_hits(logits, labels > 0, 5),
        }
    sums = sum_metrics(each, weights * labelled)
    facts = {
        **each,
        "prediction": logits.argmax(1),
        "confidence": jax.nn.softmax(logits).max(1),
        "finite": jnp.isfinite(logits).all(1),
        "weight": weights,
        "labelled": labelled,
    }
    if labels.ndim == 1:
        facts["label"] = labels
    return {"sums": sums, "each": gather(facts, [*facts])}


def _log_outcomes(logits: jax.Array) -> jax.Array:
    """Logarithms of the probabilities that each class is there and that it is not [N, 2 classes].

    Both, because one minus a mean of nearly 1 would have no digits left.
    """
    return jnp.concatenate([jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)], axis=1)


def _gathered(batch: dict[str, jax.Array], averages: bool) -> dict[str, Sums]:
    """Every image's logits and labels, on all devices; for use under the axis "batch".

    Args:
      batch: {"scores", "labels", "weights"}.
      averages: The scores are totals of what `_log_outcomes` gives; their logit is that of the
        mean probability.
    """
    logits = batch["scores"]
    if averages:
        there, not_there = jnp.split(logits, 2, axis=1)
        logits = there - not_there
    facts = {"logits": logits, "labels": batch["labels"], "weight": batch["weights"]}
    return {"sums": {}, "each": gather(facts, [*facts])}
