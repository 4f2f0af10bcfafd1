"""Configurations are checked before anything else, and every recipe passes."""

import dataclasses
import json
import pathlib
import re
import sys
from typing import get_type_hints

import pytest

import resnet_jax as rj
from resnet_jax import config as c
from resnet_jax.cli import parser
from resnet_jax.config import schema, suggestions
from resnet_jax.config.serialization import differences
from resnet_jax.config.suggestions import likely_fields
from resnet_jax.errors import STOPPED, ConfigError, StoppedError
from resnet_jax.models import blocks
from resnet_jax.ops import convolution
from resnet_jax.training.init_from import fill_from_weights
from tests.variables import random_variables

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RECIPES = sorted(path.name for path in CONFIGS.glob("*.py"))


def changed(name, value):
    section, field = name.split(".")
    config = c.Config()
    setattr(getattr(config, section), field, value)
    return config


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe, tmp_path):
    config, workdir = parser.parse_train_flags([f"--config={CONFIGS / recipe}"])
    if not config.model.name:  # the weights say it
        model = rj.ResNet20()
        rj.save_weights(tmp_path / "w.npz", model, random_variables(model))
        config.checkpoint.init_from = str(tmp_path / "w.npz")
        config = fill_from_weights(config).config
    c.check(config)
    assert workdir == pathlib.Path("runs") / recipe.removesuffix(".py")
    text = (CONFIGS / recipe).read_text()
    for part in ("Command: ", "Hardware: ", "Expected"):
        assert part in text.split('"""')[1]


def test_a_recipes_resize_is_not_kept_for_far_smaller_images():
    flags = ["--config=imagenet_he2015", "--config.data.image_size=64"]
    with pytest.raises(ConfigError, match=r"data.image_size = 64: .* data.eval_resize = 256 .*too"):
        parser.parse_train_flags(flags)
    given = "--config.data.eval_resize=256"
    assert parser.parse_train_flags([*flags, given])[0].data.eval_resize == 256
    flags[1] = "--config.data.image_size=192"
    assert parser.parse_train_flags(flags)[0].data.eval_resize == 256


