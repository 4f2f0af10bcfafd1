"""Learning-rate schedules and optimizers, composed from optax."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from resnet_jax.config.schema import Config


@dataclasses.dataclass(frozen=True)
class RunLength:
    """The optimizer steps of a run and of an epoch; the latter may be a fraction.

    Example:
      >>> RunLength.of(Config(), images=1_000).steps
      78
    """

    steps: int
    steps_per_epoch: float

    @classmethod
    def of(cls, config: Config, images: int) -> RunLength:
        """The length of a run on a number of training images."""
        per_epoch = images / config.train.batch_size
        return cls(config.train.steps or max(1, round(config.train.epochs * per_epoch)), per_epoch)


def peak_learning_rate(config: Config) -> float:
    """The peak learning rate: optimizer.learning_rate, times batch_size / base_batch if given.

    Linear scaling with the batch is from Goyal et al. 2017, section 2.1.

    Example:
      >>> from resnet_jax.config.schema import Optimizer, Train
      >>> optimizer = Optimizer(learning_rate=0.1, base_batch=256)
      >>> peak_learning_rate(Config(optimizer=optimizer, train=Train(batch_size=1024)))
      0.4
    """
    optimizer = config.optimizer
    if not optimizer.base_batch:
        return optimizer.learning_rate
    return optimizer.learning_rate * config.train.batch_size / optimizer.base_batch


def warmup_steps(config: Config, length: RunLength) -> int:
    """schedule.warmup_epochs in steps, rounded; may be more than the run has.

    Example:
      >>> from resnet_jax.config.schema import Schedule
      >>> config = Config(schedule=Schedule(warmup_epochs=2.0))
      >>> warmup_steps(config, RunLength(steps=100, steps_per_epoch=10.0))
      20
    """
    return round(config.schedule.warmup_epochs * length.steps_per_epoch)


def make_schedule(config: Config, length: RunLength) -> optax.Schedule:
    """The learning rate as a function of the number of completed steps.

    A warm-up of W steps multiplies the main schedule by a factor that rises linearly from
    s = max(schedule.warmup_start, 1 / (W + 1)) at the first step to 1 at step W, the first step
    after the warm-up: s + (1 - s) step / W. Without a warmup_start this is (step + 1) / (W + 1). A
    factor of 0 would waste the first step.

    The factor does not depend on the length of the run, so a short trial has the same first steps
    as the whole run. A plateau schedule is constant here; `make_optimizer` lowers it.

    Example:
      >>> schedule = make_schedule(Config(), RunLength(steps=100, steps_per_epoch=10.0))
      >>> round(float(schedule(50)), 4)
      0.05
    """
    main, warmup = _main_schedule(config, length), warmup_steps(config, length)
    if not warmup:
        return main
    start = max(config.schedule.warmup_start, 1 / (warmup + 1))
    factor = optax.schedules.linear_schedule(start, 1.0, warmup)
    return lambda step: factor(step) * main(step)


def _main_schedule(config: Config, length: RunLength) -> optax.Schedule:
    """The schedule without its warm-up, until whose end cosine and linear stay at the peak."""
    schedule, peak = config.schedule, peak_learning_rate(config)
    warmup = warmup_steps(config, length)
    rest = max(length.steps - warmup, 1)
    if schedule.name == "step":
        # In a short run, two drops may fall on one step. None falls on step 0.
        drops: dict[int, float] = {}
        for share in schedule.boundaries:
            step = max(round(share * length.steps), 1)
            drops[step] = drops.get(step, 1.0) * schedule.factor
        return optax.schedules.piecewise_constant_schedule(peak, drops)
    if schedule.name == "cosine":
        fall = optax.schedules.cosine_decay_schedule(peak, rest, schedule.final)
    elif schedule.name in ("linear", "one_cycle"):
        # One cycle is a linear warm-up and a linear decay (Smith & Topin 2018).
        fall = optax.schedules.linear_schedule(peak, peak * schedule.final, rest)
    else:
        return optax.schedules.constant_schedule(peak)
    return lambda step: fall(jnp.maximum(step - warmup, 0))


def describe_cut_warmup(config: Config, length: RunLength) -> str:
    """A line for the log where a run ends before its learning rate reaches the peak, else "".

    Example:
      >>> describe_cut_warmup(Config(), RunLength(steps=10, steps_per_epoch=5.0))
      ''
    """
    warmup = warmup_steps(config, length)
    if length.steps > warmup:
        return ""
    last = float(make_schedule(config, length)(length.steps - 1))
    return (
        f"the run ends in its warm-up, which takes {warmup:,} steps (schedule.warmup_epochs = "
        f"{config.schedule.warmup_epochs:g}): at its last step the learning rate is {last:.3g}, "
        f"and the peak is {peak_learning_rate(config):.3g}. To reach the peak, take more than "
        f"{warmup:,} steps or a smaller schedule.warmup_epochs"
    )


def make_optimizer(
    config: Config, length: RunLength, schedule: optax.Schedule | None = None
) -> optax.GradientTransformationExtraArgs:
    """The transformation of gradients into updates; `update` takes the loss as `value`.

    `schedule` replaces the learning rate of `make_schedule`.

    Example:
      >>> optimizer = make_optimizer(Config(), RunLength(steps=100, steps_per_epoch=10.0))
      >>> params = {"head": {"kernel": jnp.ones((2, 2))}}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params, value=jnp.array(1.0))
      >>> round(float(updates["head"]["kernel"][0, 0]), 5)
      -0.10001
    """
    fields = config.optimizer
    parts = [optax.clip_by_global_norm(fields.clip_norm)] if fields.clip_norm else []
    parts.append(_descent(config, schedule or make_schedule(config, length)))
    if config.schedule.name == "plateau":
        parts.append(
            optax.contrib.reduce_on_plateau(
                factor=config.schedule.factor,
                patience=config.schedule.patience,
                accumulation_size=max(1, math.ceil(length.steps_per_epoch)),
            )
        )
    if fields.backbone_rate != 1:
        parts.append(_scale_backbone(fields.backbone_rate))
    return optax.chain(*parts)


def _descent(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    fields = config.optimizer
    decay, mask = fields.weight_decay, _decayed
    if fields.decay_norms_and_biases:
        mask = _all
    if fields.name == "lars":
        return optax.lars(
            schedule,
            weight_decay=decay,
            weight_decay_mask=mask,
            trust_coefficient=fields.trust_coefficient,
            trust_ratio_mask=_decayed,
            momentum=fields.momentum,
            nesterov=fields.nesterov,
        )
    if fields.name == "lamb":
        return optax.lamb(schedule, fields.beta1, fields.beta2, fields.epsilon, 0.0, decay, mask)
    if fields.name == "adamw":
        return optax.adamw(
            schedule, fields.beta1, fields.beta2, fields.epsilon, weight_decay=decay, mask=mask
        )
    if fields.name != "sgd":
        raise ValueError(f"optimizer.name = {fields.name!r}: has no transformation here")
    add_decay = optax.add_decayed_weights(decay, mask)
    momentum = (
        optax.trace(fields.momentum, fields.nesterov) if fields.momentum else optax.identity()
    )
    scale = optax.scale_by_learning_rate(schedule)
    if fields.decay == "l2":
        return optax.chain(add_decay, momentum, scale)
    return optax.chain(momentum, add_decay, scale)


def _decayed(params: optax.Params) -> optax.Params:
    """Kernels, but no biases and no parameters of norms (Goyal et al. 2017, section 5.1)."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _all(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda x: True, params)


