"""How plots look: colours that follow the page's theme, marks that tell without colour, SVG to put into a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font, get_font_names

# Dark enough for text on white, and apart for the colour-blind (after Okabe and Ito). The page has a lighter set for
# its dark theme, under the same names.
COLOURS = ("#0072b2", "#c44e00", "#00805c", "#a3447f", "#946500", "#4d5a66", "#1f8fbf", "#882255")
# Fewer than colours, each, so that a second round of colours has other marks and lines.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", (0, (5, 1.5)), (0, (1, 1)))
INK, FAINT, GRID = "#1b1f24", "#8a8f98", "#dfe2e6"
# The first is matplotlib's own; the others, where there are any, write what it lacks.
_FONTS = (
    "DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Micro Hei", "Hiragino Sans",
    "Yu Gothic", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS",
)  # fmt: skip
WIDTH = 260  # points; narrower than a phone's screen is in CSS pixels, so that text is scaled up there

_THEME = {colour: f"var(--series-{i})" for i, colour in enumerate(COLOURS)}
_THEME |= {INK: "var(--ink)", FAINT: "var(--faint)", GRID: "var(--grid)"}
_STYLE = {
    "font.size": 8.5,
    "figure.titlesize": 9,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "figure.dpi": 72,  # a pixel is a point, as in SVG
    "svg.fonttype": "path",
    "svg.hashsalt": "loku",  # the same runs give the same file
    "text.parse_math": False,  # a name with dollar signs is a name
}


@contextmanager
def style() -> Iterator[None]:
    with matplotlib.rc_context({**_STYLE, "font.family": _fonts()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing")  # of each character, many times: see `unwritable`
        yield


def unwritable(text: str) -> str:
    """The characters that no font has, and of which a plot shows boxes."""
    known = {code for font in _fonts() for code in get_font(findfont(font)).get_charmap()}
    return "".join(dict.fromkeys(c for c in text if not c.isspace() and ord(c) not in known))


def _fonts() -> list[str]:
    installed = set(get_font_names())
    return [name for name in _FONTS if name in installed]


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def line(index: int) -> str | tuple:
    return LINES[index % len(LINES)]


def figure(height: float, title: str) -> tuple[Figure, Axes]:
    """One panel, ``height`` in points."""
    made = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    made.suptitle(title, x=0.01, horizontalalignment="left")
    return made, made.add_subplot()


def svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element with the page's colours. Ids begin with ``name``, unique in the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub("#[0-9a-f]{6}", lambda match: _THEME.get(match[0], match[0]), text)
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r' height="[^"]*pt"', "", text, count=1), count=1)
