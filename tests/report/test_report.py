"""The page about a run is complete and self-contained, and escapes names."""

import base64
import dataclasses
import html.parser
import io
import itertools
import json
import re
import shutil
import subprocess
import types

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from resnet_jax import config as c
from resnet_jax.cli import parser
from resnet_jax.data.sources import open_source
from resnet_jax.errors import ConfigError, DataError
from resnet_jax.report import elements, figures, pictures, predictions, run_sections, sections
from resnet_jax.report.drawing import WIDTH, to_png, to_svg
from resnet_jax.report.network_sections import confusion
from resnet_jax.report.page import _write, write_report
from resnet_jax.report.predictions import HeldOutData, predict_split
from resnet_jax.report.runs import read_run
from resnet_jax.training.loop import train
from resnet_jax.workdirs.description import read_class_names
from tests import speed
from tests.evaluation.settings import photo, prepare_sets, tiny_network

pytestmark = pytest.mark.usefixtures("tiny_model")
VOID = {"meta", "img", "br", "link", "input"}
PLOTS = ["curves", "loss", "classes", "confusion", "responses"]


def configuration():
    return c.Config(
        model=c.Model(name="tiny"),
        data=c.Data(image_size=8, threads=2),
        augment=c.Augment(pad=1, mean=(0.3,), std=(0.38,)),
        schedule=c.Schedule(name="step", boundaries=(0.5,)),
        train=c.Train(steps=4, batch_size=48, ema_decay=0.5),
        evaluate=c.Evaluate(every_epochs=2 * 48 / 1437),
        log=c.Log(every_steps=1, tensorboard=False),
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train(configuration(), folder)
    return folder


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order, and collects images and plots."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.plots, self.ids, self.tags = [], [], [], [], set()
        self.text = text
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(self.ids) == len({*self.ids})

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        if {"src", "href"} & found.keys():
            assert tag in ("img", "image", "a", "use")
        if tag in ("a", "use"):
            assert f'id="{found["href"].removeprefix("#")}"' in self.text
        if tag == "image":
            assert found["href"].startswith("data:image/png;base64,")
        if found.get("role") == "img":
            self.plots.append(found["aria-label"])
        if tag == "img":
            self.images.append(found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def pixels(image):
    kind, data = image["src"].split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))


@pytest.fixture(scope="module")
def written(workdir, tmp_path_factory):
    return write_report([workdir], tmp_path_factory.mktemp("written") / "page.html")


def test_one_run(workdir, written):
    page = Page(written.read_text())
    names = [*PLOTS, "mistakes", "explanations", "filters"]
    files = sorted(written.with_suffix("").iterdir())
    assert [path.stem for path in files] == sorted(names)
    for file in files:
        with Image.open(file) as image:
            assert np.ptp(np.asarray(image.convert("L"))) > 100  # not blank
    assert len(page.plots) == len(PLOTS)
    assert len(page.images) > 1 + 3 * sections.NUM_SALIENCY  # filters, and wrong predictions
    for image in page.images:
        assert image["alt"]
        assert np.ptp(pixels(image)) > 10
    assert len(page.text) < 250_000
    assert re.findall("<h2>(.*)</h2>", page.text) == [
        *("Result", "Learning curves", "Class sizes", "Confusion matrix"),
        *("Most confident errors", "Saliency", "First-layer filters", "Layer responses"),
        *("Recipe", "Machine"),
    ]
    assert "script" not in page.tags
    final = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
    for text in (f"{final['top1']:.2%}", "optimizer.learning_rate", "schedule.name", "jaxlib"):
        assert text in page.text


def test_evaluations_on_further_data_are_not_the_runs_own(workdir, tmp_path):
    """Those of evaluate.also follow that of data.eval_split in metrics.jsonl."""
    shutil.copytree(workdir, tmp_path / "run")
    before = read_run(workdir)
    further = {"step": 4, "split": "digits:train", "kind": "evaluation", "top1": 0.0}
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        for more in ({}, {"loss": 9.0}, {"loss": 9.0, "weights": "ema"}):
            file.write(json.dumps({**further, **more}) + "\n")
    run = read_run(tmp_path / "run")
    assert (run.bad_lines, run.final) == (0, before.final)
    assert run.evaluations == before.evaluations


