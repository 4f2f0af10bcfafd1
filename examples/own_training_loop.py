"""A training loop of your own: Optax, `jax.jit`, and the batch split over all devices.

    pip install -e '.[train]'
    python examples/own_training_loop.py

The images are sharded over a mesh and the state is replicated. From these shardings `jax.jit`
derives the rest: gradients and batch statistics are those of the whole batch, on any number of
devices.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import resnet_jax as rj

MODEL = rj.ResNet20(num_classes=10)
EPOCHS, BATCH = 15, 64


class State(NamedTuple):
    """What a training step updates."""

    params: Any
    batch_stats: Any
    opt_state: Any


def load_data() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Real handwritten digits: float32 images [N, 8, 8, 1] and labels [N]."""
    digits = load_digits()
    images, labels = np.float32(digits.images[..., None] / 8 - 1), digits.target
    held_out = np.arange(len(labels)) % 5 == 0
    return {
        "train": (images[~held_out], labels[~held_out]),
        "test": (images[held_out], labels[held_out]),
    }


def main(epochs: int = EPOCHS) -> float:
    """Trains, and returns the accuracy on the held-out images."""
    # Auto: `jax.jit` derives the shardings of all other arrays.
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(auto,))
    replicated, split = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))

    images, labels = load_data()["train"]
    steps_per_epoch = len(images) // BATCH
    steps = epochs * steps_per_epoch
    rate = optax.warmup_cosine_decay_schedule(0.01, 0.1, steps_per_epoch // 2, steps)
    optimizer = optax.sgd(rate, momentum=0.9, nesterov=True)
    init = jax.jit(functools.partial(MODEL.init, train=False))
    variables = init(jax.random.key(0), images[:1])
    state = State(**variables, opt_state=optimizer.init(variables["params"]))
    state = jax.device_put(state, replicated)

    def loss_fn(params, batch_stats, images, labels):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = MODEL.apply(variables, images, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, updates["batch_stats"]

    @functools.partial(jax.jit, donate_argnums=0)  # the new state takes the memory of the old one
    def train_step(state, images, labels):
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, batch_stats), grads = gradient(state.params, state.batch_stats, images, labels)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), loss

    order = np.random.default_rng(0)
    for epoch in range(epochs):
        shuffled = order.permutation(len(images))[: steps_per_epoch * BATCH]
        for batch in shuffled.reshape(-1, BATCH):
            state, loss = train_step(state, *jax.device_put((images[batch], labels[batch]), split))
        print(f"epoch {epoch + 1}: loss {loss:.3f}")  # waits for the device, once an epoch

    test_images, test_labels = load_data()["test"]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    predict = jax.jit(functools.partial(MODEL.apply, train=False))
    logits = predict(variables, test_images)
    accuracy = float((logits.argmax(-1) == test_labels).mean())
    print(f"{accuracy:.1%} of {len(test_labels)} held-out digits")
    return accuracy


if __name__ == "__main__":
    main()
