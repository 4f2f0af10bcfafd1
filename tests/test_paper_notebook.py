"""The notebook about the paper runs from top to bottom, with the smallest networks."""

import base64
import io
import os
import pathlib
import re

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from PIL import Image

from tests import speed
from tests.conftest import FAST_COMPILE

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "paper.ipynb"
# As papermill does: a cell after the one that is tagged "parameters". Compiling takes most of the
# time, so the networks have two stages.
SMALL = """
import resnet_jax as rj

for blocks in (1, 2):
    for kind, shortcut in (("plain", "none"), ("resnet", "A")):
        rj.register_model(
            f"{kind}{4 * blocks + 2}",
            stage_sizes=(blocks, blocks),
            stage_widths=(16, 32),
            block_cls=rj.BasicBlock,
            stem_cls=rj.CifarStem,
            shortcut=shortcut,
            num_classes=10,
            image_size=32,
        )
depths, epochs = (6, 10), 2
"""


@pytest.fixture(scope="module")
def saved():
    """The notebook as it is in the repository."""
    return nbformat.read(NOTEBOOK, 4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    notebook = nbformat.read(NOTEBOOK, 4)
    (parameters,) = [
        number
        for number, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", [])
    ]
    notebook.cells.insert(parameters + 1, new_code_cell(SMALL))
    folder = tmp_path_factory.mktemp("notebook")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / "tmp" / "jax-cache"),
        "XLA_FLAGS": FAST_COMPILE,
    }
    client = NotebookClient(
        notebook, timeout=speed.seconds(200), resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)
    return notebook


def find(notebook, text):
    """The only code cell that contains a text."""
    (cell,) = [each for each in notebook.cells if each.cell_type == "code" and text in each.source]
    return cell


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell):
    """The images that a cell shows, as arrays."""
    shown = [each.data["image/png"] for each in cell.outputs if "image/png" in each.get("data", {})]
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(each))).convert("L")) for each in shown
    ]


def test_is_saved_with_outputs(saved):
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert kinds == {"stream", "display_data"}
    assert not any(output.get("name") == "stderr" for cell in code for output in cell.outputs)


@pytest.mark.parametrize(
    "text", ["paper = {18", 'quoted = {"none"', "quoted = {20", "draw_block(left"]
)
def test_saved_counts_are_those_of_this_version(saved, executed, text):
    """Counts do not depend on the parameters of the notebook."""
    assert printed(find(saved, text)) == printed(find(executed, text)) != ""


def test_shows_every_figure(saved, executed):
    for notebook in (saved, executed):
        for text in ("def load_data", "draw_block(left", "sharey=True, layout", "deviations = {"):
            for cell in (each for each in notebook.cells if text in each.source):
                (picture,) = pictures(cell)
                assert (picture < 250).mean() > 0.01


def test_trains_all_networks(executed):
    for text, names in (
        ("def run(model)", ("plain6", "plain10", "resnet6", "resnet10")),
        ('for option in ("B", "C")', ("none", "option A", "option B", "option C")),
    ):
        lines = printed(find(executed, text)).splitlines()
        assert len(lines) == 4
        for line, name in zip(lines, names):
            assert re.fullmatch(rf"{name} +training error +\S+%  test error +\S+%", line)


def test_zero_residual_is_the_identity(executed):
    with_shortcut, without = printed(find(executed, "zero_init_residual=True")).splitlines()
    assert "max |y - x| = 0.00" in with_shortcut
    assert "max |y| = 0.00" in without
