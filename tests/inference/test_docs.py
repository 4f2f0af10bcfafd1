"""The Python blocks of docs/predict.md and docs/export.md run, with the commands beside them."""

import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

import resnet_jax as rj
from resnet_jax.cli.parser import main
from tests.variables import random_variables

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "predict.md"


@pytest.fixture(autouse=True)
def digits(tmp_path, monkeypatch):
    """A network in runs/digits: random weights in the Hub's format replace the trained run."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "digits"
    folder.mkdir(parents=True)
    model = rj.ResNet20(num_classes=10)
    variables = random_variables(model, (16, 16, 1))
    rj.save_weights(folder / "model.safetensors", model, variables)
    facts = {"input_size": [1, 16, 16], "crop_pct": 1.0, "mean": [0.3], "std": [0.38]}
    config = {"architecture": "resnet20", "num_classes": 10, "pretrained_cfg": facts}
    (folder / "config.json").write_text(json.dumps(config))


def test_blocks(capsys):
    text = DOCS.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    _, in_python, apply, explain, as_files, neighbors = (
        blocks  # the first: tests/inference/test_predict.py
    )
    names = {}
    exec(compile(as_files, str(DOCS), "exec"), names)  # noqa: S102
    exec(compile(in_python + apply + explain, str(DOCS), "exec"), names)  # noqa: S102
    assert [names["three"].index, names["eight"].index] == [3, 8]
    with Image.open("evidence.png") as overlay:
        assert overlay.size == (320, 320)
    commands = re.findall(r"^python -m resnet_jax (features runs/digits .*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert main(command.split()) == 0
    capsys.readouterr()
    exec(compile(neighbors, str(DOCS), "exec"), names)  # noqa: S102
    # Even random features distinguish most digits, if paths, labels and rows are in the same order.
    assert float(capsys.readouterr().out.partition("%")[0]) > 80


def test_onnx_block(tmp_path, capsys):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    docs = DOCS.with_name("export.md")
    section = docs.read_text().split("## ONNX")[1].split("\n## ")[0]
    (command,) = re.findall(r"^python -m resnet_jax (export .*)$", section, re.MULTILINE)
    (block,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert main(command.split()) == 0
    assert "of 16x16, 13x21, 5x5 pixels" in capsys.readouterr().out
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 17, 1)).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    names = {}
    exec(compile(block, str(docs), "exec"), names)  # noqa: S102
    model, variables, preprocessing = rj.load_pretrained("runs/digits")
    expected = model.apply(variables, preprocessing.normalize(images), train=False)
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(names["logits"], expected, rtol=0, atol=tolerance)
    assert names["names"] == [str(number) for number in np.argmax(expected, 1)]
    assert names["least"] == 5
