"""The colors of a page and its figures, on light and on dark screens.

Figures are drawn in the light colors. On the page each of them becomes a CSS variable
(`drawing.to_svg`), so that one drawing serves both.
"""

from __future__ import annotations

# Colors of curves, distinguishable with any color vision: those of Okabe & Ito, where they are too
# faint on white darker, and lighter on a dark page.
LIGHT_CURVES = (
    "#0072b2",
    "#d55e00",
    "#008f68",
    "#b8528f",
    "#a67200",
    "#2a8fcb",
    "#000000",
    "#777777",
)
_DARK_CURVES = (
    "#4fa3dc",
    "#f0793a",
    "#2cbe92",
    "#dda0c4",
    "#f0b43c",
    "#8cd0f5",
    "#ffffff",
    "#aaaaaa",
)
# The color of a confusion matrix, on which black text and white text are legible.
SHADE = "#2a7ab8"


def _named(curves: tuple[str, ...]) -> dict[str, str]:
    return {f"curve{number}": color for number, color in enumerate(curves)}


LIGHT = {
    "page": "#ffffff",
    "ink": "#1b1f24",
    "faint": "#5b6570",
    "line": "#d9dee3",
    "link": "#0b5cad",
    "strong": "#010101",
    **_named(LIGHT_CURVES),
}
DARK = {
    "page": "#14181d",
    "ink": "#d5dbe1",
    "faint": "#98a3ae",
    "line": "#333b44",
    "link": "#6db3f2",
    "strong": "#fefefe",
    **_named(_DARK_CURVES),
}


def css_variables(colors: dict[str, str]) -> str:
    """The colors as declarations of CSS.

    Example:
      >>> css_variables({"page": "#ffffff", "ink": "#1b1f24"})
      '--page: #ffffff; --ink: #1b1f24;'
    """
    return " ".join(f"--{name}: {color};" for name, color in colors.items())
