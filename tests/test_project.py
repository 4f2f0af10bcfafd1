"""The files around the package: workflows, templates, the citation."""

import pathlib
import re

import pytest
import yaml

import resnet_jax

ROOT = pathlib.Path(__file__).parents[1]
FILES = [*ROOT.glob(".github/**/*.yml"), ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_is_yaml(file):
    assert isinstance(yaml.safe_load(file.read_text()), dict)


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == resnet_jax.__version__


def test_workflows_run_on_every_python_that_is_promised():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    versions = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    [oldest] = re.findall(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())
    assert versions == sorted(versions, key=lambda each: int(each.split(".")[1]))
    assert versions[0] == oldest


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "RELEASING.md", "SECURITY.md"])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
