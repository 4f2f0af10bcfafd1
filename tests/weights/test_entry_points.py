"""Every way to open a network with every kind of source: it works, or one line says what to do."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from PIL import Image

import resnet_jax as rj
from resnet_jax import config as c
from resnet_jax.training.init_from import fill_from_weights
from resnet_jax.weights.source import open_network
from tests.variables import random_variables


@pytest.fixture(scope="module")
def sources(workdir, tmp_path_factory):
    """A folder with everything that a user may take for a network."""
    root = tmp_path_factory.mktemp("sources")
    (root / "runs").mkdir()
    (root / "runs" / "digits").symlink_to(workdir)
    model = rj.ResNet20(num_classes=7)
    variables = random_variables(model)
    (root / "hub").mkdir()
    rj.save_weights(root / "hub" / "model.safetensors", model, variables)
    description = {"architecture": "resnet20", "num_classes": 7}
    (root / "hub" / "config.json").write_text(json.dumps(description))
    for name in ("w.npz", "w.safetensors"):
        rj.save_weights(root / name, model, variables)
    (root / "w.msgpack").write_bytes(serialization.to_bytes(variables))
    (root / "w.pth").write_bytes(b"")
    program = jax.export.export(jax.jit(jnp.negative))(jax.ShapeDtypeStruct((2,), np.float32))
    (root / "net.stablehlo").write_bytes(program.serialize())
    (root / "net.onnx").write_bytes(b"\x08\x0a\x12\x0aresnet_jax")
    (root / "photos" / "cat").mkdir(parents=True)
    for suffix in ("png", "jpg", "gif"):
        Image.new("RGB", (8, 8)).save(root / "photos" / "cat" / f"1.{suffix}")
    (root / "started" / "checkpoints").mkdir(parents=True)
    return root


def init_from(source):
    config = c.Config(model=c.Model(name=""), checkpoint=c.Checkpoint(init_from=source))
    return fill_from_weights(config)


def load_weights(source):
    tiny = rj.create_model("tiny", num_classes=12)
    return rj.load_weights(tiny if source == "runs/digits" else rj.ResNet20(num_classes=7), source)


ENTRIES = {
    "load_pretrained": rj.load_pretrained,
    "load_weights": load_weights,
    "open_network": open_network,
    "init_from": init_from,
}
IS_FILE = "is a file, not a folder: read it with rj.load_weights"
NO_FOLDER = "is neither a workdir .* nor a folder in the Hub's form"
OWN_NAMES = "the names are this package's own; say which network it is with --model"
MISSING = "there is no such file or folder"
UNREACHED = (
    f"^runs/digit: {MISSING}, and the Hub cannot be reached .HF_HUB_OFFLINE is set.; "
    "did you mean runs/digits.$"
)
HUB = f"timm/a.b_c: {MISSING}, and the Hub cannot be reached .HF_HUB_OFFLINE is set.$"
IMAGE = "1.png: an image, not a file of weights"
TORCH = "w.pth"  # empty, or without torch
# What each entry says to each kind of source; None: it works.
TABLE = {
    "runs/digits": (None, None, None, None),
    "hub": (None, "rj.load_pretrained", None, None),
    "w.npz": (IS_FILE, None, None, None),
    "w.safetensors": (IS_FILE, None, None, None),
    "w.msgpack": (IS_FILE, None, OWN_NAMES, "which network it is in model.name"),
    "w.pth": (IS_FILE, TORCH, TORCH, TORCH),
    "net.stablehlo": (IS_FILE, *["an exported program; open what it was"] * 3),
    "net.onnx": (IS_FILE, *["an exported program; open what it was"] * 3),
    "photos": (NO_FOLDER,) * 4,
    "photos/cat/1.png": (IS_FILE, *[IMAGE] * 3),
    "photos/cat/1.jpg": (IS_FILE, *["an image, not"] * 3),
    "photos/cat/1.gif": (IS_FILE, *["an image, not"] * 3),
    "started": ("started/config.json cannot be read", *["is not a workdir: it has no config"] * 3),
    "nowhere": (MISSING, "cannot read nowhere: No such file", MISSING, MISSING),
    "runs/digit": (UNREACHED, "rj.load_pretrained", UNREACHED, UNREACHED[1:]),
    "timm/a.b_c": (HUB, "rj.load_pretrained", HUB, HUB),
    "a/b/c": (MISSING, "cannot read a/b/c: No such file", MISSING, MISSING),
    "none.npz": (MISSING, *["cannot read none.npz: No such file"] * 3),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("source", TABLE)
def test_a_source_opens_or_says_what_to_do(source, entry, sources, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(sources)
    message = TABLE[source][[*ENTRIES].index(entry)]
    if message is None:
        assert ENTRIES[entry](source)
        return
    with pytest.raises(rj.ResNetJaxError, match=message) as caught:
        ENTRIES[entry](source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_own_names_with_the_name_of_the_network(sources):
    network = open_network(sources / "w.msgpack", model="resnet20")
    assert (network.model.num_classes, network.channels) == (7, 3)
    chex.assert_trees_all_equal(network.variables, open_network(sources / "w.npz").variables)


def test_a_run_as_a_pretrained_network(workdir):
    """`load_pretrained` gives what `open_network` gives, and takes its own options too."""
    opened, found = open_network(workdir), rj.load_pretrained(workdir)
    model, variables, preprocessing = found
    assert (found.name, found.class_names) == ("tiny", opened.class_names)
    assert (model, preprocessing, found.threshold) == (opened.model, opened.preprocessing, None)
    chex.assert_trees_all_equal(variables, opened.variables)
    assert max(len(repr(found)), len(repr(opened))) < 20_000  # without the numbers
    images = np.full((2, 12, 12, 1), 9, np.uint8)
    logits = model.apply(variables, preprocessing.normalize(images), train=False)
    expected = opened.model.apply(opened.variables, preprocessing.normalize(images), train=False)
    np.testing.assert_array_equal(logits, expected)

    other = rj.load_pretrained(workdir, num_classes=3, reset_head=True, channels=3)
    assert (other.model.num_classes, other.class_names) == (3, ())
    assert other.variables["params"]["stem"]["conv1"]["kernel"].shape[2] == 3
    assert rj.load_pretrained(workdir, num_classes=0).model.num_classes == 0
