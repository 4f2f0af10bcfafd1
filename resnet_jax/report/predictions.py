"""A network's predictions on the held-out images of its run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from resnet_jax.data.decode import eval_crop
from resnet_jax.data.sources.base import Label, Source
from resnet_jax.errors import DataError
from resnet_jax.evaluation.evaluator import evaluate_network
from resnet_jax.evaluation.held_out import open_held_out
from resnet_jax.evaluation.label_sets import match_labels
from resnet_jax.evaluation.result import EvaluationResult
from resnet_jax.weights.network import Network, evaluated_data


@dataclasses.dataclass(frozen=True)
class Example:
    """An image and the network's prediction for it."""

    pixels: np.ndarray  # uint8 [H, W, C], cropped as the network sees it
    labels: tuple[int, ...]  # one class; in a multi-label dataset none or several; () if unknown
    predicted: int  # the most probable class
    probability: float  # of that class


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions of a network for the images of a source."""

    network: Network
    source: Source
    result: EvaluationResult

    def examples(self, count: int) -> list[Example]:
        """Images of different classes, right or wrong; of each class equally many, if possible.

        The first images of a dataset are often of one class.
        """
        labels = self.result.labels
        if labels is None:  # an image may have several
            return self._read(_spread(np.arange(self.result.images), count))
        order = np.argsort(labels, kind="stable")
        _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
        turn = np.arange(len(labels)) - np.repeat(starts, sizes)  # place among those of its class
        rounds = order[np.argsort(turn, kind="stable")]  # the first of each class, the second, ...
        found = rounds[:count] if count > len(starts) else _spread(rounds[: len(starts)], count)
        return self._read(found.tolist())

    def confident_errors(self, count: int) -> list[Example]:
        """The wrong predictions of the highest probability, in decreasing order."""
        result = self.result
        if result.labels is not None:
            wrong = np.flatnonzero(result.predictions != result.labels)
        else:  # multi-label: the most probable class is predicted and is not a label
            wrong = np.flatnonzero(~result.hits & (result.confidences >= self.network.threshold))
        order = np.argsort(-result.confidences[wrong], kind="stable")
        return self._read(wrong[order[:count]].tolist())

    def _read(self, rows: Iterable[int]) -> list[Example]:
        return [self._example(row) for row in rows]

    def _example(self, row: int) -> Example:
        network, result = self.network, self.result
        data, label = self.source[result.indices[row]]
        if result.labels is not None:
            labels = result.labels[row : row + 1]
        else:
            sets = match_labels(network, self.source).classes_of(np.array([label]))
            labels = sets.nonzero()[1]
        return Example(
            eval_crop(data, network.crop, network.channels),
            tuple(map(int, labels)),
            int(result.predictions[row]),
            float(result.confidences[row]),
        )


class HeldOutData(NamedTuple):
    """Values of `data.name` and `data.data_dir`; "": those of the run, if this user trained it."""

    name: str = ""
    data_dir: str = ""


def predict_split(network: Network, data: HeldOutData, limit: int) -> Predictions:
    """Predicts held-out images of a network opened from a workdir, at most `limit` of them.

    Raises ConfigError if the images are in a folder that somebody else's run names, DataError if
    the dataset is missing or lacks classes, and WeightsError if outputs are not finite.
    """
    config = network.config
    recorded = config.data if config and data.name else evaluated_data(network)
    name, folder = data if data.name else (recorded.name, recorded.data_dir)
    source = open_held_out(network, name, recorded.eval_split, folder)
    some = _SomeImages(source, limit)
    # The run has already reported images that cannot be decoded. `local`: only one process of a
    # run writes its report, so the devices of the others cannot take part.
    result = evaluate_network(network, some, "one_crop", log=lambda line: None, local=True)
    if result.class_names != network.class_names:
        raise DataError(
            f"{source.name}: has {len(result.class_names)} of the {len(network.class_names)} "
            "classes that the network was trained for; restore the others"
        )
    return Predictions(network, some, result)


class _SomeImages(Source):
    """Images of a source at equal distances, because it may be sorted by class."""

    def __init__(self, source: Source, limit: int) -> None:
        self._source = source
        self._positions = _spread(np.arange(len(source)), limit)
        self.name, self.split, self.fingerprint = source.name, source.split, source.fingerprint
        self.class_names, self.label_shape = source.class_names, source.label_shape
        self.channels, self.image_shape = source.channels, source.image_shape

    def __len__(self) -> int:
        return len(self._positions)

    def _read(self, position: int) -> tuple[bytes, Label]:
        return self._source[int(self._positions[position])]

    def _name(self, position: int) -> str:
        return self._source.image_name(int(self._positions[position]))


def _spread(items: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of items, at equal distances.

    Example:
      >>> _spread(np.arange(10), 4).tolist(), _spread(np.arange(2), 4).tolist()
      ([0, 3, 6, 9], [0, 1])
    """
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return items[places.round().astype(int)]