@pytest.mark.parametrize("recipe", ["cifar", "cifar100", "fashion_mnist"])
@pytest.mark.parametrize("model", ["resnet20", "resnet56", "resnet110", "plain20", "plain56"])
def test_models_of_a_recipe(recipe, model):
    config, workdir = parser.parse_train_flags([f"--config={recipe}:{model}"])
    c.check(config)
    assert config.model.name == model
    assert workdir.name == f"{recipe}-{model}"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("model.name", "resnet5O", "did you mean"),
        ("model.num_classes", -1, "0 or more"),
        ("model.dtype", "float8", "float32, bfloat16, float16"),
        ("model.shortcut", "E", "A, B, C, D, none"),
        ("model.bn_sync", "some", "none, all, group"),
        ("model.bn_group_size", 2, "bn_sync = 'group'"),
        ("model.zero_init_residual", "yes", "of type bool"),
        ("data.name", "imagenet", "tfds:NAME"),
        ("data.channels", 1025, "1, 3, or as many as"),
        ("data.image_size", 0, "1 or more"),
        ("data.crop", "five", "center, random_resized, scale_jitter"),
        ("data.crop_area", (0.5, 0.1), "smaller first"),
        ("data.crop_area", (0.5, 1.5), r"\(0, 1\]"),
        ("data.crop_ratio", (1.0,), "two positive numbers"),
        ("data.eval_resize", 8, "not be less than the evaluated side"),
        ("data.memory_gib", -1.0, "0 or more"),
        ("model.precision", "float32", "default, high, highest"),
        ("augment.hue", 0.7, r"\[0, 0.5\]"),
        ("augment.std", (0.2, 0.2, 0.2), "as many numbers as augment.mean"),
        ("augment.std", (0.0,), "positive"),
        ("optimizer.name", "adam", "sgd, lars, lamb, adamw"),
        ("optimizer.momentum", 1.0, r"\[0, 1\)"),
        ("optimizer.learning_rate", float("nan"), "of type finite float"),
        ("schedule.boundaries", (0.7, 0.5), "growing fractions"),
        ("schedule.warmup_epochs", 99.0, "not be more than train.epochs"),
        ("loss.name", "l1", "softmax, bce"),
        ("train.epochs", 0.0, "more than 0"),
        ("checkpoint.best_metric", "accuracy", "top1, top5, loss, map, f1"),
        ("checkpoint.best_metric", "map", "needs data.multi_label; use top1, top5 or loss"),
        ("train.batch_size", 1.5, "of type int"),
        ("train.batch_size", True, "of type int"),
        ("train.seed", -1, r"\[0, 2\^31\)"),
        ("checkpoint.keep", 0, "1 or more"),
        ("log.profile", "15:10", "FIRST:LAST"),
    ],
)
def test_a_fault_names_field_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ConfigError, match=rf"{name} = {re.escape(repr(value))}: .*{allowed}"):
        c.check(changed(name, value))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("data.image_size", 2**70, "must not be more than 2,147,483,647"),
        ("data.eval_size", 8193, "0 or more, up to 8,192"),
        ("data.eval_resize", 10**6, "0 or more, up to 8,192"),
        ("data.jitter_sides", (256, 10**6), "pixels up to 8,192"),
        ("data.threads", 10**6, "1 or more, up to 1,024"),
        ("data.workers", 10**6, "up to 1,024"),
        ("data.prefetch", 10**6, "up to 1,024"),
        ("data.name", "folder:\0", "without NUL"),
        ("data.data_dir", "\ud800", "text that is valid in a path"),
        ("checkpoint.copy_to", "x" * 10**5, "text that is valid in a path"),
        ("augment.std", (5e-324,), "1e-6 or more"),
        ("augment.mean", (1e300,), "must not be more than 3.4e"),
        ("augment.pad", 33, "not be more than data.image_size"),
        ("augment.rand_layers", 10**6, "up to 100"),
        ("model.num_classes", 10**9, "up to 10,000,000"),
        ("optimizer.learning_rate", 10**30, "must not be more than 2,147,483,647"),
        ("schedule.boundaries", tuple(n / 200 for n in range(1, 150)), "at most 100 growing"),
        ("train.epochs", 1e308, "must not be more than 3.4e"),
        ("train.batch_size", 2**24 + 1, "up to 16,777,216"),
        pytest.param("train.seed", 10**5000, "thousands of digits: must not be mo", id="digits"),
        ("log.profile", f"1:{'9' * 5000}", "must be text|FIRST:LAST"),
    ],
)
def test_numbers_too_large_for_any_use(name, value, allowed):
    with pytest.raises(ConfigError, match=rf"{name} = .*{allowed}") as caught:
        c.check(changed(name, value))
    assert len(str(caught.value)) < 500


