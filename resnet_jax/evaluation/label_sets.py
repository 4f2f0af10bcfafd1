"""Which of a network's outputs the labels of a data set mean.

Labels are matched by name: a workdir knows its classes, a repository on the Hub or the user may say
them, a network of a thousand classes is taken for one of ImageNet's. So the order of class folders
does not matter, and a data set of some of the classes is judged among those only. Where nobody says
what the outputs are called, they are taken in the order of the data set's classes, with a warning.
TFDS numbers the labels of ImageNet-A and ImageNet-R as ImageNet's thousand, and
their authors let only their 200 classes compete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from importlib import resources

import numpy as np

from resnet_jax.data.sources.base import Source, named
from resnet_jax.errors import DataError
from resnet_jax.weights.class_names import imagenet_ids, imagenet_names
from resnet_jax.weights.network import Network

SUBSETS = ("imagenet_a", "imagenet_r")
CORRUPTED = "imagenet2012_corrupted"

# Top-1 errors of AlexNet, each the mean of five severities, which mCE divides by: Hendrycks &
# Dietterich 2019, as in the README of their repository (github.com/hendrycks/robustness).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = (1, 2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes that compete for an image of a data set.

    Args:
      names: Of each.
      outputs: The network's output for each; None: all outputs as they are.
      places: int32, for each label of the data set its place among the classes, -1 where it has
        none; None: the labels as they are.
      matched: How labels were matched to outputs: by "name", "number" or "order".
      doubt: A line for people, where outputs may mean other classes than those; else "".
    """

    names: tuple[str, ...]
    outputs: np.ndarray | None = None
    places: np.ndarray | None = None
    matched: str = "name"
    doubt: str = ""

    def translate(self, labels: np.ndarray) -> np.ndarray:
        """Labels of the data set, [N] or [N, labels] of 0 and 1, as places among the classes.

        Example:
          >>> classes = Classes(("cat", "dog"), places=np.array([1, -1, 0], np.int32))
          >>> classes.translate(np.array([0, 2, 1])).tolist()
          [1, 0, -1]
          >>> classes.translate(np.array([[1, 1, 0]])).tolist()
          [[0, 1]]
        """
        if self.places is None:
            return labels
        if labels.ndim == 1:
            return self.places[labels]
        known = self.places >= 0
        several = np.zeros((len(labels), len(self.names)), labels.dtype)
        several[:, self.places[known]] = labels[:, known]
        return several


def data_set_name(name: str) -> str:
    """What TFDS calls a data set, without configuration and version.

    Args:
      name: As in `data.name`.

    Returns:
      "" where it is none of TFDS's.

    Example:
      >>> data_set_name("tfds:imagenet2012_corrupted/fog_1:3.1.0"), data_set_name("folder:a")
      ('imagenet2012_corrupted', '')
    """
    kind, _, rest = name.partition(":")
    return rest.partition(":")[0].partition("/")[0] if kind == "tfds" else ""


def subset_ids(name: str) -> tuple[str, ...]:
    """The WordNet ids of ImageNet-A's or ImageNet-R's 200 classes.

    Args:
      name: "imagenet_a" or "imagenet_r".

    Returns:
      In the order of ImageNet's labels.

    Example:
      >>> len(subset_ids("imagenet_a")), subset_ids("imagenet_r")[0]
      (200, 'n01443537')
    """
    file = resources.files("resnet_jax.evaluation") / "imagenet_subsets.txt"
    lines = map(str.split, file.read_text(encoding="utf-8").splitlines())
    return tuple(line[0] for line in lines if name in line[1:])


