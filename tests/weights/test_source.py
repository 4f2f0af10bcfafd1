"""Networks opened from workdirs, weight files and folders of the Hub's form."""

import json

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.evaluation.held_out import evaluate_data
from resnet_jax.weights import weight_file
from resnet_jax.weights.class_names import imagenet_ids, imagenet_names, read_class_file
from resnet_jax.weights.infer import Inferred
from resnet_jax.weights.network import require_head
from resnet_jax.weights.source import open_network
from resnet_jax.workdirs.checkpoint import load_variables
from tests.variables import random_variables


def initial(model, channels=3):
    return random_variables(model, (32, 32, channels))


def test_workdir(workdir):
    network = open_network(workdir)
    assert (network.name, network.channels, network.model.axis_name) == ("tiny", 1, None)
    assert network.class_names == (*"0123456789", "10", "11")
    expected = rj.Preprocessing(12, 0.8, "bicubic", (0.3,), (0.38,))
    assert network.preprocessing == expected
    assert (network.crop.eval_size, network.crop.eval_resize) == (12, 15)
    chex.assert_trees_all_equal(network.variables, load_variables(workdir)[1])
    assert (network.step, network.ema) == (2, True)
    plain = open_network(workdir, ema=False)
    assert not plain.ema
    assert plain.config.train.ema_decay == 0.5
    kernels = [each.variables["params"]["head"]["kernel"] for each in (network, plain)]
    assert (kernels[0] != kernels[1]).any()
    logits = network.model.apply(network.variables, jnp.zeros((1, 12, 12, 1)), train=False)
    chex.assert_shape(logits, (1, 12))


def test_weight_file(tmp_path):
    model = rj.ResNet20(num_classes=7)
    variables = initial(model, channels=1)
    rj.save_weights(tmp_path / "w.safetensors", model, variables)
    network = open_network(tmp_path / "w.safetensors", model="resnet20", crop_fraction=0.8)
    assert (network.channels, network.model.num_classes) == (1, 7)
    assert network.preprocessing.resize_size == 40
    chex.assert_trees_all_close(network.variables, variables, rtol=0, atol=0)


def test_hub_folder(tmp_path):
    model = rj.ResNet20(num_classes=1000)
    rj.save_weights(tmp_path / "model.safetensors", model, initial(model))
    config = {"architecture": "resnet20", "num_classes": 1000, "crop_pct": 0.95}
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = open_network(tmp_path, image_size=64)
    assert network.name == "resnet20"
    assert (network.preprocessing.image_size, network.preprocessing.crop_fraction) == (64, 0.95)
    assert network.class_names[0] == "tench"
    assert network.step is None
    config |= {"label_names": [f"kind {k}" for k in range(1000)], "model_args": {"in_chans": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_network(tmp_path).class_names[999] == "kind 999"


def test_imagenet_classes():
    assert len(set(imagenet_ids())) == len(imagenet_names()) == 1000
    assert list(imagenet_ids()) == sorted(imagenet_ids())
    by_id = dict(zip(imagenet_ids(), imagenet_names()))
    assert (by_id["n02123045"], by_id["n03126707"]) == ("tabby", "crane")


NAMED = {"model": "resnet20"}


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("w.npz", {"model": "resnet2O"}, rj.ModelError, "did you mean .*'resnet20'"),
        ("none.npz", {"model": "resnet20"}, rj.WeightsError, "cannot read .*none.npz"),
        ("w.npz", {"model": "resnet32"}, rj.WeightsError, "w.npz: .*do not fit"),
        ("w.npz", {"model": "resnet20", "image_size": 3}, rj.ConfigError, "at least 4 pixels"),
        ("w.npz", {"model": "resnet20", "crop_fraction": 2.0}, rj.ConfigError, "fraction in"),
        ("w.npz", {**NAMED, "mean": (0.5, 0.5)}, rj.ConfigError, "--mean=0.5,0.5: must be one num"),
        ("w.npz", {**NAMED, "mean": (123.7, 116.3, 103.5)}, rj.ConfigError, "not of 255"),
        ("w.npz", {**NAMED, "mean": (float("nan"),)}, rj.ConfigError, "--mean=nan: must be one"),
        ("w.npz", {**NAMED, "std": (0.0,)}, rj.ConfigError, "--std=0.0: must be one positive num"),
        ("w.npz", {**NAMED, "mean": (0.5,)}, rj.ConfigError, "--mean: needs --std with as many"),
        (
            "w.npz",
            {**NAMED, "interpolation": "x"},
            rj.ConfigError,
            "--interpolation=x: must be bil",
        ),
        ("w.npz", {**NAMED, "crop_mode": "border"}, rj.ConfigError, "must be center or squash"),
        ("w.npz", {**NAMED, "classes": ("a", "b")}, rj.ConfigError, "2 names, and .* 10 outputs"),
        ("w.npz", {**NAMED, "classes": "/no.txt"}, rj.ConfigError, "--classes=/no.txt: cannot be"),
        ("w.npz", {**NAMED, "weights": "both"}, rj.ConfigError, "must be 'ema' or 'raw'"),
        ("run", {"prefix": "encoder"}, rj.ConfigError, "--prefix=encoder: does not go with .*run"),
        ("run", {"classes": "names.txt"}, rj.ConfigError, "which is a workdir and says it itself"),
        ("nowhere", {}, rj.WeightsError, "nowhere"),
    ],
)
def test_mistakes(source, options, error, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = rj.ResNet20()
    rj.save_weights(tmp_path / "w.npz", model, initial(model))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(error, match=message):
        open_network(tmp_path / source, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolation": "x"}, "--interpolation=x: must be bilinear or bicubic"),
        ({"crop_mode": "resize"}, "--crop_mode=resize: must be center or squash"),
        ({"mean": (1.0, 2.0)}, "--mean=1.0,2.0: must be one number, or one per channel; in units"),
        ({"std": (0.0,)}, "--std=0.0: must be one positive number"),
        ({"mean": (0.5, 0.5), "std": (0.5,)}, "--mean: needs --std with as many numbers"),
        ({"image_size": -1}, "--image_size=-1 .*number of pixels"),
        ({"crop_fraction": 1.5}, "--crop_fraction=1.5: .*fraction in"),
        ({"threshold": 2.0}, "--threshold=2.0: must be a probability"),
        ({"classes": "/no.txt"}, "--classes=/no.txt: cannot be read"),
    ],
)
def test_wrong_options_are_reported_before_weights_are_read(options, message, tmp_path):
    with pytest.raises(rj.ConfigError, match=message):
        open_network(tmp_path / "missing.npz", **options)


