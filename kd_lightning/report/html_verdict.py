"""The report's first section: the table, quality against cost, and when the training has paid for itself."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from kd_lightning.report import svg
from kd_lightning.report.facts import SHOWN_SECONDS, Facts, capital, duration
from kd_lightning.report.figures import Drawing, legend
from kd_lightning.report.glossary import glossary
from kd_lightning.report.words import percent

_FIGURES = (
    *("params", "file_mb", "size_mb", "latency_ms_p50", "throughput_per_s", "tokens_per_s", "kl_teacher"),
    *("acceptance", "train_seconds"),
)
_TITLES = {
    "params": "parameters",
    "file_mb": "file, MB",
    "size_mb": "weights, MB",
    "latency_ms_p50": "latency, ms",
    "throughput_per_s": "per s, batch 64",
    "tokens_per_s": "tokens per s",
    "kl_teacher": "KL to teacher, bits",
    "acceptance": "accepted, %",
    "train_seconds": "training",
}


def verdict(facts: Facts) -> dict[str, Any]:
    """Return what the section shows."""
    drawings = [d for name in ("latency_ms_p50", "file_mb", "size_mb") if (d := _front(facts, name)) is not None]
    words = glossary(facts.models.values(), facts.verdict)
    return {"table": _table(facts), "drawings": drawings[:2], "costs": _costs(facts), "words": words}


def _table(facts: Facts) -> dict[str, Any]:
    headline = facts.headline
    unit = "%" if headline.percent else headline.symbol
    figures = [name for name in _FIGURES if any(facts.figure(key, name) is not None for key in facts.models)]
    if "file_mb" in figures:
        figures.remove("size_mb")
    columns = [f"{headline.name}, {unit}" if unit else headline.name, "gap closed, %", "agrees with teacher, %", "T"]
    rows: list[dict[str, Any]] = []
    for key, model in facts.models.items():
        sd, source = facts.sd(key), (model.get("quantized") or {}).get("source")
        t = facts.temperature(key)
        t = facts.temperature(str(source)) if t is None and source in facts.models else t
        share = model.get("gap_closed")
        closed = share["mean"] if share is not None and share["low"] is not None else None
        at = "–" if t is None else f"{t[0]:.3g} to {t[1]:.3g}" if isinstance(t, tuple) else f"{t:.3g}"
        cells = [
            headline.number(facts.value(key)) + (f" ± {headline.number(sd)}" if sd is not None else ""),
            percent(closed),
            percent(model["agreement"]),
            at,
        ]
        cells += [_cell(facts, key, name) for name in figures]
        rows.append(
            {
                "title": facts.title(key),
                "role": facts.role(key),
                "cells": cells,
                "marks": ["★"] * (key == facts.distilled) + ["◆"] * (key == facts.served != facts.distilled),
                "nothing": model.get("learned_nothing"),
            }
        )
    columns += [_TITLES[name] for name in figures]
    known = [i for i in range(len(columns)) if any(row["cells"][i] != "–" for row in rows)]
    for row in rows:
        row["cells"] = [row["cells"][i] for i in known]
    return {"columns": [columns[i] for i in known], "rows": rows, "gap": 1 in known}


def _cell(facts: Facts, key: str, name: str) -> str:
    if name == "train_seconds":
        found = facts.figure(key, name)
        return "–" if not found else duration(found)
    return facts.written(key, name)


def _front(facts: Facts, name: str) -> Drawing | None:
    points = [
        svg.Point(facts.title(key), facts.role(key), x, facts.shown(facts.value(key)), _sd(facts, key))
        for key in facts.models
        if (x := facts.figure(key, name))
    ]
    return quality_against(facts, name, points) if len(points) > 1 else None


def quality_against(facts: Facts, name: str, points: Sequence[svg.Point]) -> Drawing:
    """Draw quality against a cost, and the models that no other beats in both.

    Args:
        facts: Say what quality is.
        name: Of the cost, as a figure.
        points: The models.
    """
    up = facts.headline.higher_is_better
    front: list[svg.Point] = []
    for p in sorted(points, key=lambda p: (p.x, -p.y if up else p.y)):
        if not front or (p.y > front[-1].y if up else p.y < front[-1].y):
            front.append(p)
    corners = [(p.x, p.y) for p in front]
    for i, (before, after) in enumerate(pairwise(front)):
        corners.insert(2 * i + 1, (after.x, before.y))
    what = {"latency_ms_p50": "latency", "file_mb": "size of the file", "size_mb": "size of the weights"}[name]
    wide = max(p.x for p in points) / min(p.x for p in points) > 4
    on_it = "; ".join(p.label for p in front)
    alt = f"{facts.headline.name} against {what} of {len(points)} models. No other is better in both than: {on_it}."
    return Drawing(
        f"{capital(facts.headline.name)} against {what}",
        svg.scatter(
            points,
            svg.Axis(f"{_TITLES[name]}{' (logarithmic)' if wide else ''}", log=wide),
            svg.Axis(facts.axis),
            alt,
            corners,
        ),
        legend([(p.label, p.role) for p in points], numbered=True),
        f"Dotted: no other model is better in both ({on_it}).",
    )


def _sd(facts: Facts, key: str) -> float | None:
    found = facts.sd(key)
    return None if found is None else facts.shown(found)


def _costs(facts: Facts) -> dict[str, Any] | None:
    """Return what the page computes the break-even from: seconds of storing and training, and of serving a request."""
    served, key = facts.served, facts.distilled
    if served is None or key is None or "teacher" not in facts.models:
        return None

    def option(of: str, training: float, storing: float = 0.0) -> dict[str, Any] | None:
        single, batch = facts.figure(of, "latency_ms_p50"), facts.figure(of, "throughput_per_s")
        if not single:
            return None
        return {
            "title": facts.title(of),
            "role": facts.role(of),
            "training": training,
            "storing": storing,
            "single": single / 1000,
            "batch": 1 / batch if batch else single / 1000,
            "quality": facts.headline.write(facts.value(of)),
        }

    further, storing = facts.further(key), facts.storing(key)
    found = [option("teacher", 0.0), option(served, facts.seconds(key) + further, storing)]
    if "student" in facts.models:
        found.append(option("student", facts.seconds("student")))
    options = [one for one in found if one is not None]
    if len(options) < 2:
        return None
    teacher, alone = facts.seconds("teacher"), facts.seconds("student") if "student" in facts.models else 0.0
    paid = {
        "training the teacher": teacher,
        "storing the teacher's outputs": storing,
        "distilling the student": facts.seconds(key),
        f"making {served} of it": further,
        "training the student alone, to compare with": alone,
    }
    return {
        "teacher": teacher,
        "paid": [(what, duration(seconds)) for what, seconds in paid.items() if seconds >= SHOWN_SECONDS],
        "options": options,
        "runtime": facts.verdict["runtime"],
    }
