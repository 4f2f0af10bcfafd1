"""The Python of docs/predict.md runs, around the commands that it names."""

import json
import pathlib
import re

import resnet_jax as rj
from resnet_jax.cli import main
from tests.variables import random_variables

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "predict.md"


def test_blocks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Random weights in the Hub's form stand for the trained run; the commands are the same.
    folder = tmp_path / "runs" / "digits"
    folder.mkdir(parents=True)
    model = rj.ResNet20(num_classes=10)
    variables = random_variables(model, (16, 16, 1))
    rj.save_weights(folder / "model.safetensors", model, variables)
    facts = {"input_size": [1, 16, 16], "crop_pct": 1.0, "mean": [0.3], "std": [0.38]}
    config = {"architecture": "resnet20", "num_classes": 10, "pretrained_cfg": facts}
    (folder / "config.json").write_text(json.dumps(config))

    text = DOCS.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    _, in_python, apply, as_files, neighbours = blocks  # the first: tests/inference/test_predict.py
    names = {}
    exec(compile(as_files, str(DOCS), "exec"), names)  # noqa: S102
    exec(compile(in_python + apply, str(DOCS), "exec"), names)  # noqa: S102
    commands = re.findall(r"^python -m resnet_jax (features runs/digits .*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert main(command.split()) == 0
    capsys.readouterr()
    exec(compile(neighbours, str(DOCS), "exec"), names)  # noqa: S102
    # Even random features tell most digits apart, if paths, labels and rows belong together.
    assert float(capsys.readouterr().out.partition("%")[0]) > 80
