"""Figures become SVG in the colors of a page, and the colors are legible."""

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from resnet_jax.report.drawing import new_figure, to_png, to_svg
from resnet_jax.report.palette import DARK, LIGHT, LIGHT_CURVES, SHADE


def contrast(first, second):
    """The contrast ratio of WCAG 2, from 1 to 21."""

    def luminance(color):
        values = np.array([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_curves_are_legible(colors):
    """At least 4.5 for text and 3 for graphics (WCAG 2, level AA)."""
    page = colors["page"]
    assert min(contrast(colors[name], page) for name in ("ink", "faint", "link", "strong")) >= 4.5
    assert min(contrast(colors[f"curve{n}"], page) for n in range(len(LIGHT_CURVES))) >= 3
    assert contrast(colors["strong"], SHADE) >= 4.5
    assert colors.keys() == LIGHT.keys()


def test_a_color_has_one_meaning():
    """A figure is drawn in light colors, which then become variables."""
    assert len({*LIGHT.values()}) == len(LIGHT)
    assert all(color == color.lower() for color in LIGHT.values())


def figure():
    made = new_figure(2.0)
    axes = made.subplots()
    for number, color in enumerate(LIGHT_CURVES):
        axes.plot([0, 1.23456789, 2], [number, 1, 2], color=color)
    axes.set_title("<b>&\u202e", parse_math=False)
    return made


def test_colors_of_the_palette_become_variables():
    svg = to_svg(figure(), "one")
    for number in range(len(LIGHT_CURVES)):
        assert f"stroke:var(--curve{number})" in svg
    assert "fill:var(--ink)" in svg
    assert not any(color in svg.lower() for color in LIGHT.values())
    assert "&lt;b&gt;&amp;\\u202e" in svg
    assert "<style" not in svg
    assert "font-family" not in svg
    assert not re.search(r"\d\.\d{5}", svg)


def test_an_svg_is_reproducible_and_its_identifiers_are_its_own():
    assert to_svg(figure(), "one") == to_svg(figure(), "one")
    first, second = (
        {*re.findall(r' id="([^"]+)"', to_svg(figure(), name))} for name in ("one", "two")
    )
    assert first
    assert not first & second


def test_the_text_of_a_png_is_drawn():
    assert to_png(figure()).startswith(b"\x89PNG")
    assert isinstance(figure(), Figure)
