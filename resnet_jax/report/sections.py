"""The sections of a report, about one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from resnet_jax.errors import ResNetJaxError
from resnet_jax.report.elements import Section
from resnet_jax.report.network_sections import (
    class_metrics,
    confident_errors,
    confusion,
    filters,
    layer_responses,
    pixels_of,
    read_images,
    saliency,
)
from resnet_jax.report.predictions import HeldOutData, predict_split
from resnet_jax.report.run_sections import class_sizes, comparison, curves, recipe, result
from resnet_jax.report.runs import Run
from resnet_jax.weights.network import Network
from resnet_jax.weights.source import open_network

# Images: evaluated at most, shown with saliency maps, averaged in responses.
MAX_IMAGES, NUM_SALIENCY, NUM_RESPONSES = 10_000, 6, 64


def single_run_sections(run: Run, images: Sequence[str | Path], data: HeldOutData) -> list[Section]:
    """The sections about one run; those whose checkpoint or dataset is missing are left out.

    Saliency maps are of `images`, or of held-out images of different classes. Raises ConfigError if
    one of `images` cannot be read.
    """
    sections = [result(run), curves([run])]
    try:
        network = open_network(run.workdir)
    except ResNetJaxError as error:
        text = f"The checkpoint cannot be opened, so this page shows only records: {error}"
        missing = Section("network", "Network", text)
        return [*sections, *class_sizes(run), missing, *recipe(run)]
    of_recipe = recipe(run, network.channels)
    try:
        predictions = predict_split(network, data, MAX_IMAGES)
    except ResNetJaxError as error:
        text = f"The held-out images cannot be read, so this page shows no predictions: {error}"
        missing = Section("images", "Held-out images", text)
        return [*sections, *class_sizes(run), missing, filters(network), *of_recipe]
    measured = predictions.result
    by_class = measured.class_metrics
    explained = read_images(images, network) or predictions.examples(NUM_SALIENCY)
    varied = pixels_of(predictions.examples(NUM_RESPONSES))
    return [
        *sections,
        *class_sizes(run, measured),
        confusion(measured) if by_class is None else class_metrics(by_class, run),
        confident_errors(predictions),
        saliency(network, explained[:NUM_SALIENCY]),
        filters(network),
        layer_responses({run.title: (network, varied)}),
        *of_recipe,
    ]


def comparison_sections(runs: Sequence[Run], data: HeldOutData) -> list[Section]:
    """The sections that compare several runs."""
    sections = [comparison(runs), curves(runs)]
    opened: dict[str, tuple[Network, np.ndarray]] = {}
    for run in runs:
        try:
            network = open_network(run.workdir)
            examples = predict_split(network, data, NUM_RESPONSES).examples(NUM_RESPONSES)
        except ResNetJaxError:  # its curves need neither checkpoint nor data
            continue
        opened[run.title] = network, pixels_of(examples)
    if opened:
        sections.append(layer_responses(opened))
    return sections
