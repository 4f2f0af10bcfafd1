"""`Classifier` and the commands `predict` and `features`."""

import csv
import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import resnet_jax as rj
from resnet_jax.cli.parser import main
from resnet_jax.data.decode import eval_crop
from resnet_jax.distributed.data_parallel import shard
from resnet_jax.inference import features as features_module
from resnet_jax.inference import writers as writers_module
from resnet_jax.inference.batch_predictor import BatchPredictor
from resnet_jax.inference.classifier import Prediction
from resnet_jax.inference.images import ImageFile
from resnet_jax.terminal import columns
from resnet_jax.weights.source import open_network
from tests.processes import ROOT, run
from tests.variables import random_variables

DOCS = ROOT / "docs" / "predict.md"
DEVICES = jax.local_device_count()
# One size for all, so that the tests share compiled programs.
BATCH = 2 * DEVICES


def write_network(folder, channels=3):
    model = rj.ResNet8Cifar(num_classes=7)
    rj.save_weights(folder, model, random_variables(model, (32, 32, channels)))
    return str(folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("network") / "w.safetensors")


@pytest.fixture(scope="module")
def classifier(weights, accelerator):
    return rj.Classifier.load(weights, model="resnet8_cifar", batch_size=BATCH)


@pytest.fixture
def photos(tmp_path):
    """Class folders with three PNGs each, of odd sizes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (40 + 7 * number, 50, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def files_of(photos):
    return sorted(photos.rglob("*.png"))


def command(name, source, *arguments):
    return [name, source, "--model=resnet8_cifar", f"--batch_size={BATCH}", *map(str, arguments)]


# Python.


@pytest.mark.accelerators
def logits_of_each(classifier, images):
    """The logits of images that are each the first of their batch.

    So equal pixels have equal bits with any version of XLA: that of jax 0.7 rounds some places of a
    batch differently on some CPUs.
    """
    return np.concatenate([classifier.logits(image) for image in images])


def test_agrees_with_apply(classifier, photos):
    """To the bit with the same program on the same batch."""
    network = classifier.network
    crops = np.stack([eval_crop(file.read_bytes(), network.crop, 3) for file in files_of(photos)])
    batch = np.zeros((BATCH, 32, 32, 3), np.uint8)
    batch[: len(crops)] = crops

    def apply(network):
        program = jax.jit(lambda variables, x: network.model.apply(variables, x, train=False))
        # A device's share at a time, normalised outside.
        parts = [
            program(network.variables, network.preprocessing.normalize(x)) for x in shard(batch)
        ]
        return np.concatenate(parts)[: len(crops)]

    expected = apply(network.folded())
    logits = classifier.logits(files_of(photos))
    chex.assert_shape(logits, (6, 7))
    np.testing.assert_array_equal(logits, expected)
    chex.assert_trees_all_close(logits, apply(network), rtol=0, atol=1e-5)
    probabilities = classifier.probabilities(files_of(photos))
    chex.assert_trees_all_close(probabilities, jax.nn.softmax(expected), rtol=1e-6)
    for row, predictions in zip(probabilities, classifier(files_of(photos), top=3)):
        order = np.argsort(-row)[:3]
        assert [each.index for each in predictions] == order.tolist()
        assert [each.name for each in predictions] == list(map(str, order))
        assert [each.probability for each in predictions] == row[order].tolist()


def test_the_others_do_not_matter(classifier, photos):
    """One, some or more than a batch, in any order: the same image, the same numbers."""
    files = files_of(photos)
    alone = logits_of_each(classifier, files)
    many = files[::-1] * (BATCH // 2)
    found = classifier.logits(files), classifier.logits(many)
    expected = alone, np.tile(alone[::-1], (BATCH // 2, 1))
    if jax.__version_info__ < (0, 10):
        chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-5)
    else:
        chex.assert_trees_all_equal(found, expected)


def test_kinds_of_images(classifier, photos):
    file = files_of(photos)[0]
    image = Image.open(file)
    pixels = np.asarray(image)
    mixed = [file, str(file), image, image, pixels, np.stack([pixels, pixels]), jnp.asarray(pixels)]
    chex.assert_shape(classifier.logits(mixed), (8, 7))
    logits = logits_of_each(classifier, mixed)
    assert (logits == logits[0]).all()
    assert len(classifier(pixels)) == len(classifier(image)) == len(classifier(str(file))) == 1
    assert classifier([]) == []
    assert classifier.logits([]).shape == (0, 7)
    assert len(classifier(file, top=50)[0]) == 7


def test_grey_network(tmp_path, photos):
    path = write_network(tmp_path / "w.npz", channels=1)
    network = open_network(path, model="resnet8_cifar")
    # One number each, as a run on grey images has.
    preprocessing = rj.Preprocessing(32, 1.0, mean=(0.5,), std=(0.25,))
    network = dataclasses.replace(network, preprocessing=preprocessing)
    classifier = rj.Classifier(network, batch_size=BATCH)
    colour = Image.open(files_of(photos)[0])
    grey = np.asarray(colour.convert("L"))
    logits = logits_of_each(classifier, [colour, grey, grey[:, :, None]])
    assert (logits == logits[0]).all()


def test_images_in_memory_are_those_of_files(classifier, photos):
    path = files_of(photos)[0]
    pixels = np.asarray(Image.open(path))
    data = path.read_bytes()
    with path.open("rb") as file:
        images = [path, data, file, pixels, jnp.asarray(pixels), pixels / 255]
        found = logits_of_each(classifier, [*images, ImageFile(str(path)), io.BytesIO(data)])
    assert (found == found[0]).all()


def test_four_channels(tmp_path):
    network = open_network(
        write_network(tmp_path / "w.safetensors", channels=4), model="resnet8_cifar"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 4), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    colors = dataclasses.replace(network.preprocessing, mean=(0.5,) * 3, std=(0.25,) * 3)
    with pytest.raises(rj.ConfigError, match="mean"):
        rj.Classifier(dataclasses.replace(network, preprocessing=colors)).logits(pixels)
    classifier = rj.Classifier(network, batch_size=BATCH)  # one mean for all
    images = [pixels, image, tmp_path / "a.png"]
    chex.assert_shape(classifier.logits([*images, np.stack([pixels, pixels])]), (5, 7))
    found = logits_of_each(classifier, images)
    assert (found == found[0]).all()
    with pytest.raises(rj.DataError, match="has 3 channels, and 4 are needed"):
        classifier.logits(image.convert("RGB"))


def test_photos_are_turned_unless_the_network_is_opened_otherwise(classifier, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (36, 40, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    turned = np.rot90(pixels, -1)
    for upright, expected in ((None, turned), (True, turned), (False, pixels)):
        network = dataclasses.replace(classifier.network, upright=upright)
        turning = rj.Classifier(network, batch_size=BATCH)
        found = logits_of_each(turning, [tmp_path / "a.png", expected])
        np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((8, 8, 3), 2.0), "values from 2 to 2; they must be from 0 to 1"),
        (np.zeros((8, 8, 3), bool), "array of bool; images are uint8"),
        (io.StringIO("text"), "an image in memory: the open file gives text"),
        (b"GIF89a", "an image in memory: not a valid image"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\)"),
        (np.zeros((0, 8), np.uint8), r"shape \(0, 8\)"),
        (7, "int is not an image"),
        ("none.png", "none.png: cannot be read"),
    ],
)
def test_mistakes_in_python(classifier, images, message):
    with pytest.raises(rj.DataError, match=message):
        classifier(images)


def test_options_are_checked(classifier, weights):
    with pytest.raises(rj.ConfigError, match="top=0"):
        classifier([], top=0)
    with pytest.raises(rj.ConfigError, match="batch_size=-1"):
        rj.Classifier(classifier.network, batch_size=-1)
    preprocessing = rj.Preprocessing(interpolation="lanczos")
    network = features_module.Network(
        **{**vars(classifier.network), "preprocessing": preprocessing}
    )
    with pytest.raises(rj.ConfigError, match="resized by 'lanczos'"):
        rj.Classifier(network)
    network = features_module.Network(**{**vars(network), "model": rj.ResNet8Cifar(num_classes=0)})
    with pytest.raises(rj.ConfigError, match="no head"):
        rj.Classifier(network)


@pytest.fixture(scope="module")
def broken_weights(weights):
    """A network whose outputs are not numbers."""
    path = pathlib.Path(weights).with_name("nan.safetensors")
    model = rj.ResNet8Cifar(num_classes=7)
    variables = rj.load_weights(model, weights)
    variables["params"]["head"]["bias"][3] = np.nan
    rj.save_weights(path, model, variables)
    return str(path)


def test_a_network_without_numbers_is_named(classifier, broken_weights, photos):
    with pytest.raises(rj.WeightsError, match=r"nan\.safetensors: .* params/head/bias has values"):
        rj.Classifier.load(broken_weights, model="resnet8_cifar")
    variables = jax.tree.map(np.array, classifier.network.variables)
    variables["params"]["head"]["bias"][3] = np.nan
    network = dataclasses.replace(classifier.network, source="net", variables=variables)
    broken = rj.Classifier(network, batch_size=BATCH)
    for call in (broken, broken.probabilities, broken.logits):
        with pytest.raises(rj.WeightsError, match=r"net: .* outputs are not finite .*/0\.png"):
            call(files_of(photos))
    with pytest.raises(rj.WeightsError, match="an image in memory"):
        broken(np.zeros((40, 40, 3), np.uint8))


def test_an_image_without_numbers_is_named(classifier, photos):
    """One image's outputs overflow: it is no fault of the network that the others are fine."""
    white = photos / "cat" / "white.png"
    Image.new("RGB", (40, 40), "white").save(white)
    wide = BatchPredictor(
        classifier.network,
        lambda variables, images: jnp.where(images.mean((1, 2)) > 1.9, jnp.inf, 0.0),
        BATCH,
    )
    found = list(wide([*files_of(photos), white]))
    errors = [str(each) for each in found if isinstance(each, rj.DataError)]
    assert errors == [f"{white}: the network's outputs for it are not finite numbers"] * 2
    assert len(found) == 8