def test_a_folder_of_weights_is_told_from_a_repository(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(rj.WeightsError, match=r"neither a workdir .* nor .*; pass another"):
        open_network(tmp_path)
    (tmp_path / "best.pth").touch()
    with pytest.raises(rj.WeightsError, match=r"in it, pass the file: .*/best\.pth"):
        open_network(tmp_path)
    with pytest.raises(rj.WeightsError, match=r"in it, pass the file: .*/best\.pth"):
        rj.load_pretrained(tmp_path)


def test_another_filter_may_be_chosen(tmp_path):
    model = rj.ResNet20()
    rj.save_weights(tmp_path / "model.safetensors", model, initial(model))
    config = {"architecture": "resnet20", "num_classes": 10, "interpolation": "lanczos"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(rj.WeightsError, match=r"'lanczos', which is none of .*--interpolation"):
        open_network(tmp_path)
    network = open_network(tmp_path, interpolation="bicubic")
    assert network.preprocessing.interpolation == "bicubic"


# --- Weight files ---------------------------------------------------------------------------


@pytest.fixture
def inferred(monkeypatch):
    """What is inferred of any tensors."""

    def infer(tensors):
        classes = tensors["fc.weight"].shape[0] if "fc.weight" in tensors else 0
        fields = {"num_classes": classes, "shortcut": "A"}
        return Inferred("resnet20", fields, 3, 32, ("it has option A",))

    monkeypatch.setattr(weight_file, "infer_model", infer)


def save(path, num_classes=10, channels=3, head=True):
    model = rj.ResNet20(num_classes=num_classes)
    state_dict = rj.to_torch(model, initial(model, channels))
    kept = {name: x for name, x in state_dict.items() if head or not name.startswith("fc.")}
    np.savez(path, **kept)
    return path


def test_a_weight_file_needs_no_name(tmp_path, inferred):
    network = open_network(save(tmp_path / "w.npz"))
    assert (network.name, network.model.num_classes, network.named) == ("resnet20", 10, False)
    assert network.assumed == (
        "a resnet20 with shortcut=A, by its names and shapes (--model); it has option A",
        "images of 32x32 pixels with CIFAR-10's mean 0.4914,0.4822,0.4465 and std "
        "0.247,0.2435,0.2616 (--image_size, --mean, --std)",
    )
    named = open_network(tmp_path / "w.npz", model="resnet20")
    assert named.assumed == network.assumed[1:]
    chex.assert_trees_all_equal(network.variables, named.variables)
    with pytest.raises(
        rj.WeightsError, match=r"the tensors are those of a resnet20; .* do not fit"
    ):
        open_network(tmp_path / "w.npz", model="resnet32")


def test_what_the_user_says_is_not_assumed(tmp_path, inferred):
    names = tuple("abcdefghij")
    network = open_network(
        save(tmp_path / "w.npz"),
        mean=(0.5,),
        std=(0.25,),
        interpolation="bicubic",
        crop_mode="squash",
        classes=names,
        upright=True,
    )
    assert network.preprocessing == rj.Preprocessing(32, 1.0, "bicubic", (0.5,), (0.25,), "squash")
    assert (network.class_names, network.named) == (names, True)
    assert network.crop.upright
    assert network.crop.eval_crop == "squash"
    assert len(network.assumed) == 1  # the architecture
    assert "mean" not in network.assumed[0]


def test_a_file_without_a_head(tmp_path, inferred):
    path = save(tmp_path / "w.npz", head=False)
    for options in ({}, NAMED):
        network = open_network(path, **options)
        assert (network.model.num_classes, network.class_names) == (0, ())
        maps = network.model.apply(network.variables, jnp.zeros((1, 8, 8, 3)), train=False)
        assert maps.shape == (1, 64)
        with pytest.raises(rj.ConfigError, match=r"no head .* which export needs; `features`"):
            require_head(network, "export")
        with pytest.raises(rj.ConfigError, match=r"no head .* which evaluate needs"):
            evaluate_data(network, "digits")


def test_the_mean_and_deviation_of_small_images():
    """Those of the repository that the names come from."""
    assert weight_file._usual_colors(["fc.weight"], 224, 10).whose == "ImageNet's"
    assert weight_file._usual_colors(["fc.weight"], 32, 10).whose == "CIFAR-10's"
    assert weight_file._usual_colors(["fc.weight"], 32, 100).whose == "CIFAR-100's"
    assert weight_file._usual_colors(["fc.weight"], 32, 200).whose == "ImageNet's"
    akamaster = ["conv1.weight", "layer2.0.conv1.weight", "linear.weight"]
    assert weight_file._usual_colors(akamaster, 32, 10).whose == "ImageNet's"
    kuangliu = [*akamaster, "layer2.0.shortcut.0.weight"]
    assert weight_file._usual_colors(kuangliu, 32, 10).whose == "CIFAR-10's"


def test_gray_images_have_one_mean(tmp_path):
    network = open_network(save(tmp_path / "w.npz", 1000, channels=1), model="resnet20")
    assert network.preprocessing.mean == pytest.approx((0.449,))
    assert len(network.preprocessing.std) == 1
    assert "mean 0.449 and std 0.226" in network.assumed[0]
    assert "ImageNet's classes in their usual order" in network.assumed[-1]


def test_means_of_more_channels_repeat_as_the_filters_do(tmp_path):
    """Weight files and `load_pretrained(channels=5)` have one rule."""
    network = open_network(save(tmp_path / "w.npz", 1000, channels=5), model="resnet20")
    assert network.preprocessing.mean == (0.485, 0.456, 0.406, 0.485, 0.456)
    assert len(network.preprocessing.std) == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat\nbig dog\n", ("cat", "big dog")),
        ("\ufeffcat\r\nbig dog\r\n\r\n", ("cat", "big dog")),
        ('["cat", "big dog"]', ("cat", "big dog")),
        ('{"1": "big dog", "0": "cat"}', ("cat", "big dog")),
        ("", "is empty"),
        ("cat\n\ndog", "the name of output 1 is ''"),
        ("cat\ncat", "'cat' is the name of two outputs"),
        ("[1, 2]", "the name of output 0 is '1'"),
        ('["cat"', "is not whole JSON"),
        ('{"1": "cat", "2": "dog"}', 'has 2 names and none for "0"; number them from 0 to 1'),
    ],
)
def test_names_of_classes_in_a_file(text, expected, tmp_path):
    path = tmp_path / "names"
    path.write_bytes(text.encode())
    if isinstance(expected, tuple):
        assert read_class_file(path) == expected
    else:
        with pytest.raises(rj.ConfigError, match=f"--classes={path}: {expected}"):
            read_class_file(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(rj.ConfigError, match="is not text in UTF-8"):
        read_class_file(path)


def test_a_workdir_holds_the_network_that_it_says(workdir):
    with pytest.raises(rj.ConfigError, match="holds a tiny; leave the flag out"):
        open_network(workdir, model="resnet32")
    (workdir / "classes.json").write_text("[")
    with pytest.raises(rj.WeightsError, match=r"classes.json does not match its checksum"):
        open_network(workdir)
    (workdir / "SHA256SUMS").unlink()
    with pytest.raises(rj.WeightsError, match=r"classes.json cannot be read"):
        open_network(workdir)