def test_all_faults_at_once():
    config = c.Config(train=c.Train(epochs=-1.0, accumulate=0), data=c.Data(crop="five"))
    with pytest.raises(ConfigError) as caught:
        c.check(config)
    for name in ("train.epochs", "train.accumulate", "data.crop"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_field_is_documented():
    for part in dataclasses.fields(c.Config):
        section = part.default_factory
        documented = re.findall(r"^  +(\w+): ", section.__doc__, re.MULTILINE)
        assert [name for name in documented if name in get_type_hints(section)] == [
            field.name for field in dataclasses.fields(section)
        ]


def test_differences_survive_json():
    config = c.Config()
    stored = json.loads(c.to_json(config))
    assert differences(config, stored) == []
    config.log.every_steps = 7  # changes no result
    config.data.threads = 1
    assert differences(config, stored) == []
    config.augment.mean = (0.1,)
    assert differences(config, stored) == ["augment.mean: [0.5] -> [0.1]"]


def test_a_config_of_a_version_without_a_field_means_its_default():
    stored = json.loads(c.to_json(c.Config()))
    del stored["model"]["precision"]
    assert c.from_json(json.dumps(stored)) == c.Config()
    assert differences(c.Config(), stored) == []
    exact = c.Config(model=c.Model(precision="highest"))
    assert differences(exact, stored) == ["model.precision: 'default' -> 'highest'"]
    del stored["model"]  # no version wrote such a file
    assert differences(c.Config(), stored)


@pytest.mark.parametrize(
    "flags",
    [
        ["--config=cifar10:resnet56"],
        ["--config=configs/cifar10.py:resnet56"],
        ["--config", "cifar10.py:resnet56"],
    ],
)
def test_a_recipe_by_its_name_from_any_folder(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, workdir = parser.parse_train_flags(["--config.train.steps=3", *flags])
    assert (config.model.name, config.train.steps) == ("resnet56", 3)
    assert str(workdir) == "runs/cifar10-resnet56"


def test_a_file_comes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.py").write_text(
        "from resnet_jax.config.schema import Config, Train\n"
        "get_config = lambda: Config(train=Train(seed=7))\n"
    )
    assert parser.parse_train_flags(["--config=configs/digits.py"])[0].train.seed == 7
    assert parser.parse_train_flags(["--config=digits"])[0].train.seed == 0


def test_a_recipe_in_a_folder():
    config, _ = parser.parse_train_flags(["--config=degradation/fashion_mnist:plain20"])
    assert config.model.name == "plain20"


@pytest.mark.parametrize("name", ["../setup", "configs/../../x", ".", ""])
def test_a_name_that_is_no_recipe(name, capsys):
    assert parser.main(["train", f"--config={name}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.trian.epochs=3", r"unknown field 'trian\.epochs'.*'train\.epochs'"),
        ("--config=nope.py", r"--config=nope\.py: no such file; there are configs/"),
        ("--config.train.epochs=abc", "train.epochs = 'abc': must be a number"),
        ("--config.train.batch_size=1.5", r"train.batch_size = '1\.5': must be a whole number"),
        ("--config.augment.flip=maybe", "augment.flip = 'maybe': must be true or false"),
        ("--wrkdir=x", r"unknown flag '--wrkdir'; did you mean '--workdir'\?"),
        ("--recipe=cifar", "did you mean '--config'"),
        ("--resume", "to resume a run, repeat its command"),
        ("--config=", "must name a recipe; .*digits"),
        ("--config=cifra", r"no such file; did you mean cifar\?"),
        ("--config=configs/cifra.py", r"no such file; did you mean configs/cifar.py\?"),
        ("--config.train=3", "a section of fields; --help=train lists them"),
        ("epochs=3", "write --config.train.epochs=3"),
        ("somewhere", "write --config.FIELD=VALUE"),
    ],
)
def test_bad_flags_end_with_one_line(flag, message, capsys):
    assert parser.main(["train", flag]) == 2
    captured = capsys.readouterr()
    assert re.search(rf"^error: .*{message}", captured.err)
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("train.lr", "optimizer.learning_rate"),
        ("optim.lr", "optimizer.learning_rate"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("learning-rate", "optimizer.learning_rate"),
        ("bs", "train.batch_size"),
        ("train.bs", "train.batch_size"),
        ("wd", "optimizer.weight_decay"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("epochs", "train.epochs"),
        ("num_epochs", "train.epochs"),
        ("model", "model.name"),
        ("data", "data.name"),
        ("model.depth", "model.name"),
        ("aug.mixup", "augment.mixup"),
        ("augment.cutmixx", "augment.cutmix"),
        ("trian.epochs", "train.epochs"),
        ("seed", "train.seed"),
    ],
)
def test_a_wrong_name_suggests_the_field_that_is_meant(name, meant, capsys):
    assert likely_fields(name, c.to_flat(c.Config())) == [meant]
    assert parser.main(["train", f"--config.{name}=3"]) == 2
    assert f"unknown field {name!r}; did you mean {meant!r}?" in capsys.readouterr().err
    if "." not in name:
        assert parser.main(["train", f"--{name}=3"]) == 2
        assert f"'--{name}'; did you mean '--config.{meant}'?" in capsys.readouterr().err


def test_names_that_suggestions_know_exist():
    fields = c.to_flat(c.Config())
    assert set(suggestions._OTHER_NAMES.values()) <= fields.keys()
    assert not set(suggestions._OTHER_NAMES) & {name.partition(".")[2] for name in fields}
    assert likely_fields("xyzzy", fields) == likely_fields("", fields) == []


