"""One training step of one device: images to gradients to a new state.

    uint8 images -> augment -> model -> loss -> gradients -> mean over devices -> optax -> state

It is a pure function that names the devices' axis and nothing else of them;
`parallel.data_parallel` runs it on all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from resnet_jax.config.schema import Config, Loss
from resnet_jax.data.augment.apply import augment
from resnet_jax.data.sources.base import Batch
from resnet_jax.evaluation.metrics import top_k_hits
from resnet_jax.models.resnet import ResNet
from resnet_jax.ops.sharding import AXIS
from resnet_jax.training.optimizer import RunLength, current_learning_rate, make_schedule
from resnet_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def loss_per_image(
    logits: jax.Array, targets: jax.Array, config: Loss, weights: np.ndarray | None = None
) -> jax.Array:
    """The training loss of each image.

    Args:
      logits: [N, classes], float32.
      targets: Shares of each class [N, classes], each row summing to 1.
      config: Which loss, and its smoothing.
      weights: Of the classes, [classes]: factors of the terms of softmax, as `weight` in PyTorch's
        cross-entropy, and of the positive terms of bce and focal, as its `pos_weight`; None: 1.

    Returns:
      [N], in nats; for bce and focal the mean over classes, as timm takes it.

    Example:
      >>> targets = jnp.array([[1.0, 0.0]])
      >>> round(float(loss_per_image(jnp.zeros((1, 2)), targets, Loss())[0]), 4)
      0.6931
    """
    if config.label_smoothing:
        targets = optax.smooth_labels(targets, config.label_smoothing)
    if config.name == "softmax":
        shares = targets if weights is None else weights * targets
        return optax.softmax_cross_entropy(logits, shares)
    if config.bce_threshold:
        targets = (targets > config.bce_threshold).astype(jnp.float32)
    if config.name == "focal":
        loss = optax.sigmoid_focal_loss(logits, targets, gamma=config.focal_gamma)
        if weights is not None:
            loss *= weights * targets + (1 - targets)
    else:
        loss = optax.sigmoid_binary_cross_entropy(logits, targets)
        if weights is not None:
            loss -= (weights - 1) * targets * jax.nn.log_sigmoid(logits)
    return loss.mean(-1)


def make_train_step(
    model: ResNet,
    optimizer: optax.GradientTransformationExtraArgs,
    config: Config,
    length: RunLength,
    platform: str = "",
    class_weights: np.ndarray | None = None,
) -> TrainStep:
    """The training step of a run.

    Args:
      model: The network.
      optimizer: From `make_optimizer`.
      config: The configuration of the run.
      length: Its number of steps.
      platform: Of the devices that will take it; "": JAX's own.
      class_weights: As `loss_per_image` takes them; constants of the program.

    Returns:
      step(state, batch) -> (state, metrics) for one device of the axis "batch". A batch is
      {"images": uint8 [N, H, W, C], "labels": int32 [N] or, for sets of labels, uint8 [N,
      classes]}, and "mirrored": bool [N] where augment.flip_alternates is on; metrics are means
      over the batch of all devices: loss, top1, top5 (fractions; of sets, over the images that
      have labels, 0 where none has), learning_rate, and skipped: 1.0 where the step was left out
      because something in it was not a finite number, else 0.0.
    """
    schedule = make_schedule(config, length)
    on_cpu = _is_cpu(platform)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        scale = jnp.float32(1) if state.loss_scale is None else state.loss_scale.value
        found = _gradients(model, config, state, batch, scale, platform, class_weights)
        # Running statistics are those of all devices, even where each normalises by its own.
        gradients, batch_stats, metrics = lax.pmean(found, AXIS)
        if "labelled" in metrics:  # a share of the images; the hits are shares of all, too
            labelled = jnp.maximum(metrics.pop("labelled"), jnp.finfo(jnp.float32).tiny)
            metrics |= {name: metrics[name] / labelled for name in ("top1", "top5")}
        if state.loss_scale is not None:
            gradients = jax.tree.map(lambda x: x / scale, gradients)
        metrics["learning_rate"] = current_learning_rate(schedule, state.opt_state)

        updates, opt_state = optimizer.update(
            gradients, state.opt_state, state.params, value=metrics["loss"]
        )
        new = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        if state.ema:
            new = new.replace(ema=_average(new, config))
        finite = _all_finite(metrics["loss"], gradients, new)
        metrics["skipped"] = 1 - finite.astype(jnp.float32)
        return _unless_skipped(finite, new, state, on_cpu), metrics

    return step


def _gradients(
    model: ResNet,
    config: Config,
    state: TrainState,
    batch: Batch,
    scale: jax.Array,
    platform: str,
    class_weights: np.ndarray | None,
) -> tuple[Any, Any, Metrics]:
    """This device's (gradients, batch_stats, metrics), taken in `accumulate` equal parts."""
    parts = config.train.accumulate
    device, size = lax.axis_index(AXIS), batch["labels"].shape[0] // parts
    sets = batch["labels"].ndim == 2  # an image has none, one or several labels
    # Augmentation draws by an image's place in the global batch, so that it is the same on any
    # number of devices; dropout draws by device and part.
    key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    augment_key, dropout_key = jax.random.split(key)
    split = {name: x.reshape(parts, size, *x.shape[1:]) for name, x in batch.items()}
    split["first"] = (device * parts + jnp.arange(parts, dtype=jnp.int32)) * size

    def loss_of_part(
        params: Any, batch_stats: Any, part: Batch
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        images, targets = augment(
            part["images"],
            part["labels"],
            augment_key,
            config.augment,
            model.num_classes,
            part["first"],
            part.get("mirrored"),
        )
        rngs = {"dropout": jax.random.fold_in(dropout_key, part["first"])}
        logits, batch_stats = _forward(model, config, params, batch_stats, images, rngs)
        if sets:
            labels = targets >= 0.5  # of two images that are mixed, those of the larger share
            targets, rest = _smooth_sets(targets, config.loss)
            loss = loss_per_image(logits, targets, rest, class_weights).mean()
        else:
            loss = loss_per_image(logits, targets, config.loss, class_weights).mean()
            labels = targets.argmax(-1)
        metrics = {
            "loss": loss,
            "top1": top_k_hits(logits, labels, 1).mean(dtype=jnp.float32),
            "top5": top_k_hits(logits, labels, 5).mean(dtype=jnp.float32),
        }
        if sets:
            metrics["labelled"] = labels.any(1).mean(dtype=jnp.float32)
        return loss * scale, (batch_stats, metrics)

    def add_part(carry: Any, part: Batch) -> tuple[Any, None]:
        batch_stats, total = carry
        gradients, (batch_stats, metrics) = jax.grad(loss_of_part, has_aux=True)(
            state.params, batch_stats, part
        )
        return (batch_stats, jax.tree.map(jnp.add, total, (gradients, metrics))), None

    names = ("loss", "top1", "top5", *(["labelled"] if sets else []))
    nothing = dict.fromkeys(names, jnp.float32(0))
    start = state.batch_stats, (jax.tree.map(jnp.zeros_like, state.params), nothing)
    (batch_stats, total), _ = scan(add_part, start, split, platform)
    gradients, metrics = jax.tree.map(lambda x: x / parts, total)
    return gradients, batch_stats, metrics


def _smooth_sets(targets: jax.Array, config: Loss) -> tuple[jax.Array, Loss]:
    """Sets of labels with their smoothing, and the loss that is left to be taken of them.

    Each class is a decision of its own between two outcomes, over which the smoothed share is
    spread: y becomes (1 - s) y + s / 2. (With one label the outcomes are the classes.)
    """
    share = config.label_smoothing
    return (1 - share) * targets + share / 2, dataclasses.replace(config, label_smoothing=0.0)


def _is_cpu(platform: str) -> bool:
    return (platform or jax.default_backend()) == "cpu"


def scan(
    function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, platform: str
) -> tuple[Any, Any]:
    """`lax.scan`; without a loop on a CPU, where XLA runs its convolutions 17 times slower."""
    if not _is_cpu(platform):
        return lax.scan(function, carry, xs)
    outputs = []
    for index in range(jax.tree.leaves(xs)[0].shape[0]):
        carry, output = function(carry, jax.tree.map(lambda x, i=index: x[i], xs))
        outputs.append(output)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs)


