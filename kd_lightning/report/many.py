"""Several pipelines side by side: what each decided, by how much, and in what their configurations differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from kd_lightning.report import svg
from kd_lightning.report.facts import Facts, duration
from kd_lightning.report.figures import Drawing
from kd_lightning.report.html_verdict import quality_against
from kd_lightning.report.words import percent

_MOST_DIFFERENCES = 30


def overview(several: Sequence[Facts]) -> dict[str, Any]:
    """Return what the page shows.

    Raises:
        ValueError: For fewer than two pipelines.
    """
    if len(several) < 2:
        raise ValueError(f"expected two pipelines or more side by side, got {len(several)}")
    differing = _differences([facts.record["reproduce"]["config"] for facts in several])
    rows = [_row(facts, i, [of[i] for of in differing.values()]) for i, facts in enumerate(several)]
    headlines = {facts.headline.name for facts in several}
    return {
        "rows": rows,
        "differing": list(differing),
        "drawings": _drawings(several) if len(headlines) == 1 else [],
        "said": _said(several),
    }


def _row(facts: Facts, number: int, settings: Sequence[str]) -> dict[str, Any]:
    verdict, key = facts.verdict, facts.distilled
    gain, share = verdict["differences"].get("distilled-alone"), verdict["gap_closed"]
    worth = "yes" if verdict["worth_it"] else "no" if verdict["decided"] else "not decided"
    t = facts.temperature(key) if key is not None else None
    return {
        "number": number + 1,
        "name": facts.record["name"],
        "folder": facts.folder,
        "worth": worth,
        "sentence": verdict["sentence"],
        "settings": settings,
        "t": "–" if t is None else f"{t[0]:.3g} to {t[1]:.3g}" if isinstance(t, tuple) else f"{t:.3g}",
        "teacher": facts.headline.write(facts.value("teacher")) if "teacher" in facts.models else "–",
        "alone": facts.headline.write(facts.value("student")) if "student" in facts.models else "–",
        "distilled": facts.headline.write(facts.value(key)) if key is not None else "–",
        "gain": "–"
        if gain is None
        else f"{facts.headline.number(gain['mean'])} "
        f"({facts.headline.number(gain['low'])} to {facts.headline.number(gain['high'])})",
        "closed": percent(share["mean"] if share["low"] is not None else None),
        "training": duration(sum(sum(seconds) for seconds in facts.record["seconds"].values())),
    }


def _drawings(several: Sequence[Facts]) -> list[Drawing]:
    """Draw what is gained by each pipeline with its interval, and quality against latency over all."""
    headline, found = several[0].headline, []
    gains = [(i, f.verdict["differences"].get("distilled-alone")) for i, f in enumerate(several, start=1)]
    known = [(i, gain) for i, gain in gains if gain is not None]
    if known:
        series = [
            svg.Series(
                f"{i}", "distilled", [several[0].shown(gain[name]) for name in ("low", "mean", "high")], [float(i)] * 3
            )
            for i, gain in known
        ]
        alt = "What distillation gains on the student alone: " + "; ".join(
            f"pipeline {i} {headline.write_difference(gain['mean'])}" for i, gain in known
        )
        unit = "points" if headline.percent else headline.symbol
        y = svg.Axis("pipeline", low=0.4, high=len(several) + 0.6, ticks=range(1, len(several) + 1))
        x = svg.Axis(f"gained, {unit}".rstrip(", "))
        drawn = svg.lines(series, x, y, alt, mark_x=0.0)
        note = "Mean and 95 % interval, positive where distillation helps; the vertical line is no difference."
        found.append(Drawing("What distillation gains", drawn, note=note))
    for name in ("latency_ms_p50", "file_mb"):
        points = [
            svg.Point(f"{f.title(key)} of {i}", f.role(key), cost, f.shown(f.value(key)))
            for i, f in enumerate(several, start=1)
            for key in dict.fromkeys(k for k in ("teacher", "student", f.distilled, f.served) if k in f.models)
            if key is not None and (cost := f.figure(key, name))
        ]
        if len(points) > 1:
            found.append(quality_against(several[0], name, points))
    return found


def _said(several: Sequence[Facts]) -> str:
    worth = [str(i) for i, facts in enumerate(several, start=1) if facts.verdict["worth_it"]]
    if not worth:
        return f"In none of these {len(several)} pipelines was distillation shown to be worth it."
    which = f"number {worth[0]}" if len(worth) == 1 else f"numbers {', '.join(worth[:-1])} and {worth[-1]}"
    return f"Distillation was shown to be worth it in {len(worth)} of these {len(several)} pipelines: {which}."


def _differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the settings in which configurations differ, by path: a value for each."""
    flat = [dict(_flat(config)) for config in configs]
    paths = dict.fromkeys(path for one in flat for path in one)
    found = {path: [one.get(path, "–") for one in flat] for path in paths}
    differing = {path: values for path, values in found.items() if len(set(values)) > 1 and "_target_" not in path}
    return dict(list(differing.items())[:_MOST_DIFFERENCES])


def _flat(part: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(part, Mapping):
        return [item for key, value in part.items() for item in _flat(value, f"{path}.{key}".lstrip("."))]
    return [(path, str(part))]