def test_several_runs(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "other" / "digits")
    shutil.copytree(workdir, tmp_path / "third")
    shutil.rmtree(tmp_path / "third" / "checkpoints")  # its curves need no checkpoint
    output = tmp_path / "page.html"
    write_report([workdir, tmp_path / "other" / "digits", tmp_path / "third"], output)
    page = Page(output.read_text())
    assert len(page.plots) == 3
    assert "Fields that differ" not in page.text
    for title in (str(workdir), str(tmp_path / "other" / "digits"), "<td>third</td>"):
        assert title in page.text  # two folders have the same name


def test_names_are_data(workdir, tmp_path, monkeypatch):
    run = tmp_path / "<script>alert(1)</script>"
    shutil.copytree(workdir, run)
    names = ["<script>alert(1)</script>", "$x_", "a&b", "\x1b[2J\u202e", "\ud800", *"56789"]
    (run / "classes.json").write_text(json.dumps(names))
    (run / "SHA256SUMS").unlink()
    monkeypatch.setattr(predictions, "open_held_out", lambda *_, **__: named(names))
    page = Page(write_report([run], tmp_path / "page.html").read_text())
    assert "script" not in page.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text
    assert "a&amp;b" in page.text
    assert r"<td>\x1b[2J\u202e</td>" in page.text
    assert r"<td>\ud800</td>" in page.text
    assert page.text.replace("\n", "").isprintable()


def test_links_in_a_run_are_not_followed(tmp_path):
    """A stranger's run may have links at the paths of its report."""
    picture = elements.Picture("curves", b"png", "", "")
    found = [elements.Section("a", "A", pictures=[picture])]
    (tmp_path / "theirs").write_text("theirs")
    run = tmp_path / "run"
    (run / "report").mkdir(parents=True)
    for link in (run / "report.html", run / "report" / "curves.png"):
        link.symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"curves\.png: exists; give --force"):
        _write(run / "report.html", "page", found, force=False)
    _write(run / "report.html", "page", found, force=True)
    assert (run / "report.html").read_text() == "page"
    assert (run / "report" / "curves.png").read_bytes() == b"png"
    assert (tmp_path / "theirs").read_text() == "theirs"

    (tmp_path / "folder").mkdir()
    (run / "other").symlink_to(tmp_path / "folder")
    with pytest.raises(ConfigError, match=r"run/other: .*a symbolic link, which is not followed"):
        _write(run / "other.html", "page", found, force=True)
    assert not list((tmp_path / "folder").iterdir())
    assert sorted(each.name for each in run.iterdir()) == ["other", "report", "report.html"]


def named(names):
    """The digits under other names."""
    source = open_source("digits", "test")
    source.class_names = tuple(names)
    return source


def test_missing_data_is_reported(workdir, tmp_path):
    """A report is written from records if the dataset is missing or not the user's."""
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["name"] = f"folder:{tmp_path}/gone"
    (run / "config.json").write_text(json.dumps(config))
    (run / "environment.json").unlink()
    (run / "SHA256SUMS").unlink()
    page = Page(write_report([run]).read_text())
    assert "not trained by you" in page.text  # a changed config.json may be anyone's
    write_report([run], data=config["data"]["name"], force=True)
    page = Page((run / "report.html").read_text())
    assert "is not a folder" in page.text
    assert (run / "report.html").exists()


def test_own_images(workdir, written, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (9, 8), np.uint8)
    Image.fromarray(noise).save(tmp_path / "own.png")
    write_report([workdir], tmp_path / "own.html", images=[tmp_path / "own.png"])
    own, first = map(explanations_height, (tmp_path / "own", written.with_suffix("")))
    assert own < first  # one row of pictures instead of three


def explanations_height(folder):
    with Image.open(folder / "explanations.png") as image:
        return image.height


def test_predictions(workdir):
    from resnet_jax.weights.source import open_network

    run, network = read_run(workdir), open_network(workdir, best=False)
    found = predict_split(network, HeldOutData(), limit=10_000)
    assert found.result.images == 360
    assert found.result.top1 == pytest.approx(run.final["top1"], abs=1e-9)
    errors = found.confident_errors(360)
    assert len(errors) == 360 - found.result.hits.sum()
    assert all(each.labels != (each.predicted,) for each in errors)
    confidences = [each.probability for each in errors]
    assert confidences == sorted(confidences, reverse=True)
    assert [each.probability for each in found.confident_errors(5)] == confidences[:5]


