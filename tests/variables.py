"""Variables of a network without compiling its initialisation."""

import functools

import jax
import numpy as np


def random_variables(model, image_shape=(32, 32, 3), seed=0):
    """{"params", "batch_stats"}: values as in a trained network, none as it was initialised.

    Args:
      model: The network.
      image_shape: (height, width, channels) of the images.
      seed: Other seeds give other values.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    init = functools.partial(model.init, train=False)
    generator = np.random.default_rng(seed)

    def fill(path, leaf):
        match path[-1].key:
            case "kernel":  # [height, width, in, out] or [in, out]; sums stay near 1
                spread = 1 / np.sqrt(np.prod(leaf.shape[:-1]))
                values = generator.normal(0, spread, leaf.shape)
            case "scale":
                values = generator.uniform(0.5, 1.5, leaf.shape)
                values[::5] *= -1  # some are, in a trained network
            case "var":
                values = generator.uniform(0.5, 1.5, leaf.shape)
            case _:  # biases and running means
                values = generator.normal(0, 0.2, leaf.shape)
        return values.astype(leaf.dtype)

    shapes = jax.eval_shape(init, jax.random.key(0), images)
    return jax.tree.map_with_path(fill, shapes)
