"""The page about a run is complete and self-contained, and escapes names."""

import base64
import dataclasses
import html.parser
import io
import json
import shutil
import subprocess

import jax
import numpy as np
import pytest
from PIL import Image

from resnet_jax import config as c
from resnet_jax.cli import parser
from resnet_jax.data.sources import open_source
from resnet_jax.errors import ConfigError, DataError
from resnet_jax.report import figures, predictions, sections
from resnet_jax.report.page import _write, write_report
from resnet_jax.report.predictions import HeldOutData, predict_split
from resnet_jax.report.runs import read_run
from resnet_jax.training.loop import train
from resnet_jax.workdirs.description import read_class_names
from tests import speed
from tests.evaluation.settings import photo, prepare_sets, tiny_network

pytestmark = pytest.mark.usefixtures("tiny_model")
VOID = {"meta", "img", "br", "link", "input"}


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
    """Checks that tags are closed in order, and collects images."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.tags = [], [], set()
        self.text = text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        found = dict(attributes)
        assert not {"src", "href"} & found.keys() or tag in ("img", "a")
        if tag == "a":
            assert f'id="{found["href"].removeprefix("#")}"' in self.text
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
    names = ["curves", "classes", "confusion", "mistakes", "explanations", "filters", "responses"]
    assert sorted(path.stem for path in written.with_suffix("").iterdir()) == sorted(names)
    assert len(page.images) == len(names)
    for image in page.images:
        assert image["alt"]
        assert np.ptp(pixels(image)) > 100  # not blank
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
    assert len(page.images) == 2
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
    picture = sections.Picture("curves", b"png", "", "")
    found = [sections.Section("a", "A", pictures=[picture])]
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
    for index, example in enumerate(examples):
        data, label = source[index]
        assert example.labels == (label,)
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
    [table] = sections._confusion(found.result).tables
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
    page = Page(text)
    folder = multi_label_run / "report"
    names = {path.stem for path in folder.glob("*.png")}
    assert {"curves", "multi_label", "explanations"} <= names
    assert "confusion" not in names
    assert len(page.images) == len(names)
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
    [section] = sections._class_sizes(run)
    facts, every = section.tables
    assert [name for name, _ in facts.rows] == ["largest class", "smallest class", "ratio"]
    assert every.header == ("class", "training images", "held-out images")
    sizes = [int(row[1]) for row in every.rows]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == 1437
    assert sum(int(row[2]) for row in every.rows) == 360

    found = predict_split(digits_network(), HeldOutData(), limit=3).result
    found = dataclasses.replace(found, class_names=read_class_names(workdir))
    [section] = sections._class_sizes(run, found)
    accuracies = [row[3] for row in section.tables[1].rows]
    assert accuracies.count("") == 10 - len({*found.labels})
    others = dataclasses.replace(found, class_names=tuple("abcdefghij"))
    assert len(sections._class_sizes(run, others)[0].tables[1].header) == 3

    counts = {"train": np.array([0, 5, *[1000] * 8])}
    facts, _ = sections._class_sizes(dataclasses.replace(run, class_counts=counts))[0].tables
    assert facts.rows[1:] == [
        ("smallest class", "1, 5 training images"),
        ("ratio", "200"),
        ("classes without training images", "1"),
    ]
    assert (
        sections._class_sizes(dataclasses.replace(run, class_counts={})) == []
    )  # of older versions
    many = figures.class_sizes([*map(str, range(500))], np.arange(500), [None, *[0.5] * 499])
    assert many.startswith(b"\x89PNG")


def test_a_data_set_that_lost_classes():
    with pytest.raises(DataError, match="has 10 of the 11 classes"):
        predict_split(digits_network(11), HeldOutData(), limit=3)


def test_drops_and_times(workdir):
    run = read_run(workdir)
    assert run.rate_drops() == [3]  # of four steps, the learning rate drops after two
    rates = [record["images_per_second"] for record in run.training]
    assert run.seconds == pytest.approx(sum(48 / rate for rate in rates))


def test_short_records_are_averaged():
    """With the next record, or at the end with the one before."""
    records = [{"step": 4, "top1": 0.5}, {"step": 5, "top1": 1.0}, {"step": 8, "top1": 0.5}]
    assert figures.training_errors(records) == ([4, 8], [50.0, 37.5])
    ends_short = [*records, {"step": 9, "top1": 1.0}]
    assert figures.training_errors(ends_short) == ([4, 9], [50.0, 30.0])


def test_many_classes_and_long_names():
    counts = np.eye(50, dtype=int)
    assert figures.confusion_matrix(counts, ["x" * 40] * 50).startswith(b"\x89PNG")
    many = figures.image_grid([np.zeros((8, 8, 3), np.uint8)] * 7, ["$a$\n^"] * 7, columns=3)
    assert many.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a workdir"),
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


def test_in_a_browser(workdir, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("needs Chromium")
    page = write_report([workdir], tmp_path / "page.html")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--enable-logging=stderr", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path}/profile", "--window-size=900,3600"]
    command += [f"--screenshot={tmp_path}/page.png", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=speed.seconds(120))
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr  # errors of the page
    shown = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    assert shown.shape == (3600, 900)
    blocks = shown[:3000].reshape(10, 300, 900)
    assert all(np.ptp(block) > 100 for block in blocks)  # no part is empty
