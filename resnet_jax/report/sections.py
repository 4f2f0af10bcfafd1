"""The sections of a report: what each of them shows, and where it comes from."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from resnet_jax.config.serialization import to_flat
from resnet_jax.data.augment.apply import normalize
from resnet_jax.data.decode.decoding import eval_crop, read_encoded
from resnet_jax.errors import ConfigError, DataError, ResNetJaxError
from resnet_jax.evaluation.result import ClassMeasures, Report
from resnet_jax.inference.classifier import probabilities
from resnet_jax.inference.explain import grad_cam, integrated_gradients, responses
from resnet_jax.models.summary import summary
from resnet_jax.report import figures
from resnet_jax.report.predictions import Example, HeldOut, Predictions, predict_split
from resnet_jax.report.runs import Run
from resnet_jax.terminal import visible
from resnet_jax.weights.source import Network, open_network
from resnet_jax.workdirs.description import read_class_names
from resnet_jax.workdirs.metric_writers import duration

# Held-out images that the network is run over again.
MOST_IMAGES = 10_000
MISTAKES, EXPLAINED, RESPONDING = 24, 6, 64


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG file in a report.

    Args:
      name: Of its file.
      png: Its bytes.
      alt: What it shows, for who cannot see it.
      caption: The line below it.
    """

    name: str
    png: bytes
    alt: str
    caption: str

    @property
    def uri(self) -> str:
        """The picture inside the page itself."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text; `folded` is the line that unfolds them."""

    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()
    folded: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    id: str
    heading: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


def one_run(run: Run, images: Sequence[str | Path], data: HeldOut) -> list[Section]:
    """A run from all sides, as far as there still is what it was made of.

    Args:
      run: Its records.
      images: Image files to explain, instead of the first held-out ones.
      data: Where the held-out images are.

    Returns:
      The sections from above.

    Raises:
      ConfigError: One of the images cannot be read.
    """
    sections = [_figures(run), _curves([run])]
    try:
        network = open_network(run.workdir)
    except ResNetJaxError as error:
        text = f"The network could not be opened, so only its records are here: {error}"
        found = Section("network", "Network", text)
        return [*sections, *_class_sizes(run), found, *_recipe(run)]
    try:
        predictions = predict_split(network, data, MOST_IMAGES)
    except ResNetJaxError as error:
        text = f"The held-out images could not be read, so they are not looked at: {error}"
        images_section, recipe = Section("images", "Images", text), _recipe(run, network.channels)
        return [*sections, *_class_sizes(run), images_section, _filters(network), *recipe]
    held_out = predictions.examples(RESPONDING)
    examples = _read_images(images, network) or held_out
    classes = predictions.report.class_measures
    sections += [
        *_class_sizes(run, predictions.report),
        _confusion(predictions.report) if classes is None else _class_measures(classes, run),
        _mistakes(predictions),
        _explanations(network, examples[:EXPLAINED]),
        _filters(network),
        _responses({run.title: (network, _pixels(held_out))}),
    ]
    return [*sections, *_recipe(run, network.channels)]


def several_runs(runs: Sequence[Run], data: HeldOut) -> list[Section]:
    """Runs laid over each other.

    Args:
      runs: Their records.
      data: Where the held-out images are.

    Returns:
      The sections from above.
    """
    sections = [_comparison(runs), _curves(runs)]
    found: dict[str, tuple[Network, np.ndarray]] = {}
    for run in runs:
        try:
            network = open_network(run.workdir)
            examples = predict_split(network, data, RESPONDING).examples(RESPONDING)
        except ResNetJaxError:  # its curves are there all the same
            continue
        found[run.title] = network, _pixels(examples)
    if found:
        sections.append(_responses(found))
    return sections


def _figures(run: Run) -> Section:
    final, config = run.final, run.config
    rows = [
        ("held out", f"{config.data.eval_split}, {final.get('images', 0):,} images"),
        ("mAP", f"{final['map']:.2%}" if "map" in final else ""),
        ("F1, macro", f"{final['f1']:.2%}" if "f1" in final else ""),
        ("F1, micro", f"{final['f1_micro']:.2%}" if "f1_micro" in final else ""),
        ("top-1", f"{final['top1']:.2%}" if final else "not evaluated yet"),
        ("top-5", f"{final['top5']:.2%}" if "top5" in final else ""),
        ("loss", f"{final['loss']:.4f}" if final else ""),
        ("steps", f"{run.training[-1]['step'] if run.training else 0:,}"),
        ("time in training", duration(run.seconds)),
        ("images/s in training", f"{run.images_per_second:,.0f}"),
        ("left out", f"{run.bad_lines} lines of metrics.jsonl" if run.bad_lines else ""),
    ]
    rows = [row for row in rows if row[1]]
    return Section("result", "Result", tables=[Table(rows)])