def digits_network(classes=10):
    names = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "gone")[:classes]
    network = tiny_network(classes, channels=1, crop_fraction=1.0, names=names)
    return dataclasses.replace(network, config=configuration())


def test_examples_are_what_the_network_sees():
    source = open_source("digits", "test")
    found = predict_split(digits_network(), HeldOutData(), limit=3)
    examples = found.examples(10)
    assert found.result.images == len(examples) == 3
    positions = (0, 180, 359)  # at equal distances
    chosen = {source[index][1]: source[index][0] for index in positions}
    assert len(chosen) == 3
    for example in examples:
        data = chosen.pop(*example.labels)
        np.testing.assert_array_equal(example.pixels[:, :, 0], Image.open(io.BytesIO(data)))


def test_one_process_of_several_reports_alone(monkeypatch):
    """The other processes have ended, so collectives with them would hang."""
    network, ran, pmap = digits_network(), [], jax.pmap
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.devices", lambda: [*jax.local_devices()] * 2)
    monkeypatch.setattr("jax.pmap", lambda *a, **k: ran.append(k["devices"]) or pmap(*a, **k))
    assert predict_split(network, HeldOutData(), limit=20).result.images == 20
    assert ran == [jax.local_devices()] * len(ran) != []


def test_a_class_without_images():
    """Its accuracy is not defined, so it is left out."""
    found = predict_split(digits_network(), HeldOutData(), limit=3)
    [table] = confusion(found.result).tables
    there = {str(*each.labels) for each in found.examples(3)}
    assert {name for name, _, _ in table.rows} == there
    assert len(there) < 10


