"""What type checkers and editors know about the constructors."""

import abc
import ast
import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import pytest

import resnet_jax as rj
from resnet_jax.models.architectures import CONSTRUCTORS

ROOT = Path(rj.__file__).parents[1]

RIGHT = """
from functools import partial

import flax.linen as nn
import resnet_jax as rj

rj.ResNet50(num_classes=10, stage_sizes=[1, 1, 1, 1], norm="group")
rj.SEResNet50(num_classes=10, norm=partial(nn.LayerNorm, epsilon=1e-6))
rj.ResNet(norm=nn.RMSNorm).feature_info()["stage1"].channels
rj.Classifier.load("x")
"""
WRONG = {
    "rj.ResNet50(num_clases=10)": "num_clases",
    "rj.ResNet1202(num_clases=10)": "num_clases",
    "rj.SEResNet50(num_clases=10)": "num_clases",
    "rj.ResNet(norm='layer')": "norm",
    "rj.ResNet50(num_classes='10')": "num_classes",
    "rj.ResNet51()": "ResNet51",
}


@pytest.mark.slow  # the checker reads JAX
def test_misspelt_fields_do_not_pass_a_type_checker(tmp_path):
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(RIGHT)
    wrong.write_text("\n".join(["import resnet_jax as rj", *WRONG]))
    command = [sys.executable, "-m", "mypy", f"--config-file={ROOT / 'pyproject.toml'}"]
    command += [f"--cache-dir={ROOT / '.mypy_cache'}", str(right), str(wrong)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.findall(r"(\w+)\.py:(\d+): error: (.*)", done.stdout)
    assert [(name, int(line)) for name, line, _ in found] == [
        ("wrong", line) for line in range(2, len(WRONG) + 2)
    ], done.stdout
    for (_, _, message), word in zip(found, WRONG.values()):
        assert word in message


def test_constructors_that_are_made_on_demand_are_declared():
    tree = ast.parse(Path(rj.__file__).read_text())
    declared = {
        target.id
        for each in ast.walk(tree)
        if isinstance(each, ast.Assign) and getattr(each.value, "id", "") == "ResNet50"
        for target in each.targets
    }
    assert declared == set(CONSTRUCTORS)


def test_constructors_that_are_made_on_demand_say_what_they_are():
    constructor = rj.SEResNet50
    fields = inspect.signature(constructor).parameters
    assert fields["se_ratio"].default == 1 / 16
    assert fields["num_classes"].default == 1000
    assert constructor.__doc__.startswith("The network 'seresnet50' (Hu et al. 2018")
    assert constructor is rj.SEResNet50


def test_help_leaves_out_what_flax_adds():
    lines = pydoc.plain(pydoc.render_doc(rj.ResNet)).splitlines()
    assert len(lines) < 170
    text = "\n".join(lines)
    assert inspect.getdoc(rj.ResNet).splitlines()[-1] in text
    assert "__call__(self, " in text
    assert "inherited from flax" not in text


def test_modules_keep_what_flax_adds():
    model = rj.ResNet20()
    assert {"init", "apply", "tabulate", "features", "num_classes"} <= set(dir(model))
    assert rj.ResNet.apply is nn.Module.apply

    class Network(rj.ResNet, abc.ABC):  # no conflict of metaclasses
        @abc.abstractmethod
        def own(self): ...

    assert "own" in dir(Network)
