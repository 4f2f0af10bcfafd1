"""Lists of images and labels: CSV and JSON Lines, their splits, parts and mistakes."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from resnet_jax.config.schema import Augment, Config, Data
from resnet_jax.data.sources import open_source
from resnet_jax.errors import DataError
from resnet_jax.training.inputs import open_sources

TEXT = """path,label,split
a/0.png,cat,train
a/1.png,dog,train
b/2.png,dog,test
b/3.png,cat,test
a/4.png,cat,train
"""


@pytest.fixture
def place(tmp_path):
    """A folder with images 0 to 4, each of its own grey."""
    for number, folder in enumerate("aabba"):
        (tmp_path / folder).mkdir(exist_ok=True)
        image = Image.fromarray(np.full((2, 2, 3), (40 * number, 0, 0), np.uint8))
        image.save(tmp_path / folder / f"{number}.png")
    return tmp_path


def write(place, text, name="list.csv"):
    path = place / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"{path.suffix[1:]}:{path}"


def lines(*records):
    return "".join(json.dumps(each) + "\n" for each in records)


def many(place, labels, header="path,label"):
    """A list with an image for each of the labels."""
    (place / "m").mkdir()
    for number in range(len(labels)):
        os.link(place / "a" / "0.png", place / "m" / f"{number}.png")
    rows = (f"m/{number}.png,{label}\n" for number, label in enumerate(labels))
    return write(place, f"{header}\n" + "".join(rows))


def numbers(source):
    """Which images they are, by their files' names."""
    names = [source.image_name(index) for index in range(len(source))]
    return [int(os.path.basename(name)[:-4]) for name in names]