@pytest.fixture(scope="module")
def multi_label_run(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    splits = {
        split: [(photo(n, 8, 8), np.flatnonzero(rng.random(2) < 0.4)) for n in range(24)]
        for split in ("train", "test")
    }
    prepare_sets(root, "sets", ("cat", "<i>dog", "yak"), splits)
    config = configuration()
    config.data.name, config.data.data_dir = "tfds:sets", str(root)
    config.data.multi_label, config.loss.name = True, "bce"
    config.augment.mean, config.augment.std = (0.5,), (0.25,)
    config.train.batch_size = 8
    config.evaluate.every_epochs = 1.0
    train(config, root / "run")
    return root / "run"


def test_multi_label(multi_label_run):
    """A multi-label report has metrics by class and curves of mAP and F1, no confusion matrix."""
    text = write_report([multi_label_run]).read_text()
    Page(text)
    folder = multi_label_run / "report"
    names = {path.stem for path in folder.glob("*.png")}
    assert {"curves", "multi_label", "explanations"} <= names
    assert "confusion" not in names
    assert {"Learning", "Metrics", "Saliency"} <= {*re.findall(r"<h2>(\w+)", text)}
    assert "average precision" in text
    assert "&lt;i&gt;dog" in text
    assert "Classes without images are left out: 1." in text
    assert "mAP" in text


def test_multi_label_errors(multi_label_run):
    from resnet_jax.weights.source import open_network

    found = predict_split(open_network(multi_label_run), HeldOutData(), limit=100)
    labels = open_source("tfds:sets", "test", multi_label_run.parent, multi_label=None).labels()
    for place, example in enumerate(found.examples(100)):
        assert example.labels == tuple(np.flatnonzero(labels[place]))
    errors = found.confident_errors(100)
    assert errors
    for each in errors:
        assert each.predicted not in each.labels
        assert each.probability >= 0.5


def test_sizes_of_classes(workdir, tmp_path):
    """By decreasing size, with accuracies where they are known."""
    run = read_run(workdir)
    [section] = run_sections.class_sizes(run)
    facts, every = section.tables
    assert [name for name, _ in facts.rows] == ["largest class", "smallest class", "ratio"]
    assert every.header == ("class", "training images", "held-out images")
    sizes = [int(row[1]) for row in every.rows]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == 1437
    assert sum(int(row[2]) for row in every.rows) == 360

    found = predict_split(digits_network(), HeldOutData(), limit=3).result
    found = dataclasses.replace(found, class_names=read_class_names(workdir))
    [section] = run_sections.class_sizes(run, found)
    accuracies = [row[3] for row in section.tables[1].rows]
    assert accuracies.count("") == 10 - len({*found.labels})
    others = dataclasses.replace(found, class_names=tuple("abcdefghij"))
    assert len(run_sections.class_sizes(run, others)[0].tables[1].header) == 3

    counts = {"train": np.array([0, 5, *[1000] * 8])}
    facts, _ = run_sections.class_sizes(dataclasses.replace(run, class_counts=counts))[0].tables
    assert facts.rows[1:] == [
        ("smallest class", "1, 5 training images"),
        ("ratio", "200"),
        ("classes without training images", "1"),
    ]
    assert (
        run_sections.class_sizes(dataclasses.replace(run, class_counts={})) == []
    )  # of older versions


def drawn(figure):
    """The figure as a page has it, parsed."""
    return Page(to_svg(figure, "name")).text


def test_bars_of_a_few_classes_are_apart_and_have_names():
    """Also where all of them are equally large."""
    names = ["cat", "a <b>long</b> name that has to be shortened", "$x$"]
    figure = figures.class_sizes(names, np.array([20, 20, 20]), [0.5, None, 1.0])
    sizes, accuracies = figure.axes
    bars = [bar.get_bbox() for bar in sizes.patches]
    assert [bar.width for bar in bars] == [20, 20, 20]
    gaps = [lower.y0 - upper.y1 for upper, lower in itertools.pairwise(bars)]
    assert min(gaps) > 0.2
    shown = [label.get_text() for label in sizes.get_yticklabels()]
    assert shown == ["cat", "a <b>long<…shortened", "$x$"]
    assert [bar.get_bbox().width for bar in accuracies.patches][::2] == [50, 100]
    assert "&lt;b&gt;" in drawn(figure)


@pytest.mark.parametrize(("classes", "dots"), [(41, 40), (500, 167), (10_000, 200)])
def test_many_classes_are_curves(classes, dots):
    accuracies = [None, *np.linspace(0, 1, classes - 1)]
    figure = figures.class_sizes([""] * classes, np.arange(classes)[::-1] + 1, accuracies)
    sizes, percent = figure.axes
    [curve] = sizes.lines
    assert (curve.get_xdata()[0], curve.get_xdata()[-1]) == (1, classes)
    [line] = percent.lines
    assert len(line.get_xdata()) == dots
    assert line.get_ydata()[-1] > 98
    assert len(drawn(figure)) < 60_000


def test_curves_of_few_points_have_markers(workdir):
    run = read_run(workdir)
    errors, _ = figures.learning_curves([run]).axes
    training, held_out, *_ = errors.lines
    assert training.get_marker() == held_out.get_marker() == "o"
    assert errors.get_xlim()[0] == 0
    assert errors.get_xlim()[1] == pytest.approx(4 * 1.03)
    many = [{**run.training[0], "step": step} for step in range(1, 5001)]
    long = dataclasses.replace(run, training=many)
    errors, _ = figures.learning_curves([long]).axes
    assert errors.lines[0].get_marker() == "None"
    assert len(errors.lines[0].get_xdata()) == 500
    assert errors.lines[0].get_xdata()[-1] == 5000


def test_top_5_of_five_classes_is_not_shown(workdir):
    run = read_run(workdir)
    assert run.num_classes == 10

    def names(run):
        [table] = run_sections.result(run).tables
        return [name for name, _ in table.rows]

    assert "top-5" in names(run)
    assert "top-5" not in names(dataclasses.replace(run, num_classes=5))


def test_examples_are_of_different_classes():
    """A dataset is often sorted by class."""

    def classes(labels, count):
        result = types.SimpleNamespace(labels=labels, images=40)
        found = predictions.Predictions(None, None, result)
        rows = []
        object.__setattr__(found, "_read", rows.extend)
        found.examples(count)
        return rows

    labels = np.repeat([0, 1, 2, 7], 10)
    assert sorted(labels[classes(labels, 4)]) == [0, 1, 2, 7]
    assert sorted(labels[classes(labels, 6)]) == [0, 0, 1, 1, 2, 7]
    assert sorted(labels[classes(labels, 2)]) == [0, 7]
    assert len({*classes(labels, 100)}) == 40
    assert classes(None, 4) == [0, 13, 26, 39]


def test_a_data_set_that_lost_classes():
    with pytest.raises(DataError, match="has 10 of the 11 classes"):
        predict_split(digits_network(11), HeldOutData(), limit=3)


def test_drops_and_times(workdir):
    run = read_run(workdir)
    assert run.rate_drops() == [2]  # of four steps, the learning rate drops after two
    rates = [record["images_per_second"] for record in run.training]
    assert run.seconds == pytest.approx(sum(48 / rate for rate in rates))


def run_with(schedule, rates, every, epoch, workdir, steps=100):
    """A run whose records, `every` steps apart, have learning rates."""
    config = configuration()
    config.schedule, config.train.steps = schedule, steps
    speed = {"images_per_second": 1.0, "loss": 1.0, "top1": 0.5}
    records = [
        {"step": n * every, "epoch": n * every / epoch, "learning_rate": rate, **speed}
        for n, rate in enumerate(rates, 1)
    ]
    return dataclasses.replace(read_run(workdir), config=config, training=records)


def test_dotted_lines_are_where_the_learning_rate_drops(workdir):
    """Not at the next record, which may be many steps later."""
    schedule = c.Schedule(name="step", boundaries=(0.33, 0.5, 0.99), factor=0.5)
    run = run_with(schedule, [0.1, 0.05, 0.025], 25, 10.0, workdir)
    assert run.rate_drops() == [33, 50]  # the last one is still to come
    schedule = c.Schedule(name="plateau", factor=0.7)
    run = run_with(schedule, [0.1, 0.1, 0.07, 0.07, 0.049], 25, 30.0, workdir, steps=500)
    assert run.rate_drops() == [60, 120]  # ends of epochs in (50, 75) and (100, 125)
    assert run_with(c.Schedule(), [0.1, 0.01], 25, 30.0, workdir).rate_drops() == []


def test_why_training_looks_worse_than_held_out():
    """Only by what a run does."""
    plain, mixed = configuration(), configuration()
    plain.augment.pad = 0
    mixed.augment.mixup, mixed.loss.label_smoothing, mixed.model.dropout_rate = 0.2, 0.1, 0.5

    def text(*configs):
        return run_sections.training_text([types.SimpleNamespace(config=each) for each in configs])

    assert "augmented" not in text(plain)
    assert "expected" not in text(plain)
    assert "on augmented images." in text(configuration())
    for part in ("mixup (of a mixed image", "label smoothing (", "dropout (off in evaluation)"):
        assert part in text(mixed)
        assert part in text(plain, mixed)
    assert "above the held-out one is expected" in text(mixed)
    assert "cutmix" not in text(mixed)


def test_the_recipe_is_linked(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    command = tmp_path / "run/command.json"
    for recipe in ("../../secret", "/etc/passwd", "mine.py", "<b>cifar", ["digits"], "x" * 9999):
        command.write_text(json.dumps({"recipe": recipe}))
        found = run_sections.recipe(read_run(tmp_path / "run"))
        assert [each.id for each in found] == ["recipe", "machine"]
    command.write_text('{"recipe": "configs/cifar.py:resnet56"}')
    page = Page(write_report([tmp_path / "run"]).read_text())
    assert '<a href="#source">configs/cifar.py:resnet56</a>' in page.text
    assert "def get_config(" in page.text


def test_runs_are_compared_field_by_field(workdir):
    run = read_run(workdir)
    other = dataclasses.replace(run, title="b", config=configuration())
    other.config.optimizer.learning_rate = 0.25
    runs, fields = run_sections.comparison([run, other]).tables
    assert fields.rows == [("optimizer.learning_rate", "0.1", "0.25")]
    assert len(runs.rows) == 2
    assert all(len(row) == len(runs.header) for row in runs.rows)


def test_names_take_the_room_there_is():
    assert figures._name_size(10, 4.6) == 9
    assert figures._name_size(40, 4.6) == 6.5
    axes = Figure().subplots()
    assert figures._name_ticks(axes, ["cat", "dog"], 4.6) == ["cat", "dog"]
    assert axes.get_xticklabels()[0].get_rotation() == 0
    names = ["a rather long name of a class"] * 10
    [*shown] = figures._name_ticks(axes, names, 4.6)
    assert axes.get_xticklabels()[0].get_rotation() == 90
    assert 15 < len(shown[0]) < len(names[0])


def test_large_images_are_reduced():
    image = np.random.default_rng(0).integers(0, 256, (448, 224, 3), np.uint8)
    with Image.open(io.BytesIO(pictures.pixels_png(image))) as found:
        assert found.size == (80, 160)
    with Image.open(io.BytesIO(pictures.pixels_png(image[:8, :8, :1]))) as found:
        assert (found.size, found.mode) == ((8, 8), "L")


def test_short_records_are_averaged():
    """With the next record, or at the end with the one before."""
    records = [{"step": 4, "top1": 0.5}, {"step": 5, "top1": 1.0}, {"step": 8, "top1": 0.5}]
    assert figures.training_errors(records) == ([4, 8], [50.0, 37.5])
    assert figures.training_errors([]) == ([], [])
    ends_short = [*records, {"step": 9, "top1": 1.0}]
    assert figures.training_errors(ends_short) == ([4, 9], [50.0, 30.0])


def test_many_classes_and_long_names():
    counts = np.eye(50, dtype=int)
    assert to_png(figures.confusion_matrix(counts, ["x" * 40] * 50)).startswith(b"\x89PNG")
    many = pictures.image_grid([np.zeros((8, 8, 3), np.uint8)] * 7, ["$a$\n^"] * 7, columns=3)
    assert many.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["{run}", "--output={tmp}/there.html"], "exists; give --force to replace it"),
        (["{run}", "--output={tmp}/page.pdf"], "must end in .html"),
        (["{run}", "--output={tmp}/none/page.html"], "no folder"),
        (["{run}", "--output={tmp}/x.html", "--images", "{tmp}/none.png"], "cannot be read"),
        (["{tmp}/empty"], "cannot be read"),
        (["{tmp}/odd"], "has no record yet, and 1 lines that are not records"),
    ],
)
def test_user_mistakes(arguments, message, workdir, tmp_path, capsys):
    (tmp_path / "there.html").write_text("mine")
    for name, records in (("empty", None), ("odd", '{"step": 1}\n')):
        (tmp_path / name).mkdir()
        shutil.copy(workdir / "config.json", tmp_path / name)
        if records:
            (tmp_path / name / "metrics.jsonl").write_text(records)
    arguments = [each.format(run=workdir, tmp=tmp_path) for each in arguments]
    assert parser.main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (tmp_path / "there.html").read_text() == "mine"


