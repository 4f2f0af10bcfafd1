"""The sections of a report, from what `runs` and `predictions` read."""

from __future__ import annotations

import base64
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from resnet_jax.config.flags import packaged_recipe
from resnet_jax.config.schema import Augment, Config
from resnet_jax.config.serialization import to_flat
from resnet_jax.data.decode import eval_crop, read_encoded
from resnet_jax.errors import ConfigError, DataError, ResNetJaxError
from resnet_jax.evaluation.class_tables import ClassMetrics
from resnet_jax.evaluation.result import EvaluationResult
from resnet_jax.inference.explain import grad_cam, integrated_gradients, responses
from resnet_jax.models.summary import summary
from resnet_jax.report import figures
from resnet_jax.report.predictions import Example, HeldOutData, Predictions, predict_split
from resnet_jax.report.runs import Run
from resnet_jax.terminal import visible
from resnet_jax.weights.network import Network
from resnet_jax.weights.source import open_network
from resnet_jax.workdirs.description import read_class_names
from resnet_jax.workdirs.metric_writers import duration

# Images: evaluated at most, shown as errors, shown with saliency maps, averaged in responses.
MAX_IMAGES, NUM_ERRORS, NUM_SALIENCY, NUM_RESPONSES = 10_000, 24, 6, 64


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG file of a report.

    The page shows it, in its dark form on a dark page, unless its section has tiles of the same
    images.
    """

    name: str  # of its file, without ".png"
    png: bytes
    alt: str
    caption: str
    dark: bytes = b""

    @property
    def uri(self) -> str:
        """The file as a data URI, which embeds it in the page."""
        return _uri(self.png)

    @property
    def dark_uri(self) -> str:
        """The form for a dark page; "" if it has none."""
        return _uri(self.dark) if self.dark else ""

    @property
    def width(self) -> int:
        """The width on a large page, in CSS pixels."""
        # Bytes 16 to 19 of a PNG file are its width. Figures have twice the resolution or less.
        return round(int.from_bytes(self.png[16:20]) * 0.6)

    @property
    def is_wide(self) -> bool:
        """Whether a phone shows a part that is scrolled, because all of it would be illegible."""
        return self.width > 600


@dataclasses.dataclass(frozen=True)
class Tile:
    """One image or several beside each other, above a line of text."""

    pngs: Sequence[bytes]
    alt: str
    title: str
    text: str = ""

    @property
    def uris(self) -> list[str]:
        """The images as data URIs."""
        return [*map(_uri, self.pngs)]


class Link(NamedTuple):
    """A cell of a table that is a link; `target` is our own text, not a stranger's."""

    text: str
    target: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text, collapsed below a line `collapsed` unless that is empty."""

    rows: Sequence[Sequence[str | Link]]
    header: Sequence[str] = ()
    collapsed: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    id: str
    heading: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    tiles: Sequence[Tile] = ()
    source: str = ""  # of a program


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _figure(name: str, draw: Callable[..., bytes], alt: str, caption: str) -> Picture:
    """A figure for light and for dark pages; `draw` takes the theme."""
    return Picture(name, draw(theme=figures.LIGHT), alt, caption, draw(theme=figures.DARK))


def single_run_sections(run: Run, images: Sequence[str | Path], data: HeldOutData) -> list[Section]:
    """The sections about one run; those whose checkpoint or dataset is missing are left out.

    Saliency maps are of `images`, or of the first held-out images. Raises ConfigError if one of
    `images` cannot be read.
    """
    sections = [_result(run), _curves([run])]
    try:
        network = open_network(run.workdir)
    except ResNetJaxError as error:
        text = f"The checkpoint cannot be opened, so this page shows only records: {error}"
        missing = Section("network", "Network", text)
        return [*sections, *_class_sizes(run), missing, *_recipe(run)]
    recipe = _recipe(run, network.channels)
    try:
        predictions = predict_split(network, data, MAX_IMAGES)
    except ResNetJaxError as error:
        text = f"The held-out images cannot be read, so this page shows no predictions: {error}"
        missing = Section("images", "Held-out images", text)
        return [*sections, *_class_sizes(run), missing, _filters(network), *recipe]
    held_out = predictions.examples(NUM_RESPONSES)
    explained = _read_images(images, network) or held_out
    result = predictions.result
    by_class = result.class_metrics
    return [
        *sections,
        *_class_sizes(run, result),
        _confusion(result) if by_class is None else _class_metrics(by_class, run),
        _confident_errors(predictions),
        _saliency(network, explained[:NUM_SALIENCY]),
        _filters(network),
        _responses({run.title: (network, _pixels(held_out))}),
        *recipe,
    ]


def comparison_sections(runs: Sequence[Run], data: HeldOutData) -> list[Section]:
    """The sections that compare several runs."""
    sections = [_comparison(runs), _curves(runs)]
    opened: dict[str, tuple[Network, np.ndarray]] = {}
    for run in runs:
        try:
            network = open_network(run.workdir)
            examples = predict_split(network, data, NUM_RESPONSES).examples(NUM_RESPONSES)
        except ResNetJaxError:  # its curves need neither checkpoint nor data
            continue
        opened[run.title] = network, _pixels(examples)
    if opened:
        sections.append(_responses(opened))
    return sections


def _result(run: Run) -> Section:
    final, config = run.final, run.config
    rows = [
        ("held out", f"{config.data.eval_split}, {final.get('images', 0):,} images"),
        ("mAP", _percent(final, "map")),
        ("F1, macro", _percent(final, "f1")),
        ("F1, micro", _percent(final, "f1_micro")),
        ("top-1", _percent(final, "top1") if final else "not evaluated yet"),
        ("top-5", _percent(final, "top5")),
        ("loss", f"{final['loss']:.4f}" if final else ""),
        ("steps", f"{run.training[-1]['step'] if run.training else 0:,}"),
        ("training time", duration(run.seconds)),
        ("training images/s", f"{run.images_per_second:,.0f}"),
        ("damaged records", f"{run.bad_lines} lines of metrics.jsonl" if run.bad_lines else ""),
    ]
    rows = [row for row in rows if row[1]]
    return Section("result", "Result", tables=[Table(rows)])


def _percent(record: dict[str, Any], name: str) -> str:
    return f"{record[name]:.2%}" if name in record else ""


def _comparison(runs: Sequence[Run]) -> Section:
    header = (
        *("run", "network", "held-out error", "best", "training error", "held-out loss"),
        *("steps", "time", "images/s"),
    )
    rows = []
    for run in runs:
        final, last = run.final, run.training[-1] if run.training else {}
        rows.append(
            (
                run.title,
                run.config.model.name,
                f"{1 - final['top1']:.2%}" if final else "",
                f"{1 - max(each['top1'] for each in run.ranked):.2%}" if final else "",
                f"{1 - last['top1']:.2%}" if last else "",
                f"{final['loss']:.4f}" if final else "",
                f"{last.get('step', 0):,}",
                duration(run.seconds),
                f"{run.images_per_second:,.0f}",
            )
        )
    tables = [Table(rows, header)]
    if differing := _differing_fields(runs):
        titles = tuple(run.title for run in runs)
        tables.append(Table(differing, ("field", *titles), collapsed="Fields that differ"))
    text = (
        "Held-out errors are those of the last evaluation and the best one; training errors are "
        "means over the steps of the last record."
    )
    return Section("runs", "Runs", text, tables=tables)


def _differing_fields(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The fields of the configuration that differ, with the value in each run."""
    fields = [to_flat(run.config) for run in runs]
    return [
        (name, *(repr(each[name]) for each in fields))
        for name in fields[0]
        if any(each[name] != fields[0][name] for each in fields)
    ]


