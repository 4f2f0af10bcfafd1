"""Networks opened from workdirs, weight files and folders of the Hub's form."""

import json

import chex
import jax.numpy as jnp
import pytest

import resnet_jax as rj
from resnet_jax.evaluation.network import imagenet_ids, imagenet_names, open_network
from resnet_jax.training import config as c
from resnet_jax.training.checkpoint import load_variables
from resnet_jax.training.loop import train
from tests.variables import random_variables


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_model):
    """Two steps on digits, with statistics shared over devices and a moving average."""
    folder = tmp_path_factory.mktemp("run")
    config = c.Config(
        model=c.Model(name="tiny", bn_sync="all", num_classes=12),
        data=c.Data(image_size=8, eval_size=12, eval_resize=15, interpolation="bicubic"),
        augment=c.Augment(mean=(0.3,), std=(0.38,)),
        train=c.Train(steps=2, batch_size=16, ema_decay=0.5),
        log=c.Log(tensorboard=False),
    )
    train(config, folder)
    return folder


def initial(model, channels=3):
    return random_variables(model, (32, 32, channels))


def test_workdir(workdir):
    network = open_network(workdir)
    assert (network.name, network.channels, network.model.axis_name) == ("tiny", 1, None)
    assert network.class_names == (*"0123456789", "10", "11")
    expected = rj.Preprocessing(12, 0.8, "bicubic", (0.3,), (0.38,))
    assert network.preprocessing == expected
    assert (network.crop.eval_size, network.crop.eval_resize) == (12, 15)
    assert network.colours.mean == (0.3,)
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


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("w.npz", {}, rj.ConfigError, "--model: .*w.npz does not say which network"),
        ("w.npz", {"model": "resnet2O"}, rj.ModelError, "did you mean .*'resnet20'"),
        ("none.npz", {"model": "resnet20"}, rj.WeightsError, "cannot read .*none.npz"),
        ("w.npz", {"model": "resnet32"}, rj.WeightsError, "w.npz: .*do not fit"),
        ("w.npz", {"model": "resnet20", "image_size": 3}, rj.ConfigError, "at least 4 pixels"),
        ("w.npz", {"model": "resnet20", "crop_fraction": 2.0}, rj.ConfigError, "share in"),
        ("nowhere", {}, rj.WeightsError, "nowhere"),
    ],
)
def test_mistakes(source, options, error, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = rj.ResNet20()
    rj.save_weights(tmp_path / "w.npz", model, initial(model))
    with pytest.raises(error, match=message):
        open_network(tmp_path / source, **options)


def test_a_workdir_holds_the_network_that_it_says(workdir):
    with pytest.raises(rj.ConfigError, match="holds a tiny; leave the flag out"):
        open_network(workdir, model="resnet32")
    (workdir / "classes.json").write_text("[")
    with pytest.raises(rj.WeightsError, match=r"classes.json does not match its checksum"):
        open_network(workdir)
    (workdir / "SHA256SUMS").unlink()
    with pytest.raises(rj.WeightsError, match=r"classes.json cannot be read"):
        open_network(workdir)
