"""What a run starts from: weights, and the facts that come with them."""

import json
import re

import jax
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax import config as c
from resnet_jax.cli.parser import parse_train_flags
from resnet_jax.config.schema import Checkpoint, Config, Data
from resnet_jax.errors import ConfigError
from resnet_jax.evaluation.held_out import evaluate_data
from resnet_jax.training import init_from
from resnet_jax.training.init_from import Start, fill_from_weights, initial_variables
from resnet_jax.training.loop import train
from resnet_jax.weights.class_names import imagenet_ids, imagenet_names
from resnet_jax.weights.source import open_network
from resnet_jax.workdirs.evaluations import Evaluations
from tests.evaluation.settings import write_folder
from tests.training.runs import records
from tests.variables import random_variables


def test_filters_for_color_are_repeated_where_the_channels_are_given(tmp_path):
    model = rj.ResNet8Cifar(num_classes=3)
    variables = random_variables(model, (32, 32, 3))
    rj.save_weights(tmp_path / "w.safetensors", model, variables)
    start = Checkpoint(init_from=str(tmp_path / "w.safetensors"))
    with pytest.raises(
        ConfigError, match=r"takes 3 channels, the data has 5; set data.channels = 5"
    ):
        initial_variables(Config(checkpoint=start), model, channels=5)
    with pytest.raises(ConfigError, match=r"the data has 1; set data.channels = 3"):
        initial_variables(Config(checkpoint=start), model, channels=1)
    found = initial_variables(Config(checkpoint=start, data=Data(channels=5)), model, channels=5)
    kernel = np.asarray(variables["params"]["stem"]["conv1"]["kernel"])
    expected = kernel[:, :, [0, 1, 2, 0, 1]] * 3 / 5
    np.testing.assert_allclose(found["params"]["stem"]["conv1"]["kernel"], expected, rtol=1e-6)
    logits = model.apply(found, np.zeros((1, 32, 32, 5), np.float32), train=False)
    assert logits.shape == (1, 3)
    del found["params"]["stem"], variables["params"]["stem"]
    assert jax.tree.all(jax.tree.map(np.array_equal, found, variables))


# --- What the weights say -------------------------------------------------------------------


def finetune(source, *flags, data="digits"):
    """The recipe's configuration for weights, with flags as a user gives them."""
    flags = [f"--config.checkpoint.init_from={source}", *flags]
    return parse_train_flags([f"--config=finetune:{data}", *flags])[0]


