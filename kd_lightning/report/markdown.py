"""The verdict, and what a sweep has found, as Markdown: descriptions of runs in MLflow."""

import re
from collections.abc import Mapping, Sequence

from kd_lightning.headline import Headline
from kd_lightning.records import Verdict
from kd_lightning.report.table import Table, comparison, overview
from kd_lightning.report.words import percent, say
from kd_lightning.tracking.sweeps import SweptPipeline

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


def sweep_as_markdown(headline: Headline, pipelines: Sequence[SweptPipeline], most: int = MOST) -> str:
    """Return which of a sweep's pipelines is the best on the validation split, and a table of them, the best first.

    Args:
        headline: By which they are judged.
        pipelines: Those so far. One without a verdict is counted alone.
        most: As for :func:`as_markdown`.
    """
    own = f"final/val_{headline.key}"
    judged = [pipeline for pipeline in pipelines if own in pipeline.figures]
    judged.sort(key=lambda pipeline: pipeline.figures[own], reverse=headline.higher_is_better)
    if not judged:
        return f"{len(pipelines)} pipelines, none with a verdict on a distilled student."
    paths = list(dict.fromkeys(path for pipeline in judged for path in pipeline.values))
    short = ["T" if path.endswith(".temperature") else path.rpartition(".")[2] for path in paths]
    names = [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
    unit = "%" if headline.percent else headline.symbol
    measured = (f"validation {headline.name} {unit}".rstrip(), f"test {headline.name} {unit}".rstrip())
    rows = tuple(
        (*(pipeline.values.get(path, "–") for path in paths), *_cells(headline, pipeline.figures))
        for pipeline in judged
    )
    table = Table((*names, *measured, "agreement %", "gap closed %", "worth it"), rows)
    best = ", ".join(f"{name} = {value}" for name, value in zip(names, rows[0], strict=False))
    said = f"Of {len(judged)} pipelines the best on the validation {headline.units}: {best}."
    if len(judged) < len(pipelines):
        said += f" {len(pipelines) - len(judged)} more without a verdict on a distilled student."
    for count in range(len(rows), 0, -1):
        text = f"**{escaped(said)}**\n\n{_table(table, count, 'the runs below this one')}"
        if len(text) <= most:
            return text
    return f"{escaped(said)[: most - 1]}…"


def _cells(headline: Headline, figures: Mapping[str, float]) -> tuple[str, ...]:
    share = figures.get("final/gap_closed") if "final/gap_closed_low" in figures else None  # else any could be true
    decided = figures.get("final/decided") == 1
    return (
        headline.number(figures[f"final/val_{headline.key}"]),
        f"{headline.number(figures.get(f'final/{headline.key}'))} ± "
        f"{headline.number(figures.get(f'final/{headline.key}_sd'))}",
        percent(figures.get("final/agreement")),
        percent(share),
        ("yes" if figures.get("final/worth_it") == 1 else "no") if decided else "not decided",
    )


def escaped(text: str) -> str:
    r"""Return text that Markdown shows as it is, on one line: labels may have any character.

    Example:
        >>> print(escaped("T_1 | *bold* <b>"))
        T\_1 \| \*bold\* \<b\>
    """
    return re.sub(r"([\\`*_\[\]<>|~#&])", r"\\\1", " ".join(text.split()))


def _list(findings: tuple[str, ...]) -> str:
    return "\n".join(f"- {escaped(finding)}" for finding in findings)


def _table(table: Table, most_rows: int, others: str = "verdict.json") -> str:
    cells = [table.columns, ("---", *["---:"] * (len(table.columns) - 1))]
    lines = [" | ".join(map(escaped, table.columns)), " | ".join(cells[1])]
    lines += [" | ".join(map(escaped, row)) for row in table.rows[:most_rows]]
    left_out = len(table.rows) - most_rows
    text = "\n".join(f"| {line} |" for line in lines)
    notes = [f"{left_out} further rows: {others}"] * (left_out > 0) + [table.note] * bool(table.note)
    return "\n\n".join([text, *map(escaped, notes)])
