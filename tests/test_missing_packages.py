"""A package that is missing or broken: one line names the module at fault, whatever needed it."""

import importlib.abc
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import resnet_jax as rj
from resnet_jax import WeightsError, report
from resnet_jax.cli import commands, parser
from resnet_jax.config.schema import Checkpoint, Config, Log
from resnet_jax.data.decode import image_pixels, jpeg
from resnet_jax.data.sources import open_source
from resnet_jax.data.sources.tfds_files import import_tfds
from resnet_jax.errors import (
    ConfigError,
    DataError,
    ExportError,
    import_failure,
    library_errors,
)
from resnet_jax.errors import (
    WeightsError as AnyWeightsError,
)
from resnet_jax.export import agreement, exporter
from resnet_jax.export.hub import push_folder
from resnet_jax.weights.files import read_state_dict
from resnet_jax.weights.pretrained import load_pretrained
from resnet_jax.workdirs.metric_writers import _TensorBoard, _WeightsAndBiases
from resnet_jax.workdirs.remote_copy import RemoteCopy

BROKEN = "/usr/lib/libfoo.so: undefined symbol: _Zfoo"


class _Failing(importlib.abc.MetaPathFinder):
    """Importing a library fails as if one of its own imports had failed."""

    def __init__(self, library, error):
        self.library, self.error = library, error

    def find_spec(self, name, path, target=None):
        del path, target
        if name.partition(".")[0] == self.library:
            raise self.error


@pytest.fixture
def fail(monkeypatch):
    """Makes the import of a library fail, also for those of our modules that have it already."""

    def start(library, error, ours=()):
        for name in [*sys.modules]:
            if name.partition(".")[0] == library or any(map(name.startswith, ours)):
                package, _, module = name.rpartition(".")
                if package in sys.modules:  # `from package import module` looks there first
                    monkeypatch.delattr(sys.modules[package], module, raising=False)
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [_Failing(library, error), *sys.meta_path])

    return start


def _pth(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"")
    read_state_dict(tmp_path / "w.pth")


def _parquet(tmp_path):
    from resnet_jax.inference.features import write_features

    write_features(None, [], tmp_path / "x.parquet")


# What is done, the library that it imports, the error, and what of ours has imported it before.
def _load_workdir(folder):
    (folder / "checkpoints").mkdir()
    return rj.load_weights(rj.ResNet20(), folder)


CASES = {
    "digits": (lambda at: open_source("digits", "train", str(at)), "sklearn", DataError, ()),
    "tfds": (lambda at: import_tfds(), "tensorflow_datasets", DataError, ()),
    "onnx": (
        lambda at: exporter._write_onnx(None),
        "onnxruntime",
        ExportError,
        ("resnet_jax.export.onnx",),
    ),
    "images to compare on": (lambda at: agreement.sample_images(None), "sklearn", ExportError, ()),
    "hub": (lambda at: load_pretrained("a/b"), "huggingface_hub", WeightsError, ()),
    "push": (lambda at: push_folder(at, "a/b"), "huggingface_hub", ExportError, ()),
    "pth": (_pth, "torch", AnyWeightsError, ()),
    "parquet": (_parquet, "pyarrow", ConfigError, ()),
    "tensorboard": (
        lambda at: _TensorBoard(at, 0),
        "tensorboardX",
        ConfigError,
        (),
    ),
    "wandb": (
        lambda at: _WeightsAndBiases(Config(log=Log(wandb="x")), at),
        "wandb",
        ConfigError,
        (),
    ),
    "bucket": (
        lambda at: RemoteCopy(Config(checkpoint=Checkpoint(copy_to="gs://a/b")), at),
        "gcsfs",
        ConfigError,
        (),
    ),
    "workdir": (
        _load_workdir,
        "orbax",
        WeightsError,
        ("resnet_jax.workdirs.checkpoint", "resnet_jax.workdirs.saved_state"),
    ),
}


@pytest.mark.parametrize("family", CASES)
def test_a_missing_dependency_of_a_library_is_named(family, fail, tmp_path):
    call, library, kind, ours = CASES[family]
    fail(library, ModuleNotFoundError("No module named 'joblib2'", name="joblib2"), ours)
    with pytest.raises(kind) as caught:
        call(tmp_path)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert text.endswith(" needs joblib2, which is not installed: pip install joblib2"), text


@pytest.mark.parametrize("family", CASES)
def test_a_broken_library_keeps_its_words(family, fail, tmp_path):
    call, library, kind, ours = CASES[family]
    fail(library, ImportError(BROKEN, name=library), ours)
    with pytest.raises(kind) as caught:
        call(tmp_path)
    assert BROKEN in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "install" not in str(caught.value)


_OF_CV2 = ("resnet_jax.inference.classifier", "resnet_jax.data.decode")
_OF_MATPLOTLIB = tuple(
    f"resnet_jax.report.{each.name}" for each in pkgutil.iter_modules(report.__path__)
)
COMMANDS = {
    "images": (["predict", "w.npz", "a.jpg"], "cv2", _OF_CV2),
    "report": (["report", "run"], "matplotlib", _OF_MATPLOTLIB),
    "train": (["train"], "absl", ()),
}


