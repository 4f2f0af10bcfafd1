"""What recipes need to know about a dataset: its name, splits, image size and normalization."""

from __future__ import annotations

import dataclasses
from typing import Any

from resnet_jax.config.schema import Augment, Data


@dataclasses.dataclass(frozen=True)
class DatasetPreset:
    """A dataset as the recipes use it.

    Args:
      name: As in `Data.name`.
      image_size: Side of the training images in pixels.
      mean: Of each channel, in units of 1 (255 in a uint8 image).
      std: Of each channel, in units of 1.
      eval_split: The split to evaluate.

    Example:
      >>> IMAGENET.data(eval_resize=256).eval_split
      'validation'
    """

    name: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_split: str = "test"

    def data(self, **fields: Any) -> Data:
        """The data section of this dataset, with `fields` set or replaced."""
        given = {"name": self.name, "image_size": self.image_size, "eval_split": self.eval_split}
        return Data(**{**given, **fields})

    def augment(self, **fields: Any) -> Augment:
        """The augment section with this dataset's mean and std, with `fields` set or replaced."""
        return Augment(**{"mean": self.mean, "std": self.std, **fields})


IMAGENET = DatasetPreset(
    "tfds:imagenet2012", 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "validation"
)
CIFAR10 = DatasetPreset("tfds:cifar10", 32, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
CIFAR100 = DatasetPreset("tfds:cifar100", 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
FASHION_MNIST = DatasetPreset("tfds:fashion_mnist", 28, (0.286,), (0.353,))
