"""A report's page: which sections it has, and one HTML file that holds them all."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from resnet_jax.data.augment import normalize
from resnet_jax.data.decode import eval_crop
from resnet_jax.errors import ConfigError, ResNetJaxError
from resnet_jax.evaluation.network import Network, open_network
from resnet_jax.inference.explain import grad_cam, integrated_gradients, responses
from resnet_jax.models.summary import summary
from resnet_jax.report import figures
from resnet_jax.report.predictions import Example, Predictions, predict_split
from resnet_jax.report.runs import Run, read_run
from resnet_jax.training.config import to_flat

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


def write_report(
    workdirs: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    images: Sequence[str | Path] = (),
    force: bool = False,
) -> Path:
    """Writes one self-contained HTML file about runs, and its pictures beside it.

    One run is looked at from all sides; several are laid over each other, as the paper compares
    plain and residual networks.

    Args:
      workdirs: Folders of the runs.
      output: The HTML file; None: "report.html" in the run's folder, or in the current one for
        several runs. Pictures go into a folder of the same name without ".html".
      images: Image files to explain, instead of the first held-out ones.
      force: Replace what is there.

    Returns:
      The file.

    Raises:
      ConfigError: A folder is no workdir, or the output is there already or cannot be written.

    Example:
      >>> write_report(["nowhere"])
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: nowhere is not a workdir: it has no config.json
    """
    runs = _with_titles([read_run(workdir) for workdir in workdirs])
    output = Path(output or (runs[0].workdir if len(runs) == 1 else Path()) / "report.html")
    if output.suffix != ".html":
        raise ConfigError(f"--output={output}: must end in .html")
    if output.exists() and not force:
        raise ConfigError(f"--output={output} exists already; --force replaces it")
    if not output.parent.is_dir():
        raise ConfigError(f"--output={output}: there is no folder {output.parent}; make it first")
    sections = _one_run(runs[0], images) if len(runs) == 1 else _several_runs(runs)
    _write(output, _render(runs, sections), sections)
    return output


def _with_titles(runs: list[Run]) -> list[Run]:
    """Runs whose folders share a name are called by their paths."""
    titles = [run.title for run in runs]
    return [
        dataclasses.replace(run, title=str(run.workdir)) if titles.count(run.title) > 1 else run
        for run in runs
    ]


def _one_run(run: Run, images: Sequence[str | Path]) -> list[Section]:
    sections = [_figures(run), _curves([run])]
    try:
        network = open_network(run.workdir)
    except ResNetJaxError as error:
        text = f"The network could not be opened, so only its records are here: {error}"
        return [*sections, Section("network", "Network", text), *_recipe(run)]
    try:
        predictions = predict_split(network, run.config, MOST_IMAGES, RESPONDING)
    except ResNetJaxError as error:
        text = f"The held-out images could not be read, so they are not looked at: {error}"
        return [*sections, Section("images", "Images", text), _filters(network), *_recipe(run)]
    sections += [_confusion(network, predictions), _mistakes(network, predictions)]
    examples = _read_images(images, network) or predictions.examples
    sections += [_explanations(network, examples[:EXPLAINED]), _filters(network)]
    pixels = np.stack([example.pixels for example in predictions.examples])
    sections.append(_responses({run.title: (network, pixels)}))
    return [*sections, *_recipe(run)]


def _several_runs(runs: Sequence[Run]) -> list[Section]:
    sections = [_comparison(runs), _curves(runs)]
    found: dict[str, tuple[Network, np.ndarray]] = {}
    for run in runs:
        try:
            network = open_network(run.workdir)
            examples = predict_split(network, run.config, RESPONDING, RESPONDING).examples
        except ResNetJaxError:  # its curves are there all the same
            continue
        found[run.title] = network, np.stack([example.pixels for example in examples])
    if found:
        sections.append(_responses(found))
    return sections


def _figures(run: Run) -> Section:
    final, config = run.final, run.config
    rows = [
        ("held out", f"{config.data.eval_split}, {final.get('images', 0):,} images"),
        ("top-1", f"{final['top1']:.2%}" if final else "not evaluated yet"),
        ("top-5", f"{final['top5']:.2%}" if "top5" in final else ""),
        ("loss", f"{final['loss']:.4f}" if final else ""),
        ("steps", f"{run.training[-1]['step'] if run.training else 0:,}"),
        ("time in training", _duration(run.seconds)),
        ("images/s in training", f"{run.images_per_second:,.0f}"),
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
                _duration(run.seconds),
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
    return Section("curves", "Learning curves", pictures=[picture])


def _confusion(network: Network, predictions: Predictions) -> Section:
    names, accuracy = network.class_names, predictions.class_accuracy
    counts = predictions.confusion.sum(1)
    order = [index for index in np.argsort(accuracy).tolist() if counts[index]]
    rows = [(names[i], f"{accuracy[i]:.1%}", f"{counts[i]:,}") for i in order]
    table = Table(rows, ("class", "recognised", "images"), folded="Each class, the hardest first")
    pictures = []
    if len(names) <= 200:  # with more nothing could be seen
        pictures.append(
            Picture(
                "confusion",
                figures.confusion_matrix(predictions.confusion, names),
                "Confusion matrix: true classes by predicted ones",
                f"Of {predictions.images:,} held-out images, by the state with the best top-1.",
            )
        )
    return Section("confusion", "Confusion", pictures=pictures, tables=[table])


def _mistakes(network: Network, predictions: Predictions) -> Section:
    if not predictions.mistakes:
        text = f"None of {predictions.images:,} images is mistaken."
        return Section("mistakes", "Surest mistakes", text)
    names, shown = network.class_names, predictions.mistakes[:MISTAKES]
    titles = [
        f"{_short(names[each.label])}\n→ {_short(names[each.predicted])} {each.probability:.0%}"
        for each in shown
    ]
    pixels = [each.pixels for each in shown]
    picture = Picture(
        "mistakes",
        figures.picture_grid(pixels, titles, columns=6),
        "Images that the network is most sure of and wrong",
        "Above each image its true class, and below that the prediction with its probability.",
    )
    return Section("mistakes", "Surest mistakes", pictures=[picture])


def _explanations(network: Network, examples: Sequence[Example]) -> Section:
    pixels = np.stack([example.pixels for example in examples])
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


def _recipe(run: Run) -> list[Section]:
    config = run.config
    try:
        from resnet_jax.training.setup import make_model

        classes = json.loads((run.workdir / "classes.json").read_text())
        model = make_model(config, len(classes)).clone(axis_name=None)
        side, channels = config.data.image_size, config.data.channels or len(config.augment.mean)
        found = summary(model, (1, side, side, channels))
        network = [
            ("network", config.model.name),
            ("parameters", f"{found.parameters:,}"),
            ("multiply-adds an image", f"{found.multiply_adds:,}"),
        ]
    except (ResNetJaxError, OSError, ValueError, TypeError, RecursionError):
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
            pixels = eval_crop(Path(path).read_bytes(), network.crop, network.channels)
        except OSError as error:
            raise ConfigError(f"--images: {path} cannot be read: {error.strerror}") from error
        images = normalize(jnp.asarray(pixels[None]), network.colours)
        logits: Any = network.model.apply(network.variables, images, train=False)
        shares = np.asarray(jnp.exp(logits - logits.max()))[0]
        guess = int(shares.argmax())
        examples.append(Example(pixels, guess, guess, float(shares[guess] / shares.sum())))
    return examples


def _render(runs: Sequence[Run], sections: Sequence[Section]) -> str:
    import jinja2

    text = (resources.files("resnet_jax.report") / "template.html").read_text(encoding="utf-8")
    # Names of classes, files and folders are data: autoescape keeps them from being markup.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    data = runs[0].config.data
    one = f"{runs[0].title}: {runs[0].config.model.name} on {data.name}"
    title = one if len(runs) == 1 else f"{len(runs)} runs on {data.name}"
    lead = "A network trained with resnet_jax." if len(runs) == 1 else "Runs beside each other."
    return environment.from_string(text).render(title=title, lead=lead, sections=sections)


def _write(output: Path, page: str, sections: Sequence[Section]) -> None:
    """The pictures first, the page last and at once: a page that is there is whole."""
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    folder = output.with_suffix("")
    try:
        folder.mkdir(exist_ok=True)
        for picture in (each for section in sections for each in section.pictures):
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"--output={output} cannot be written: {error.strerror}") from error


def _short(name: str, longest: int = 16) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