def _curves(runs: Sequence[Run]) -> Section:
    drops = any(run.rate_drops() for run in runs)
    pictures = [
        _figure(
            "curves",
            functools.partial(figures.learning_curves, runs),
            "Top-1 error over training steps, with the learning rate below",
            "Top-1 error, as in He et al. 2015, Figures 4 and 6."
            + " Dotted lines: drops of the learning rate." * drops,
        ),
        _figure(
            "loss",
            functools.partial(figures.loss_curves, runs),
            "Loss over training steps",
            "Loss on training batches and on held-out images.",
        ),
    ]
    if any("map" in record for run in runs for record in run.evaluations):
        pictures.append(
            _figure(
                "multi_label",
                functools.partial(figures.multi_label_curves, runs),
                "Mean average precision and macro F1 over training steps",
                "Mean average precision, and F1 at the threshold of each run, on held-out images.",
            )
        )
    return Section("curves", "Learning curves", training_text(runs), pictures=pictures)


def training_text(runs: Sequence[Run]) -> str:
    """Why training curves may be above held-out ones, from the configurations of runs."""
    configs = [run.config for run in runs]

    def used(*names: str) -> list[str]:
        """The names of fields that any run sets, as text."""
        fields = [to_flat(config) for config in configs]
        words = {each: each.partition(".")[2].replace("_", " ") for each in names}
        return [words[each] for each in names if any(flat[each] for flat in fields)]

    text = "Training values are means over the steps of a record, whose parameters still change"
    text += ", on augmented images" * any(_is_augmented(config) for config in configs) + "."
    reasons = []
    if mixed := used("augment.mixup", "augment.cutmix"):
        names = " and ".join(mixed)
        reasons.append(f"{names} (of a mixed image only the class with the larger share counts)")
    if smoothing := used("loss.label_smoothing"):
        reasons.append(f"{smoothing[0]} (the training loss cannot reach 0)")
    if dropped := used("model.dropout_rate", "model.stochastic_depth_rate"):
        names = " and ".join(each.removesuffix(" rate") for each in dropped)
        reasons.append(f"{names} (off in evaluation)")
    if used("loss.class_weights"):
        reasons.append("class weights (in the training loss only)")
    if reasons:
        text += f" What also raises training error or loss here: {', '.join(reasons)}."
        text += " A training curve above the held-out one is expected."
    return text


