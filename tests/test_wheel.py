"""The built wheel, installed into a clean environment, does everything without the checkout."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests import processes
from tests.processes import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The folder of the scripts of an environment that has the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}"]
    subprocess.run([*pip, ROOT], check=True)
    [wheel] = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    scripts = folder / "venv" / "bin"
    # libtpu is 0.5 GB: `plan` compiles where the tests' own environment has it, too.
    extras = "train,report,plan" if importlib.util.find_spec("libtpu") else "train,report"
    install = [scripts / "pip", "install", "--quiet", f"{wheel}[{extras}]"]
    subprocess.run(install, check=True)
    return scripts


@pytest.fixture(scope="module")
def run(scripts, tmp_path_factory):
    """Runs a program of the environment in an empty folder; returns (exit code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("here")
    environment = {**outside(), "XLA_FLAGS": "", "TFDS_DATA_DIR": str(folder / "data")}

    def start(program, *arguments):
        command = (scripts / program, *arguments)
        done = processes.run(*command, seconds=600, cwd=folder, env=environment)
        return done.returncode, done.stdout, done.stderr

    return start


def outside():
    """The environment of the tests without what leads Python to this checkout."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


@pytest.fixture(scope="module")
def trained(run):
    """The log of a training of a few steps."""
    flags = ["--config.train.steps=20", "--workdir=run"]
    code, out, err = run("resnet-jax", "train", "--config=digits", *flags)
    assert code == 0, err
    return out + err


def test_what_it_requires_fits_together(run):
    assert run("pip", "check")[0] == 0


def test_imports_the_installed_package(run, scripts):
    _, out, _ = run("python", "-c", "import resnet_jax; print(resnet_jax.__file__)")
    assert out.startswith(str(scripts.parent))


def test_trains_by_its_recipes(run, trained):
    assert "everything is in run" in trained
    assert "no report.html" not in trained
    for recipe in sorted(path.stem for path in (ROOT / "configs").glob("*.py")):
        code, out, err = run("resnet-jax", "train", f"--config={recipe}", "--help")
        assert code == 0, err
        assert "--config.train.batch_size" in out


@pytest.mark.parametrize("program", [("resnet-jax",), ("python", "-m", "resnet_jax")], ids=str)
def test_evaluates(run, trained, program):
    code, out, err = run(*program, "evaluate", "run", "--json=result.json", "--force")
    assert code == 0, err
    assert "top-1" in out


@pytest.mark.parametrize("form", ["stablehlo", "hub"])
def test_exports(run, trained, form):
    code, _, err = run("resnet-jax", "export", "run", f"--format={form}", f"--output={form}")
    assert code == 0, err


def test_plans(run):
    flags = ["--config=digits", "--topology=v5e:2x2", "--batch_per_chip=16"]
    code, out, err = run("resnet-jax", "plan", *flags)
    if importlib.util.find_spec("libtpu"):
        assert code == 0, err
        assert "v5e:2x2" in out
    else:
        assert code == 2
        assert "libtpu" in err
        assert "pip install 'jax[tpu]'" in err
        assert err.count("\n") == 1


def test_the_core_alone_has_a_network(tmp_path, scripts):
    """Without any extra: what the dependencies name is all that the models import."""
    [wheel] = scripts.parents[1].glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
    code = "import json, resnet_jax as rj; print(json.dumps(rj.list_models('resnet5*')))"
    done = processes.run(python, "-c", code, cwd=tmp_path, env=outside())
    assert "resnet50" in json.loads(done.stdout), done.stderr
