"""The report's sections on how the training went, and on how well each class does."""

from collections.abc import Mapping, Sequence
from typing import Any

from kd_lightning.report import svg
from kd_lightning.report.facts import Facts, capital
from kd_lightning.report.figures import Drawing, legend

_TERMS = {
    "train/loss/": "Each loss as it is",
    "train/loss_weighted/": "Each loss with its weight",
    "train/grad_norm/": "Gradient norm of each loss",
}
_RATE = "lr-"  # as Lightning's LearningRateMonitor has it: lr-Adam, of several groups lr-Adam/pg1
_FAR_APART = 10
_MOST_GROUPS_SHOWN = 40
_AGREES = {
    "Regression": "% of values within the task's tolerance of the teacher's",
    "Embedding": "% of the teacher's nearest that are nearest to it, too",
}
_NOT_DRAWN = ("kd/temperature", "val/teacher_", "test/", "system/")  # elsewhere, one number, or of the machine
_NAMES = {
    "val/agreement": ("agreement with the teacher, validation", "%"),
    "val/acc": ("accuracy, validation", "%"),
    "val/ece": ("calibration error (ECE), validation", "%"),
    "val/kl_teacher": ("KL divergence from the teacher, validation", "nats"),
    "kd/teacher_entropy": ("entropy of the soft targets", "% of the largest possible"),
    "kd/on_policy_share": ("batches that the student wrote", "%"),
    "train/loss": ("total loss", "loss"),
    "train/samples_per_s": ("speed of the training", "samples a second"),
    "train/teacher_share": ("the teacher's part of the training's time", "%"),
    "train/peak_memory_mb": ("peak memory", "MB"),
}
"""What is logged: the figure's title, and its unit; what stands in percent is logged as a share."""


def training(facts: Facts) -> dict[str, Any] | None:
    """Curves: each term raw and weighted, validation, agreement, learning rate and whatever else was logged."""
    logged: Mapping[str, Mapping[str, Any]] = facts.record["training"]
    keys = [k for k in ("teacher", "student", "control", facts.distilled) if k and logged.get(k)]
    if not keys:
        return None
    drawings = []
    distilled = facts.distilled if facts.distilled in keys else None
    if distilled is not None:
        for prefix, title in _TERMS.items():
            drawings += _terms(facts, logged[distilled], prefix, title)
    names = list(dict.fromkeys(name for key in keys for name in logged[key]))
    drawings += _rates(facts, logged, keys, [name for name in names if name.startswith(_RATE)])
    rest = [name for name in names if not name.startswith((*_TERMS, _RATE, *_NOT_DRAWN))]
    for name in sorted(rest, key=lambda n: (not n.startswith("val/"), n)):
        drawing = _curve(facts, logged, keys, name)
        if drawing is not None:
            drawings.append(drawing)
    seeds = max(facts.seeds(key) for key in keys)
    return {"drawings": drawings, "seeds": seeds} if drawings else None


def _terms(facts: Facts, of: Mapping[str, Any], prefix: str, title: str) -> list[Drawing]:
    those = [(name.removeprefix(prefix), curve) for name, curve in of.items() if name.startswith(prefix)]
    found = [(name, curve) for name, curve in those if len(curve["step"]) > 1]
    if not found:
        return []
    series = [
        svg.Series(name, svg.TERMS[i], c["step"], c["mean"], c["low"], c["high"])
        for i, (name, c) in enumerate(found[: len(svg.TERMS)])
    ]
    alt = f"{title}, of the distilled student: " + ", ".join(
        f"{s.label} from {s.y[0]:.3g} to {s.y[-1]:.3g}" for s in series
    )
    y = _falling_axis(series, "norm" if "norm" in title else "loss")
    drawn = svg.lines(series, svg.Axis("step"), y, alt)
    return [Drawing(f"{title}: distilled", drawn, legend([(s.label, s.role) for s in series]))]


def _falling_axis(series: Sequence[svg.Series], title: str) -> svg.Axis:
    """Return a logarithmic axis where losses, say, fall over more than a factor of 30."""
    every = [v for s in series for v in (*s.low, *s.high)]
    if min(every) > 0 and max(every) / min(every) > 30:
        return svg.Axis(f"{title} (logarithmic)", log=True)
    return svg.Axis(title, low=0 if min(every) >= 0 else None)