def _scale_backbone(rate: float) -> optax.GradientTransformation:
    """Multiplies the updates of everything but the head."""

    def scale(updates: dict, params: dict | None) -> dict:
        del params
        return {
            name: part if name == "head" else jax.tree.map(lambda x: rate * x, part)
            for name, part in updates.items()
        }

    return optax.stateless(scale)


def current_learning_rate(schedule: optax.Schedule, opt_state: optax.OptState) -> jax.Array:
    """The learning rate of the next step, a scalar, with the drops of a plateau schedule.

    It follows from the optimizer's own count of steps, which leaves out skipped ones.

    Example:
      >>> length = RunLength(steps=10, steps_per_epoch=5.0)
      >>> state = make_optimizer(Config(), length).init({"head": jnp.zeros((2, 2))})
      >>> round(float(current_learning_rate(make_schedule(Config(), length), state)), 4)
      0.1
    """
    rate = jnp.float32(1)
    for state in jax.tree.leaves(opt_state, is_leaf=_has_rate):
        if isinstance(state, optax.ScaleByScheduleState):
            rate = rate * schedule(state.count)
        elif isinstance(state, optax.contrib.ReduceLROnPlateauState):
            rate = rate * state.scale
    return rate


def _has_rate(state: object) -> bool:
    return isinstance(state, optax.ScaleByScheduleState | optax.contrib.ReduceLROnPlateauState)