# The commands.


OUTPUTS = ["", "--format=jsonl", "--format=csv", "--output={out}/x.jsonl", "--output={out}/x.csv"]


@pytest.mark.parametrize("flag", OUTPUTS)
def test_predict_writes_no_nan(flag, broken_weights, photos, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    flags = [flag.format(out=tmp_path / "out")] if flag else []
    assert main(command("predict", broken_weights, photos, *flags)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[-1].startswith(f"error: {broken_weights}: the network's params")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["x.npz", "x.parquet"])
def test_features_has_no_nan(name, weights, photos, tmp_path, capsys):
    if name == "x.parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    model = rj.ResNet8Cifar(num_classes=7)
    variables = rj.load_weights(model, weights)
    variables["params"]["stem"]["conv1"]["kernel"][:] = np.inf
    broken = tmp_path / "inf.npz"
    rj.save_weights(broken, model, variables)
    (tmp_path / "out").mkdir()
    arguments = command("features", str(broken), photos, f"--output={tmp_path / 'out' / name}")
    assert main(arguments) == 2
    assert "inf.npz: the network's params/stem/conv1/kernel has" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == []


def test_a_broken_file_among_good_ones(weights, photos, tmp_path):
    """As a user calls it: the good ones are predicted, the exit code is 1."""
    (photos / "cat" / "1.png").write_bytes(b"no image")
    flags = ["--model=resnet8_cifar", "--format=jsonl", "--top=2", "--batch_size=4"]
    program = [sys.executable, "-m", "resnet_jax"]
    result = run(*program, "predict", weights, photos, *flags, cwd=tmp_path)
    assert result.returncode == 1
    # JAX may have something to say of the machine, before.
    assert "Traceback" not in result.stderr
    skipped, total = result.stderr.splitlines()[-2:]
    assert re.match(r"skipped: .*cat/1\.png: not a valid image", skipped)
    assert total == "1 of 6 images could not be read"
    found = list(map(json.loads, result.stdout.splitlines()))
    names = ["cat/0.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png"]
    assert [each["image"] for each in found] == [str(photos / name) for name in names]
    expected = rj.Classifier.load(weights, model="resnet8_cifar").probabilities(found[3]["image"])[
        0
    ]
    best = found[3]["predictions"][0]
    chex.assert_trees_all_close(best["probability"], float(expected.max()), rtol=1e-5)
    assert (best["name"], best["index"]) == (str(expected.argmax()), int(expected.argmax()))


def test_formats_say_the_same(weights, photos, tmp_path, classifier, capsys):
    odd = tmp_path / 'a, "b"\nc.png'
    odd.write_bytes(files_of(photos)[0].read_bytes())
    inputs = [photos / "dog", odd]
    names = [*map(str, files_of(photos / "dog")), str(odd)]
    expected = [[name, *each] for name, each in zip(names, classifier(names, top=2))]

    for name in ("out.csv", "out.jsonl"):  # the form follows the name
        arguments = ["--top=2", f"--output={tmp_path / name}"]
        assert main(command("predict", weights, *inputs, *arguments)) == 0
    assert capsys.readouterr().out == ""
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    lines = list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()))
    for (image, *best), line, first in zip(expected, lines, rows[::2], strict=True):
        assert line["image"] == first["image"] == image
        for written, each in zip(line["predictions"], best, strict=True):
            assert (written["name"], written["index"]) == (each.name, each.index)
            assert np.float32(written["probability"]) == np.float32(each.probability)
        assert first["rank"] == "1"
        assert first["name"] == best[0].name
        assert float(first["probability"]) == line["predictions"][0]["probability"]

    assert main(command("predict", weights, *inputs, "--top=2")) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + 2 * 4
    assert table[0].split() == ["image", "probability", "class"]
    shown = r'a, "b"\nc.png'
    best = expected[3][1]
    assert table[7].endswith(f"{shown}       {best.probability:.4f}  {best.name}")


