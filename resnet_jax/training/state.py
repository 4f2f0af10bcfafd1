"""The state that a run carries from step to step; every checkpoint holds all of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from resnet_jax.config.schema import Config
from resnet_jax.models.resnet import ResNet


class LossScale(struct.PyTreeNode):
    """A factor of the loss that keeps float16 gradients from vanishing.

    It is halved when a step is skipped, and doubled after 2,000 steps (`good_steps`) without.

    Example:
      >>> scale = LossScale.create()
      >>> float(scale.update(jnp.array(False)).value)
      32768.0
    """

    value: jax.Array
    good_steps: jax.Array

    @classmethod
    def create(cls) -> LossScale:
        """The initial scale, 2^16."""
        return cls(jnp.float32(2.0**16), jnp.int32(0))

    def update(self, finite: jax.Array) -> LossScale:
        """The scale after a step that was taken (finite) or skipped."""
        grown = self.good_steps + 1 >= 2_000
        value = jnp.where(finite, jnp.where(grown, self.value * 2, self.value), self.value / 2)
        good_steps = jnp.where(finite & ~grown, self.good_steps + 1, 0)
        return LossScale(jnp.maximum(value, 1.0), good_steps)


class TrainState(struct.PyTreeNode):
    """The state that a training step updates.

    It holds no random key and no position in the data, because both follow from seed and step.
    """

    step: jax.Array  # completed steps, int32
    params: Any
    batch_stats: Any  # running mean and variance of the norms
    opt_state: Any
    ema: dict[str, Any]  # moving averages {"params", "batch_stats"}; {} without
    loss_scale: LossScale | None  # with float16

    @property
    def variables(self) -> dict[str, Any]:
        """{"params", "batch_stats"}, as the model applies them."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    model: ResNet,
    optimizer: optax.GradientTransformation,
    config: Config,
    channels: int,
    initial: dict[str, Any] | None = None,
) -> TrainState:
    """Creates the state before the first step, as NumPy arrays.

    Its variables are `initial`, or random ones that follow from train.seed.

    Example:
      >>> import resnet_jax as rj
      >>> state = create_state(rj.ResNet20(), optax.sgd(0.1), Config(), channels=3)
      >>> int(state.step), sorted(state.variables)
      (0, ['batch_stats', 'params'])
    """
    new_state = functools.partial(_new_state, optimizer=optimizer, config=config)
    if initial is not None:
        state = jax.jit(new_state)(initial)
    else:
        random = _random_variables(model, config, channels)
        # It runs once, and the CPU's compiler takes three times as long to optimize it.
        options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
        init = jax.jit(lambda key: new_state(random(key)), compiler_options=options)
        state = init(jax.random.key(config.train.seed))
    return jax.tree.map(np.array, state)


def state_shapes(
    model: ResNet, optimizer: optax.GradientTransformation, config: Config, channels: int
) -> TrainState:
    """The shapes and types of the state, as `jax.ShapeDtypeStruct`; computes nothing.

    Example:
      >>> import resnet_jax as rj
      >>> state = state_shapes(rj.ResNet20(), optax.sgd(0.1), Config(), channels=3)
      >>> state.params["head"]["kernel"].shape
      (64, 10)
    """
    random = _random_variables(model, config, channels)
    return jax.eval_shape(
        lambda key: _new_state(random(key), optimizer, config), jax.random.key(config.train.seed)
    )


def _random_variables(
    model: ResNet, config: Config, channels: int
) -> Callable[[jax.Array], dict[str, Any]]:
    side = config.data.image_size
    return lambda key: dict(model.init(key, jnp.zeros((1, side, side, channels)), train=False))


def _new_state(
    variables: dict[str, Any], optimizer: optax.GradientTransformation, config: Config
) -> TrainState:
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema={"params": params, "batch_stats": batch_stats} if config.train.ema_decay else {},
        loss_scale=LossScale.create() if config.model.dtype == "float16" else None,
    )