def _forward(
    model: ResNet,
    config: Config,
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    rngs: dict[str, jax.Array],
) -> tuple[jax.Array, Any]:
    """(logits, new batch_stats); a frozen backbone gets no gradient and keeps its statistics."""
    if config.optimizer.backbone_rate == 0:
        params = {k: v if k == "head" else lax.stop_gradient(v) for k, v in params.items()}
        variables = {"params": params, "batch_stats": batch_stats}
        return jnp.asarray(model.apply(variables, images, train=False)), batch_stats
    variables = {"params": params, "batch_stats": batch_stats}
    logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
    return logits, updates.get("batch_stats", batch_stats)


def _all_finite(loss: jax.Array, gradients: Any, new: TrainState) -> jax.Array:
    """Whether a step may be taken: one bool, the same on all devices.

    The same because it is computed from what `lax.pmean` has made the same. These four suffice:
    - What overflowed in the network reaches the state by gradients and running statistics only; a
      plateau schedule also sees the loss. An infinity that shows in none of them left no trace.
    - Finite squares of the gradients keep the moments of every optimizer finite, Adam's second
      ones too, and so keeps clipping from dividing by an infinite norm.
    - The update is the last that can overflow: it shows in the new parameters. Their averages lie
      between old and new ones.
    """
    squares = optax.tree.norm((loss, gradients, new.params, new.batch_stats), squared=True)
    return jnp.isfinite(squares)


def _unless_skipped(
    finite: jax.Array, new: TrainState, old: TrainState, on_cpu: bool
) -> TrainState:
    """The new state; of a skipped step only its number, and what float16 learns from it."""
    if on_cpu:
        # For jnp.where a CPU's compiler writes out all that comes before it once more for each
        # leaf, and takes three times as long.
        state = lax.cond(finite, lambda n, o: n, lambda n, o: o, new, old)
    else:
        # A conditional would copy the state: for ResNet-50 on a TPU v5e 1% of a step's traffic.
        state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    scale = old.loss_scale and old.loss_scale.update(finite)
    return state.replace(step=new.step, loss_scale=scale)


def _average(state: TrainState, config: Config) -> dict[str, Any]:
    """Moves the averages towards the state, every `ema_every` steps.

    The start is no part of them: the shares of the n states so far, (1 - decay) decay^(n - i) of
    state i, are divided by their sum 1 - decay^n, as Adam divides its moments (Kingma & Ba 2014,
    section 3). With a decay of nearly 1, the average of random weights would stay nearly random.
    """
    decay, every = config.train.ema_decay, config.train.ema_every
    updates = jnp.maximum(state.step // every, 1).astype(jnp.float32)
    rate = (1 - decay) / -jnp.expm1(updates * math.log(decay))
    moved = optax.incremental_update(state.variables, state.ema, rate)
    due = state.step % every == 0
    return jax.tree.map(lambda m, o: jnp.where(due, m, o), moved, state.ema)