def _comparison(runs: Sequence[Run]) -> Section:
    header = ("run", "network", "training error", "held-out error", "loss", "steps", "time")
    rows = []
    for run in runs:
        final, last = run.final, run.training[-1] if run.training else {}
        rows.append(
            (
                run.title,
                run.config.model.name,
                f"{1 - last['top1']:.2%}" if last else "",
                f"{1 - final['top1']:.2%}" if final else "",
                f"{final['loss']:.4f}" if final else "",
                f"{last.get('step', 0):,}",
                duration(run.seconds),
            )
        )
    text = "Training error: the last record's mean, of images augmented as for training."
    return Section("runs", "Runs", text, tables=[Table(rows, header)])


def _curves(runs: Sequence[Run]) -> Section:
    picture = Picture(
        "curves",
        figures.learning_curves(runs),
        "Top-1 error over training steps, with the learning rate below",
        "As in He et al. 2015, Figures 4 and 6. Dotted: where the learning rate falls.",
    )
    pictures = [picture]
    if any("map" in record for run in runs for record in run.evaluations):
        pictures.append(
            Picture(
                "multi_label",
                figures.multi_label_curves(runs),
                "Mean average precision and macro F1 over training steps",
                "Mean average precision, and F1 at the threshold of each run, on held-out images.",
            )
        )
    return Section("curves", "Learning curves", pictures=pictures)


def _class_sizes(run: Run, report: Report | None = None) -> list[Section]:
    """Sizes of the classes, and what is recognized of each; none where the run did not count."""
    if not run.class_counts.get("train", np.zeros(0)).any():
        return []
    names, counts = read_class_names(run.workdir), run.class_counts["train"]
    known = report and report.class_names == names and report.per_class
    recognized = [each.top1 for each in known] if known else []
    order, there = np.argsort(-counts, kind="stable"), counts[counts > 0]
    smallest = int(order[len(there) - 1])
    facts = [
        ("largest class", f"{_short(names[order[0]])}, {there.max():,} training images"),
        ("smallest class", f"{_short(names[smallest])}, {there.min():,} training images"),
        ("ratio", f"{there.max() / there.min():.3g}"),
    ]
    if missing := len(names) - len(there):
        facts.append(("classes without training images", f"{missing:,}"))
    columns = {"training images": [f"{each:,}" for each in counts]}
    if "eval" in run.class_counts:
        columns["held-out images"] = [f"{each:,}" for each in run.class_counts["eval"]]
    if recognized:
        columns["recognized"] = ["" if each is None else f"{each:.1%}" for each in recognized]
    rows = [(names[index], *(column[index] for column in columns.values())) for index in order]
    every = Table(rows, ("class", *columns), folded="Each class, the largest first")
    picture = Picture(
        "classes",
        figures.class_sizes([visible(name) for name in names], counts, recognized),
        "Training images of each class, and how many of its held-out images are recognized",
        "Classes from the largest to the smallest, by training images.",
    )
    return [
        Section("classes", "Sizes of classes", pictures=[picture], tables=[Table(facts), every])
    ]


def _confusion(report: Report) -> Section:
    there = [each for each in report.per_class or () if each.top1 is not None]
    hardest = sorted(there, key=lambda each: each.top1 or 0.0)
    rows = [(each.name, f"{each.top1:.1%}", f"{each.images:,}") for each in hardest]
    table = Table(rows, ("class", "recognised", "images"), folded="Each class, the hardest first")
    pictures = []
    names, counts = report.class_names, report.confusion
    if counts is not None and len(names) <= 200:  # with more nothing could be seen
        pictures.append(
            Picture(
                "confusion",
                figures.confusion_matrix(counts, [visible(name) for name in names]),
                "Confusion matrix: true classes by predicted ones",
                f"Of {report.images:,} held-out images, by the best state of the run.",
            )
        )
    return Section("confusion", "Confusion", pictures=pictures, tables=[table])


def _class_measures(classes: Sequence[ClassMeasures], run: Run) -> Section:
    """Each class of a multi-label network, in the place of a confusion matrix."""
    there = [each for each in classes if each.average_precision is not None]
    hardest = sorted(there, key=lambda each: each.average_precision or 0.0)
    rows = []
    for each in hardest:
        shares = (each.average_precision, each.precision, each.recall, each.f1)
        cells = ["" if x is None else f"{x:.1%}" for x in shares]
        rows.append((each.name, *cells, f"{each.images:,}", f"{each.predicted:,}"))
    header = ("class", "average precision", "precision", "recall", "F1", "images", "predicted")
    text = (
        f"The hardest first. A class is predicted from a probability of "
        f"{run.config.evaluate.threshold:g} up."
    )
    if len(there) < len(classes):
        text += f" {len(classes) - len(there):,} classes are on no image."
    return Section("class_measures", "Measures of each class", text, tables=[Table(rows, header)])