@pytest.mark.parametrize("listed", [False, True])
def test_standard_input(listed, weights, photos, monkeypatch, capsys):
    file = files_of(photos)[0]
    data = f"{file}\nnone.png\n".encode() if listed else file.read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    code = main(command("predict", weights, "-", "--format=jsonl"))
    output = capsys.readouterr()
    assert code == (1 if listed else 0)
    assert json.loads(output.out)["image"] == (str(file) if listed else "-")
    assert ("skipped: none.png: cannot be read" in output.err) == listed


NAMES = [
    *("cat", "caf\u00e9", "back\\slash", "two\nlines", 'a, "b"', "a-b=c", "5", ""),
    *("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1+1", "'quoted", "=a\\nb\\"),
    *(
        "\x1b[2J\x07",
        "\x9b1m\\x1b",
        "\u202egpj.exe",
        "a\u200bb",
        "a\u2028b",
        "\udcff.png",
        "\u6f22\u202e",
    ),
]


def test_csv_is_no_formula_and_no_code():
    """A cell begins no formula and holds no code; docs/predict.md says how to get the name."""
    block = re.search(r"```python\n(def exact_name.*?)```", DOCS.read_text(), re.DOTALL)
    scope = {}
    exec(block.group(1), scope)  # noqa: S102
    header, write = writers_module._csv([])
    text = header + "".join(write(name, [Prediction(name, 3, 0.1)]) for name in NAMES)
    rows = list(csv.DictReader(io.StringIO(text)))
    for name, row in zip(NAMES, rows, strict=True):
        assert row["image"] == row["name"]
        assert scope["exact_name"](row["name"]) == name
        assert not row["name"].startswith(("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d"))
        assert row["name"].replace("\n", "").isprintable()
    plain = NAMES[: NAMES.index("=1+1")]
    assert [row["name"] for row in rows[: len(plain)]] == plain
    text.encode()


