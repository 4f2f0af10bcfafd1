"""What a page consists of: sections with pictures, tiles and tables."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from resnet_jax.report.drawing import css_width, to_png, to_svg


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG file of a report; the page shows it unless its section has tiles of the same images."""

    name: str  # of its file, without ".png"
    png: bytes
    alt: str
    caption: str
    width: int = 0  # on a large page, in CSS pixels
    svg: str = ""  # what the page shows instead, in its own colors

    @classmethod
    def of_figure(cls, name: str, figure: Figure, alt: str, caption: str) -> Picture:
        """A figure in the light colors of the palette."""
        return cls(name, to_png(figure), alt, caption, css_width(figure), to_svg(figure, name))

    @property
    def uri(self) -> str:
        """The file as a data URI, which embeds it in the page."""
        return _uri(self.png)

    @property
    def is_wide(self) -> bool:
        """Whether a phone shows a part that is scrolled, because all of it would be illegible."""
        return self.width > 600


@dataclasses.dataclass(frozen=True)
class Tile:
    """One image or several beside each other, each above its label, and lines of text below."""

    pngs: Sequence[bytes]
    alt: str
    title: str
    text: str = ""
    labels: Sequence[str] = ()

    @property
    def images(self) -> list[tuple[str, str]]:
        """The images as data URIs, with their labels."""
        return [*zip(map(_uri, self.pngs), self.labels or [""] * len(self.pngs))]


class Link(NamedTuple):
    """A cell of a table that is a link; `target` is our own text, not a stranger's."""

    text: str
    target: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text, collapsed below a line `collapsed` unless that is empty."""

    rows: Sequence[Sequence[str | Link]]
    header: Sequence[str] = ()
    collapsed: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    id: str
    heading: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    tiles: Sequence[Tile] = ()
    source: str = ""  # of a program


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
