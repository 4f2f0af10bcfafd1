"""Which outputs of a network the labels of a dataset stand for.

Labels are matched by name: a workdir knows its classes, a repository on the Hub or the user may
name them, and a network of 1,000 classes is assumed to be one of ImageNet's. So the order of class
folders does not matter, and on a dataset with some of the classes only these compete. Where
nothing names the outputs, they are matched to the classes of the dataset by order, with a
warning. TFDS numbers the labels of ImageNet-A and ImageNet-R as ImageNet's 1,000 classes, and the
authors let only their 200 classes compete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from importlib import resources

import numpy as np

from resnet_jax.data.sources.base import Source, shortlist
from resnet_jax.errors import DataError
from resnet_jax.weights.class_names import imagenet_ids, imagenet_names
from resnet_jax.weights.network import Network

SUBSETS = ("imagenet_a", "imagenet_r")
CORRUPTED = "imagenet2012_corrupted"
# The split to evaluate on where the user names none.
DEFAULT_SPLITS = {
    "imagenet2012": "validation",
    "imagenet2012_real": "validation",
    CORRUPTED: "validation",
    "imagenet_v2": "test",
    "imagenet_a": "test",
    "imagenet_r": "test",
    "imagenet_sketch": "test",
}

# Top-1 errors of AlexNet, each the mean of five severities; mCE divides by them: Hendrycks &
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
class LabelMatch:
    """The classes that compete on a dataset, and how its labels are matched to them.

    `names` are those of the classes. `outputs` has the network's output for each, and is None
    where all outputs compete in their order. `class_of_label`, int32, has the class of each label
    of the dataset, -1 where it has none, and is None where a label is its class. Labels were
    matched `by` "name", "number" or "order"; `warning` is a line for the user, or "".
    """

    names: tuple[str, ...]
    outputs: np.ndarray | None = None
    class_of_label: np.ndarray | None = None
    by: str = "name"
    warning: str = ""

    def classes_of(self, labels: np.ndarray) -> np.ndarray:
        """Converts labels, [N] or sets [N, labels] of 0 and 1, to classes, [N] or [N, classes].

        Example:
          >>> match = LabelMatch(("cat", "dog"), class_of_label=np.array([1, -1, 0], np.int32))
          >>> match.classes_of(np.array([0, 2, 1])).tolist()
          [1, 0, -1]
          >>> match.classes_of(np.array([[1, 1, 0]])).tolist()
          [[0, 1]]
        """
        if self.class_of_label is None:
            return labels
        if labels.ndim == 1:
            return self.class_of_label[labels]
        known = self.class_of_label >= 0
        sets = np.zeros((len(labels), len(self.names)), labels.dtype)
        sets[:, self.class_of_label[known]] = labels[:, known]
        return sets


def data_set_name(data: str) -> str:
    """The TFDS name in a `data.name`, without configuration and version; "" for other data.

    Example:
      >>> data_set_name("tfds:imagenet2012_corrupted/fog_1:3.1.0"), data_set_name("folder:a")
      ('imagenet2012_corrupted', '')
    """
    kind, _, rest = data.partition(":")
    return rest.partition(":")[0].partition("/")[0] if kind == "tfds" else ""


def subset_ids(subset: str) -> tuple[str, ...]:
    """The WordNet ids of the 200 classes of "imagenet_a" or "imagenet_r", in ImageNet's order.

    Example:
      >>> len(subset_ids("imagenet_a")), subset_ids("imagenet_r")[0]
      (200, 'n01443537')
    """
    file = resources.files("resnet_jax.evaluation") / "imagenet_subsets.txt"
    lines = map(str.split, file.read_text(encoding="utf-8").splitlines())
    return tuple(line[0] for line in lines if subset in line[1:])


def match_labels(network: Network, source: Source) -> LabelMatch:
    """Finds the network's output for each label of a dataset.

    Raises:
      DataError: The network does not have the dataset's classes.

    Example:
      >>> import tempfile
      >>> from types import SimpleNamespace
      >>> from resnet_jax.data.sources import open_source
      >>> network = SimpleNamespace(class_names=tuple("0987654321"))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     match_labels(network, open_source("digits", "test", folder)).class_of_label.tolist()
      [0, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    """
    subset = data_set_name(source.name)
    wanted = subset_ids(subset) if subset in SUBSETS else source.class_names
    outputs, by = _find_outputs(wanted, network, source)
    # Outputs without a name are called after the classes that they are matched to.
    known = network.class_names if by != "order" else tuple(wanted)
    names = tuple(known[output] for output in outputs)
    if subset in SUBSETS:  # its labels number all of ImageNet's classes
        number = {name: place for place, name in enumerate(wanted)}
        class_of_label = [number.get(name, -1) for name in source.class_names]
        return LabelMatch(names, outputs, np.array(class_of_label, np.int32), by)
    warning = _order_warning(network, source) if by == "order" else ""
    if len(outputs) == len(known):
        in_order = (outputs == np.arange(len(outputs))).all()
        return LabelMatch(known, None, None if in_order else outputs, by, warning)
    if names == known[: len(names)] and _rest_is_unnamed(network, len(names)):
        return LabelMatch(known, by=by)  # all outputs compete, as in training
    return LabelMatch(names, outputs, None, by)


def _find_outputs(
    wanted: Sequence[str], network: Network, source: Source
) -> tuple[np.ndarray, str]:
    """The output of each class, and whether it was found by "name", "number" or "order"."""
    for names in _possible_names(network):
        number = {name: place for place, name in enumerate(names)}
        if len(number) == len(names) and number.keys() >= set(wanted):
            by = "number" if names == _numbers(network) else "name"
            return np.array([number[name] for name in wanted], np.int32), by
    same_count = len(wanted) == len(network.class_names)
    is_named = network.named or network.config is not None
    if same_count and not is_named and not _some_are_imagenets(wanted, network):
        return np.arange(len(wanted), dtype=np.int32), "order"
    here, there = _difference(wanted, network.class_names), _difference(network.class_names, wanted)
    which = f"{len(here)} of its" if 0 < len(here) < len(wanted) else "its"
    can_name = network.config is None and same_count
    theirs, ours = shortlist(here, network.class_names), shortlist(there, wanted)
    raise DataError(
        f"{source.name}: {which} {len(wanted)} classes ({theirs}) are not among the "
        f"{len(network.class_names)} of {network.source} ({ours}); "
        "take the dataset that the network was trained for"
        + (", or name the outputs as its classes are called with --classes=FILE" * can_name)
    )


def _difference(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The names that the others lack; all names where there is none."""
    known = set(others)
    return [name for name in names if name not in known] or list(names)


def _some_are_imagenets(wanted: Sequence[str], network: Network) -> bool:
    """Whether a dataset for a network of ImageNet has some of ImageNet's classes."""
    known = network.class_names == imagenet_names() and {*imagenet_ids(), *imagenet_names()}
    return bool(known and known & set(wanted))


def _order_warning(network: Network, source: Source) -> str:
    first, last = source.class_names[0], source.class_names[-1]
    return (
        f"the network's {len(network.class_names)} outputs are matched to the classes of "
        f"{source.name} by order, not by name ({first} ... {last}): --classes=FILE says what they "
        "are called"
    )


def _possible_names(network: Network) -> Iterator[tuple[str, ...]]:
    """What the network's classes may be called in a dataset."""
    yield network.class_names
    if network.class_names in (imagenet_ids(), imagenet_names()):
        yield from (imagenet_ids(), imagenet_names())
    if network.config is None:
        yield _numbers(network)


def _numbers(network: Network) -> tuple[str, ...]:
    return tuple(map(str, range(len(network.class_names))))


def _rest_is_unnamed(network: Network, known: int) -> bool:
    """Whether the outputs past the known ones are those of a head wider than its dataset."""
    numbers = range(known, len(network.class_names))
    return network.class_names[known:] == tuple(map(str, numbers))
