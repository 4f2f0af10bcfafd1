"""A network of this package in a Flax NNX program.

    pip install -e '.[train]' 'flax>=0.12'
    python examples/nnx.py

`nnx.bridge.ToNNX` turns the linen module into an NNX module that holds its variables: "params"
become `nnx.Param`, "batch_stats" become `nnx.BatchStat`. Weights, including PyTorch's, go in and
come out. Flax 0.11 loses nested parameters where a call updates the running statistics beside them.
"""

from typing import Any

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import resnet_jax as rj

LINEN = rj.ResNet20(num_classes=10)


def load_variables(module: nnx.Module, variables: dict[str, Any]) -> None:
    """Sets an NNX module's variables to those of linen, such as `rj.load_weights` returns."""
    for collection in variables.values():  # "params", "batch_stats"
        nnx.update(module, collection)


def linen_variables(module: nnx.Module) -> dict[str, Any]:
    """The linen variables of an NNX module, for `rj.save_weights` or `rj.to_torch`."""
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    return {name: nnx.to_pure_dict(nnx.state(module, kind)) for name, kind in kinds.items()}


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, images, labels):
    """One step; returns the loss. NNX updates `model` and `optimizer` in place."""

    def loss_fn(model):
        # `mutable` lets the call update the running statistics in `model`.
        logits = model(images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def main(epochs: int = 5) -> float:
    """Trains, and returns the accuracy on the held-out digits."""
    digits = load_digits()
    images, labels = np.float32(digits.images[..., None] / 8 - 1), digits.target  # [N, 8, 8, 1]
    test = np.arange(len(labels)) % 5 == 0
    train_images, train_labels = images[~test], labels[~test]

    model = nnx.bridge.ToNNX(LINEN, rngs=nnx.Rngs(0)).lazy_init(images[:1], train=False)
    rate = optax.cosine_decay_schedule(0.1, epochs * (len(train_labels) // 64))
    optimizer = nnx.Optimizer(model, optax.sgd(rate, momentum=0.9), wrt=nnx.Param)
    order = np.random.default_rng(0)
    for epoch in range(epochs):
        shuffled = order.permutation(len(train_labels) // 64 * 64)
        for batch in shuffled.reshape(-1, 64):
            loss = train_step(model, optimizer, train_images[batch], train_labels[batch])
        print(f"epoch {epoch + 1}: loss {loss:.3f}")

    logits = model(images[test], train=False)
    accuracy = float((logits.argmax(-1) == labels[test]).mean())
    print(f"{accuracy:.1%} of {test.sum()} held-out digits")

    variables = linen_variables(model)
    np.testing.assert_array_equal(LINEN.apply(variables, images[test], train=False), logits)
    return accuracy


if __name__ == "__main__":
    main()