def test_jsonl_has_exact_names_in_ascii():
    _, write = writers_module._json_lines([])
    for name in NAMES:
        line = write(name, [Prediction(name, 3, 0.1)])
        assert line[:-1].isascii()
        assert line[:-1].isprintable()
        record = json.loads(line)
        assert record["image"] == record["predictions"][0]["name"] == name


def test_a_table_stays_in_line():
    files = [ImageFile(name) for name in NAMES]
    header, write = writers_module._table(files)
    lines = [header, *(write(name, [Prediction(name, 3, 0.25)]) for name in NAMES)]
    assert all(line.count("\n") == 1 and line[:-1].isprintable() for line in lines)
    before = {
        columns(line.partition("0.2500" if "0.2500" in line else "bility")[0]) for line in lines
    }
    assert len(before) == 1


MISTAKES = {
    "missing": ("predict", ["none.png"], "none.png: there is no such file"),
    "foreign": ("predict", ["notes.txt"], "notes.txt: not a valid image"),
    "all broken": ("predict", ["notes.txt", "old.npz"], "no image could be read; notes.txt"),
    "empty folder": ("predict", ["empty"], "empty: the folder has no images"),
    "existing": ("predict", ["a.png", "--output=notes.txt"], "exists; give --force"),
    "unwritable": ("predict", ["a.png", "--output=no/x.csv"], "cannot be written (No such"),
    "a folder": ("predict", ["a.png", "--output=empty", "--force"], "is a folder"),
    "top": ("predict", ["a.png", "--top=0"], "--top=0: must be 1 or more"),
    "batch size": ("predict", ["a.png", "--batch_size=-2"], "--batch_size=-2"),
    "layer": ("features", ["a.png", "--output=x.npz", "--layer=stage9"], "unknown layer 'stage9'"),
    "torchvision's layer": (
        *("features", ["a.png", "--output=x.npz", "--layer=layer3"]),
        "unknown layer 'layer3'; did you mean 'stage3'?",
    ),
    "maps": ("features", ["a.png", "--output=x.npz", "--maps"], "take --layer=stage3"),
    "suffix": ("features", ["a.png", "--output=x.txt"], "must end in .npz or .parquet"),
    "features exist": ("features", ["a.png", "--output=old.npz"], "exists; give --force"),
    "broken features": ("features", ["notes.txt", "--output=x.npz"], "not a valid image"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_take_one_line(mistake, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "old.npz").write_text("old")
    Image.new("RGB", (40, 40)).save("a.png")
    before = sorted(os.listdir())
    name, arguments, message = MISTAKES[mistake]
    flags = [] if "batch_size" in "".join(arguments) else [f"--batch_size={BATCH}"]
    assert main([name, weights, "--model=resnet8_cifar", *flags, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ")
    assert message in error[-1]
    assert sorted(os.listdir()) == before
    assert pathlib.Path("notes.txt").read_text() == "notes"
    assert pathlib.Path("old.npz").read_text() == "old"


def test_a_foreign_network_takes_one_line(photos, capsys):
    file = str(files_of(photos)[0])
    assert main(["predict", file, file]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_force_replaces(weights, photos, tmp_path):
    output = tmp_path / "out.csv"
    output.write_text("old")
    assert main(command("predict", weights, photos, f"--output={output}", "--force")) == 0
    assert output.read_text().startswith("image,rank")


@pytest.fixture
def heard():
    """SIGINT counts: a shell's background processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("name", ["predict", "features"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_half_file(name, number, weights, photos, tmp_path, monkeypatch):
    """In the middle of the results a signal comes; nothing appears, and the old file stays."""
    folder = tmp_path / "out"
    folder.mkdir()
    output = folder / "x.npz"
    output.write_text("old")
    partly = []

    def pull(self, results):
        for file, result in zip(self._files, results):
            yield file, result
            partly.append(os.listdir(folder))
            os.kill(os.getpid(), number)
            time.sleep(5)

    monkeypatch.setattr("resnet_jax.inference.writers.Progress.__call__", pull)
    before = signal.getsignal(signal.SIGTERM)
    assert main(command(name, weights, photos, f"--output={output}", "--force")) == 75
    assert len(partly) == 1
    assert len(partly[0]) == 2  # the old file, and the new one under another name
    assert os.listdir(folder) == ["x.npz"]
    assert output.read_text() == "old"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_closed_pipe_is_no_error(weights, photos):
    shell = (
        f"{sys.executable} -m resnet_jax predict {weights} {photos} --model=resnet8_cifar | true"
    )
    result = run("/bin/bash", "-o", "pipefail", "-c", shell)
    assert result.returncode == 0
    assert "Error" not in result.stderr


# Features.


@pytest.mark.parametrize(
    ("layer", "maps", "shape"),
    [
        ("pooled", False, (256,)),
        ("stage1", False, (64,)),
        ("stage3", True, (8, 8, 256)),
        ("stem", True, (32, 32, 64)),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_features(suffix, layer, maps, shape, weights, photos, tmp_path, monkeypatch, classifier):
    monkeypatch.setattr(features_module, "_GROUP_BYTES", 4 * 2 * int(np.prod(shape)))  # two rows
    output = tmp_path / f"x{suffix}"
    flags = [f"--output={output}", f"--layer={layer}", *(["--maps"] if maps else [])]
    (photos / "cat" / "1.png").write_bytes(b"")
    assert main(command("features", weights, photos, *flags)) == 1
    if suffix == ".npz":
        with np.load(output) as file:
            found, paths, labels = (file[name] for name in ("features", "paths", "labels"))
    else:
        pq = pytest.importorskip("pyarrow.parquet")
        assert pq.ParquetFile(output).num_row_groups == 3
        table = pq.read_table(output)
        paths, labels = (table[name].to_pylist() for name in ("paths", "labels"))
        column = table["features"].combine_chunks()
        found = (
            column.to_numpy_ndarray() if maps else np.stack(column.to_numpy(zero_copy_only=False))
        )
    files = [file for file in files_of(photos) if file != photos / "cat" / "1.png"]
    assert list(paths) == list(map(str, files))
    assert list(labels) == ["cat", "cat", "dog", "dog", "dog"]
    assert found.dtype == np.float32
    network = classifier.network
    crops = np.stack([eval_crop(file.read_bytes(), network.crop, 3) for file in files])
    images = network.preprocessing.normalize(crops)
    if layer == "pooled":
        # What the head makes of them are the logits.
        head = network.variables["params"]["head"]
        chex.assert_trees_all_close(
            found @ head["kernel"] + head["bias"],
            network.model.apply(network.variables, images, train=False),
            atol=1e-5,
        )
    else:
        every = network.model.apply(network.variables, images, train=False, method="features")
        expected = every[layer] if maps else every[layer].mean((1, 2))
        chex.assert_trees_all_close(found, np.asarray(expected), atol=1e-5)
    assert found.shape == (5, *shape)


def test_the_same_features_are_the_same_bytes(weights, photos, tmp_path):
    for name in ("a.npz", "b.npz"):
        assert main(command("features", weights, photos, f"--output={tmp_path / name}")) == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_without_pyarrow_there_is_a_line(weights, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(command("features", weights, photos, f"--output={tmp_path / 'x.parquet'}")) == 2
    assert "pip install pyarrow" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["photos"]
