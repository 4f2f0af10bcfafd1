"""The notebook runs from top to bottom, at a small size on a CPU."""

import json
import os
import pathlib
import re

import jax
import numpy as np
import PIL
import pytest
from nbformat.v4 import new_code_cell

import resnet_jax as rj
from tests.notebooks import (
    code_cells,
    execute,
    find,
    is_as_it_ran,
    parameter_cells,
    pictures,
    printed,
    read,
)
from tests.variables import random_variables

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "colab_tpu.ipynb"
SMALL = """
import os

from tests import tiny

tiny.get_config()  # registers it in the notebook's process
data_set, network, image_size, epochs, resume_steps = "digits", tiny.NAME, 8, 1.0, 150
data_dir = os.environ["TFDS_DATA_DIR"]  # where other tests have prepared it
"""
# Cells after the last one of the notebook, for what it does not show.
HUB = "pretrained = 'hub'"
WORKERS = """
data = dataclasses.replace(config.data, crop="random_resized", workers=1)
streamed = dataclasses.replace(
    config,
    data=data,
    train=Train(steps=3, batch_size=16),
    checkpoint=Checkpoint(),
    log=Log(tensorboard=False, report=False),
)
print(train(streamed, "streamed").steps, "steps")
"""


@pytest.fixture(scope="module")
def notebook():
    return read(NOTEBOOK)


def run(folder):
    """(notebook, client) after a run in an empty folder, without an internet connection."""
    _save_as_on_the_hub(folder / "hub")
    notebook = read(NOTEBOOK)
    features = find(notebook, "load_pretrained").source
    maps = find(notebook, "Show feature maps").source
    notebook.cells += map(new_code_cell, (f"{HUB}\n{features}", maps, WORKERS))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "empty")}
    return notebook, execute(notebook, folder, SMALL, **offline)


def _save_as_on_the_hub(folder):
    folder.mkdir()
    model = rj.ResNet20()
    rj.save_weights(folder / "model.safetensors", model, random_variables(model))
    facts = {"input_size": [3, 32, 32], "crop_pct": 0.875, "interpolation": "bicubic"}
    config = {"architecture": "resnet20", "num_classes": 10, "pretrained_cfg": facts}
    (folder / "config.json").write_text(json.dumps(config))


def test_is_committed_as_it_ran(notebook):
    """And small enough for a viewer."""
    is_as_it_ran(notebook)
    assert sum(map(pictures, code_cells(notebook))) == 5
    assert NOTEBOOK.stat().st_size < 2**20


def test_what_a_reader_skips_is_folded(notebook):
    """Cells of plots and of the installation start with a title that Colab shows instead."""
    folded = [cell for cell in notebook.cells if cell.metadata.get("cellView") == "form"]
    assert len(folded) == 7
    assert all(cell.source.startswith("# @title ") for cell in folded)


def test_is_opened_and_installed_from_one_address(notebook):
    """The address of the badge and that of pip name the same account and project."""
    (badge,) = re.findall(r"research\.google\.com/github/(\S+?)\)", notebook.cells[0].source)
    owner, _, path = badge.partition("/blob/main/")
    assert ROOT / path == NOTEBOOK
    (parameters,) = parameter_cells(notebook)
    assert f'"https://github.com/{owner}"' in notebook.cells[parameters].source


def test_installing_keeps_what_is_loaded(notebook):
    """Otherwise Colab would ask for a restart, and JAX would lose its chip."""
    cell = {"repository": "https://github.com/OWNER/resnet_jax"}
    exec(find(notebook, "def install").source, cell)  # noqa: S102
    versions = dict(line.split("==") for line in cell["kept"]())
    assert versions["jax"] == jax.__version__
    assert versions["numpy"] == np.__version__
    assert versions["pillow"] == PIL.__version__
    with pytest.raises(RuntimeError, match="must be the address of this project"):
        cell["install"]()


def test_has_one_cell_of_parameters(notebook):
    (index,) = parameter_cells(notebook)
    defaults = {}
    exec(notebook.cells[index].source, defaults)  # noqa: S102
    assert defaults.keys() >= {"data_set", "image_size", "epochs", "resume_steps", "pretrained"}


def test_runs_from_top_to_bottom(tmp_path):
    """One test, so that the notebook runs only once."""
    notebook, client = run(tmp_path)
    shows_the_curve_while_training(notebook, client, tmp_path)
    agrees_with_the_evaluation_of_the_run(notebook)
    shows_pictures(notebook)
    features_without_and_with_pretrained_weights(notebook)
    resumes_a_stopped_run(notebook)
    saves_the_run(notebook, tmp_path)
    reads_images_in_other_processes(notebook)


def shows_the_curve_while_training(notebook, client, folder):
    cell = find(notebook, "result = watch(")
    assert "test accuracy after 22 steps" in printed(cell)
    assert pictures(cell) == 1
    assert client.redrawn >= 2  # at the end, and before
    records = (folder / "runs/notebook/metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["step"] == 22


def agrees_with_the_evaluation_of_the_run(notebook):
    text = printed(find(notebook, "in the run's evaluation"))
    here, there = [word for word in text.split() if "%" in word]
    assert here == there


def shows_pictures(notebook):
    for text in (
        "def show_images",
        "most confident errors",
        'title="confusion matrix',
        "Show feature maps",
    ):
        for cell in code_cells(notebook, text):
            assert pictures(cell) == 1


def features_without_and_with_pretrained_weights(notebook):
    trained, pretrained = map(printed, code_cells(notebook, "load_pretrained"))
    assert "using tiny as trained above" in trained
    assert pretrained == ""


def resumes_a_stopped_run(notebook):
    text = printed(find(notebook, "def press_stop"))
    assert "stopped by a signal" in text
    assert "resuming after step" in text
    assert "is from checkpoint.copy_to" in text
    assert "largest difference of any weight: 0.0" in text


def saves_the_run(notebook, folder):
    assert "the weights read back are equal" in printed(find(notebook, "save_weights"))
    assert {*os.listdir(folder / "resnet_jax")} == {"notebook", "notebook-tiny.safetensors"}
    copy, run = folder / "resnet_jax" / "notebook", folder / "runs" / "notebook"
    assert {"config.json", "checkpoints"} < {*os.listdir(copy)}
    assert (copy / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def reads_images_in_other_processes(notebook):
    """In a process that has not parsed absl's flags."""
    assert "3 steps" in printed(notebook.cells[-1])
