"""From a figure of matplotlib to a PNG file and to SVG in a page.

Figures are made without pyplot, which has global state and is not safe in threads. Their width is
small and their text large, so that a phone of 360 pixels shows them legibly.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from resnet_jax.report.palette import LIGHT
from resnet_jax.terminal import visible

WIDTH = 4.6  # inches; 72 / WIDTH times the pixels of a phone is a point
_PIXELS_PER_INCH = 120  # of CSS, on a large page
_VARIABLES = {color: f"var(--{name})" for name, color in LIGHT.items()}


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure; sides are in inches."""
    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def to_png(figure: Figure) -> bytes:
    """A figure as a PNG file for a light page."""
    _paint(figure)
    file = io.BytesIO()
    with _without_warnings():
        figure.savefig(file, format="png")
    return file.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element for a page, in the page's font and the colors of its variables.

    Args:
      figure: A figure in the colors of `palette.LIGHT`.
      name: Distinguishes its identifiers from those of other figures on a page.
    """
    _paint(figure)
    file = io.BytesIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text remains text; without a salt, identifiers would be random.
    options = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name})
    with options, _without_warnings():
        figure.savefig(file, format="svg", metadata=none)
    root = ElementTree.fromstring(file.getvalue())  # noqa: S314, it is matplotlib's own
    _shorten(root)
    root.attrib = {"width": str(css_width(figure)), "viewBox": root.attrib["viewBox"]}
    return ElementTree.tostring(root, encoding="unicode")


def css_width(figure: Figure) -> int:
    """The width of a figure on a large page, in CSS pixels."""
    return round(figure.get_figwidth() * _PIXELS_PER_INCH)


def _shorten(root: ElementTree.Element) -> None:
    """Removes what an element in a page does not need, and makes colors variables."""
    for parent in root.iter():
        for child in [*parent]:
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    used = {
        name
        for element in root.iter()
        for value in element.attrib.values()
        for name in re.findall(r"(?:^|url\()#([^)]+)", value)
    }
    for element in root.iter():
        element.tag, element.tail = _local(element.tag), None
        element.text = visible(element.text or "") if element.tag in ("text", "tspan") else None
        attributes = {_local(name): value for name, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        if attributes.get("transform", "").startswith("rotate(-0 "):
            del attributes["transform"]
        element.attrib = {name: _short(name, value) for name, value in attributes.items()}


def _local(name: str) -> str:
    """A name without its namespace, which HTML knows."""
    return name.rpartition("}")[2]


def _short(name: str, value: str) -> str:
    if name == "style":
        return _style(value)
    if name in ("d", "points", "x", "y", "width", "height", "transform"):
        digits = 4 if name == "transform" else 2
        value = re.sub(r"-?\d+\.\d+", lambda found: f"{round(float(found[0]), digits):g}", value)
        return " ".join(re.sub(r" ?([A-Za-z]) ", r"\1", value).split())
    return value


def _style(value: str) -> str:
    """Declarations of CSS with variables for colors, and without the family of a font."""
    found: dict[str, str] = {}
    for declaration in value.split(";"):
        name, _, each = declaration.partition(":")
        found[name.strip()] = each.strip()
    found.pop("font-family", None)
    if font := found.pop("font", None):  # older versions of matplotlib: size and family
        size = re.search(r"[\d.]+px", font)
        found["font-size"] = size[0] if size else "10px"
    found.pop("", None)
    return ";".join(f"{name}:{_VARIABLES.get(each.lower(), each)}" for name, each in found.items())


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():  # characters that the font lacks become boxes
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        yield


def _paint(figure: Figure) -> None:
    """Gives backgrounds, frames and text outside of the axes the colors of the page."""
    page, ink = LIGHT["page"], LIGHT["ink"]
    figure.set_facecolor(page)
    for axes in figure.axes:
        axes.set_facecolor(page)
        axes.tick_params(colors=ink, which="both")
        for label in (axes.title, axes.xaxis.label, axes.yaxis.label):
            label.set_color(ink)
        for spine in axes.spines.values():
            spine.set_edgecolor(ink)
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    for legend in filter(None, legends):
        legend.get_frame().set(facecolor=page, edgecolor=ink)
        for text in legend.get_texts():
            text.set_color(ink)
