"""A detector on a ResNet's feature maps: a feature pyramid (FPN) finds digits in a picture.

    pip install -e '.[train]'
    python examples/features_fpn.py

`features` returns the map of each stage, and `feature_info` its channels and stride. The pyramid
(Lin et al. 2017) adds each coarse map, enlarged, to the next finer one; the head says for each
position which digit is there, or none. With weights (`rj.load_weights`) put them at
variables["params"]["backbone"].
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import resnet_jax as rj

# Small, for small digits; for photos rj.ResNet50(num_classes=0), with weights.
BACKBONE = rj.ResNet18(
    stem_cls=functools.partial(rj.ImageNetStem, features=16),
    stage_sizes=(1, 1, 1, 1),
    stage_widths=(16, 32, 64, 128),
    num_classes=0,
)
SIDE, DIGITS, NOTHING = 64, 6, 10


class Detector(nn.Module):
    """Images [N, H, W, 1] -> logits [N, H/4, W/4, 11] of ten digits and "nothing"."""

    backbone: rj.ResNet
    width: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        maps = self.backbone.features(images, train=train)
        *finer, top = (f"stage{number}" for number in (1, 2, 3, 4))  # strides 4, 8, 16, 32
        merged = nn.Conv(self.width, (1, 1), name=f"lateral_{top}")(maps[top])
        for name in reversed(finer):
            lateral = nn.Conv(self.width, (1, 1), name=f"lateral_{name}")(maps[name])
            merged = lateral + jax.image.resize(merged, lateral.shape, "nearest")
        y = nn.relu(nn.Conv(self.width, (3, 3), name="smooth")(merged))
        return nn.Conv(NOTHING + 1, (1, 1), name="classify")(y)


def make_scenes(random: np.random.Generator, count: int, digits: np.ndarray, labels: np.ndarray):
    """Digits of 8x8 pixels at random places: images [N, 64, 64, 1], classes [N, 16, 16]."""
    images = random.normal(0, 0.2, (count, SIDE, SIDE, 1)).astype(np.float32)
    classes = np.full((count, SIDE // 4, SIDE // 4), NOTHING)
    for image, targets in zip(images, classes):
        for cell in random.choice(16, DIGITS, replace=False):  # on a grid, so that none overlap
            row, column = 4 * np.array(divmod(cell, 4)) + random.integers(0, 3, 2)  # stride 4
            which = random.integers(len(labels))
            image[4 * row : 4 * row + 8, 4 * column : 4 * column + 8, 0] += digits[which] / 8
            targets[row, column] = labels[which]  # the cell of the upper left corner
    return images, classes


def main(steps: int = 300, batch_size: int = 16) -> tuple[float, float]:
    """Trains; returns recall and precision in new scenes, of digits that it never saw."""
    digits = load_digits()
    held_out = np.arange(len(digits.target)) % 5 == 0
    random = np.random.default_rng(0)
    model, optimizer = Detector(BACKBONE), optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 1)))
    opt_state = optimizer.init(variables["params"])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(variables, opt_state, images, classes):
        def loss_fn(params):
            both = {**variables, "params": params}
            logits, updates = model.apply(both, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
            weights = jnp.where(classes == NOTHING, 0.1, 1.0)  # most positions have no digit
            return (weights * losses).mean(), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        changes, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], changes)
        return {"params": params, **updates}, opt_state, loss

    for step in range(1, steps + 1):
        scenes = make_scenes(random, batch_size, digits.images[~held_out], digits.target[~held_out])
        variables, opt_state, loss = train_step(variables, opt_state, *scenes)
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.4f}")

    @jax.jit
    def find(variables, images):
        return model.apply(variables, images, train=False).argmax(-1)

    images, classes = make_scenes(random, 64, digits.images[held_out], digits.target[held_out])
    found = np.asarray(find(variables, images))
    right = (found == classes) & (classes != NOTHING)  # the digit, and its place
    recall = right.sum() / (classes != NOTHING).sum()
    precision = right.sum() / max(1, (found != NOTHING).sum())
    print(f"{recall:.1%} of the digits are found; {precision:.1%} of what is found is right")
    return float(recall), float(precision)


if __name__ == "__main__":
    main()
