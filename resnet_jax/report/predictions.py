"""What a network says of the images that its run was evaluated on, and those images themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from resnet_jax.data.decode.decoding import eval_crop
from resnet_jax.data.sources.base import Label, Source
from resnet_jax.errors import DataError
from resnet_jax.evaluation.evaluator import evaluate_network, open_held_out
from resnet_jax.evaluation.label_sets import match_classes
from resnet_jax.evaluation.result import Report
from resnet_jax.weights.network import Network, evaluated_data


@dataclasses.dataclass(frozen=True)
class Example:
    """One image and what the network says of it.

    Args:
      pixels: uint8 [H, W, C], as the network sees it.
      labels: Its classes: one, or of a multi-label network none or several.
      predicted: The class with the highest probability.
      probability: That probability.
    """

    pixels: np.ndarray
    labels: tuple[int, ...]
    predicted: int
    probability: float


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A pass over held-out images.

    Args:
      network: That made it.
      source: The images.
      report: What it says of each.
    """

    network: Network
    source: Source
    report: Report

    def examples(self, count: int) -> list[Example]:
        """The first images, right or wrong."""
        return self._read(range(min(count, self.report.images)))

    def mistakes(self, count: int) -> list[Example]:
        """The surest wrong predictions, the surest first; each image's likeliest class counts."""
        report = self.report
        if report.labels is not None:
            wrong = np.flatnonzero(report.predictions != report.labels)
        else:  # a class that the image has not, and that is predicted all the same
            wrong = np.flatnonzero(~report.hits & (report.confidences >= self.network.threshold))
        surest = np.argsort(-report.confidences[wrong], kind="stable")
        return self._read(wrong[surest[:count]].tolist())

    def _read(self, places: Iterable[int]) -> list[Example]:
        return [self._example(place) for place in places]

    def _example(self, place: int) -> Example:
        network, report = self.network, self.report
        data, label = self.source[report.indices[place]]
        if report.labels is not None:
            labels = report.labels[place : place + 1]
        else:
            sets = match_classes(network, self.source).translate(np.array([label]))
            labels = sets.nonzero()[1]
        return Example(
            eval_crop(data, network.crop, network.channels),
            tuple(map(int, labels)),
            int(report.predictions[place]),
            float(report.confidences[place]),
        )


class HeldOut(NamedTuple):
    """Where held-out images are; "": where the run says, if it is this user's own.

    Args:
      name: As in `data.name`.
      folder: As in `data.data_dir`.
    """

    name: str = ""
    folder: str = ""


def predict_split(network: Network, where: HeldOut, most: int) -> Predictions:
    """Runs a network over the images that its run was evaluated on.

    Args:
      network: From a workdir, with the variables to look at.
      where: Where the images are.
      most: Images looked at, at most.

    Returns:
      What it says of them.

    Raises:
      ConfigError: Somebody else trained the network, and its images are in a folder.
      DataError: The data set is not there, or not the one that the network was trained for.
      WeightsError: The network's outputs are not numbers.
    """
    config = network.config
    data = config.data if config and where.name else evaluated_data(network)
    name, folder = where if where.name else (data.name, data.data_dir)
    source = open_held_out(network, name, data.eval_split, folder)
    first = _First(source, most)
    # The run has named the images that cannot be decoded. Of its processes only one writes.
    report = evaluate_network(network, first, "one_crop", log=lambda line: None, alone=True)
    if report.class_names != network.class_names:
        raise DataError(
            f"{source.name}: has {len(report.class_names)} of the {len(network.class_names)} "
            "classes that the network was trained for; restore the others"
        )
    return Predictions(network, first, report)


class _First(Source):
    """The first images of a source."""

    def __init__(self, source: Source, most: int) -> None:
        self._source = source
        self._length = min(most, len(source))
        self.name, self.split, self.fingerprint = source.name, source.split, source.fingerprint
        self.class_names, self.label_shape = source.class_names, source.label_shape
        self.channels, self.image_shape = source.channels, source.image_shape

    def __len__(self) -> int:
        return self._length

    def _read(self, position: int) -> tuple[bytes, Label]:
        return self._source[position]

    def _name(self, position: int) -> str:
        return self._source.image_name(position)