def _is_augmented(config: Config) -> bool:
    plain = Augment(mean=config.augment.mean, std=config.augment.std)
    # Fields that need others to take effect.
    names = ("rand_magnitude", "rand_magnitude_std")
    plain = dataclasses.replace(plain, **{each: getattr(config.augment, each) for each in names})
    return config.augment != plain or config.data.crop != "center"


def _class_sizes(run: Run, result: EvaluationResult | None = None) -> list[Section]:
    """Images of each class, with accuracies from `result`; [] where the run did not count them."""
    if not run.class_counts.get("train", np.zeros(0)).any():
        return []
    names, counts = read_class_names(run.workdir), run.class_counts["train"]
    known = result and result.class_names == names and result.per_class
    accuracies = [each.top1 for each in known] if known else []
    order, present = np.argsort(-counts, kind="stable"), counts[counts > 0]
    smallest = int(order[len(present) - 1])
    facts = [
        ("largest class", f"{_short(names[order[0]])}, {present.max():,} training images"),
        ("smallest class", f"{_short(names[smallest])}, {present.min():,} training images"),
        ("ratio", f"{present.max() / present.min():.3g}"),
    ]
    if missing := len(names) - len(present):
        facts.append(("classes without training images", f"{missing:,}"))
    columns = {"training images": [f"{each:,}" for each in counts]}
    if "eval" in run.class_counts:
        columns["held-out images"] = [f"{each:,}" for each in run.class_counts["eval"]]
    if accuracies:
        columns["accuracy"] = ["" if each is None else f"{each:.1%}" for each in accuracies]
    rows = [(names[index], *(column[index] for column in columns.values())) for index in order]
    by_class = Table(rows, ("class", *columns), collapsed="All classes, largest first")
    shown = [visible(name) for name in names]
    picture = _figure(
        "classes",
        functools.partial(figures.class_sizes, shown, counts, accuracies),
        "Training images of each class, and accuracy on its held-out images",
        "Classes by decreasing number of training images.",
    )
    tables = [Table(facts), by_class]
    return [Section("classes", "Class sizes", pictures=[picture], tables=tables)]


def _confusion(result: EvaluationResult) -> Section:
    present = [each for each in result.per_class or () if each.top1 is not None]
    hardest = sorted(present, key=lambda each: each.top1 or 0.0)
    rows = [(each.name, f"{each.top1:.1%}", f"{each.images:,}") for each in hardest]
    header = ("class", "accuracy", "images")
    table = Table(rows, header, collapsed="All classes, lowest accuracy first")
    pictures = []
    names, counts = result.class_names, result.confusion
    if counts is not None and len(names) <= 200:  # a larger one is illegible
        pictures.append(
            _figure(
                "confusion",
                functools.partial(figures.confusion_matrix, counts, [*map(visible, names)]),
                "Confusion matrix: true classes in rows, predicted classes in columns",
                f"{result.images:,} held-out images, classified by the best state of the run.",
            )
        )
    return Section("confusion", "Confusion matrix", pictures=pictures, tables=[table])


def _class_metrics(classes: Sequence[ClassMetrics], run: Run) -> Section:
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


def _confident_errors(predictions: Predictions) -> Section:
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
        figures.image_grid([each.pixels for each in shown], titles, columns=6),
        "Wrongly classified images with the highest predicted probability",
        f"Of each image: its {truth}, then the predicted class with its probability.",
    )
    tiles = []
    for each in shown:
        right = ", ".join(names[label] for label in each.labels) or "none"
        guess = f"→ {names[each.predicted]} {each.probability:.0%}"
        tiles.append(Tile([figures.pixels_png(each.pixels)], f"{right} {guess}", right, guess))
    return Section("errors", heading, pictures=[picture], tiles=tiles)


