"""``report.html``: one file without a network, made from ``report.json`` alone."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from kd_lightning.durable_files import write_atomically
from kd_lightning.report import html_quantization, html_sections, html_training, html_verdict
from kd_lightning.report.facts import PAGE, Facts, read_facts
from kd_lightning.report.in_a_minute import cards, serving
from kd_lightning.report.many import overview


def render(record: Mapping[str, Any]) -> str:
    """Return the page of one pipeline.

    Args:
        record: As :mod:`kd_lightning.pipeline.report_record` makes it.
    """
    facts = Facts(record)
    said = facts.verdict
    sections = {
        "verdict": ("The verdict", html_verdict.verdict(facts)),
        "knowledge": ("What the teacher knows", html_sections.knowledge(facts)),
        "temperature": ("Temperature", html_sections.temperature(facts)),
        "training": ("Training", html_training.training(facts)),
        "groups": (_by(facts), html_training.by_group(facts)),
        "quantization": ("Quantisation", html_quantization.quantization(facts)),
        "reproduce": ("How to reproduce it", html_sections.reproduce(facts)),
    }
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            name=record["name"],
            facts=facts,
            cards=cards(facts),
            findings=said["findings"],
            warnings=said["warnings"],
            serving=serving(facts),
            sections={key: (title, found) for key, (title, found) in sections.items() if found is not None},
        )
    )


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a pipeline's folder, from the record there.

    Raises:
        ValueError: For a folder without a record, and for one that is torn or of another version.
    """
    path = folder / PAGE
    write_atomically(path, render(read_facts(folder).record).encode())
    return path


def render_many(several: Sequence[Facts]) -> str:
    """Return one page over several pipelines, side by side."""
    return _environment().get_template("several.html.j2").render(**overview(several))


def _by(facts: Facts) -> str:
    groups = facts.record.get("groups")
    by = groups["by"] if groups else None
    return {"class": "Per class", "text": "Per text", "target": "By target"}.get(by or "", "How sure, how right")


def _unbroken(value: Any) -> Any:
    """Keep a number and its per cent sign in one line."""
    return re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", value) if type(value) is str else value


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("kd_lightning.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_unbroken,
        trim_blocks=True,
        lstrip_blocks=True,
    )
