"""What a person reads in the terminal: the verdict. PyTorch is not imported: an answer that is kept needs none."""

import textwrap
from collections.abc import Iterable
from pathlib import Path

import rich.table
from rich.console import Console
from rich.text import Text

from kd_lightning.records import Verdict
from kd_lightning.report.table import Table, comparison, overview
from kd_lightning.report.words import Words, say


def print_verdict(verdict: Verdict, console: Console) -> None:
    """Print the tables, which fit 80 columns; then the sentence, the findings and the warnings."""
    print_said(tables_of(verdict), say(verdict), console)


def tables_of(verdict: Verdict) -> tuple[Table, ...]:
    """Return the tables that are printed."""
    return tuple(table for table in (overview(verdict), comparison(verdict)) if table is not None)


def print_said(tables: Iterable[Table], words: Words, console: Console) -> None:
    """Print tables and words of a verdict."""
    for table in tables:
        console.print(_in_rich(table))
        if table.note:
            console.print(Text(table.note, style="dim"))
        console.print()
    lines = [words.sentence, *(f"- {said}" for said in words.findings), *(f"Beware: {said}" for said in words.warnings)]
    for line in lines:
        indent = "  " if line.startswith("- ") else ""
        console.print(Text(textwrap.fill(line, console.width, subsequent_indent=indent, break_on_hyphens=False)))


def print_places(report: str | Path | None, places: Iterable[str], console: Console) -> None:
    """Print where the report is, and where MLflow shows the runs."""
    if report is not None:
        console.print()
        console.print(f"Report: {report}", highlight=False, soft_wrap=True)
    for i, place in enumerate(places):
        console.print(f"\n{place}" if i == 0 else place, highlight=False, soft_wrap=True)


def _in_rich(table: Table) -> rich.table.Table:
    """Lay out a table whose numbers stay on one line: titles are wrapped to their width, names where there is need."""
    laid_out = rich.table.Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    laid_out.add_column("")
    for i, column in enumerate(table.columns[1:], start=1):
        width = max(len(row[i]) for row in table.rows)
        wrapped = textwrap.wrap(column, max(width, 9), break_long_words=False, break_on_hyphens=False)
        laid_out.add_column(Text("\n".join(wrapped)), justify="right", no_wrap=True)
    for row in table.rows:
        laid_out.add_row(*map(Text, row))
    return laid_out
