"""One training step of one device: images to gradients to a new state.

    uint8 images -> augment -> model -> loss -> gradients -> mean over devices -> optax -> state

The step is a pure function that knows of other devices only the name of their axis.
`data_parallel.parallel_step` runs it on all of them.
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
    """The training loss of each image, float32 [N], in nats.

    For bce and focal it is the mean over classes, as in timm.

    Args:
      logits: float32 [N, classes].
      targets: Probabilities [N, classes], each row summing to 1.
      config: The loss and its label smoothing.
      weights: Class weights [classes]: factors of the terms of softmax, as `weight` in PyTorch's
        cross-entropy, and of the positive terms of bce and focal, as its `pos_weight`.

    Example:
      >>> targets = jnp.array([[1.0, 0.0]])
      >>> round(float(loss_per_image(jnp.zeros((1, 2)), targets, Loss())[0]), 4)
      0.6931
    """
    if config.label_smoothing:
        targets = optax.smooth_labels(targets, config.label_smoothing)
    if config.name == "softmax":
        weighted = targets if weights is None else weights * targets
        return optax.softmax_cross_entropy(logits, weighted)
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
    """Makes step(state, batch) -> (state, metrics) for one device of the axis "batch".

    A batch is {"images": uint8 [N, H, W, C], "labels": int32 [N] or, for sets of labels, uint8 [N,
    classes]}, with "mirrored": bool [N] where augment.flip_alternates is on. Metrics are means over
    the batches of all devices: loss, top1 and top5 (fractions; for sets of labels, of the images
    that have any), learning_rate, and skipped: 1.0 where the step was skipped because something in
    it was not finite, else 0.0.

    `platform` is that of the devices to compile for; "" is JAX's default. `class_weights` [classes]
    become constants of the program.
    """
    schedule = make_schedule(config, length)
    platform = platform or jax.default_backend()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        scale = jnp.float32(1) if state.loss_scale is None else state.loss_scale.value
        found = _gradients(model, config, state, batch, scale, platform, class_weights)
        # Running statistics are those of all devices, even where each normalizes by its own.
        gradients, batch_stats, metrics = lax.pmean(found, AXIS)
        if "labeled" in metrics:  # hits per image become hits per labeled image
            labeled = jnp.maximum(metrics.pop("labeled"), jnp.finfo(jnp.float32).tiny)
            metrics |= {name: metrics[name] / labeled for name in ("top1", "top5")}
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
        finite = _all_finite(metrics["loss"], gradients, new, platform)
        metrics["skipped"] = 1 - finite.astype(jnp.float32)
        return _unless_skipped(finite, new, state, platform == "cpu"), metrics

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
    """This device's (gradients, batch_stats, metrics), computed in `accumulate` equal parts."""
    parts = config.train.accumulate
    device, size = lax.axis_index(AXIS), batch["labels"].shape[0] // parts
    sets = batch["labels"].ndim == 2  # an image has any number of labels
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
            labels = targets >= 0.5  # of two mixed images, those with the larger share
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
            metrics["labeled"] = labels.any(1).mean(dtype=jnp.float32)
        return loss * scale, (batch_stats, metrics)

    def add_part(carry: Any, part: Batch) -> tuple[Any, None]:
        batch_stats, total = carry
        gradients, (batch_stats, metrics) = jax.grad(loss_of_part, has_aux=True)(
            state.params, batch_stats, part
        )
        return (batch_stats, jax.tree.map(jnp.add, total, (gradients, metrics))), None

    names = ("loss", "top1", "top5", *(["labeled"] if sets else []))
    nothing = dict.fromkeys(names, jnp.float32(0))
    start = state.batch_stats, (jax.tree.map(jnp.zeros_like, state.params), nothing)
    (batch_stats, total), _ = scan(add_part, start, split, platform)
    gradients, metrics = jax.tree.map(lambda x: x / parts, total)
    return gradients, batch_stats, metrics


def _smooth_sets(targets: jax.Array, config: Loss) -> tuple[jax.Array, Loss]:
    """Smoothed sets of labels, and the loss without its smoothing.

    Each class is a binary decision, so smoothing spreads over two outcomes: y becomes
    (1 - s) y + s / 2. (With one label the outcomes are the classes.)
    """
    smoothing = config.label_smoothing
    smoothed = (1 - smoothing) * targets + smoothing / 2
    return smoothed, dataclasses.replace(config, label_smoothing=0.0)


