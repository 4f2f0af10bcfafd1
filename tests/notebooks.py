"""Runs a notebook of this project, and reads what its cells show."""

import base64
import io
import os
import pathlib

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from PIL import Image

from tests import speed
from tests.conftest import FAST_COMPILE

ROOT = pathlib.Path(__file__).parents[1]


class Client(NotebookClient):
    """Counts updates of displayed images while cells run."""

    redrawn = 0

    def process_message(self, msg, cell, cell_index):
        self.redrawn += msg["msg_type"] == "update_display_data"
        return super().process_message(msg, cell, cell_index)


def execute(notebook, folder, parameters, **environment):
    """Runs all cells in a folder; `parameters` is a cell after that of the notebook's parameters.

    Returns the client. As papermill does, it keeps the notebook's own parameters above.
    """
    (tagged,) = parameter_cells(notebook)
    notebook.cells.insert(tagged + 1, new_code_cell(parameters))
    environment = {
        **os.environ,  # with the compilation cache of the tests
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FAST_COMPILE,  # and one device, as in Colab
        **environment,
    }
    client = Client(
        notebook, timeout=speed.seconds(200), resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)
    return client


def parameter_cells(notebook):
    """The numbers of the cells that are tagged "parameters"."""
    cells = enumerate(notebook.cells)
    return [number for number, cell in cells if "parameters" in cell.metadata.get("tags", [])]


def read(path):
    return nbformat.read(path, 4)


def code_cells(notebook, text=""):
    """The code cells that contain a text."""
    return [each for each in notebook.cells if each.cell_type == "code" and text in each.source]


def find(notebook, text):
    """The only code cell that contains a text."""
    (cell,) = code_cells(notebook, text)
    return cell


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell):
    """The number of images that a cell shows, none of which is blank."""
    shown = [x.data["image/png"] for x in cell.outputs if "image/png" in x.get("data", {})]
    for picture in shown:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert (np.asarray(image.convert("L")) < 250).mean() > 0.01
    return len(shown)


def is_as_it_ran(notebook):
    """From top to bottom, with what it showed."""
    code = code_cells(notebook)
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert not [x for cell in code for x in cell.outputs if x.output_type == "error"]
