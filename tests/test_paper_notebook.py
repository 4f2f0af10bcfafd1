"""The notebook about the paper runs from top to bottom, with the smallest networks."""

import pathlib
import re

import pytest

from tests.notebooks import code_cells, execute, find, is_as_it_ran, pictures, printed, read

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "paper.ipynb"
# Compiling takes most of the time, so the networks have two stages.
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
    return read(NOTEBOOK)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    notebook = read(NOTEBOOK)
    execute(notebook, tmp_path_factory.mktemp("notebook"), SMALL)
    return notebook


def test_is_saved_with_outputs(saved):
    is_as_it_ran(saved)
    outputs = [output for cell in code_cells(saved) for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert not any(output.get("name") == "stderr" for output in outputs)


@pytest.mark.parametrize(
    "text", ["paper = {18", 'quoted = {"none"', "quoted = {20", "draw_block(left"]
)
def test_saved_counts_are_those_of_this_version(saved, executed, text):
    """Counts do not depend on the parameters of the notebook."""
    assert printed(find(saved, text)) == printed(find(executed, text)) != ""


def test_shows_every_figure(saved, executed):
    for notebook in (saved, executed):
        for text in ("def load_data", "draw_block(left", "sharey=True, layout", "deviations = {"):
            for cell in code_cells(notebook, text):
                assert pictures(cell) == 1


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
