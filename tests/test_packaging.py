"""What pyproject.toml, constraints.txt and the Dockerfile say about versions fits together."""

import json
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTED = ("train", "report", "hub", "onnx", "test")  # what the default tests install


def requirements(*extras):
    """The direct requirements of the package and of some extras, without those on itself."""
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    found = map(Requirement, lines)
    return [each for each in found if each.name != PROJECT["name"]]


def constraints():
    """Name -> version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def test_constraints_name_a_version_that_is_allowed():
    pins = constraints()
    for each in requirements(*TESTED):
        version = pins[canonicalize_name(each.name)]
        assert each.specifier.contains(version), f"{each} and {version}"


def test_every_requirement_has_a_lower_bound_and_no_other():
    """A bound above would replace what people have, and need a release for each new version."""
    for each in requirements(*TESTED):
        assert [bound.operator for bound in each.specifier] == [">="], each


def test_the_two_lists_of_a_package_agree():
    """A package in several extras has one lower bound."""
    bounds = {}
    for each in requirements(*PROJECT["optional-dependencies"]):
        if each.specifier:
            bounds.setdefault(canonicalize_name(each.name), set()).add(str(each.specifier))
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


def dockerfile_commands():
    """The commands of the Dockerfile, with continued lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def images():
    """The extras of each image that the Dockerfile's head describes; the first is the default."""
    text = (ROOT / "Dockerfile").read_text()
    (default,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    return [default, *re.findall(r"--build-arg EXTRAS=(\S+)", text)]


def test_the_images_have_extras_that_exist():
    assert len(images()) == 3
    for extras in images():
        assert {*extras.split(",")} <= PROJECT["optional-dependencies"].keys()


def test_the_image_runs_without_root_what_is_there():
    commands = dockerfile_commands()
    assert "USER resnet" in commands
    assert '["resnet-jax"]' in commands[-2]
    assert "resnet-jax" in PROJECT["scripts"]
    last = max(i for i, line in enumerate(commands) if line.startswith("FROM"))
    for line in commands[last:]:
        if line.startswith("COPY") and "--from" not in line:
            assert (ROOT / line.split()[1]).exists(), line


@pytest.mark.slow
@pytest.mark.parametrize("extras", images())
def test_pip_can_install_what_the_dockerfile_does(extras, tmp_path):
    (command,) = [line for line in dockerfile_commands() if "/opt/venv/bin/pip install" in line]
    words = shlex.split(command.replace("${EXTRAS}", extras))[2:]  # after RUN and pip
    dry = [sys.executable, "-m", "pip", *words, "--dry-run", "--ignore-installed", "--quiet"]
    done = subprocess.run(
        [*dry, f"--report={tmp_path / 'report.json'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    planned = {canonicalize_name(each["metadata"]["name"]) for each in report["install"]}
    assert ("jax-cuda12-plugin" in planned) == ("gpu" in extras)
    assert ("libtpu" in planned) == ("tpu" in extras)