@pytest.mark.parametrize("family", COMMANDS)
def test_commands_name_it_too(family, fail, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, library, ours = COMMANDS[family]
    with monkeypatch.context():
        fail(library, ModuleNotFoundError("No module named 'yaml'", name="yaml"), ours)
        assert parser.main(arguments) == 2
    assert capsys.readouterr().err == "error: yaml is not installed: pip install pyyaml\n"


def test_a_broken_library_is_one_line_of_a_command(fail, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = "libGL.so.1: cannot open shared object file"
    arguments, library, ours = COMMANDS["images"]
    fail(library, ImportError(text, name="cv2"), ours)
    assert parser.main(arguments) == 2
    assert capsys.readouterr().err == f"error: cv2 cannot be imported ({text})\n"


@pytest.mark.parametrize("name", ["resnet_jax", "resnet_jax.training.nothing"])
def test_a_missing_module_of_ours_is_a_bug(name, monkeypatch):
    error = ModuleNotFoundError(f"No module named {name!r}", name=name)
    with pytest.raises(ModuleNotFoundError):
        import_failure(error)

    def command(options):
        raise error

    monkeypatch.setattr(commands, "summary", command)
    with pytest.raises(ModuleNotFoundError):
        parser.main(["summary", "resnet20"])


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        ("sklearn", "pip install scikit-learn, or this package's extra 'train'"),
        ("cv2", "pip install opencv-python-headless, or this package's extra 'train'"),
        ("PIL", "pip install pillow, or this package's extra 'train'"),
        ("absl", "pip install absl-py, or this package's extra 'train'"),
        ("pyarrow", "pip install pyarrow, or this package's extra 'features'"),
        ("matplotlib", "pip install matplotlib, or this package's extra 'report'"),
        ("onnxruntime", "pip install onnxruntime, or this package's extra 'onnx'"),
        ("torch", "pip install torch, or this package's extra 'torch-weights'"),
        ("tensorflow_datasets", "pip install tensorflow-datasets, or this package's extra 'train'"),
        ("google.protobuf", "pip install protobuf"),
        ("gcsfs", "pip install gcsfs, or this package's extra 'gcs'"),
        ("aiohttp", "pip install aiohttp"),
    ],
)
def test_what_to_install(module, advice):
    error = ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert import_failure(error) == f"{module} is not installed: {advice}"


def test_a_module_missing_from_an_installed_package_is_not_installed_again():
    error = ModuleNotFoundError("No module named 'numpy.nothing'", name="numpy.nothing")
    assert import_failure(error, "x") == (
        "x needs numpy.nothing, which cannot be imported (No module named 'numpy.nothing')"
    )


@pytest.mark.parametrize(
    ("error", "warns"),
    [
        (ModuleNotFoundError("No module named 'simplejpeg'", name="simplejpeg"), False),
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), True),
        (ImportError(BROKEN, name="simplejpeg"), True),
    ],
)
def test_without_the_faster_decoder_pillow_decodes(error, warns, fail, caplog, monkeypatch):
    """Where it was meant to be there, with a line."""
    fail("simplejpeg", error)
    spec = importlib.util.spec_from_file_location("another_jpeg", jpeg.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look it up
    spec.loader.exec_module(module)
    assert module.simplejpeg is None
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == warns
    if warns:
        assert (
            lines[0] == f"{import_failure(error)}; Pillow decodes JPEGs instead, which takes longer"
        )


def test_digits_where_a_part_of_tfds_is_missing(tmp_path):
    """TFDS would go on without, as an empty module."""
    code = "import sys; sys.modules['promise'] = None; from resnet_jax.cli.parser import main; "
    code += "sys.exit(main(['prepare', 'digits', '--data_dir=data']))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == (
        "error: reading TFDS datasets needs promise, which is not installed: pip install promise"
    )


@pytest.mark.parametrize("error", [MemoryError(), ImportError("x"), KeyboardInterrupt()])
def test_what_is_no_sign_of_bad_input_passes(error):
    with pytest.raises(type(error)), library_errors(lambda error: DataError("damaged")):
        raise error


def test_a_full_memory_is_no_damaged_image(monkeypatch):
    def load(image):
        raise MemoryError

    image = Image.new("L", (2, 2))
    monkeypatch.setattr(type(image), "load", load)
    with pytest.raises(MemoryError):
        image_pixels(image, 1)


def test_a_package_that_is_missing_is_no_damaged_record(monkeypatch):
    source = open_source("digits", "test")
    monkeypatch.setattr(source, "_records", None)

    def lose(folder, split):
        raise ModuleNotFoundError("No module named 'array_record'", name="array_record")

    monkeypatch.setattr("resnet_jax.data.sources.tfds._open_records", lose)
    with pytest.raises(ModuleNotFoundError):
        source[0]


def test_a_bug_in_the_copy_of_a_run_is_no_refusal_of_the_bucket(tmp_path, monkeypatch):
    config = Config(checkpoint=Checkpoint(copy_to=f"file://{tmp_path}/copy"))
    place = RemoteCopy(config, tmp_path / "run")

    def bug(self):
        return None + 1

    monkeypatch.setattr(RemoteCopy, "_names", bug)
    with pytest.raises(TypeError):
        place.steps()
    with pytest.raises(TypeError):
        place.push()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("assert 1 > 2", "AssertionError"),
        ("import no_such", "needs no_such, which is not installed: pip install no-such"),
        ("from resnet_jax.errors import no_such", "ImportError: cannot import name 'no_such'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_configuration_that_fails(line, text, tmp_path, capsys):
    path = Path(tmp_path, "mine.py")
    path.write_text(f"def get_config():\n    {line}\n")
    assert parser.main(["train", f"--config={path}"]) == 2
    (found,) = capsys.readouterr().err.splitlines()
    assert found.startswith(f"error: --config={path}"), found
    assert found.partition(str(path))[2].lstrip(": ").startswith(text), found
