"""The verdict as Markdown, for the description of a run in MLflow."""

import re

from kd_lightning.records import Verdict
from kd_lightning.report.table import Table, comparison, overview
from kd_lightning.report.words import say

MOST = 5000
"""Characters that MLflow keeps of a tag's value, which a description is."""


def as_markdown(verdict: Verdict, most: int = MOST) -> str:
    """Return the sentence, the tables, the findings and the warnings.

    Args:
        verdict: Whatever was compared.
        most: Characters that the text may have; the last rows of the tables are left out where it would have more.
    """
    words = say(verdict)
    tables = [table for table in (overview(verdict), comparison(verdict)) if table is not None]
    rows = max(len(table.rows) for table in tables)
    while True:
        parts = [f"**{escaped(words.sentence)}**", *(_table(table, rows) for table in tables)]
        parts += [_list(words.findings), "\n".join(f"**Beware:** {escaped(said)}  " for said in words.warnings)]
        text = "\n\n".join(part for part in parts if part)
        if len(text) <= most or rows == 0:
            return text if len(text) <= most else text[: most - 1] + "…"
        rows -= 1


def escaped(text: str) -> str:
    r"""Return text that Markdown shows as it is, on one line: labels may have any character.

    Example:
        >>> print(escaped("T_1 | *bold* <b>"))
        T\_1 \| \*bold\* \<b\>
    """
    return re.sub(r"([\\`*_\[\]<>|~#&])", r"\\\1", " ".join(text.split()))


def _list(findings: tuple[str, ...]) -> str:
    return "\n".join(f"- {escaped(finding)}" for finding in findings)


def _table(table: Table, most_rows: int) -> str:
    cells = [table.columns, ("---", *["---:"] * (len(table.columns) - 1))]
    lines = [" | ".join(map(escaped, table.columns)), " | ".join(cells[1])]
    lines += [" | ".join(map(escaped, row)) for row in table.rows[:most_rows]]
    left_out = len(table.rows) - most_rows
    text = "\n".join(f"| {line} |" for line in lines)
    notes = [f"{left_out} further rows: verdict.json"] * (left_out > 0) + [table.note] * bool(table.note)
    return "\n\n".join([text, *map(escaped, notes)])
