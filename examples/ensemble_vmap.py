"""An ensemble: `jax.vmap` trains several networks as one program.

    pip install -e '.[train]'
    python examples/ensemble_vmap.py

Every array of the state gets a leading axis for the members. They see the same batches and differ
in their initial parameters only; the average of their probabilities is usually better than the
average member.
"""

import functools

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import resnet_jax as rj

MODEL = rj.ResNet(
    stage_sizes=(1, 1),
    stage_widths=(16, 32),
    num_classes=10,
    block_cls=rj.BasicBlock,
    stem_cls=rj.CifarStem,
)


def main(members: int = 5, steps: int = 80) -> tuple[np.ndarray, float]:
    """Trains; returns each member's held-out accuracy, and the ensemble's."""
    digits = load_digits()
    images, labels = np.float32(digits.images[..., None] / 8 - 1), digits.target  # [N, 8, 8, 1]
    test = np.arange(len(labels)) % 5 == 0
    train_images, train_labels = images[~test], labels[~test]
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    # These two functions are about one network.
    def init(key):
        variables = MODEL.init(key, images[:1], train=False)
        return variables, optimizer.init(variables["params"])

    def train_step(state, images, labels):
        variables, opt_state = state

        def loss_fn(params):
            inputs = {**variables, "params": params}
            logits, updates = MODEL.apply(inputs, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        grads, updates = jax.grad(loss_fn, has_aux=True)(variables["params"])
        changes, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], changes)
        return {"params": params, **updates}, opt_state

    # And these are about all of them.
    state = jax.jit(jax.vmap(init))(jax.random.split(jax.random.key(0), members))
    train_all = jax.jit(jax.vmap(train_step, in_axes=(0, None, None)), donate_argnums=0)
    order = np.random.default_rng(0)
    for _ in range(steps):
        batch = order.choice(len(train_labels), 64, replace=False)
        state = train_all(state, train_images[batch], train_labels[batch])

    variables, _ = state
    predict = jax.jit(jax.vmap(functools.partial(MODEL.apply, train=False), in_axes=(0, None)))
    probabilities = jax.nn.softmax(predict(variables, images[test]))  # [members, N, classes]
    accuracies = np.asarray((probabilities.argmax(-1) == labels[test]).mean(-1))
    together = float((probabilities.mean(0).argmax(-1) == labels[test]).mean())
    print("members:", ", ".join(f"{accuracy:.1%}" for accuracy in accuracies))
    print(f"their average: {accuracies.mean():.1%}; the ensemble: {together:.1%}")

    # A member is an ordinary network, which can be saved, loaded and converted.
    first = jax.tree.map(lambda leaf: leaf[0], variables)
    print(f"{len(rj.to_torch(MODEL, first))} tensors of the first member, named as in PyTorch")
    return accuracies, together


if __name__ == "__main__":
    main()
