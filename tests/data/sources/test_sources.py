"""Sources: the digits, TFDS datasets without TensorFlow, folders of images; all their mistakes."""

import concurrent.futures
import errno
import importlib.util
import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from resnet_jax.config.schema import Augment, Config, Data
from resnet_jax.data import prepare
from resnet_jax.data.sources import digits, folders, open_source, tfds_files
from resnet_jax.errors import DataError
from resnet_jax.training.inputs import open_sources


def encoded(array, kind="JPEG"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def pixels(image):
    with Image.open(io.BytesIO(image)) as opened:
        return np.asarray(opened)


def message(*args, call=open_source, **kwargs):
    """The text of the DataError that a call raises: one line always."""
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


# --- The digits -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("digits"))
    prepare.prepare("digits", folder)
    return folder


def test_digits_equal_scikit_learns(digits_dir):
    train, test = (open_source("digits", split, digits_dir) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    found = [(pixels(image).tobytes(), label) for part in (train, test) for image, label in part]
    original = load_digits()
    scaled = np.rint(original.images / 16 * 255).astype(np.uint8)
    expected = [(image.tobytes(), int(label)) for image, label in zip(scaled, original.target)]
    assert sorted(found) == sorted(expected)
    assert (scaled.min(), scaled.max()) == (0, 255)


def test_digits_are_described(digits_dir):
    source = open_source("digits", "test", digits_dir)
    assert source.class_names == tuple("0123456789")
    assert (source.num_classes, source.channels, source.image_shape) == (10, 1, (8, 8))
    assert source.image_name(7) == "test[7]"


def test_sources_count_the_images_of_each_class(digits_dir, tmp_path):
    source = open_source("digits", "test", digits_dir)
    assert source.labels().tolist() == [label for _, label in source]
    assert source.class_counts().sum() == 360
    for number, name in enumerate("ab"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for image in range(number + 2):
            Image.new("L", (4, 4)).save(tmp_path / "train" / name / f"{image}.png")
    folder = open_source(f"folder:{tmp_path}", "train")
    assert folder.labels().tolist() == [label for _, label in folder]
    assert folder.class_counts().tolist() == [2, 3]


def test_digits_splits_hold_every_class_alike():
    for images, labels in digits.load().values():
        assert images.shape[1:] == (8, 8)
        counts = np.bincount(labels, minlength=10)
        assert counts.max() - counts.min() <= 0.06 * len(labels) / 10 + 2


def test_digits_splits_stay_the_same():
    """Accuracies on the test split are compared from release to release."""
    sums = {name: zlib.crc32(images.tobytes()) for name, (images, _) in digits.load().items()}
    assert sums == {"train": 892334940, "test": 2824193226}


def test_parts_of_a_split_are_disjoint_and_whole(digits_dir):
    first, rest = (
        list(open_source("digits", part, digits_dir)) for part in ("train[:90%]", "train[90%:]")
    )
    assert len(first) == 1293
    assert first + rest == list(open_source("digits", "train", digits_dir))
    assert len(open_source("digits", "train[:100]+test", digits_dir)) == 460


def test_indices_are_those_of_a_sequence(digits_dir):
    source = open_source("digits", "test", digits_dir)
    assert source[-1] == source[359] == source[np.int64(359)]
    assert isinstance(source[0][1], int)
    for index in (360, -361):
        with pytest.raises(IndexError, match="of 360"):
            source[index]


def test_digits_prepare_themselves_once(tmp_path):
    open_source("digits", "test", str(tmp_path))
    info = tmp_path / "digits" / "1.0.0" / "dataset_info.json"
    before = info.stat().st_mtime_ns
    open_source("digits", "train", str(tmp_path))
    assert info.stat().st_mtime_ns == before


@pytest.mark.parametrize("lost", ["dataset_info.json", "digits-test.array_record-00000-of-00001"])
def test_half_a_data_set_is_refused_and_stays(digits_dir, tmp_path, lost):
    """The folder may be anyone's: only its owner can say that it may go."""
    shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "digits" / "1.0.0"
    (folder / lost).unlink()
    (folder / "letter.txt").write_text("keep")
    text = message("digits", "test", str(tmp_path))
    assert text.endswith(f"the digits in {folder} are not whole; move that folder away")
    assert (folder / "letter.txt").read_text() == "keep"
    folder.rename(tmp_path / "away")
    assert len(open_source("digits", "test", str(tmp_path))) == 360


FOREIGN = {"pythonClassName": "stranger.payload.X", "jsonFeature": {"json": "{}"}}


@pytest.mark.parametrize(
    "description",
    [
        FOREIGN,
        {"python_class_name": "stranger.payload.X"},
        {"type": "stranger.payload.X", "content": {}},
        {"pythonClassName": 3},
        {"featuresDict": {"features": {"image": FOREIGN}}},
        {"sequence": {"feature": {"featuresDict": {"features": {"x": FOREIGN}}}}},
        {"jsonFeature": {"json": json.dumps({"feature": FOREIGN})}},
        {"pythonClassName": "tensorflow_datasets.core.features.__import__"},
        {"pythonClassName": "tensorflow_datasets.core.features"},
        {"pythonClassName": "tensorflow_datasets.core.features.x\n.stranger"},
        {"content": {"label": {"content": {"names_file": "/etc/passwd"}}}},
        {"featuresDict": {"features": {"../../label": {}}}},
        {"featuresDict": {"features": {"x": {"classLabel": {"numClasses": "2000000000"}}}}},
    ],
)
def test_no_description_loads_code(description, digits_dir, tmp_path, monkeypatch):
    """TFDS imports whatever class features.json names, also from the current folder."""
    shutil.copytree(digits_dir, tmp_path / "data")
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "payload.py").write_text("import os; os.environ['RAN'] = '1'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict"}
    path = tmp_path / "data" / "digits" / "1.0.0" / "features.json"
    path.write_text(json.dumps({**own, **description}))
    text = message("digits", "test", str(tmp_path / "data"))
    assert "\n" not in text
    assert "RAN" not in os.environ
    assert not [name for name in sys.modules if name.startswith("stranger")]


@pytest.mark.parametrize("name", ["label.labels.txt", "dataset_info.json", "extra.txt"])
@pytest.mark.parametrize("kind", ["fifo", "zeros", "sparse"])
def test_special_files_beside_the_records(name, kind, digits_dir, tmp_path):
    """TFDS would read them to their end."""
    shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "digits" / "1.0.0" / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 10**11)
    text = message("digits", "test", str(tmp_path))
    assert "cannot read its description" in text or "not whole" in text


def test_records_outside_of_the_data_set_are_not_read(digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "digits" / "1.0.0" / "dataset_info.json"
    text = path.read_text()
    assert "{DATASET}-{SPLIT}" in text
    path.write_text(text.replace("{DATASET}-{SPLIT}", "../../other/{DATASET}-{SPLIT}"))
    assert "lies outside of" in message("digits", "test", str(tmp_path))


@pytest.mark.parametrize(
    "name", ["../..", "/etc", "a/../b", ".hidden", "a//b", "cifar10:../1", "~", "a/b/c", ""]
)
def test_a_name_is_no_path(name, tmp_path):
    text = message(f"tfds:{name}", "test", str(tmp_path))
    assert "must be" in text
    assert f"tfds:{name}" in text


def test_two_processes_may_prepare_the_digits(tmp_path, monkeypatch):
    real = digits.prepare

    def lose_the_race(root):
        real(root)  # the other process
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(digits, "prepare", lose_the_race)
    assert len(open_source("digits", "test", str(tmp_path))) == 360


def test_digits_without_a_place_or_scikit_learn(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    text = message("digits", "train", str(tmp_path / "file"))
    assert f"data.data_dir = '{tmp_path / 'file'}': cannot write the digits" in text

    for name in [*sys.modules]:
        if name.partition(".")[0] == "sklearn":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert message("digits", "train", str(tmp_path / "other")) == (
        "data.name = 'digits' needs sklearn, which is not installed: pip install scikit-learn, "
        "or this package's extra 'train'"
    )


def test_nothing_imports_tensorflow(digits_dir):
    code = f"""
import sys
import resnet_jax, resnet_jax.data.sources, resnet_jax.data.prepare
assert "tensorflow_datasets" not in sys.modules
import tensorflow_datasets.core.registered as registered
before = set(registered._DATASET_REGISTRY)
source = resnet_jax.data.sources.open_source("digits", "train", {digits_dir!r})
source[0]
resnet_jax.data.prepare.prepare("digits", {digits_dir!r})
import resnet_jax.data.sources.digits
assert set(registered._DATASET_REGISTRY) == before
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- TFDS -----------------------------------------------------------------------------------

PHOTOS = [
    np.random.default_rng(seed).integers(0, 256, (6 + seed % 3, 9, 3), np.uint8)
    for seed in range(12)
]


class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """JPEGs of several sizes, other names of features, a mask beside the image, unlabelled ones."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = {
            "mask": tfds.features.Image(shape=(None, None, 1)),
            "photo": tfds.features.Image(),
            "kind": tfds.features.ClassLabel(names=["cat", "dog", "eel"]),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("photo", "kind"),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0), "unlabelled": self._generate_examples(-1)}

    def _generate_examples(self, sign):
        for key, photo in enumerate(PHOTOS):
            label = sign if sign < 0 else key % 3
            yield key, {"mask": b"not an image", "photo": encoded(photo), "kind": label}


class Vectors(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"vector": np.float32})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"vector": np.float32(1)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (Photos, Vectors):
        builder(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def photos_dir(prepared, tmp_path):
    """A copy of the prepared datasets that a test may damage."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_tfds_gives_the_bytes_as_stored(prepared):
    source = open_source("tfds:photos", "train", str(prepared))
    expected = [(encoded(photo), key % 3) for key, photo in enumerate(PHOTOS)]
    assert sorted(source) == sorted(expected)
    assert source.class_names == ("cat", "dog", "eel")
    assert (source.channels, source.image_shape) == (3, None)
    assert list(open_source("tfds:photos:1.2.0", "train", str(prepared))) == list(source)


def test_tfds_takes_the_highest_version(photos_dir):
    folder = photos_dir / "photos"
    for version in ("1.10.0", "1.9.0"):
        shutil.copytree(folder / "1.2.0", folder / version)
    assert tfds_files.find_prepared("photos", str(photos_dir)).name == "1.10.0"
    assert tfds_files.find_prepared("photos:1.9.0", str(photos_dir)).name == "1.9.0"


def test_tfds_default_folder(prepared, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(prepared))
    assert len(open_source("tfds:photos", "train")) == 12


@pytest.mark.parametrize("name", ["digits", "tfds:cifar10"])
def test_buckets_are_mounted(name, monkeypatch):
    message = (
        "^data.data_dir = 'gs://photos/tfds': datasets are read from folders, not from a bucket, "
        "and a package such as gcsfs does not change that; mount it "
        r"\(gcsfuse photos /mnt/photos\) and give /mnt/photos/tfds, or copy it to a disk$"
    )
    with pytest.raises(DataError, match=message):
        open_source(name, "train", "gs://photos/tfds")
    with pytest.raises(DataError, match=r"^data.name = 'folder:s3://a/b': .*give /mnt/a/b, "):
        open_source("folder:s3://a/b", "train")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", "gs://photos/tfds")  # of TFDS_DATA_DIR
    with pytest.raises(DataError, match=message):
        open_source(name, "train")


def test_tfds_folder_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_source("digits", "train", "here")
    assert (tmp_path / "here" / "digits").is_dir()


def test_tfds_reads_from_threads(digits_dir):
    source = open_source("digits", "train", digits_dir)
    expected = list(source)
    source = pickle.loads(pickle.dumps(source))  # noqa: S301 - with no reader open yet
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, range(len(source)))) == expected


def test_tfds_names_that_are_not_there(prepared):
    place = str(prepared)
    assert message("tfds:cifar10", "train", place) == (
        f"data.name = 'tfds:cifar10': not prepared in data.data_dir = '{place}'; run: "
        f"python -m resnet_jax prepare cifar10 --data_dir={place}"
    )
    assert "did you mean cifar10" in message("tfds:cifar1O", "train", place)
    text = message("tfds:photos:9.0.0", "train", place)
    assert "no version 9.0.0" in text
    assert "only 1.2.0" in text
    for name in ("tfds:", "cifar10", "", "folder:"):
        text = message(name, "train", place)
        assert text.startswith(f"data.name = {name!r}: must be digits, tfds:NAME[:VERSION]")


def test_tfds_configurations(photos_dir):
    shutil.move(photos_dir / "photos", photos_dir / "base")
    shutil.move(photos_dir / "base", photos_dir / "photos" / "small")
    assert "choose one, such as tfds:photos/small" in message("tfds:photos", "train", photos_dir)
    assert len(open_source("tfds:photos/small", "train", str(photos_dir))) == 12


@pytest.mark.parametrize(
    "split", ["trian", "train[", "train[:200%]", "train[:0]", "", "validation"]
)
def test_tfds_splits_that_are_not_there(prepared, split):
    text = message("tfds:photos", split, str(prepared))
    assert text.startswith(f"data.eval_split = {split!r}: ")
    assert "its splits: train, unlabelled" in text
    assert text.endswith("; did you mean 'train'?") == (split == "trian")
    text = message("tfds:photos", split, str(prepared), train_split=split)
    assert text.startswith(f"data.train_split = {split!r}: ")
    assert text.endswith("; did you mean 'train'?") == (split in ("trian", "validation"))


def test_tfds_data_sets_that_cannot_train(prepared):
    assert "needs an image with a class label; its features: vector" in message(
        "tfds:vectors", "train", str(prepared)
    )
    assert "has no label (-1); choose another split" in message(
        "tfds:photos", "unlabelled", str(prepared)
    )


def test_tfds_half_prepared(photos_dir):
    folder = photos_dir / "photos"
    (folder / "1.2.0" / "photos-train.array_record-00000-of-00001").unlink()
    text = message("tfds:photos", "train", str(photos_dir))
    assert "half-prepared: 1 files of split train are missing" in text
    shutil.move(folder / "1.2.0", folder / "incomplete.ABCDEF_1.2.0")
    text = message("tfds:photos", "train", str(photos_dir))
    assert "half-prepared in data.data_dir" in text
    assert "python -m resnet_jax prepare photos" in text


@pytest.mark.parametrize("size", [0, 100, 65536])
def test_tfds_files_that_were_cut_off(photos_dir, size):
    path = photos_dir / "photos" / "1.2.0" / "photos-train.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[:size])
    text = message("tfds:photos", "train", str(photos_dir))
    assert "train[0] of" in text
    assert "the file is damaged" in text


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("open() failed: Too many open files; opening x", "raise `ulimit -n`"),
        ("open() failed: Permission denied; opening x", "fix that"),
        ("read() failed: Input/output error", "fix that"),
        ("Invalid chunk header hash", "the file is damaged"),
    ],
)
def test_only_damage_is_called_damage(words, advice, photos_dir, monkeypatch):
    """Whoever deletes ImageNet because too many files are open has lost it."""
    source = open_source("tfds:photos", "train", str(photos_dir))

    class Records:
        def __getitem__(self, position):
            raise RuntimeError(words)

    source._records = Records()
    text = message(0, call=source.__getitem__)
    assert advice in text
    assert "delete" not in text
    assert ("damaged" in text) == (advice == "the file is damaged")


def test_the_limit_of_open_files_is_raised(photos_dir):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
        open_source("tfds:photos", "train", str(photos_dir))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 65_536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_tfds_description_that_is_damaged(photos_dir):
    (photos_dir / "photos" / "1.2.0" / "dataset_info.json").write_text("{")
    text = message("tfds:photos", "train", str(photos_dir))
    assert text.startswith("data.name = 'tfds:photos': cannot read its description")
    again = message("photos", str(photos_dir), call=prepare.prepare)
    assert again.startswith(text[:55])


def test_tfds_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert "pip install tensorflow-datasets" in message("tfds:photos", "train")


# --- Preparing ------------------------------------------------------------------------------


def to_tfrecord(folder):
    """Turns a prepared dataset into what TFDS writes with TensorFlow."""
    info = tfds.builder_from_directory(folder).info
    for split in info.splits.values():
        (path,) = split.filepaths
        raw = tfds.builder_from_directory(folder).as_data_source(
            split.name, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        frames = [struct.pack("<QI", len(each), 0) + each + b"crc." for each in raw]
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(b"".join(frames))
        path.unlink()
    description = folder / "dataset_info.json"
    description.write_text(description.read_text().replace('"array_record"', '"tfrecord"'))


def test_prepare_converts_tfrecord(photos_dir):
    place, folder = str(photos_dir), photos_dir / "photos" / "1.2.0"
    before = open_source("tfds:photos", "train", place)
    expected = list(before)
    to_tfrecord(folder)
    text = message("tfds:photos", "train", place)
    assert "prepared as tfrecord" in text
    assert f"python -m resnet_jax prepare photos --data_dir={place}" in text

    prepare.prepare("tfds:photos", place)
    after = open_source("tfds:photos", "train", place)
    assert list(after) == expected
    assert after.fingerprint == before.fingerprint
    assert len(list(folder.glob("*.tfrecord-*"))) == 2
    prepare.prepare("photos", place)  # nothing left to do
    for path in folder.glob("*.tfrecord-*"):  # as the docstring allows
        path.unlink()
    assert list(open_source("tfds:photos", "train", place)) == expected
    assert not list(folder.glob("incomplete*"))


def test_prepare_goes_on_with_a_conversion(photos_dir):
    folder = photos_dir / "photos" / "1.2.0"
    to_tfrecord(folder)
    whole = folder / "photos-unlabelled.tfrecord-00000-of-00001"
    content = whole.read_bytes()
    for cut in (content[:-5], content[:7], content + b"123", content[: len(content) // 12]):
        whole.write_bytes(cut)
        assert "damaged" in message("photos", str(photos_dir), call=prepare.prepare)
        assert "tfrecord" in message("tfds:photos", "train", str(photos_dir))
    assert not list(folder.glob("incomplete*"))
    whole.write_bytes(content)
    done = (folder / "photos-train.array_record-00000-of-00001").stat().st_mtime_ns
    prepare.prepare("photos", str(photos_dir))
    assert (folder / "photos-train.array_record-00000-of-00001").stat().st_mtime_ns == done
    assert len(open_source("tfds:photos", "train", str(photos_dir))) == 12


def test_prepare_counts_the_examples(photos_dir):
    folder = photos_dir / "photos" / "1.2.0"
    to_tfrecord(folder)
    path = folder / "photos-train.tfrecord-00000-of-00001"
    content = path.read_bytes()
    (first,) = struct.unpack_from("<Q", content)
    path.write_bytes(content[12 + first + 4 :])
    assert "holds 11 examples, not 12" in message("photos", photos_dir, call=prepare.prepare)
    path.unlink()
    assert "lacks 1 files" in message("photos", str(photos_dir), call=prepare.prepare)


def test_prepare_needs_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = message("cifar10", str(tmp_path), call=prepare.prepare)
    assert text == (
        "data.name = 'tfds:cifar10': TFDS needs TensorFlow to prepare it (never to read it): "
        "pip install tensorflow-cpu"
    )


@pytest.mark.parametrize("name", ["no_such_set", "folder:/images", "no_such_set:1.0.0"])
def test_prepare_unknown_names(tmp_path, name):
    assert message(name, str(tmp_path), call=prepare.prepare).startswith("data.name = ")


def test_prepare_wants_imagenets_archives_first(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    text = message("imagenet2012", str(tmp_path), call=prepare.prepare)
    assert f"manual_dir = '{tmp_path}/downloads/manual'" in text
    assert "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar" in text
    assert "image-net.org" in text
    (tmp_path / "ILSVRC2012_img_train.tar").touch()
    text = message("imagenet2012:5.1.0", str(tmp_path), str(tmp_path), call=prepare.prepare)
    assert "': ILSVRC2012_img_val.tar must be there" in text


class Failing:
    def __init__(self, error):
        self.error = error

    def __call__(self, name, **settings):
        assert settings["file_format"] == "array_record"
        return self

    def download_and_prepare(self, download_config):
        raise self.error


@pytest.mark.parametrize(
    ("error", "start", "part"),
    [
        (ConnectionError("no\nroute"), "data.name = 'tfds:cifar10'", "ConnectionError: no route"),
        (AssertionError(), "data.name = 'tfds:cifar10'", "(AssertionError: AssertionError)"),
        (OSError(errno.ENOSPC, "No space left", "/d/x"), "data.data_dir = ", "cannot write /d/x"),
        (PermissionError(errno.EACCES, "Permission denied"), "data.data_dir = ", "denied"),
        (RuntimeError("write: No space left on device"), "data.data_dir = ", "No space left"),
        (OSError("Not enough disk space. Needed: 1 GiB"), "data.data_dir = ", "Needed: 1 GiB"),
    ],
)
def test_prepare_explains_failures(tmp_path, monkeypatch, error, start, part):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tfds, "builder", Failing(error))
    text = message("cifar10", str(tmp_path), call=prepare.prepare)
    assert text.startswith(start)
    assert part in text


# --- Folders --------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """Two splits of two classes, with things beside them that are not images."""
    root = tmp_path / "images"
    for split, count in (("train", 3), ("test", 2)):
        for kind in ("cat", "dog"):
            folder = root / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.jpg").write_bytes(encoded(PHOTOS[number]))
            (folder / ".hidden.jpg").touch()
            (folder / "notes.txt").touch()
    (root / "train" / ".cache").mkdir()
    (root / "train" / "dog" / "3.PNG").write_bytes(encoded(PHOTOS[3], "PNG"))
    (root / "train" / "README").touch()
    return root


def test_folder_order_and_labels(images):
    source = open_source(f"folder:{images}", "train")
    assert source.class_names == ("cat", "dog")
    names = [source.image_name(index) for index in range(len(source))]
    expected = ["cat/0.jpg", "cat/1.jpg", "cat/2.jpg"]
    expected += ["dog/0.jpg", "dog/1.jpg", "dog/2.jpg", "dog/3.PNG"]
    assert names == [str(images / "train" / each) for each in expected]
    assert [label for _, label in source] == [0, 0, 0, 1, 1, 1, 1]
    assert source[-1] == (encoded(PHOTOS[3], "PNG"), 1)
    assert (source.num_classes, source.channels, source.image_shape) == (2, 3, None)


def test_what_is_left_out_is_said(images):
    text = "2 files that are not images by their names (.txt)"
    assert open_source(f"folder:{images}", "test").left_out == text
    for name in ("a.txt", "b.txt", "README", ".hidden"):
        (images / "test" / "cat" / name).touch()
    (images / "test" / "dog" / "more").mkdir()
    (images / "test" / "dog" / "more" / "x.doc").touch()
    (images / "test" / "dog" / "gone.png").symlink_to("nowhere")
    shutil.copy(images / "test" / "cat" / "0.jpg", images / "test")
    assert open_source(f"folder:{images}", "test").left_out == (
        "6 files that are not images by their names (.txt, README, .doc); 1 images in no class "
        "folder; 1 broken links, which count as corrupt"
    )


def test_folders_in_class_folders(images):
    flat = open_source(f"folder:{images}", "test")
    inside = images / "test" / "cat" / "a" / "b"
    inside.mkdir(parents=True)
    (inside / "2.jpg").write_bytes(encoded(PHOTOS[2]))
    (images / "test" / "cat" / ".git").mkdir()
    shutil.copy(inside / "2.jpg", images / "test" / "cat" / ".git" / "x.jpg")
    (images / "test" / "cat" / "a.jpg").mkdir()  # a folder, whatever it is called
    source = open_source(f"folder:{images}", "test")
    assert source.image_name(2) == str(inside / "2.jpg")
    assert [label for _, label in source] == [0, 0, 0, 1, 1]
    assert source[2][0] == encoded(PHOTOS[2])
    assert source.fingerprint != flat.fingerprint


def test_links_between_folders_end(images):
    """Without care, each of them would be walked through for ever, or give one image twice."""
    cat, dog = images / "test" / "cat", images / "test" / "dog"
    (cat / "a").mkdir()
    (cat / "a" / "2.jpg").write_bytes(encoded(PHOTOS[2]))
    for name, target in (("up", ".."), ("self", "."), ("a/root", "/"), ("z", "a"), ("d", dog)):
        (cat / name).symlink_to(target)
    for number in range(30):  # links to each other: 30! ways
        (cat / f"x{number}").mkdir()
        for other in range(30):
            (cat / f"x{number}" / f"to{other}").symlink_to(f"../x{other}")
    source = open_source(f"folder:{images}", "test")
    names = [os.path.relpath(source.image_name(index), cat) for index in range(len(source))]
    assert names[:5] == ["0.jpg", "1.jpg", "a/2.jpg", "d/0.jpg", "d/1.jpg"]
    assert len(names) == 7
    linked = images / "linked"
    linked.mkdir()
    for name in ("cat", "dog"):
        (linked / name).symlink_to(images / "train" / name)
    assert len(open_source(f"folder:{images}", "linked")) == 7


def test_folder_suffixes(images):
    for suffix in ("jpeg", "webp", "bmp", "JPG"):
        (images / "test" / "cat" / f"more.{suffix}").write_bytes(b"image")
    assert len(open_source(f"folder:{images}", "test")) == 8


def test_names_that_are_not_utf8(images):
    path = os.fsencode(images / "test" / "dog") + b"/\xe9.jpg"
    with open(path, "wb") as file:
        file.write(encoded(PHOTOS[0]))
    source = open_source(f"folder:{images}", "test")
    assert len(source.fingerprint) == 16
    assert "\udce9.jpg" in source.image_name(len(source) - 1)


def test_folder_of_grey_images(images):
    for number in range(2):
        path = images / "test" / "cat" / f"{number}.jpg"
        path.write_bytes(encoded(PHOTOS[number][..., 0]))
    assert open_source(f"folder:{images}", "test").channels == 3  # the dogs have colours
    for number in range(2):
        path = images / "test" / "dog" / f"{number}.jpg"
        path.write_bytes(encoded(PHOTOS[number][..., 0]))
    assert open_source(f"folder:{images}", "test").channels == 1
    (images / "test" / "dog" / "0.jpg").write_bytes(b"damaged")
    assert open_source(f"folder:{images}", "test").channels == 1
    (images / "test" / "cat" / "0.jpg").write_bytes(b"damaged")
    assert open_source(f"folder:{images}", "test").channels == 1  # by those after them
    for name in ("cat/1.jpg", "dog/1.jpg"):
        (images / "test" / name).write_bytes(b"damaged")
    assert "can be opened" in message(f"folder:{images}", "test")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_every_kind_of_grey(mode, tmp_path):
    for name in ("cat/0.png", "dog/0.png"):
        path = tmp_path / "test" / name
        path.parent.mkdir(parents=True)
        Image.new("L", (4, 4)).convert(mode).save(path)
    assert open_source(f"folder:{tmp_path}", "test").channels == 1


def test_grey_images_first_do_not_make_a_grey_data_set(images):
    for label in ("cat", "dog"):
        for number in range(20):
            path = images / "train" / label / f"!{number:02}.jpg"
            path.write_bytes(encoded(PHOTOS[0][..., 0]))
    assert open_source(f"folder:{images}", "train").channels == 3


def test_channels_are_those_of_the_training_split(images):
    """Else the evaluation ends after an epoch, because the network takes others."""
    for path in (images / "test").rglob("*.jpg"):
        path.write_bytes(encoded(PHOTOS[0][..., 0]))
    assert open_source(f"folder:{images}", "test").channels == 1
    config = Config(data=Data(name=f"folder:{images}"), augment=Augment(mean=(0.5,), std=(0.2,)))
    assert {each.channels for each in open_sources(config).values()} == {3}


@pytest.mark.parametrize("bad", ["loop", "nothing", "fifo", "device", "sparse", "unreadable"])
def test_a_bad_entry_is_named_when_it_is_read(images, bad):
    path = images / "test" / "cat" / "0.jpg"
    path.unlink()
    if bad == "fifo":
        os.mkfifo(path)
    elif bad in ("sparse", "unreadable"):
        path.touch(0o000 if bad == "unreadable" else 0o600)
        os.truncate(path, 10**11 if bad == "sparse" else 10)
        if bad == "unreadable" and os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    else:
        path.symlink_to({"loop": path, "nothing": "nowhere", "device": "/dev/zero"}[bad])
    source = open_source(f"folder:{images}", "test")
    assert len(source) == 4  # it keeps its place, so that the others keep theirs
    assert f"cannot read {path}: " in message(0, call=source.__getitem__)
    assert source[1][0]


def test_folder_under_home(images, monkeypatch):
    monkeypatch.setenv("HOME", str(images.parent))
    assert len(open_source("folder:~/images", "test")) == 4
    monkeypatch.chdir(images.parent)
    source = open_source("folder:images", "test")
    monkeypatch.chdir("/")
    assert source[0][1] == 0


def test_folder_splits_that_are_not_there(images):
    text = message(f"folder:{images}", "validation")
    assert text.startswith("data.eval_split = 'validation'")
    assert text.endswith("it has: test, train; did you mean 'test'?")
    text = message(f"folder:{images}", "val[:90%]", train_split="val[:90%]")
    assert text.startswith("data.train_split = 'val[:90%]': ")
    assert text.endswith("has no folder 'val'; it has: test, train; did you mean 'train'?")
    assert message(f"folder:{images}", "tets").endswith("; did you mean 'test'?")
    assert message(f"folder:{images}", "train+Test").endswith("; did you mean 'test'?")
    for split in ("", "."):
        assert "it has: test, train" in message(f"folder:{images}", split)
    shutil.rmtree(images / "test")
    assert message(f"folder:{images}", "test").endswith(
        "it has: train; to divide it, set data.train_split = 'train[:90%]' and data.eval_split = "
        "'train[90%:]'"
    )


def test_folder_that_is_no_data_set(images, tmp_path):
    assert "is not a folder" in message(f"folder:{tmp_path}/nowhere", "train")
    assert "is not a folder" in message(f"folder:{images}/train/README", "train")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "has no class folders" in message(f"folder:{tmp_path}/empty", "train")
    (tmp_path / "empty" / "train").rmdir()
    assert "has no folders" in message(f"folder:{tmp_path}/empty", "train")


def test_folder_needs_two_classes_with_images(images):
    shutil.rmtree(images / "train" / "cat")
    text = message(f"folder:{images}", "train")
    assert "has one class, dog; needs two" in text
    (images / "train" / "cat").mkdir()
    (images / "train" / "cat" / "0.svg").touch()
    text = message(f"folder:{images}", "train")
    assert "has no images of 1 of the 2 classes (cat) (it has 2 files that are not images" in text
    assert text.endswith(
        "set data.allow_missing_classes = true (evaluate: --allow_missing_classes)"
    )
    source = open_source(f"folder:{images}", "train", allow_missing_classes=True)
    assert source.class_names == ("cat", "dog")
    assert source.class_counts().tolist() == [0, 4]
    assert [label for _, label in source] == [1] * 4
    assert source.left_out.startswith("no images of 1 of the 2 classes (cat); 2 files")
    shutil.rmtree(images / "train" / "dog")
    (images / "train" / "dog").mkdir()
    assert "of 2 of the 2" in message(f"folder:{images}", "train", allow_missing_classes=True)


def test_folder_classes_are_those_of_the_train_split(images):
    shutil.copytree(images / "test" / "cat", images / "test" / "eel")
    text = message(f"folder:{images}", "test")
    assert text.startswith("data.eval_split = 'test': has 1 classes more than data.train_split")
    assert "(eel)" in text
    shutil.rmtree(images / "test" / "eel")
    shutil.rmtree(images / "test" / "cat")
    assert "has no images of 1 of the 2 classes (cat)" in message(f"folder:{images}", "test")
    source = open_source(f"folder:{images}", "test", allow_missing_classes=True)
    assert (source.class_names, len(source), source[0][1]) == (("cat", "dog"), 2, 1)
    assert "has one class" in message(f"folder:{images}", "test", train_split="training")


def test_class_names_that_look_the_same(images):
    """Composed and decomposed letters, and a trailing blank."""
    for split, names in (("train", ["caf\u00e9", "eel"]), ("test", ["cafe\u0301", "eel "])):
        for name in names:
            shutil.copytree(images / split / "cat", images / split / name)
    text = message(f"folder:{images}", "test")
    assert "has 2 classes more" in text
    assert "('cafe\\u0301', 'eel ')" in text


def test_classes_without_splits(tmp_path, images):
    """The message says how to take parts of them."""
    text = message(f"folder:{images}/train", "train")
    assert text.endswith(f"train is a split of data.name = 'folder:{images}', beside test")
    shutil.rmtree(images / "test")
    text = message(f"folder:{images}/train", "train")
    advice = f"data.name = 'folder:{images}', data.train_split = 'train[:90%]' and "
    assert f"it has: cat, dog. If these are classes, train is the split: {advice}" in text
    assert len(open_source(f"folder:{images}", "train[:90%]")) == 5


def test_folders_as_sets_of_labels(images):
    source = open_source(f"folder:{images}", "train", multi_label=True)
    assert source.label_shape == (2,)
    assert source[0][1].tolist() == [1, 0]
    assert source.labels().tolist() == [each.tolist() for _, each in source]
    assert source.class_counts().tolist() == [3, 4]


# --- Parts of folders -----------------------------------------------------------------------


def names_of(source):
    return [source.image_name(index) for index in range(len(source))]


@pytest.fixture
def many(tmp_path):
    """A hundred images of one class, ten of the second, two of the third."""
    for label, count in (("a", 100), ("b", 10), ("c", 2)):
        folder = tmp_path / "many" / "train" / label
        folder.mkdir(parents=True)
        for number in range(count):
            Image.new("L", (1, 1)).save(folder / f"{number:02}.png")
    return tmp_path / "many"


def test_parts_of_a_folder(many):
    whole = open_source(f"folder:{many}", "train")
    first = open_source(f"folder:{many}", "train[:80%]", train_split="train[:80%]")
    rest = open_source(f"folder:{many}", "train[-20%:]", train_split="train[:80%]")
    assert sorted(names_of(first) + names_of(rest)) == names_of(whole)
    assert first.class_counts().tolist() == [80, 8, 1]
    assert rest.class_counts().tolist() == [20, 2, 1]
    assert names_of(first) == sorted(names_of(first))
    # The same images on every host and day, in whatever folder.
    known = ["00", "06", "11", "16", "23", "49", "53", "56", "57", "61"]
    assert [os.path.basename(name)[:2] for name in names_of(rest)][:10] == known
    assert len({each.fingerprint for each in (whole, first, rest)}) == 3
    moved = many.rename(many.parent / "moved")
    assert open_source(f"folder:{moved}", "train[-20%:]").fingerprint == rest.fingerprint


def test_folds_of_a_folder(many):
    held_out = []
    for start in range(0, 100, 20):
        fold = f"train[{start}%:{start + 20}%]"
        others = "+".join(
            part
            for part, there in (
                (f"train[:{start}%]", start > 0),
                (f"train[{start + 20}%:]", start < 80),
            )
            if there
        )
        part = open_source(f"folder:{many}", fold, allow_missing_classes=True)
        trained = open_source(f"folder:{many}", others, allow_missing_classes=True)
        assert not set(names_of(part)) & set(names_of(trained))
        assert len(part) + len(trained) == 112
        assert part.class_counts().tolist()[:2] == [20, 2]
        held_out += names_of(part)
    assert len(held_out) == len(set(held_out)) == 112


def test_more_images_move_few_others(many):
    before = set(names_of(open_source(f"folder:{many}", "train[:90%]")))
    for number in range(100, 110):
        Image.new("L", (1, 1)).save(many / "train" / "a" / f"{number}.png")
    after = set(names_of(open_source(f"folder:{many}", "train[:90%]")))
    assert len(before - after) <= 10


def test_splits_joined(images):
    both = open_source(f"folder:{images}", "test+train[:50%]")
    assert both.class_counts().tolist() == [2 + 2, 2 + 2]
    assert names_of(both)[:2] == [str(images / "test" / "cat" / f"{each}.jpg") for each in (0, 1)]
    assert [label for _, label in both] == both.labels().tolist()
    assert list(pickle.loads(pickle.dumps(both))) == list(both)  # noqa: S301
    (images / "a+b[:50%]").mkdir()  # a folder of this very name counts
    for label in ("cat", "dog"):
        shutil.copytree(images / "test" / label, images / "a+b[:50%]" / label)
    assert len(open_source(f"folder:{images}", "a+b[:50%]")) == 4


@pytest.mark.parametrize(
    ("split", "reason"),
    [
        ("train[:1000]", "1000 must be a percentage, which is taken of every class"),
        ("train[10%]", "must be a split or parts of splits"),
        ("train[:]+", "must be a split or parts of splits"),
        ("train[:200%]", "200% must be between"),
        ("train[50%:50%]", "selects nothing"),
        ("train[-10%:90%]", "selects nothing"),
        ("train[:50%]+train[40%:]", "selects images of train twice"),
        ("train+train", "selects images of train twice"),
        ("../images[:5%]", "must be the name of a folder in"),
        ("train[:99999999999999999999%]", "must be a percentage"),
    ],
)
def test_parts_that_are_none(split, reason, images):
    text = message(f"folder:{images}", split)
    assert text.startswith(f"data.eval_split = {split!r}: ")
    assert reason in text


def test_known_fingerprints_of_flat_folders(tmp_path):
    """Runs of earlier versions resume: these were printed by the code before there were parts."""
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "1.pgm").write_bytes(b"P5 1 1 255\n" + label.encode())
    found = [open_source(f"folder:{tmp_path}", split).fingerprint for split in ("train", "test")]
    assert found == ["8b0648bacf588994", "f3365c18b1a256b1"]


def test_folder_that_cannot_be_read(images, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(folders.os, "scandir", refuse)
    assert "cannot read" in message(f"folder:{images}", "train")
    monkeypatch.undo()
    monkeypatch.setattr(folders.os, "listdir", refuse)
    assert "Permission denied" in message(f"folder:{images}", "train")


def test_folder_file_that_vanished(images):
    source = open_source(f"folder:{images}", "train")
    path = images / "train" / "cat" / "1.jpg"
    path.unlink()
    text = message(1, call=source.__getitem__)
    assert text == f"cannot read {path}: No such file or directory"


# --- All ------------------------------------------------------------------------------------


def test_sources_pickle(prepared, images):
    for source in (
        open_source("tfds:photos", "train", str(prepared)),
        open_source(f"folder:{images}", "train"),
    ):
        pickled = pickle.dumps(source)
        assert len(pickled) < 2000
        again = pickle.loads(pickled)  # noqa: S301
        assert again.image_name(2) == source.image_name(2)
        assert list(again) == list(source)
        for name in ("class_names", "channels", "image_shape", "fingerprint"):
            assert getattr(again, name) == getattr(source, name)


def test_sources_pickle_into_another_process(prepared, tmp_path):
    source = open_source("tfds:photos", "train", str(prepared))
    (tmp_path / "source.pickle").write_bytes(pickle.dumps(source))
    code = (
        "import pickle, sys; source = pickle.load(open(sys.argv[1], 'rb'));"
        "assert 'tensorflow' not in sys.modules; print(len(source), source[3][1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "source.pickle"], capture_output=True, text=True
    )
    assert done.stdout == f"12 {source[3][1]}\n", done.stderr


def test_fingerprints_tell_data_apart(digits_dir, prepared, images):
    folder = f"folder:{images}"
    seen = {
        open_source("digits", "train", digits_dir).fingerprint,
        open_source("digits", "test", digits_dir).fingerprint,
        open_source("digits", "train[:50%]", digits_dir).fingerprint,
        open_source("tfds:photos", "train", str(prepared)).fingerprint,
        open_source(folder, "train").fingerprint,
        open_source(folder, "test").fingerprint,
    }
    assert len(seen) == 6
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in seen)


def test_fingerprint_of_a_folder_follows_its_files(images, tmp_path):
    first = open_source(f"folder:{images}", "train").fingerprint
    copy = tmp_path / "copy"
    shutil.copytree(images, copy)
    assert open_source(f"folder:{copy}", "train").fingerprint == first
    (copy / "train" / "cat" / "notes.txt").write_text("not an image")
    assert open_source(f"folder:{copy}", "train").fingerprint == first
    with open(copy / "train" / "cat" / "1.jpg", "ab") as file:
        file.write(b"!")
    longer = open_source(f"folder:{copy}", "train").fingerprint
    os.rename(copy / "train" / "cat" / "1.jpg", copy / "train" / "cat" / "4.jpg")
    renamed = open_source(f"folder:{copy}", "train").fingerprint
    assert len({first, longer, renamed}) == 3
