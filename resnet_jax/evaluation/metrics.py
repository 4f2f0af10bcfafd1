"""Top-1, top-5 and loss over a data set, each image counted exactly once.

Batches are padded to one size and carry weights of 0 and 1; devices add up, and the one division
comes at the end. The result does not depend on the batch size or the number of devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from resnet_jax.data.augment import normalize
from resnet_jax.models.resnet import ResNet
from resnet_jax.training.config import Augment
from resnet_jax.training.parallel import AXIS, put
from resnet_jax.training.step import top_k_hits

Sums = dict[str, Any]


def make_evaluation_step(
    model: ResNet, config: Augment, flip: bool = False
) -> Callable[[Any, dict[str, jax.Array]], Sums]:
    """The evaluation step of one device of the axis "batch".

    Args:
      model: The network.
      config: With the mean and standard deviation that images are normalised by.
      flip: Average the logits of each image and its mirror image.

    Returns:
      step(variables, batch) -> sums over all devices: images, loss (softmax cross-entropy in
      nats, whatever the network was trained with), top1, top5.
    """

    def step(variables: Any, batch: dict[str, jax.Array]) -> Sums:
        labels, weights = batch["labels"], batch["weights"]
        images = normalize(batch["images"], config)
        predict = functools.partial(model.apply, variables, train=False)
        logits = jnp.asarray(predict(images))
        if flip:
            logits = (logits + jnp.asarray(predict(images[:, :, ::-1]))) / 2
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        each = {
            "images": jnp.ones_like(weights),
            "loss": loss,
            "top1": top_k_hits(logits, labels, 1),
            "top5": top_k_hits(logits, labels, 5),
        }
        # `where` and not a product: 0 times the NaN of a padded image would be NaN.
        sums = {name: jnp.where(weights > 0, x, 0).sum() for name, x in each.items()}
        return lax.psum(sums, AXIS)

    return step


def evaluate(
    step: Callable[[Any, Any], Sums], variables: Any, batches: Iterable[dict[str, np.ndarray]]
) -> dict[str, float]:
    """Measures a network on a data set.

    Args:
      step: `make_evaluation_step`'s, over all devices.
      variables: {"params", "batch_stats"}.
      batches: This host's part, with weights; equally many on every host.

    Returns:
      {"images", "loss", "top1", "top5"}: a count, nats an image, and fractions.
    """
    total: dict[str, float] = dict.fromkeys(("images", "loss", "top1", "top5"), 0.0)
    waiting: Sums | None = None
    # One batch is summed up in float64 while the next is computed.
    for batch in batches:
        sums = step(variables, put(batch))
        _add(total, waiting)
        waiting = sums
    _add(total, waiting)
    images = total.pop("images")
    return {"images": images, **{name: value / images for name, value in total.items()}}


def _add(total: dict[str, float], sums: Sums | None) -> None:
    for name, value in jax.device_get(sums or {}).items():
        total[name] += float(value)