def scan(
    function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, platform: str
) -> tuple[Any, Any]:
    """`lax.scan`, unrolled on a CPU, where XLA runs convolutions in a loop 17 times slower."""
    if platform != "cpu":
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
    """(logits, new batch_stats). A frozen backbone has no gradient and keeps its statistics."""
    if config.optimizer.backbone_rate == 0:
        params = {k: v if k == "head" else lax.stop_gradient(v) for k, v in params.items()}
        variables = {"params": params, "batch_stats": batch_stats}
        return jnp.asarray(model.apply(variables, images, train=False)), batch_stats
    variables = {"params": params, "batch_stats": batch_stats}
    logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
    return logits, updates.get("batch_stats", batch_stats)


def _all_finite(loss: jax.Array, gradients: Any, new: TrainState, platform: str) -> jax.Array:
    """Whether the step is taken: a bool that is the same on all devices.

    It is the same because it is computed from means over all devices. These four trees suffice:
    - What overflows in the network reaches the state through gradients and running statistics
      only; a plateau schedule also sees the loss. An infinity that shows in none of them has no
      effect.
    - Finite squares of the gradients keep the moments of every optimizer finite, including Adam's
      second moments, and keep clipping from dividing by an infinite norm.
    - The update is the last value that can overflow, and shows in the new parameters. Their moving
      averages lie between old and new ones.
    """
    tree: Any = (loss, gradients, new.params, new.batch_stats)
    if platform == "gpu":
        tree = _joined(tree)
    return jnp.isfinite(optax.tree.norm(tree, squared=True))


# A GPU reads a leaf of up to this size in less time than it takes to launch a kernel. XLA gives a
# kernel at most 96 operands; a new parameter has up to three.
_SMALL, _JOINED = 2**17, 24


def _joined(tree: Any) -> list[jax.Array]:
    """The numbers of all leaves, with those of small leaves joined to a few vectors."""
    leaves = jax.tree.leaves(tree)
    # On a GPU, the kernel of a convolution lies in memory with its outputs first.
    small = [
        jnp.moveaxis(x, -1, 0).ravel() if x.ndim > 2 else x.ravel()
        for x in leaves
        if x.size <= _SMALL
    ]
    joined = [
        jnp.concatenate(small[first : first + _JOINED]) for first in range(0, len(small), _JOINED)
    ]
    return joined + [x for x in leaves if x.size > _SMALL]


def _unless_skipped(
    finite: jax.Array, new: TrainState, old: TrainState, on_cpu: bool
) -> TrainState:
    """The new state; after a skipped step, the old one with the new step and loss scale."""
    if on_cpu:
        # With jnp.where the CPU's compiler duplicates everything before it for each leaf, and
        # takes three times as long.
        state = lax.cond(finite, lambda n, o: n, lambda n, o: o, new, old)
    else:
        # lax.cond would copy the state: 1% of the traffic of a ResNet-50 step on a TPU v5e.
        state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    scale = old.loss_scale and old.loss_scale.update(finite)
    return state.replace(step=new.step, loss_scale=scale)


def _average(state: TrainState, config: Config) -> dict[str, Any]:
    """Updates the moving averages with a new state, every train.ema_every steps.

    They are debiased as Adam's moments are (Kingma & Ba 2014, section 3): the weights of the n
    states so far, (1 - decay) decay^(n - i) for state i, are divided by their sum 1 - decay^n, and
    the initial parameters have none. With a decay near 1 they would dominate otherwise. A skipped
    step counts as a state too, so those before the first update stand for the initial parameters.
    """
    decay, every = config.train.ema_decay, config.train.ema_every
    updates = jnp.maximum(state.step // every, 1).astype(jnp.float32)
    rate = (1 - decay) / -jnp.expm1(updates * math.log(decay))
    moved = optax.incremental_update(state.variables, state.ema, rate)
    due = state.step % every == 0
    return jax.tree.map(lambda m, o: jnp.where(due, m, o), moved, state.ema)
