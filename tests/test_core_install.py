"""What works with the core packages alone, and what the rest says there, in one line."""

import json
import subprocess
import sys

import pytest

# Packages that no requirement of the core brings are hidden, as after `pip install .`.
HIDE = """
import importlib.abc, importlib.metadata, json, re, sys

def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()

core = set()
def require(name):
    name = canonical(name)
    if name not in core:
        core.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            return
        for line in lines:
            if "extra ==" not in line:
                require(re.match(r"[\\w.-]+", line)[0])

for name in ("jax", "flax", "numpy", "ml_dtypes", "safetensors"):
    require(name)
hidden = {
    module for module, packages in importlib.metadata.packages_distributions().items()
    if module != "resnet_jax" and not core & set(map(canonical, packages))
}

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
assert "PIL" in hidden and "flax" not in hidden
"""
PYTHON = """
import inspect, pydoc
import jax, jax.numpy as jnp
import resnet_jax as rj

model = rj.create_model("resnet20", stage_sizes=(1, 1, 1))
variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
for name in ("w.safetensors", "w.npz"):
    rj.save_weights(name, model, variables)
    rj.load_weights(model, name)
rj.summary(model, (1, 32, 32, 3)), rj.fold_batch_norm(model, variables)
for name in dir(rj):
    getattr(rj, name)
pydoc.render_doc(rj)

open("w.pth", "wb").write(b"x")
open("w.h5", "wb").write(b"\\x89HDF\\r\\n\\x1a\\n")
calls = {
    "class": lambda: rj.Classifier,
    "load": lambda: rj.Classifier.load("w.npz", model="resnet20"),
    "hub": lambda: rj.load_pretrained("timm/resnet18"),
    "pth": lambda: rj.load_weights(model, "w.pth"),
    "h5": lambda: rj.load_weights(model, "w.h5"),
}
said = {}
for name, call in calls.items():
    try:
        said[name] = repr(call())
    except rj.ResNetJaxError as error:
        said[name] = str(error)
print(json.dumps(said))
"""
COMMANDS = """
from resnet_jax.cli.parser import main

for arguments in json.loads(sys.argv[1]):
    assert main(arguments.split()) == 2, arguments
"""


def _run(code, *arguments, at):
    done = subprocess.run(
        [sys.executable, "-c", HIDE + code, *arguments], cwd=at, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.filterwarnings("ignore")
def test_python(tmp_path):
    said = json.loads(_run(PYTHON, at=tmp_path).stdout)
    image = "resnet_jax.Classifier needs PIL, which is not installed: pip install pillow, or this "
    assert said["class"] == said["load"] == f"{image}package's extra 'train'"
    for name, package in {"hub": "huggingface-hub", "pth": "torch", "h5": "h5py"}.items():
        assert f"is not installed: pip install {package}" in said[name]


def test_commands(tmp_path):
    """Each ends in one line that says what to install."""
    arguments = [
        *("train", "plan", "find_rate", "prepare digits", "report run"),
        *("predict w.npz a.jpg", "evaluate w.npz", "features w.npz a.jpg --output=x.npz"),
        "export w.npz --format=stablehlo --output=x",
    ]
    done = _run(COMMANDS, json.dumps(arguments), at=tmp_path)
    lines = done.stderr.splitlines()
    assert len(lines) == len(arguments), done.stderr
    for line, each in zip(lines, arguments):
        assert line.startswith("error: "), line
        assert "this package's extra '" in line or "w.npz" in line, (each, line)