def test_flags_come_in_any_order():
    arguments = ["--config.train.epochs=3", "--config=configs/finetune.py:folder:/a/b"]
    config, workdir = parser.parse_train_flags(arguments)
    assert (config.train.epochs, config.data.name) == (3.0, "folder:/a/b")
    assert str(workdir) == "runs/finetune-folder-a-b"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("def get_config(:", "SyntaxError|invalid syntax"),
        ("def get_config():\n    return undefined", "undefined"),
        (
            "from resnet_jax.config.schema import Train\nget_config = lambda: Train(batch=3)",
            "batch",
        ),
        ("x = 1", "get_config"),
        ("def get_config():\n    return {}", "does not return a"),
    ],
)
def test_a_faulty_configuration_file(program, message, tmp_path, capsys, monkeypatch):
    # The library runs each file in one module of this name; a process loads only one.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    path = tmp_path / "mine.py"
    path.write_text(program)
    assert parser.main(["train", f"--config={path}"]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"^error: --config=.*mine\.py: .*({message})", error)
    assert error.count("\n") == 1
    assert len(error) < 300


def test_shortcut_as_help_shows_it():
    config, _ = parser.parse_train_flags(["--config.model.shortcut=None"])
    assert config.model.shortcut is None


def test_help_lists_every_field_if_asked(capsys):
    assert parser.main(["train", "--help=all", "--config=cifar"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--config.{name}=" in printed for name in c.to_flat(c.Config()))
    assert "--config.model.name=resnet20" in printed


@pytest.mark.parametrize("columns", [80, 200])
def test_help_is_short_and_fits(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert parser.main(["train", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 80
    assert max(map(len, lines)) <= min(columns, 100)
    for text in ("--config.optimizer.learning_rate=0.1", "--help=all", "--process_id", "schedule "):
        assert any(text in line for line in lines)
    assert any("Zhang et al. 2018" in line for line in lines) or columns == 80
    assert parser.main(["train", "--help=all"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= min(columns, 100)


def test_help_about_a_section_or_a_field(capsys):
    assert parser.main(["train", "--help=optimizer"]) == 0
    printed = capsys.readouterr().out
    assert "--config.optimizer.clip_norm=0.0" in printed
    assert printed.count("--config.") == len(dataclasses.fields(c.Optimizer))
    assert parser.main(["train", "--help=train.seed"]) == 0
    assert "Seed of initial parameters, order of images, crops" in capsys.readouterr().out
    assert parser.main(["train", "--help=lr"]) == 2
    error = capsys.readouterr().err
    assert "--help=lr: no such section or field; did you mean optimizer.learning_rate?" in error


def test_errors_hold_no_codes_for_a_terminal(capsys):
    assert parser._fail(ConfigError("no \x1b]0;title\x07 of\nours"), 2) == 2
    assert capsys.readouterr().err == "error: no \\x1b]0;title\\x07 of ours\n"


def test_help_says_that_a_configuration_is_a_program(capsys):
    assert parser.main(["train", "--help"]) == 0
    assert "run as Python code" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("script", "usage"),
    [
        ("train.py", "python train.py"),
        ("/x/__main__.py", "python -m resnet_jax train"),
        ("/x/bin/resnet-jax", "resnet-jax train"),
    ],
)
def test_help_names_the_command_that_was_called(script, usage, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script])
    assert parser.main(["train", "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: {usage} [--config=RECIPE")


def test_a_stopped_run_says_so_once(capsys):
    error = StoppedError("stopped by a signal after step 3; all is saved")
    assert parser._fail(error, STOPPED, "stopped") == STOPPED
    assert capsys.readouterr().err == "stopped: by a signal after step 3; all is saved\n"


def test_choices_are_those_of_the_models():
    """The schema lists them again, because it is read where no model is loaded."""
    assert schema.SHORTCUTS == blocks.SHORTCUT_OPTIONS
    assert schema.PRECISIONS == convolution.PRECISIONS