def message(*args, **kwargs):
    """The text of the DataError: one line always."""
    with pytest.raises(DataError) as caught:
        open_source(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- What is read ---------------------------------------------------------------------------


def test_rows_become_images(place):
    name = write(place, TEXT)
    train, test = (open_source(name, split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("cat", "dog")
    assert (numbers(train), [label for _, label in train]) == ([0, 1, 4], [0, 1, 0])
    assert (numbers(test), [label for _, label in test]) == ([2, 3], [1, 0])
    assert train[1][0] == (place / "a" / "1.png").read_bytes()
    assert train.image_name(-1) == str(place / "a" / "4.png")
    assert (train.channels, train.image_shape, train.label_shape) == (3, None, ())
    assert train.labels().tolist() == [0, 1, 0]
    assert train.class_counts().tolist() == [2, 1]
    assert (train.name, train.split, train.left_out) == (name, "train", "")


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("\n", "\r\n"),
        "\ufeff" + TEXT,
        TEXT.replace("path,label,split", "Image, Label ,SPLIT"),
        TEXT.replace("path,label,split", "filename,labels,split"),
        TEXT.replace(",", ", "),
        TEXT.replace("\n", "\n\n").replace("path", "\n\npath", 0) + " , ,\n\n",
        '"path","split","x","label"\n'
        + "".join(
            '"{}","{}","a ""b"", c","{}"\n'.format(*(line.split(",")[each] for each in (0, 2, 1)))
            for line in TEXT.splitlines()[1:]
        ),
    ],
    ids=["crlf", "bom", "case", "names", "blanks", "blank lines", "quotes"],
)
def test_spellings_of_csv(text, place):
    if text.endswith(" , ,\n\n"):
        text = text.replace(" , ,\n", ",,\n")
    expected = open_source(write(place, TEXT, "first.csv"), "train")
    source = open_source(write(place, text), "train")
    assert list(source) == list(expected)
    assert source.fingerprint == expected.fingerprint


def test_json_lines(place):
    text = lines(
        *(dict(zip(("path", "label", "split"), line.split(","))) for line in TEXT.splitlines()[1:])
    )
    expected = open_source(write(place, TEXT), "train")
    source = open_source(write(place, "\ufeff" + text + "\n", "list.jsonl"), "train")
    assert list(source) == list(expected)
    assert source.fingerprint == expected.fingerprint
    one = lines({"file": "a/0.png", "labels": [3]}, {"file": "a/1.png", "label": 10})
    assert open_source(write(place, one, "one.jsonl"), "train").class_names == ("3", "10")


def test_numbers_are_sorted_as_numbers(place):
    text = "path,label\na/0.png,10\na/1.png,9\nb/2.png,0\n"
    assert open_source(write(place, text), "train").class_names == ("0", "9", "10")
    text = text.replace("0\n", "x\n")
    assert open_source(write(place, text), "train").class_names == ("1x", "9", "x")


def test_paths(place, tmp_path_factory, monkeypatch):
    """Below the list, anywhere else, and with bytes that are no UTF-8."""
    other = tmp_path_factory.mktemp("other")
    shutil.copy(place / "a" / "0.png", other / "7.png")
    odd = os.fsencode(other) + b"/\xe98.png"
    shutil.copy(place / "a" / "0.png", os.fsdecode(odd))
    text = f"path,label\n{other}/7.png,cat\na/../a/1.png,dog\n".encode() + odd + b",dog\n"
    source = open_source(write(place, text), "train")
    assert source.left_out == ""
    assert source.image_name(2) == os.fsdecode(odd)
    assert source[0][0] == source[2][0] == (place / "a" / "0.png").read_bytes()
    monkeypatch.chdir(place)
    source = open_source("csv:list.csv", "train")
    monkeypatch.chdir("/")
    assert source[1][1] == 1


def test_a_moved_list_is_the_same(place, tmp_path_factory):
    name = write(place, TEXT)
    absolute = TEXT.replace("\na/", f"\n{place}/a/").replace("\nb/", f"\n{place}/b/")
    expected = open_source(name, "train").fingerprint
    assert open_source(write(place, absolute, "absolute.csv"), "train").fingerprint == expected
    copy = shutil.copytree(place, tmp_path_factory.mktemp("moved") / "x")
    moved = open_source(f"csv:{copy}/list.csv", "train")
    assert moved.fingerprint == expected
    assert moved.image_name(0) == str(copy / "a" / "0.png")
    for text in (
        TEXT.replace("0.png,cat", "0.png,dog"),
        TEXT.replace("a/4.png,cat,train", "a/4.png,cat,test"),
        TEXT.replace("a/1.png", "a/./1.png"),
    ):
        assert open_source(write(place, text), "train").fingerprint != expected
    assert open_source(name, "test").fingerprint != expected
    (place / "a" / "0.png").write_bytes((place / "a" / "0.png").read_bytes() + b"!")
    assert open_source(write(place, TEXT), "train").fingerprint != expected


def test_lists_pickle_small(place):
    source = open_source(many(place, ["x", "y"] * 200), "train[50%:]")
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000 + 200 * (len("m/000.png") + 8 + 4 + 8)
    again = pickle.loads(pickled)  # noqa: S301
    assert again.image_name(5) == source.image_name(5)
    assert again.labels().tolist() == source.labels().tolist()


def test_channels_are_decided_as_for_folders(place):
    for number, folder in enumerate("aabba"):
        Image.new("L", (2, 2)).save(place / folder / f"{number}.png")
    assert open_source(write(place, TEXT), "train").channels == 1


# --- Several labels -------------------------------------------------------------------------

SEVERAL = """path,labels
a/0.png,cat|dog
a/1.png,
b/2.png,dog | eel|
b/3.png,eel
a/4.png,cat|cat
"""
SETS = [[1, 1, 0], [0, 0, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("kind", ["labels", "label", "separator", "jsonl"])
def test_images_of_several_labels(kind, place):
    text, options = SEVERAL, {}
    if kind == "label":
        text = SEVERAL.replace("labels", "label")
    if kind == "separator":
        text, options = SEVERAL.replace("|", ";"), {"label_separator": ";"}
    name = write(place, text)
    if kind == "jsonl":
        rows = (line.split(",") for line in SEVERAL.splitlines()[1:])
        records = (
            {"path": path, "labels": [x.strip() for x in labels.split("|") if x.strip()]}
            for path, labels in rows
        )
        name = write(place, lines(*records), "list.jsonl")
    source = open_source(name, "train", multi_label=True, **options)
    assert source.class_names == ("cat", "dog", "eel")
    assert source.label_shape == (3,)
    assert [label.tolist() for _, label in source] == SETS
    assert source[0][1].dtype == source.labels().dtype == np.int32
    assert source.labels().tolist() == SETS
    assert source.class_counts().tolist() == [2, 2, 2]


def test_what_a_list_says_of_its_labels(place):
    """Where nobody says, as for a weight file, the name of the column does."""
    assert open_source(write(place, SEVERAL), "train", multi_label=None).label_shape == (3,)
    assert open_source(write(place, TEXT), "train", multi_label=None).label_shape == ()
    assert open_source(write(place, TEXT), "train", multi_label=True)[0][1].tolist() == [1, 0]
    one = SEVERAL.replace("label", "x|y").replace("x|ys", "label")
    assert open_source(write(place, one.replace(",\n", ",z\n")), "train").label_shape == ()
    record = lines({"path": "a/0.png", "labels": ["x", "y"]})
    name = write(place, record, "list.jsonl")
    assert open_source(name, "train", multi_label=None).label_shape == (2,)


def test_rare_labels_are_in_both_parts(place):
    labels = ["common"] * 80 + ["common|rare"] * 10 + ["other|rare"] * 10
    name = many(place, labels, "path,labels")
    for split, counts in (("train[:80%]", [72, 8, 16]), ("train[80%:]", [18, 2, 4])):
        found = open_source(name, split, train_split=split, multi_label=True).class_counts()
        assert np.abs(found - counts).max() <= 2


# --- Splits, parts and classes --------------------------------------------------------------


def test_a_list_without_splits(place):
    name = many(place, [0, 1, 2] * 30)
    whole = open_source(name, "train")
    first, rest = (open_source(name, f"train[{part}]") for part in (":-10%", "-10%:"))
    assert len(open_source(name, "all")) == len(whole) == 90
    names = [{each.image_name(index) for index in range(len(each))} for each in (first, rest)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 90
    assert rest.class_counts().tolist() == [3, 3, 3]
    text = message(name, "test")
    assert text.startswith("data.eval_split = 'test': the list has no 'split' in its lines")
    assert "data.train_split = 'train[:90%]' and data.eval_split = 'train[90%:]'" in text


def test_splits_of_a_list(place):
    name = write(place, TEXT)
    assert numbers(open_source(name, "test+train")) == [0, 1, 2, 3, 4]
    assert len(open_source(name, "train[:50%]", allow_missing_classes=True)) == 1
    text = message(name, "val")
    reason = "the list has no split 'val', only train (3 images), test (2 images)"
    assert text == f"data.eval_split = 'val': {reason}; did you mean 'test'?"
    assert "1000 must be a percentage" in message(name, "train[:1000]")


def test_classes_that_are_missing(place):
    """The same rule as for folders, in training and elsewhere."""
    name = write(place, TEXT.replace("b/3.png,cat", "b/3.png,dog"))
    assert "has no images of 1 of the 2 classes (cat); add some, or set" in message(name, "test")
    source = open_source(name, "test", allow_missing_classes=True)
    assert source.class_names == ("cat", "dog")
    assert source.left_out == "no images of 1 of the 2 classes (cat)"
    data = Data(name=name, allow_missing_classes=True)
    sources = open_sources(Config(data=data, augment=Augment()))
    assert sources["eval"].class_names == ("cat", "dog")
    data.allow_missing_classes = False
    with pytest.raises(DataError, match="has no images of 1 of the 2 classes"):
        open_sources(Config(data=data))
    # A class of one image is trained on in no part that it is not in, and keeps its number.
    text = "path,label\na/0.png,a\na/1.png,b\nb/2.png,b\nb/3.png,c\na/4.png,c\n"
    source = open_source(write(place, text), "train[60%:]", allow_missing_classes=True)
    assert source.class_names == ("a", "b", "c")


def test_missing_files_are_said_and_named(place):
    (place / "a" / "1.png").unlink()
    (place / "a" / "4.png").unlink()
    (place / "a" / "4.png").mkdir()
    source = open_source(write(place, TEXT), "train")
    assert source.left_out == "missing files, which count as corrupt: 1, such as a/1.png"
    for position, reason in ((1, "No such file"), (2, "Is a directory")):
        with pytest.raises(DataError, match=rf"cannot read {place}/a/.*\.png: {reason}"):
            source[position]


# --- Mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no images"),
        ("\n\n", "names no images"),
        ("path,label\n", "names no images"),
        ("a/0.png,cat\n", "line 1: must name the columns, one of them 'path'; it has 'a/0.png"),
        ("path\na/0.png\n", "line 1: must name the columns, one of them 'label'"),
        ("path;label\na/0.png;cat\n", "it has 'path;label'"),
        ("path,label,path\n", "line 1: has the column 'path' twice"),
        ("path,label\na/0.png,cat\n\na/1.png\n", "line 4: has 1 fields and the header 2"),
        ("path,label\na/0.png,cat, black\n", "line 2: has 3 fields and the header 2; quote"),
        ("path,label\na/0.png,\n", "line 2: has no label; set data.multi_label = true"),
        ("path,label\n,cat\n", "line 2: has no path"),
        ("path,label,split\na/0.png,cat,\n", "line 2: has no split"),
        ("path,labels\na/0.png,cat|dog\n", "line 2: has 2 labels (cat, dog); set data.multi_label"),
        (
            "path,label\na/0.png,cat\na/1.png,dog\na/0.png,dog\n",
            "line 4: names the image of line 2",
        ),
        ("path,label\na/0.png,cat\n", "data.eval_split = 'train': has one class, cat; needs two"),
        ('path,label\n"a/0.png\n,cat\n', "line 2: is not CSV (unexpected end of data)"),
        ('path,label\na/1.png,x\n"a"b,cat\n', "line 3: is not CSV ("),
        ("path,label\ra/0.png,cat\r", "line 1: is not CSV ("),
        ("path,label\na\0,cat\n", "line 2: has a path that is not a valid file name"),
        (b"path,label\na/0.png,caf\xe9\n", "line 2: has an empty label, or one that is not UTF-8"),
        ("path,label\n".encode("utf-16"), "line 1: is UTF-16; save the list as UTF-8"),
        ("path,label\n" + "x" * 2**21, "line 2: has more than 1,048,576 bytes"),
        ("path,label\nx,y\nz,w\n", "line 2: there is no file x, nor any of the others"),
    ],
)
def test_mistakes_in_csv(text, reason, place):
    found = message(write(place, text), "train", train_split="")
    assert reason in found
    if "line" in reason:
        assert found.startswith(f"data.name = 'csv:{place}/list.csv': line ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[\n", "line 1: is not JSON ("),
        ("[1]\n", "line 1: is not an object"),
        ("[" * 100_000, "line 1: is not JSON ("),
        ('{"label": "cat"}', "line 1: needs text under the key 'path'"),
        ('{"path": 3, "label": "cat"}', "line 1: needs text under the key 'path'"),
        ('{"path": "a"}', 'line 1: needs "label": text or a whole number'),
        ('{"path": "a", "label": null}', 'line 1: needs "label"'),
        ('{"path": "a", "label": true}', 'line 1: needs "label"'),
        ('{"path": "a", "labels": "cat"}', 'line 1: needs "label"'),
        ('{"path": "a", "label": ["cat"]}', 'line 1: needs "label"'),
        ('{"path": "a", "labels": []}', "line 1: has no label; set data.multi_label = true"),
        ('{"path": "a", "label": ""}', "line 1: has an empty label"),
        ('{"path": "\\ud800", "label": "x"}', "line 1: has a path that is not a valid file name"),
        ('{"path": "a", "label": "\\ud800"}', "line 1: has an empty label, or one that is not"),
        ('{"path": "a", "label": "x", "split": 1}', "line 1: has a split that is not text"),
        (
            '{"path": "a", "label": "x", "split": "t"}\n{"path": "b", "label": "x"}',
            "line 2: must have a split if the first line has one",
        ),
    ],
)
def test_mistakes_in_json_lines(text, reason, place):
    found = message(write(place, text, "list.jsonl"), "train")
    assert found.startswith(f"data.name = 'jsonl:{place}/list.jsonl': line ")
    assert reason in found


