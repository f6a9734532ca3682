"""How pictures are drawn: with matplotlib, as SVG whose bytes depend on what is drawn alone."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from importlib import util
from typing import Any

from vllm_quantkit.spec import Frozen

HOW_TO_DRAW = (
    'There are no pictures, since matplotlib is not installed: pip install "vllm-quantkit[bench]".'
)

INK = "#24292f"
"""Of text, axes and grids; inside an HTML page it becomes the page's own colour of text."""

PAPER = "#ffffff"
"""Behind a picture in a file of its own, so that it can be read on a page of any colour."""

BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f7f7f"
"""Told apart by those who do not see all colours (https://doi.org/10.1038/nmeth.1618), and of
enough contrast on white and on black; marks and dashes differ as well."""

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 10,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.transparent": True,
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and enlarged
    "text.color": INK,
    "text.parse_math": False,  # names of models may hold dollar signs
    "xtick.color": INK,
    "ytick.color": INK,
}

NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""Dates and versions would change the bytes."""


class Picture(Frozen):
    """A drawing, ready for a page.

    Attributes:
        name: of its file, without an ending.
        title: what it shows, a few words.
        alt: what a reader who cannot see it should know.
        svg: the drawing on a transparent ground, ink in `INK`.
    """

    name: str
    title: str
    alt: str
    svg: str

    @property
    def file(self) -> str:
        """The SVG on white paper, as a file of its own."""
        start = self.svg.index("<svg")
        end = self.svg.index(">", start) + 1
        paper = f'\n <title>{escape(self.title)}</title>\n <rect width="100%" height="100%" '
        return f'{self.svg[:end]}{paper}fill="{PAPER}"/>{self.svg[end:]}'

    @property
    def inline(self) -> str:
        """The SVG inside an HTML page, ink in the page's colour.

        The page has its title under `<name>-title` and its alternative text under `<name>-alt`.
        """
        body = self.svg[self.svg.index("<svg") :].replace(INK, "currentColor")
        label = f'aria-labelledby="{self.name}-title" aria-describedby="{self.name}-alt"'
        body = body.replace("<svg", f'<svg role="img" {label}', 1)
        # A page knows the namespace.
        return body.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1)


def can_draw() -> bool:
    """Whether matplotlib, the extra `bench`, is installed."""
    return util.find_spec("matplotlib") is not None


def draw(
    name: str,
    title: str,
    alt: str,
    paint: Callable[..., None],
    size: tuple[float, float] = (7.2, 3.6),
    columns: int = 1,
) -> Picture:
    """A picture of one or more pairs of axes, side by side.

    Args:
        name: of its file; also keeps apart the marks of pictures on one page.
        title: what it shows.
        alt: the same for those who cannot see it, with its figures.
        paint: is given the axes, each an argument.
        size: inches.
        columns: pairs of axes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        paint(*(figure.add_subplot(1, columns, place + 1) for place in range(columns)))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=NO_METADATA)
    return Picture(name=name, title=title, alt=alt, svg=_bare(stream.getvalue(), name))


def legend_above(axes: Any) -> None:
    """A legend that hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)


def plain_ticks(axis: Any) -> None:
    """Decimal numbers, on logarithmic axes too."""
    axis.set_major_formatter("{x:g}")


def _bare(svg: str, name: str) -> str:
    """Without document type and comments, and with marks that are the picture's own."""
    svg = re.sub(r"<!DOCTYPE.*?>\n?|<!--.*?-->\n? *", "", svg, flags=re.DOTALL)
    svg = svg.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    svg = svg.replace("xlink:href", "href")
    ids = re.compile(r'(id="|url\(#|href="#)')
    return ids.sub(lambda found: f"{found[1]}{name}-", svg)