def _rates(
    facts: Facts, logged: Mapping[str, Mapping[str, Any]], keys: Sequence[str], names: Sequence[str]
) -> list[Drawing]:
    """Draw learning rates: a figure for the only, or first, group of parameters of each model, and one for each other.

    On a linear axis, on which one sees a warm-up; on a logarithmic one where models' highest rates are far apart.
    """
    by_group: dict[str, list[str]] = {}
    for name in names:
        group = name.partition("/")[2]
        by_group.setdefault("" if group == "pg1" else group, []).append(name)
    found = []
    for group, those in by_group.items():
        curves = [(key, logged[key][name]) for key in keys for name in those if name in logged[key]]
        series = [
            svg.Series(facts.title(key), facts.role(key), c["step"], c["mean"], c["low"], c["high"])
            for key, c in curves
            if len(c["step"]) > 1
        ]
        if not series:
            continue
        highest = [max(c["high"]) for _, c in curves]
        far = min(highest) > 0 and max(highest) / min(highest) > _FAR_APART
        y = svg.Axis("logarithmic", log=True, low=min(highest) / 100) if far else svg.Axis("", low=0)
        title = f"Learning rate{f', parameters {group}' if group else ''}"
        alt = f"{title}: " + ", ".join(f"{s.label} at most {max(s.high):.3g}, {s.y[-1]:.3g} at the end" for s in series)
        named = legend([(s.label, s.role) for s in series])
        found.append(Drawing(title, svg.lines(series, svg.Axis("step"), y, alt), named))
    return found


def _curve(facts: Facts, logged: Mapping[str, Mapping[str, Any]], keys: Sequence[str], name: str) -> Drawing | None:
    split, _, rest = name.partition("/")
    plain = f"{rest.replace('_', ' ')}, validation" if split == "val" else name.replace("_", " ")
    title, unit = _NAMES.get(name, (plain, ""))
    if name == f"val/{facts.headline.key}":
        title, unit = f"{facts.headline.name}, validation", "%" if facts.headline.percent else facts.headline.symbol
    if name == "val/kl_teacher" and facts.record["task"]["kind"] == "LanguageModelling":
        unit = "bits a token"
    factor = 100 if unit.startswith("%") else 1
    series = []
    for key in keys:
        c = logged[key].get(name)
        nobody = name == "train/teacher_share" and not any(c["high"] if c else [])  # no teacher: no part of the time
        if c and len(c["step"]) > 1 and not nobody:
            mean, low, high = ([factor * v for v in c[which]] for which in ("mean", "low", "high"))
            series.append(svg.Series(facts.title(key), facts.role(key), c["step"], mean, low, high))
    if not series:
        return None
    alt = f"{title}: " + ", ".join(f"{s.label} from {s.y[0]:.3g} to {s.y[-1]:.3g}" for s in series)
    y = _falling_axis(series, unit) if "loss" in name else svg.Axis(unit)
    drawn = svg.lines(series, svg.Axis("step"), y, alt)
    return Drawing(capital(title), drawn, legend([(s.label, s.role) for s in series]))


def by_group(facts: Facts) -> dict[str, Any] | None:
    """Quality, agreement and retention of each class, text or range; how sure models are, and how often right."""
    groups, calibrations = facts.record.get("groups"), facts.record.get("calibration")
    found: dict[str, Any] = {"groups": None, "drawings": []}
    if groups:
        found["groups"] = _groups(facts, groups)
        found["drawings"] += [_per_group(facts, groups)]
    if calibrations:
        found["calibration"] = _eces(facts, calibrations)
        found["diagrams"] = [_diagram(facts, key, runs) for key, runs in calibrations.items()]
    return found if groups or calibrations else None


def _models_of(facts: Facts, groups: Mapping[str, Any]) -> list[str]:
    wanted = ("teacher", "student", "control", facts.distilled, facts.served)
    return list(dict.fromkeys(key for key in wanted if key is not None and key in groups["models"]))


def _groups(facts: Facts, groups: Mapping[str, Any]) -> dict[str, Any]:
    models, headline = _models_of(facts, groups), facts.headline
    second = "agreement" if all(groups["models"][k].get("agreement") for k in models) else None
    rows = []
    for i, name in enumerate(groups["names"][:_MOST_GROUPS_SHOWN]):
        cells = []
        for key in models:
            of = groups["models"][key]
            cell = {"quality": headline.number(of["mean"][i]), "agreement": "", "retention": ""}
            if key != "teacher" and second and of["agreement"][i] is not None:
                cell["agreement"] = f"{100 * of['agreement'][i]:.0f}"
            if key != "teacher" and of.get("retention") and of["retention"][i] is not None:
                cell["retention"] = f"{100 * of['retention'][i]:.0f}"
            cells.append(cell)
        rows.append({"name": name, "count": groups["count"][i] if groups["count"] else None, "cells": cells})
    left_out = max(0, len(groups["names"]) - _MOST_GROUPS_SHOWN)
    return {
        "models": models,
        "rows": rows,
        "title": capital(facts.axis),
        "by": groups["by"],
        "agreement": second is not None,
        "agrees": _AGREES.get(facts.record["task"]["kind"], "% of the same answers as the teacher"),
        "left_out": left_out,
    }