def match_classes(network: Network, source: Source) -> Classes:
    """Finds the network's output for each label of a data set.

    Args:
      network: The network.
      source: The data set.

    Returns:
      The classes that compete.

    Raises:
      DataError: The network has not the data set's classes.

    Example:
      >>> import tempfile
      >>> from types import SimpleNamespace
      >>> from resnet_jax.data.sources.opening import open_source
      >>> network = SimpleNamespace(class_names=tuple("0987654321"))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     match_classes(network, open_source("digits", "test", folder)).places.tolist()
      [0, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    """
    subset = data_set_name(source.name)
    wanted = subset_ids(subset) if subset in SUBSETS else source.class_names
    outputs, matched = _outputs(wanted, network, source)
    # Outputs that nobody named are called as the classes that they are taken for.
    known = network.class_names if matched != "order" else tuple(wanted)
    names = tuple(known[output] for output in outputs)
    if subset in SUBSETS:  # labels count all of ImageNet's classes
        place = {name: number for number, name in enumerate(wanted)}
        places = [place.get(name, -1) for name in source.class_names]
        return Classes(names, outputs, np.array(places, np.int32), matched)
    doubt = _doubt(network, source) if matched == "order" else ""
    if len(outputs) == len(known):
        in_order = (outputs == np.arange(len(outputs))).all()
        return Classes(known, None, None if in_order else outputs, matched, doubt)
    if names == known[: len(names)] and _is_filler(network, len(names)):
        return Classes(known, matched=matched)  # all outputs compete, as while training
    return Classes(names, outputs, None, matched)


def _outputs(wanted: Sequence[str], network: Network, source: Source) -> tuple[np.ndarray, str]:
    """The output of each name, and how it was matched."""
    for names in _names(network):
        number = {name: place for place, name in enumerate(names)}
        if len(number) == len(names) and number.keys() >= set(wanted):
            by = "number" if names == _numbers(network) else "name"
            return np.array([number[name] for name in wanted], np.int32), by
    same_number = len(wanted) == len(network.class_names)
    if same_number and not _is_named(network) and not _some_are_imagenets(wanted, network):
        return np.arange(len(wanted), dtype=np.int32), "order"
    here, there = _only(wanted, network.class_names), _only(network.class_names, wanted)
    which = f"{len(here)} of its" if 0 < len(here) < len(wanted) else "its"
    raise DataError(
        f"{source.name}: {which} {len(wanted)} classes ({named(here, network.class_names)}) are "
        f"not among the {len(network.class_names)} of {network.source} ({named(there, wanted)}); "
        "take the data set that the network was trained for" + _remedy(network, same_number)
    )


def _only(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The names that the others lack; all where there is none."""
    known = set(others)
    return [name for name in names if name not in known] or list(names)


def _remedy(network: Network, same_number: bool) -> str:
    if network.config is None and same_number:
        return ", or name the outputs as its classes are called with --classes=FILE"
    return ""


def _is_named(network: Network) -> bool:
    """Whether somebody said what the outputs are called."""
    return network.named or network.config is not None


def _some_are_imagenets(wanted: Sequence[str], network: Network) -> bool:
    """Whether a data set has classes of ImageNet's, among others, for a network of ImageNet."""
    known = network.class_names == imagenet_names() and {*imagenet_ids(), *imagenet_names()}
    return bool(known and known & set(wanted))


def _doubt(network: Network, source: Source) -> str:
    first, last = source.class_names[0], source.class_names[-1]
    return (
        f"the network's {len(network.class_names)} outputs are matched to the classes of "
        f"{source.name} by order, not by name ({first} ... {last}): --classes=FILE says what they "
        "are called"
    )


def _names(network: Network) -> Iterator[tuple[str, ...]]:
    """What the network's classes may be called."""
    yield network.class_names
    if network.class_names in (imagenet_ids(), imagenet_names()):
        yield from (imagenet_ids(), imagenet_names())
    if network.config is None:
        yield _numbers(network)


def _numbers(network: Network) -> tuple[str, ...]:
    return tuple(map(str, range(len(network.class_names))))


def _is_filler(network: Network, known: int) -> bool:
    """Whether outputs past the known ones belong to no class: a head wider than its data set."""
    numbers = range(known, len(network.class_names))
    return network.class_names[known:] == tuple(map(str, numbers))