def _saliency(network: Network, examples: Sequence[Example]) -> Section:
    pixels = _pixels(examples)
    images = network.preprocessing.normalize(pixels)
    classes = jnp.array([example.predicted for example in examples])
    cams = grad_cam(network.model, network.variables, images, classes)
    attributions = integrated_gradients(network.model, network.variables, images, classes, steps=20)
    titles = [
        f"{_short(network.class_names[each.predicted])} {each.probability:.0%}" for each in examples
    ]
    picture = Picture(
        "explanations",
        figures.saliency_grid(pixels, np.asarray(cams), np.asarray(attributions), titles),
        "Images with Grad-CAM and integrated gradients of the predicted class",
        "For the predicted class: Grad-CAM (Selvaraju et al. 2017) on the last stage, and "
        "integrated gradients (Sundararajan et al. 2017; orange raises its logit, purple lowers "
        "it).",
    )
    tiles = [
        Tile(figures.saliency_pngs(*each), title, title)
        for *each, title in zip(pixels, np.asarray(cams), np.asarray(attributions), titles)
    ]
    return Section("saliency", "Saliency", pictures=[picture], tiles=tiles)


def _filters(network: Network) -> Section:
    kernel = np.asarray(network.variables["params"]["stem"]["conv1"]["kernel"], np.float32)
    picture = Picture(
        "filters",
        figures.filter_grid(kernel),
        "The filters of the first convolution",
        f"{kernel.shape[3]} filters of {kernel.shape[0]}x{kernel.shape[1]} pixels; gray is 0.",
    )
    return Section("filters", "First-layer filters", pictures=[picture])


def _responses(networks: dict[str, tuple[Network, np.ndarray]]) -> Section:
    """Layer responses of networks by run title, on uint8 images [N, H, W, C] of each."""
    deviations = {}
    for title, (network, pixels) in networks.items():
        images = network.preprocessing.normalize(pixels)
        deviations[title] = responses(network.model, network.variables, images)
    picture = _figure(
        "responses",
        functools.partial(figures.response_curves, deviations),
        "Standard deviation of each layer's response",
        "As in He et al. 2015, Figure 7: after each convolution and its norm, before ReLU or "
        "addition. In the paper, residual networks have smaller responses than plain ones.",
    )
    return Section("responses", "Layer responses", pictures=[picture])


def _recipe(run: Run, channels: int = 0) -> list[Section]:
    config = run.config
    try:
        from resnet_jax.config.model import make_model

        model = make_model(config, len(read_class_names(run.workdir))).clone(axis_name=None)
        side = config.data.image_size
        channels = channels or config.data.channels or len(config.augment.mean)
        counts = summary(model, (1, side, side, channels))
        network = [
            ("network", config.model.name),
            ("parameters", f"{counts.parameters:,}"),
            ("multiply-adds per image", f"{counts.multiply_adds:,}"),
        ]
    except ResNetJaxError:
        network = [("network", config.model.name)]
    changed = [(name, repr(value)) for name, value in run.changed_fields.items()]
    every_field = [(name, repr(value)) for name, value in to_flat(config).items()]
    source = packaged_recipe(run.recipe)
    origin = Link(run.recipe, "#source") if source else run.recipe
    recipe = Section(
        "recipe",
        "Recipe",
        "Fields that differ from their defaults; config.json has all of them.",
        tables=[
            Table([*([("recipe", origin)] if origin else []), *network, *changed]),
            Table(every_field, collapsed="All fields"),
        ],
    )
    sections = [recipe]
    if source:
        text = source.read_text(encoding="utf-8")
        heading = f"Source of {source.name}"
        about = "The recipe as it is in the installed package; flags may have changed fields."
        sections.append(Section("source", heading, about, source=text))
    if run.environment:
        machine = Section("machine", "Machine", tables=[Table([*run.environment.items()])])
        sections.append(machine)
    return sections


def _read_images(paths: Sequence[str | Path], network: Network) -> list[Example]:
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
        examples.append(Example(pixels, (predicted,), predicted, float(scores[predicted])))
    return examples


def _pixels(examples: Sequence[Example]) -> np.ndarray:
    return np.stack([example.pixels for example in examples])


def _short(name: str, longest: int = 16) -> str:
    name = visible(name)
    return name if len(name) <= longest else name[: longest - 1] + "…"