def _mistakes(predictions: Predictions) -> Section:
    names, shown = predictions.report.class_names, predictions.mistakes(MISTAKES)
    several = predictions.network.multi_label
    if not shown:
        text = f"None of {predictions.report.images:,} images is mistaken."
        return Section("mistakes", "Surest mistakes", text)
    titles = [
        f"{_short(', '.join(names[label] for label in each.labels) or 'none')}\n"
        f"→ {_short(names[each.predicted])} {each.probability:.0%}"
        for each in shown
    ]
    picture = Picture(
        "mistakes",
        figures.picture_grid([each.pixels for each in shown], titles, columns=6),
        "Images that the network is most sure of and wrong",
        f"Above each image its true {'classes' if several else 'class'}, and below that the "
        "prediction with its probability.",
    )
    return Section("mistakes", "Surest mistakes", pictures=[picture])


def _explanations(network: Network, examples: Sequence[Example]) -> Section:
    pixels = _pixels(examples)
    images = normalize(jnp.asarray(pixels), network.colours)
    classes = jnp.array([example.predicted for example in examples])
    evidence = grad_cam(network.model, network.variables, images, classes)
    shares = integrated_gradients(network.model, network.variables, images, classes, steps=20)
    titles = [
        f"{_short(network.class_names[each.predicted])} {each.probability:.0%}" for each in examples
    ]
    picture = Picture(
        "explanations",
        figures.explanation_grid(pixels, np.asarray(evidence), np.asarray(shares), titles),
        "Images with the places that speak for the predicted class",
        "For the predicted class: Grad-CAM (Selvaraju et al. 2017) on the last stage, and "
        "integrated gradients (Sundararajan et al. 2017): orange speaks for it, purple against.",
    )
    return Section("explanations", "What it looks at", pictures=[picture])


def _filters(network: Network) -> Section:
    kernel = np.asarray(network.variables["params"]["stem"]["conv1"]["kernel"], np.float32)
    picture = Picture(
        "filters",
        figures.filter_grid(kernel),
        "The first layer's filters",
        f"{kernel.shape[3]} filters of {kernel.shape[0]}x{kernel.shape[1]} pixels; grey is 0.",
    )
    return Section("filters", "First-layer filters", pictures=[picture])


def _responses(networks: dict[str, tuple[Network, np.ndarray]]) -> Section:
    found = {}
    for title, (network, pixels) in networks.items():
        images = normalize(jnp.asarray(pixels), network.colours)
        found[title] = responses(network.model, network.variables, images)
    picture = Picture(
        "responses",
        figures.response_curves(found),
        "Standard deviation of each layer's response",
        "As in He et al. 2015, Figure 7: after a convolution and its norm, before ReLU or "
        "addition. The paper finds them smaller in residual networks than in plain ones.",
    )
    return Section("responses", "Layer responses", pictures=[picture])


def _recipe(run: Run, channels: int = 0) -> list[Section]:
    config = run.config
    try:
        from resnet_jax.config.model import make_model

        model = make_model(config, len(read_class_names(run.workdir))).clone(axis_name=None)
        side = config.data.image_size
        channels = channels or config.data.channels or len(config.augment.mean)
        found = summary(model, (1, side, side, channels))
        network = [
            ("network", config.model.name),
            ("parameters", f"{found.parameters:,}"),
            ("multiply-adds an image", f"{found.multiply_adds:,}"),
        ]
    except ResNetJaxError:
        network = [("network", config.model.name)]
    changed = [(name, repr(value)) for name, value in run.changed_fields.items()]
    everything = [(name, repr(value)) for name, value in to_flat(config).items()]
    recipe = Section(
        "recipe",
        "Recipe",
        "What differs from the defaults; all fields are in config.json.",
        tables=[Table(network + changed), Table(everything, folded="All fields")],
    )
    if not run.environment:
        return [recipe]
    return [recipe, Section("machine", "Machine", tables=[Table([*run.environment.items()])])]


def _read_images(paths: Sequence[str | Path], network: Network) -> list[Example]:
    examples = []
    for path in paths:
        try:
            pixels = eval_crop(read_encoded(path), network.crop, network.channels)
        except OSError as error:
            raise ConfigError(f"--images: {path} cannot be read: {error.strerror}") from error
        except DataError as error:
            raise ConfigError(f"--images: {path}: {error}") from error
        images = normalize(jnp.asarray(pixels[None]), network.colours)
        logits: Any = network.model.apply(network.variables, images, train=False)
        shares = probabilities(network, np.asarray(logits))[0]
        guess = int(shares.argmax())
        examples.append(Example(pixels, (guess,), guess, float(shares[guess])))
    return examples


def _pixels(examples: Sequence[Example]) -> np.ndarray:
    return np.stack([example.pixels for example in examples])


def _short(name: str, longest: int = 16) -> str:
    name = visible(name)
    return name if len(name) <= longest else name[: longest - 1] + "…"
