"""What a network says of the images it was evaluated on, and which it was surest of and wrong."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.data.augment import normalize
from resnet_jax.data.loader import (
    Batch,
    Corrupt,
    evaluation_batches,
    fits_memory,
    load_memory,
    streamed_evaluation_batches,
)
from resnet_jax.data.sources import Source, open_source
from resnet_jax.evaluation.network import Network
from resnet_jax.models.resnet import ResNet
from resnet_jax.training.config import Config
from resnet_jax.weights.convert import Variables

BATCH = 128


@dataclasses.dataclass(frozen=True)
class Example:
    """One image and what the network says of it.

    Args:
      pixels: uint8 [H, W, C], as the network sees it.
      label: Its class.
      predicted: The class with the highest probability.
      probability: That probability.
    """

    pixels: np.ndarray
    label: int
    predicted: int
    probability: float


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A pass over held-out images.

    Args:
      confusion: Counts [classes, classes], rows are true classes.
      mistakes: The surest wrong predictions, the surest first.
      examples: The first images, right or wrong.
      images: How many there were.
    """

    confusion: np.ndarray
    mistakes: list[Example]
    examples: list[Example]
    images: int

    @property
    def class_accuracy(self) -> np.ndarray:
        """Share of each class's images that are recognised; NaN for a class without images."""
        counts = self.confusion.sum(1)
        shares = self.confusion.diagonal() / np.maximum(counts, 1)
        return np.where(counts > 0, shares, np.nan)


def predict_split(network: Network, config: Config, most: int, keep: int) -> Predictions:
    """Runs a network over the images that its run was evaluated on.

    Args:
      network: With the variables to look at.
      config: Of its run: data set, split and crop.
      most: Images looked at, at most.
      keep: Mistakes and examples kept.

    Returns:
      Counts and images.

    Raises:
      DataError: The data set is not there.
    """
    data = config.data
    source = open_source(data.name, data.eval_split, data.data_dir, train_split=data.train_split)
    classes = len(network.class_names)
    confusion = np.zeros((classes, classes), np.int64)
    surest: list[tuple[float, int, Example]] = []
    examples: list[Example] = []
    order = itertools.count()

    for batch in itertools.islice(_batches(source, config), -(-most // BATCH)):
        real = batch["weights"] > 0
        images = normalize(jnp.asarray(batch["images"]), network.colours)
        found = np.asarray(_probabilities(network.model, network.variables, images))
        predicted = found.argmax(-1)
        np.add.at(confusion, (batch["labels"][real], predicted[real]), 1)
        for place in np.flatnonzero(real).tolist():
            sure = float(found[place].max())
            label, guess = int(batch["labels"][place]), int(predicted[place])
            wanted = label != guess and (len(surest) < keep or sure > surest[0][0])
            if not wanted and len(examples) >= keep:
                continue
            example = Example(batch["images"][place].copy(), label, guess, sure)
            if len(examples) < keep:
                examples.append(example)
            if wanted:
                heapq.heappush(surest, (sure, -next(order), example))
                if len(surest) > keep:
                    heapq.heappop(surest)
    mistakes = [example for _, _, example in sorted(surest, key=lambda each: -each[0])]
    return Predictions(confusion, mistakes, examples, int(confusion.sum()))


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(model: ResNet, variables: Variables, images: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.asarray(model.apply(variables, images, train=False)))


def _batches(source: Source, config: Config) -> Iterator[Batch]:
    data = config.data
    corrupt = Corrupt(data.max_corrupt, lambda line: None)  # the run named them
    if fits_memory(source, data, training=False):
        images = load_memory(source, data, training=False, corrupt=corrupt)
        return evaluation_batches(images, BATCH)
    return streamed_evaluation_batches(source, data, BATCH, corrupt)