@pytest.fixture
def hub(tmp_path):
    """A folder in the Hub's form: a CIFAR network trained at 40 / 0.8 = 50 pixels."""
    model = rj.ResNet8Cifar(num_classes=3)
    folder = tmp_path / "hub"
    folder.mkdir()
    rj.save_weights(folder / "model.safetensors", model, random_variables(model))
    facts = {"input_size": [3, 40, 40], "crop_pct": 0.8, "interpolation": "bicubic"}
    facts |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = {"architecture": "resnet8_cifar", "num_classes": 3, "pretrained_cfg": facts}
    config["label_names"] = ["class0", "class1", "class2"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_fields_that_are_left_come_from_the_weights(hub):
    start = fill_from_weights(finetune(hub))
    data, augment = start.config.data, start.config.augment
    assert start.config.model.name == "resnet8_cifar"
    assert (data.channels, data.image_size, data.eval_resize) == (3, 40, 50)
    assert (data.interpolation, data.eval_crop) == ("bicubic", "center")
    assert (augment.mean, augment.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    c.check(start.config)
    assert start.lines[0].startswith(
        f"from {hub}: model.name = 'resnet8_cifar', data.channels = 3, data"
    )
    assert "augment.std = (0.4, 0.5, 0.6)" in start.lines[0]
    assert Start.from_json(start.to_json()) == start


def test_a_run_that_resumes_has_the_fields_of_its_network(tmp_path, monkeypatch):
    """Those that change what the weights mean, too: the recipe does not have them."""
    model, path = rj.ResNet20(num_classes=3, shortcut="B"), tmp_path / "weights.safetensors"
    rj.save_weights(path, model, random_variables(model))
    first = fill_from_weights(finetune(path, "--config.data.image_size=32")).config
    assert (first.model.name, first.model.shortcut) == ("resnet20", "B")
    monkeypatch.setattr(init_from, "has_states", lambda workdir: True)
    monkeypatch.setattr(init_from, "read_config", lambda workdir: first)
    again = finetune(path, "--config.data.image_size=32")
    assert fill_from_weights(again, tmp_path).config == first
    again.model.shortcut = "C"  # is then refused, as any other change
    assert fill_from_weights(again, tmp_path).config.model.shortcut == "C"


def test_what_the_user_sets_wins(hub):
    flags = ["--config.data.image_size=32", "--config.augment.mean=(0.5,0.5,0.5)"]
    start = fill_from_weights(finetune(hub, *flags))
    assert start.config.data.image_size == 32
    assert start.config.data.eval_resize == 40  # in the proportion of the weights
    assert start.config.augment.mean == (0.5,) * 3
    assert "image_size" not in start.lines[0]
    assert "mean" not in start.lines[0]
    start = fill_from_weights(finetune(hub, "--config.data.eval_resize=44"))
    assert (start.config.data.image_size, start.config.data.eval_resize) == (40, 44)
    with pytest.raises(ConfigError, match=r"model.name = resnet32: .* holds a resnet8_cifar"):
        fill_from_weights(finetune(hub, "--config.model.name=resnet32"))


def test_another_filter_than_that_of_the_weights(hub):
    stored = json.loads((hub / "config.json").read_text())
    stored["pretrained_cfg"]["interpolation"] = "lanczos"
    (hub / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"'lanczos', .*; data.interpolation chooses one of the"):
        fill_from_weights(finetune(hub))
    start = fill_from_weights(finetune(hub, "--config.data.interpolation=bilinear"))
    assert start.config.data.interpolation == "bilinear"


def test_several_networks_in_a_file(tmp_path):
    tensors = rj.to_torch(rj.ResNet8Cifar(), random_variables(rj.ResNet8Cifar()))
    both = {f"{name}.{key}": x for name in ("a", "b") for key, x in tensors.items()}
    np.savez(tmp_path / "w.npz", **both)
    with pytest.raises(ConfigError, match=r"choose one by rj.load_weights\(..., prefix=...\), and"):
        fill_from_weights(finetune(tmp_path / "w.npz"))
    with pytest.raises(rj.WeightsError, match=r"several networks, choose one by --prefix=: there"):
        open_network(tmp_path / "w.npz")


def test_a_configuration_that_leaves_nothing_reads_no_weights():
    config = Config(checkpoint=Checkpoint(init_from="/none.npz"))
    assert fill_from_weights(config) == Start(config)
    with pytest.raises(ConfigError, match=r"checkpoint.init_from = '/none.npz': cannot read"):
        fill_from_weights(finetune("/none.npz"))
    with pytest.raises(ConfigError, match=r"model.name = '': .*; or set checkpoint"):
        c.check(fill_from_weights(finetune("")).config)


@pytest.mark.parametrize(
    ("classes", "named", "data", "keeps", "line"),
    [
        (("a", "b"), True, ("a", "b"), True, "kept: its classes are those of the data, by name"),
        (("a", "b"), True, ("b", "a"), False, "a new one: .* or another order"),
        (("a", "b"), True, ("a", "c"), False, "a new one: its classes have other names"),
        (("a", "b"), True, ("a", "b", "c"), False, "it has 2 classes, and 3 are needed"),
        (("0", "1"), False, ("a", "c"), True, "kept: .* by order, not by name"),
        (
            ("",),
            False,
            ("a", "b"),
            False,
            "the weights have no head of one linear layer, and 2 classes",
        ),
    ],
)
def test_the_head_is_kept_where_it_fits(classes, named, data, keeps, line):
    config = Config(checkpoint=Checkpoint(init_from="w", reset_head=None))
    start = Start(config, (), classes, named).with_head(data)
    assert start.config.checkpoint.reset_head is not keeps
    assert re.search(line, start.lines[-1])
    for given in (False, True):  # who says it is obeyed
        config = Config(checkpoint=Checkpoint(init_from="w", reset_head=given))
        assert Start(config, (), classes, named).with_head(data).config == config


def test_a_head_of_imagenet_is_kept_by_name_only():
    names = imagenet_names()
    start = Start(Config(checkpoint=Checkpoint(init_from="w", reset_head=None)), (), names)
    assert start.with_head(imagenet_ids()).config.checkpoint.reset_head is False
    other = tuple(f"class{number}" for number in range(1000))
    assert start.with_head(other).config.checkpoint.reset_head is True


def test_fine_tuning_from_a_hub_folder(hub, tmp_path, capsys):
    """The head is kept and evaluated before the first step; a restart needs no weights."""
    for split in ("train", "test"):
        write_folder(tmp_path / "data", [(50, 50)] * 8, classes=3, split=split)
    flags = [
        "--config.train.steps=1",
        "--config.train.batch_size=8",
        "--config.log.tensorboard=0",
        "--config.log.report=0",
    ]
    flags.append("--config.model.dtype=float32")  # as `evaluate_data` computes
    config = finetune(hub, *flags, data=f"folder:{tmp_path}/data")
    train(config, tmp_path / "run")
    err = capsys.readouterr().err
    assert err.index(f"from {hub}: model.name = 'resnet8_cifar'") < err.index("1 steps of 8")
    assert "the head of the weights is kept: its classes are those of the data, by name" in err
    found = [each for each in records(tmp_path / "run") if each["split"] == "test"]
    assert [each["step"] for each in found] == [0, 1]
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["model"]["name"] == "resnet8_cifar"
    assert (stored["data"]["image_size"], stored["data"]["eval_resize"]) == (40, 50)
    assert stored["checkpoint"]["reset_head"] is False
    report = evaluate_data(open_network(hub), config.data.name, "test", batch_size=8)
    assert found[0]["top1"] == report.top1
    assert found[0]["loss"] == pytest.approx(report.loss, rel=1e-4)
    (hub / "config.json").unlink()
    again = finetune(hub, *flags[1:], "--config.train.steps=2", data=f"folder:{tmp_path}/data")
    again.checkpoint.allow_change = True
    train(again, tmp_path / "run")
    found = [each for each in records(tmp_path / "run") if each["split"] == "test"]
    assert [each["step"] for each in found] == [0, 1, 2]


def test_step_0_is_no_state():
    """The best state is one that was saved, however good the weights were."""
    evaluations = Evaluations("top1", "test")
    for step, top1 in ((0, 0.9), (1, 0.2), (2, 0.3)):
        evaluations.add({"step": step, "split": "test", "top1": top1})
    assert (evaluations.best, evaluations.best_value) == (2, 0.3)
