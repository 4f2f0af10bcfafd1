"""The sections of a report about a network and its predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from resnet_jax.data.decode import eval_crop, read_encoded
from resnet_jax.errors import ConfigError, DataError
from resnet_jax.evaluation.class_tables import ClassMetrics
from resnet_jax.evaluation.result import EvaluationResult
from resnet_jax.inference.explain import grad_cam, integrated_gradients, responses
from resnet_jax.report import figures, pictures
from resnet_jax.report.elements import Picture, Section, Table, Tile
from resnet_jax.report.predictions import Example, Predictions
from resnet_jax.report.runs import Run
from resnet_jax.terminal import shortened, visible
from resnet_jax.weights.network import Network

NUM_ERRORS = 24  # images
_METHODS = ("Grad-CAM", "integrated gradients")


def confusion(result: EvaluationResult) -> Section:
    """The confusion matrix and the accuracy on each class."""
    present = [each for each in result.per_class or () if each.top1 is not None]
    hardest = sorted(present, key=lambda each: each.top1 or 0.0)
    rows = [(each.name, f"{each.top1:.1%}", f"{each.images:,}") for each in hardest]
    header = ("class", "accuracy", "images")
    table = Table(rows, header, collapsed="All classes, lowest accuracy first")
    shown = []
    names, counts = result.class_names, result.confusion
    if counts is not None and len(names) <= 200:  # a larger one is illegible
        shown.append(
            Picture.of_figure(
                "confusion",
                figures.confusion_matrix(counts, [*map(visible, names)]),
                "Confusion matrix: true classes in rows, predicted classes in columns",
                f"{result.images:,} held-out images, classified by the best state of the run. The "
                "stronger the color of a cell, the larger its share of its row (as a square root).",
            )
        )
    return Section("confusion", "Confusion matrix", pictures=shown, tables=[table])


def class_metrics(classes: Sequence[ClassMetrics], run: Run) -> Section:
    """The metrics of each class, which replace the confusion matrix of a multi-label network."""
    present = [each for each in classes if each.average_precision is not None]
    hardest = sorted(present, key=lambda each: each.average_precision or 0.0)
    rows = []
    for each in hardest:
        metrics = (each.average_precision, each.precision, each.recall, each.f1)
        cells = ["" if x is None else f"{x:.1%}" for x in metrics]
        rows.append((each.name, *cells, f"{each.images:,}", f"{each.predicted:,}"))
    header = ("class", "average precision", "precision", "recall", "F1", "images", "predicted")
    text = (
        "Classes by increasing average precision. A class is predicted if its probability is at "
        f"least {run.config.evaluate.threshold:g}."
    )
    if absent := len(classes) - len(present):
        text += f" Classes without images are left out: {absent:,}."
    return Section("class_metrics", "Metrics by class", text, tables=[Table(rows, header)])


def confident_errors(predictions: Predictions) -> Section:
    """The wrong predictions of the highest probability."""
    heading = "Most confident errors"
    names, shown = predictions.result.class_names, predictions.confident_errors(NUM_ERRORS)
    if not shown:
        text = f"All {predictions.result.images:,} images are classified correctly."
        return Section("errors", heading, text)
    titles = [
        f"{_short(', '.join(names[label] for label in each.labels) or 'none')}\n"
        f"→ {_short(names[each.predicted])} {each.probability:.0%}"
        for each in shown
    ]
    truth = "true classes" if predictions.network.multi_label else "true class"
    picture = Picture(
        "mistakes",
        pictures.image_grid([each.pixels for each in shown], titles, columns=6),
        "Wrongly classified images with the highest predicted probability",
        f"Of each image: its {truth}, then the predicted class with its probability.",
    )
    tiles = []
    for each in shown:
        # Both names have room below the image.
        right = _short(", ".join(names[label] for label in each.labels) or "none", 28)
        guess = f"→ {_short(names[each.predicted], 24)} {each.probability:.0%}"
        tiles.append(Tile([pictures.pixels_png(each.pixels)], f"{right} {guess}", right, guess))
    return Section("errors", heading, pictures=[picture], tiles=tiles)


def saliency(network: Network, examples: Sequence[Example]) -> Section:
    """Where the evidence for the predicted class lies in images, by two methods."""
    pixels, names = pixels_of(examples), network.class_names
    images = network.preprocessing.normalize(pixels)
    classes = jnp.array([example.predicted for example in examples])
    cams = np.asarray(grad_cam(network.model, network.variables, images, classes))
    attributions = np.asarray(
        integrated_gradients(network.model, network.variables, images, classes, steps=20)
    )
    titles = [f"{_short(names[each.predicted])} {each.probability:.0%}" for each in examples]
    picture = Picture(
        "explanations",
        pictures.saliency_grid(pixels, cams, attributions, titles),
        "Images with Grad-CAM and integrated gradients of the predicted class",
        "The evidence for the predicted class. Grad-CAM (Selvaraju et al. 2017), on the last "
        "stage: the brighter, the more of it. Integrated gradients (Sundararajan et al. 2017): "
        "orange raises the logit of the class, purple lowers it.",
    )
    tiles = []
    for each, cam, attribution in zip(examples, cams, attributions):
        guess = f"predicted: {names[each.predicted]} ({each.probability:.0%})"
        truth = ", ".join(names[label] for label in each.labels)
        pngs = pictures.saliency_pngs(each.pixels, cam, attribution)
        truth = truth and f"true: {truth}"
        tiles.append(Tile(pngs, guess, guess, truth, ("image", *_METHODS)))
    return Section("saliency", "Saliency", pictures=[picture], tiles=tiles)


def filters(network: Network) -> Section:
    """The kernel of the first convolution, as pictures."""
    kernel = np.asarray(network.variables["params"]["stem"]["conv1"]["kernel"], np.float32)
    picture = Picture(
        "filters",
        pictures.filter_grid(kernel),
        "The filters of the first convolution",
        f"{kernel.shape[3]} filters of {kernel.shape[0]}x{kernel.shape[1]} pixels; gray is 0.",
        width=pictures.FILTERS_WIDTH,
    )
    return Section("filters", "First-layer filters", pictures=[picture])


def layer_responses(networks: dict[str, tuple[Network, np.ndarray]]) -> Section:
    """Layer responses of networks by run title, on uint8 images [N, H, W, C] of each."""
    deviations = {}
    for title, (network, pixels) in networks.items():
        images = network.preprocessing.normalize(pixels)
        deviations[title] = responses(network.model, network.variables, images)
    picture = Picture.of_figure(
        "responses",
        figures.response_curves(deviations),
        "Standard deviation of each layer's response",
        "As in He et al. 2015, Figure 7: after each convolution and its norm, before ReLU or "
        "addition. In the paper, residual networks have smaller responses than plain ones.",
    )
    return Section("responses", "Layer responses", pictures=[picture])


def read_images(paths: Sequence[str | Path], network: Network) -> list[Example]:
    """The user's own images with their predictions; raises ConfigError for an unreadable one."""
    examples = []
    for path in paths:
        try:
            pixels = eval_crop(read_encoded(path), network.crop, network.channels)
        except OSError as error:
            raise ConfigError(f"--images: {path} cannot be read: {error.strerror}") from error
        except DataError as error:
            raise ConfigError(f"--images: {path}: {error}") from error
        images = network.preprocessing.normalize(pixels[None])
        logits: Any = network.model.apply(network.variables, images, train=False)
        scores = network.probabilities(np.asarray(logits))[0]
        predicted = int(scores.argmax())
        examples.append(Example(pixels, (), predicted, float(scores[predicted])))
    return examples


def pixels_of(examples: Sequence[Example]) -> np.ndarray:
    """The images of examples, uint8 [N, H, W, C]."""
    return np.stack([example.pixels for example in examples])


def _short(name: str, width: int = 16) -> str:
    return shortened(visible(name), width)
