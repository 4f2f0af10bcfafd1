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
    stage_sizes=(1, 1), stage_widths=(16, 32), num_classes=10,
    block_cls=rj.BasicBlock, stem_cls=rj.CifarStem,
)  # fmt: skip
OPTIMIZER = optax.adam(3e-3)


def init(key: jax.Array, images: np.ndarray) -> tuple:
    """The state of one member: its variables and the optimizer's state."""
    variables = MODEL.init(key, images, train=False)
    return variables, OPTIMIZER.init(variables["params"])


def train_step(state: tuple, images: np.ndarray, labels: np.ndarray) -> tuple:
    """A step of one member."""
    variables, opt_state = state

    def loss_fn(params):
        both = {**variables, "params": params}
        logits, updates = MODEL.apply(both, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

    grads, batch_stats = jax.grad(loss_fn, has_aux=True)(variables["params"])
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    params = optax.apply_updates(variables["params"], updates)
    return {"params": params, **batch_stats}, opt_state


def main(members: int = 5, steps: int = 60) -> tuple[np.ndarray, float]:
    """Trains; returns each member's held-out accuracy, and the ensemble's."""
    digits = load_digits()
    images, labels = np.float32(digits.images[..., None] / 8 - 1), digits.target  # [N, 8, 8, 1]
    test = np.arange(len(labels)) % 5 == 0
    train_images, train_labels = images[~test], labels[~test]

    keys = jax.random.split(jax.random.key(0), members)
    state = jax.vmap(init, in_axes=(0, None))(keys, images[:1])
    step = jax.jit(jax.vmap(train_step, in_axes=(0, None, None)), donate_argnums=0)
    order = np.random.default_rng(0)
    for _ in range(steps):
        batch = order.choice(len(train_labels), 64, replace=False)
        state = step(state, train_images[batch], train_labels[batch])

    variables, _ = state
    predict = jax.vmap(functools.partial(MODEL.apply, train=False), in_axes=(0, None))
    probabilities = jax.nn.softmax(predict(variables, images[test]))  # [members, N, classes]
    accuracies = (probabilities.argmax(-1) == labels[test]).mean(-1)
    together = float((probabilities.mean(0).argmax(-1) == labels[test]).mean())
    for member, accuracy in enumerate(accuracies):
        print(f"member {member}: {accuracy:.1%}")
    print(f"average of members {accuracies.mean():.1%}, ensemble {together:.1%}")

    # A member is an ordinary network: its variables load, save and convert as any others.
    rj.to_torch(MODEL, jax.tree.map(lambda leaf: leaf[0], variables))
    return np.asarray(accuracies), together


if __name__ == "__main__":
    main()