def test_full_disk(workdir, tmp_path, monkeypatch):
    def replace(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(ConfigError, match=r"page\.html: cannot be written \(No space left"):
        write_report([workdir], tmp_path / "page.html")
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


@pytest.fixture
def browser(tmp_path):
    """A function that starts Chromium with flags and returns its standard output."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program:
        pytest.skip("needs Chromium")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--enable-logging=stderr", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path}/profile"]

    def run(*flags):
        done = subprocess.run(
            [*command, *flags], capture_output=True, text=True, timeout=speed.seconds(120)
        )
        assert done.returncode == 0, done.stderr
        assert "CONSOLE" not in done.stderr  # errors of the page
        return done.stdout

    return run


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(scheme, written, tmp_path, browser):
    flags = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    shot = tmp_path / "page.png"
    browser(*flags, "--window-size=900,4200", f"--screenshot={shot}", written.as_uri())
    shown = np.asarray(Image.open(shot).convert("L"))
    assert shown.shape == (4200, 900)
    blocks = shown[:3600].reshape(9, 400, 900)
    assert all(np.ptp(block) > 100 for block in blocks)  # no part is empty
    assert (np.median(shown) > 200) == (scheme == "light")


def test_on_a_phone(written, tmp_path, browser):
    """Nothing is wider than a phone, and text in plots is not smaller than 7 pixels."""
    frame = tmp_path / "frame.html"
    frame.write_text(f"""<iframe id="phone" width="360" height="700" src="{written.as_uri()}">
      </iframe><script>onload = () => {{
        const page = document.getElementById("phone").contentDocument;
        const widths = [...page.querySelectorAll("svg")].map(each => each.clientWidth);
        document.title = JSON.stringify([page.documentElement.scrollWidth, widths]);
      }}</script>""")
    dom = browser("--allow-file-access-from-files", "--dump-dom", frame.as_uri())
    scrolled, widths = json.loads(re.search("<title>(.*)</title>", dom)[1])
    assert scrolled == 360
    assert len(widths) == len(PLOTS)
    assert all(300 < each <= 360 for each in widths)
    assert 8 / 72 * min(widths) / WIDTH > 7