def _per_group(facts: Facts, groups: Mapping[str, Any]) -> Drawing:
    """Draw what the distilled student has gained on the student alone, against what the teacher is ahead."""
    models = groups["models"]
    names, sign = groups["names"], 1 if facts.headline.higher_is_better else -1
    key = facts.distilled
    if key not in models or "student" not in models or "teacher" not in models:
        first = next(iter(models))
        means = models[first]["mean"]
        numbers = [float(i) for i in range(1, len(means) + 1)]
        shown = [None if v is None else facts.shown(v) for v in means]
        series = [svg.Series(facts.title(first), facts.role(first), numbers, shown)]
        alt = f"{facts.headline.name} by {groups['by']}"
        return Drawing(alt, svg.dots(series, svg.Axis(groups["by"]), svg.Axis(facts.axis), alt, diagonal=False))
    ahead, gained, named = [], [], []
    for name, t, s, d in zip(
        names, models["teacher"]["mean"], models["student"]["mean"], models[key]["mean"], strict=True
    ):
        if None not in (t, s, d):
            ahead.append(facts.shown(sign * (t - s)))
            gained.append(facts.shown(sign * (d - s)))
            named.append(name)
    points = [svg.Point(n, "distilled", a, g) for n, a, g in zip(named, ahead, gained, strict=True)]
    worst = min(zip(gained, named, strict=True), default=(0, ""))
    best = max(zip(gained, named, strict=True), default=(0, ""))
    unit = "points" if facts.headline.percent else facts.headline.symbol
    most, least = f"{best[1]} ({best[0]:+.3g})", f"{worst[1]} ({worst[0]:+.3g})"
    alt = f"Most is gained on {most}, least on {least}."
    if best[0] <= 0:
        alt = f"Nothing is gained; least is lost on {most}, most on {least}."
    x, y = (
        svg.Axis(f"{what}, {unit}".rstrip(", "))
        for what in ("teacher ahead of student alone", "gained by distillation")
    )
    few = len(points) <= 16
    if few:
        drawn, named_points = svg.scatter(points, x, y, alt), legend([(p.label, p.role) for p in points], numbered=True)
    else:
        drawn = svg.dots([svg.Series("distilled", "distilled", ahead, gained)], x, y, alt)
        named_points = legend([])
    return Drawing(f"What is gained by {groups['by']}", drawn, named_points, alt)


def _eces(facts: Facts, calibrations: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, str]]:
    rows = []
    for key, runs in calibrations.items():
        eces = [100 * run["ece"] for run in runs]
        sure = [100 * _weighted(run["confidence"], run["answers"]) for run in runs]
        right = [100 * _weighted(run["right"], run["answers"]) for run in runs]
        how = _mean(sure) - _mean(right)
        rows.append(
            {
                "title": facts.title(key),
                "ece": f"{_mean(eces):.1f}" + (f" ({min(eces):.1f} to {max(eces):.1f})" if len(eces) > 1 else ""),
                "sure": f"{_mean(sure):.1f}",
                "right": f"{_mean(right):.1f}",
                "how": "too sure" if how > 1 else "too unsure" if how < -1 else "about right",
            }
        )
    return rows


def _diagram(facts: Facts, key: str, runs: Sequence[Mapping[str, Any]]) -> Drawing:
    run = runs[0]
    xs, ys = ([100 * v for v in run[name]] for name in ("confidence", "right"))
    ece = f"{100 * run['ece']:.1f} %"
    alt = f"How often {facts.title(key)} is right, by how sure it is. Expected calibration error {ece}."
    drawn = svg.dots(
        [svg.Series(facts.title(key), facts.role(key), xs, ys)],
        svg.Axis("how sure, %", low=0, high=100),
        svg.Axis("how often right, %", low=0, high=100),
        alt,
        counts=run["answers"],
    )
    return Drawing(facts.title(key), drawn, note=f"ECE {ece}" + (", first seed." if len(runs) > 1 else "."))


def _weighted(values: Sequence[float], counts: Sequence[int]) -> float:
    return sum(v * c for v, c in zip(values, counts, strict=True)) / max(sum(counts), 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
