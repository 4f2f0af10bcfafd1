"""The code of docs/tutorials runs, in order and in an empty folder, page by page.

A Python block shares its names with the blocks above it; a block that starts with the comment
`# FILE.py` is also written to that file. Commands of the package run in this process, and `train`
takes a few steps only. A block under `<!-- not run by the tests: WHY -->` needs what the tests do
not have; its commands are parsed, so that their flags and recipes exist.
"""

import functools
import json
import os
import pathlib
import re
import shlex

import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.cli.parser import _parse, main
from resnet_jax.config.flags import parse_train_flags
from resnet_jax.distributed.launch import FLAGS
from resnet_jax.models import registry
from tests import tiny
from tests.variables import random_variables

PAGES = sorted((pathlib.Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(
    r"(?P<skipped><!-- not run by the tests: .+? -->\n+)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
COMMAND = re.compile(r"(?:python -m resnet_jax|python train\.py)(?= )[^|;&\n]*")
FEW_STEPS = ("train.steps=2", "train.batch_size=16", "evaluate.batch_size=16", "log.report=false")


def _pretrained_network():
    """A small network in the Hub's format, in the place of ImageNet's ResNet-50."""
    folder = pathlib.Path("timm", "resnet50.a1_in1k")
    folder.mkdir(parents=True)
    model = rj.create_model(tiny.NAME, num_classes=1000)
    rj.save_weights(folder / "model.safetensors", model, random_variables(model))
    facts = {"input_size": [3, 32, 32], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    config = {"architecture": tiny.NAME, "num_classes": 1000, "pretrained_cfg": facts}
    (folder / "config.json").write_text(json.dumps(config))


def _colleagues_file():
    """A small network under a PyTorch suffix: the content of a file counts, not its suffix."""
    model = rj.create_model("resnet8_cifar", num_classes=5)
    rj.save_weights("weights.safetensors", model, random_variables(model))
    os.replace("weights.safetensors", "colleague.pth")


BEFORE = {"train-on-your-photos": _pretrained_network, "fine-tune-from-pth": _colleagues_file}


# These compile several programs of a whole ResNet-18.
SLOW = ("features-for-detection", "from-pytorch")


def _page(path):
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SLOW))


@pytest.fixture(params=map(_page, PAGES))
def page(request, tmp_path, monkeypatch, tiny_model):
    """A page, in an empty folder. ResNet-18 has one block in each stage here: the same shapes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))
    small = functools.partial(rj.ResNet18, stage_sizes=(1, 1, 1, 1))
    monkeypatch.setattr(rj, "ResNet18", small)
    BEFORE.get(request.param.stem, lambda: None)()
    return request.param


def test_a_page(page):
    names = {"__name__": page.stem}
    for block in BLOCK.finditer(page.read_text()):
        language, text = block["language"], block["text"]
        if language == "python":
            assert not block["skipped"], "a block that is not run is a py block"
            if file := re.match(r"# (\w+\.py)\n", text):
                pathlib.Path(file[1]).write_text(text)
            exec(compile(text, f"{page.name}: {text.splitlines()[0]}", "exec"), names)  # noqa: S102
        elif language == "py":
            assert block["skipped"], text
            compile(text, page.name, "exec")
        elif language == "bash":
            for command in _commands(text):
                _parses(command) if block["skipped"] else _runs(command)


def _commands(text):
    """The arguments of each command of this package in a block of shell lines."""
    for found in COMMAND.findall(text.replace("\\\n", " ")):
        if found.count('"') % 2:  # the end of --command="..."
            found = found.rpartition('"')[0]
        words = shlex.split(found, comments=True)
        yield ["train", *words[2:]] if words[1] == "train.py" else words[3:]


def _runs(command):
    if command[0] == "train":
        command = [*command, *(f"--config.{field}" for field in FEW_STEPS)]
        if not any("init_from" in flag or "finetune" in flag or ".py" in flag for flag in command):
            command.append(f"--config.model.name={tiny.NAME}")
    assert main(command) == 0, command


def _parses(command):
    options = _parse(command)
    if command[0] in ("train", "plan", "find_rate"):
        launch = tuple(re.findall(r"--\w+", FLAGS))
        parse_train_flags([word for word in options.rest if not word.startswith(launch)])


def test_the_marks_are_found():
    """A page of each kind of block, so that a changed pattern does not skip them all."""
    found = [block for page in PAGES for block in BLOCK.finditer(page.read_text())]
    kinds = {(block["language"], bool(block["skipped"])) for block in found}
    assert kinds >= {("python", False), ("bash", False), ("bash", True), ("py", True)}
    assert np.all([block["text"].strip() for block in found])
