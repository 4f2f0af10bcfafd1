"""Tables of classes fit into a terminal, whatever their names are."""

import numpy as np
import pytest

from resnet_jax.evaluation.class_tables import ClassAccuracy, ClassMetrics, class_lines
from resnet_jax.terminal import columns, shortened

LONG = [f"a rather long name that is the same for all up to number {n}" for n in range(20)]


def accuracies(names, confusion):
    images = confusion.sum(1)
    hits = confusion.diagonal() / images
    return [ClassAccuracy(*each) for each in zip(names, images.tolist(), hits.tolist())]


def matrix_of(lines):
    """The counts of a printed confusion matrix, and the names of its rows."""
    start = next(n for n, line in enumerate(lines) if line.startswith("confusion matrix"))
    blocks, names = {}, {}
    for line in lines[start + 1 :]:
        if not line:
            continue
        if line.startswith("   "):  # the numbers of columns
            block = [*map(int, line.split())]
            continue
        cells = line.split()
        row, counts = int(cells[0]), [*map(int, cells[-len(block) :])]
        names[row] = " ".join(cells[1 : -len(block)])
        blocks |= {(row, column): count for column, count in zip(block, counts, strict=True)}
    side = max(row for row, _ in blocks) + 1
    assert len(blocks) == side**2
    return np.array([[blocks[row, column] for column in range(side)] for row in range(side)]), names


@pytest.mark.parametrize("most", [9, 99, 9_999])
@pytest.mark.parametrize("classes", [2, 12, 20])
@pytest.mark.parametrize("width", [0, 80, 120])
def test_tables_fit_the_terminal(most, classes, width):
    names = LONG[:classes]
    confusion = np.random.default_rng(0).integers(0, most + 1, (classes, classes))
    lines = [*class_lines(names, accuracies(names, confusion), confusion, width)]
    if width:
        assert max(map(columns, lines)) <= width
    printed, labels = matrix_of(lines)
    np.testing.assert_array_equal(printed, confusion)
    for number, name in enumerate(names):  # the end distinguishes them
        assert labels[number].startswith(name[:6])
        assert labels[number].endswith(name[-2:])
        assert width or labels[number] == name
    rows = lines[1 : classes + 1]
    assert [line.split("%")[0].split()[-2] for line in rows] == [*map(str, confusion.sum(1))]


def test_metrics_of_classes_fit_the_terminal():
    metrics = [ClassMetrics(name, 10, 9, 0.5, None, 1.0, 0.25) for name in LONG]
    assert max(map(columns, class_lines(LONG, metrics, None))) > 80
    lines = [*class_lines(LONG, metrics, None, 80)]
    assert {*map(columns, lines)} == {80}
    assert lines[3].endswith("  50.00%         - 100.00%  25.00%")


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdefg", 6, "abc…fg"),
        ("abcdefgh", 1, "…"),
        ("漢字漢字漢字", 6, "漢…字"),  # two columns each
        ("ab\u0301cdefg\u0301h", 5, "ab\u0301…g\u0301h"),  # accents stay with their letters
        ("abcdef\u0301gh", 6, "abc…gh"),
        ("👩\u200d🚀👩\u200d🚀👩\u200d🚀", 6, "👩…🚀"),  # no joiner without a partner
    ],
)
def test_shortened(text, width, expected):
    found = shortened(text, width)
    assert found == expected
    assert columns(found) <= width
