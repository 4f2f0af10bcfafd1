"""Sizes of well-known datasets, for planning a run on a machine that does not have them."""

from __future__ import annotations

from resnet_jax.config.schema import Data
from resnet_jax.data.sources.base import Source, field_error
from resnet_jax.data.sources.opening import open_split
from resnet_jax.data.sources.splits import parse_split
from resnet_jax.errors import DataError

# Training images, classes and channels, by the name in TFDS; and the embedded digits.
KNOWN_SIZES = {
    "cifar10": (50_000, 10, 3),
    "cifar100": (50_000, 100, 3),
    "digits": (1_437, 10, 1),
    "fashion_mnist": (60_000, 10, 1),
    "food101": (75_750, 101, 3),
    "imagenet2012": (1_281_167, 1_000, 3),
    "imagenet_resized": (1_281_167, 1_000, 3),
    "mnist": (60_000, 10, 1),
    "oxford_flowers102": (1_020, 102, 3),
    "oxford_iiit_pet": (3_680, 37, 3),
    "svhn_cropped": (73_257, 10, 3),
}


class SizeOnlySource(Source):
    """A split of which only the size is known; it has no images to read.

    Example:
      >>> source = SizeOnlySource(images=50_000, classes=10, channels=3)
      >>> len(source), source.num_classes
      (50000, 10)
    """

    def __init__(self, images: int, classes: int, channels: int) -> None:
        self._images = images
        self.class_names = tuple(map(str, range(classes)))
        self.channels = channels
        self.image_shape = None
        self.fingerprint = ""

    def __len__(self) -> int:
        return self._images

    def _read(self, position: int) -> tuple[bytes, int]:
        raise DataError(f"image {position} of a dataset of which only the size is known")

    def _name(self, position: int) -> str:
        return str(position)


def training_size(config: Data, images: int = 0, classes: int = 0) -> Source:
    """The training split as a source whose images are counted, not read.

    Args:
      config: Names the dataset.
      images: Its training images; 0: as known here, or as prepared on this machine.
      classes: Its classes; 0: as for `images`.

    Raises:
      DataError: The dataset is neither known nor prepared.

    Example:
      >>> len(training_size(Data(name="tfds:imagenet2012")))
      1281167
    """
    name = config.name.removeprefix("tfds:").partition(":")[0].partition("/")[0]
    if images and classes:
        channels = KNOWN_SIZES.get(name, (0, 0, 3))[2]
        return SizeOnlySource(images, classes, config.channels or channels)
    if known := _part_of_train(name, config.train_split):
        found: Source = SizeOnlySource(known, *KNOWN_SIZES[name][1:])
    else:
        found = _prepared(config)
    if images or classes:
        return SizeOnlySource(images or len(found), classes or found.num_classes, found.channels)
    return found


def _part_of_train(name: str, split: str) -> int:
    """Images in percentages of a known training split, as TFDS rounds them; 0 if not known."""
    try:
        parts = parse_split(split, "data.train_split")
    except DataError:  # such as train[:1000]
        return 0
    if name not in KNOWN_SIZES or set(parts) != {"train"}:
        return 0
    images = KNOWN_SIZES[name][0]
    return sum(round(images * last) - round(images * first) for first, last in parts["train"])


def _prepared(config: Data) -> Source:
    try:
        return open_split(config, config.train_split)
    except DataError as error:
        raise field_error(
            "data.name",
            config.name,
            f"the size of its split {config.train_split!r} is not known; give --images and "
            f"--num_classes, or prepare it. Known without: train, and percentages of it, of "
            f"{', '.join(KNOWN_SIZES)} "
            f"({error})",
        ) from error
