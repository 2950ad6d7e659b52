"""A figure of the report with what stands around it."""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from kd_lightning.report.svg import swatch


class Drawing(NamedTuple):
    """A figure.

    Attributes:
        title: Above it.
        svg: The figure.
        legend: Below it; empty for none.
        note: What to see in it, or how it was made.
    """

    title: str
    svg: str
    legend: Markup = Markup("")
    note: str = ""

    @property
    def drawn(self) -> Markup:
        """The figure for a page; :mod:`kd_lightning.report.svg` has escaped what came from outside."""
        return Markup(self.svg)


def legend(models: Sequence[tuple[str, str]], numbered: bool = False) -> Markup:
    """Return a list of models with the marks and dashes of their roles.

    Args:
        models: Label and role of each.
        numbered: Whether the figure names them by number.
    """
    items = Markup("").join(
        Markup("<li>{}{} {}</li>").format(
            Markup(swatch(role, line=not numbered)), Markup("<b>{}</b>").format(i) if numbered else "", escape(label)
        )
        for i, (label, role) in enumerate(models, start=1)
    )
    return Markup('<ul class="legend">{}</ul>').format(items)