def test_labels_that_training_does_not_know(place):
    name = write(place, TEXT.replace("b/3.png,cat", "b/3.png,cat\u00a0"))
    assert len(open_source(name, "test")) == 2  # blanks around a label are none of it
    records = [{"path": "a/0.png", "label": "caf\u00e9", "split": "train"}]
    records += [{"path": "a/1.png", "label": "x", "split": "train"}]
    records += [{"path": "b/2.png", "label": "cafe\u0301", "split": "test"}]
    text = message(write(place, lines(*records), "list.jsonl"), "test")
    assert "line 3: the label 'cafe\\u0301' is not one of the 2 training classes" in text
    assert "('caf\\xe9', x)" in text


@pytest.mark.parametrize("bad", ["missing", "folder", "fifo", "zeros", "sparse", "unreadable"])
def test_files_that_are_no_lists(bad, place):
    path = place / "list.csv"
    if bad == "folder":
        path.mkdir()
    elif bad == "fifo":
        os.mkfifo(path)
    elif bad == "zeros":
        path.symlink_to("/dev/zero")
    elif bad != "missing":
        path.touch(0o000 if bad == "unreadable" else 0o600)
        os.truncate(path, 10**11 if bad == "sparse" else 0)
        if bad == "unreadable" and os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    assert message(f"csv:{path}", "train").startswith(
        f"data.name = 'csv:{path}': cannot read {path} ("
    )
