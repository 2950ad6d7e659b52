"""The report's other sections: what is drawn and said in each; None for one of which nothing is known."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kd_lightning.report import svg
from kd_lightning.report.facts import Facts
from kd_lightning.report.figures import Drawing, legend
from kd_lightning.report.words import percent

_RULES = {
    "knowledge": ("Where the teacher knows most beyond its answer", "the highest entropy of what it says"),
    "error": ("Where the teacher is furthest off", "the largest error"),
    "disagreement": (
        "Where teacher and distilled student disagree most",
        "the largest Jensen–Shannon divergence of what the two say",
    ),
    "lot": ("Drawn by lot", "by a fixed seed, so that nobody has picked them"),
}
_DIFFERENCE = "the largest difference of what the two say"
_RESEMBLING, _MUCH = 8, 0.5


def knowledge(facts: Facts) -> dict[str, Any] | None:
    """What the teacher knows: examples, and which classes resemble which."""
    examples, looked_at = facts.record.get("examples"), facts.record.get("looked_at")
    if not examples:
        return None
    used = (facts.record.get("temperature") or {}).get("used")
    titles = {
        "teacher": "teacher",
        "teacher at T": f"teacher, T\u00a0=\u00a0{used:.3g}" if used else "",
        "label": "label",
    }
    for key in facts.models:
        titles.setdefault(key, facts.title(key))
    groups, thing = [], "token" if facts.things == "tokens" else "class"
    for rule, (title, how) in _RULES.items():
        those = [_example(facts, one) for one in examples if one["rule"] == rule]
        if those and rule == "disagreement" and "values" in those[0]:
            how = _DIFFERENCE
        if those:
            each = rule != "lot" and those[0].get("label") is not None
            groups.append({"title": title, "how": how + f", one of each {thing}" * each, "examples": those})
    points = facts.record.get("points")
    return {
        "groups": groups,
        "titles": titles,
        "looked_at": looked_at,
        "rows": (examples[0].get("input") or {}).get("kind") == "row",
        "structure": _structure(facts),
        "drawings": [_predictions(facts, points)] if points else [],
        "thing": thing,
    }


def _example(facts: Facts, one: Mapping[str, Any]) -> dict[str, Any]:
    if "classes" in one:
        names, label = facts.names(one["classes"]), one.get("label")
        says = {model: of for model, of in one["says"].items() if model != "control"}  # room for the others
        right = {label} if label is not None else set(one["set"])
        rows = [
            {"name": name, "right": c in right, "p": {m: of[i] for m, of in says.items()}}
            for i, (c, name) in enumerate(zip(one["classes"], names, strict=True))
        ]
        told = facts.names([label])[0] if label is not None else ", ".join(facts.names(one["set"])) or "none"
        return {**one, "says": says, "rows": rows, "told": told, "several": label is None}
    if "maps" in one:
        names = facts.names(range(len(one["colours"])))
        return {
            **one,
            "maps": {model: of for model, of in one["maps"].items() if model != "control"},
            "key": [(name, "rgb({},{},{})".format(*c)) for name, c in zip(names, one["colours"], strict=True)],
        }
    return dict(one)


def _structure(facts: Facts) -> dict[str, Any] | None:
    found = facts.record.get("resemblance")
    if not found:
        return None
    names = facts.names(found["classes"])
    drawings = []
    for key, rows in found["maps"].items():
        shares = found["inherited"].get(key)
        note = "" if not shares else f"Rank correlation with the teacher's: {_mean(shares):.2f}."
        nearest = max(
            ((rows[i][j] or 0, names[i], names[j]) for i in range(len(names)) for j in range(len(names)) if i != j),
            default=(0, "", ""),
        )
        alt = (
            f"Which of {len(names)} classes {facts.title(key)} takes for which other. {note} Most of all "
            f"{nearest[1]} for {nearest[2]}, {nearest[0]:.2f}."
        )
        drawings.append(Drawing(facts.title(key), svg.heatmap(rows, names, alt), note=note))
    nearest_rows = []
    for one in sorted(found["nearest"], key=lambda one: -one["share"]["teacher"])[:_RESEMBLING]:
        this, other = facts.names([one["class"], one["other"]])
        cells = {
            key: f"{share:.2f}" + ("" if one["rank"][key] == 1 else f" (no. {one['rank'][key]})")
            for key, share in one["share"].items()
        }
        nearest_rows.append({"this": this, "other": other, "cells": cells})
    models = list(found["maps"])
    return {"drawings": drawings, "nearest": nearest_rows, "models": models, "said": _inherited(facts, found)}


def _inherited(facts: Facts, found: Mapping[str, Any]) -> str:
    """Say whether the students see the same resemblances as the teacher."""
    shares = {key: _mean(values) for key, values in found["inherited"].items() if values}
    key = facts.distilled
    if key not in shares:
        return ""
    agrees = "agrees" if shares[key] > _MUCH else "hardly agrees"
    said = f"The distilled student {agrees} with the teacher on what resembles what: over {found['pairs']:,} pairs of "
    said += f"{facts.things} their rank correlation is {shares[key]:.2f}"
    others = {name: shares[name] for name in ("student", "control") if name in shares}
    if others:
        said += " (" + ", ".join(f"{facts.title(name)} {share:.2f}" for name, share in others.items()) + ")"
    if "student" not in shares:
        return said + "."
    if min(found["inherited"][key]) > max(found["inherited"]["student"]):
        return said + ". It has inherited that: with each seed it is closer to the teacher than the student alone."
    if shares[key] > shares["student"]:
        return said + ". On average it is closer to the teacher than the student alone, but not with each seed."
    return said + ". That is no closer to the teacher than the student alone, which never saw it."


def _predictions(facts: Facts, points: Mapping[str, Any]) -> Drawing:
    models = [key for key in ("teacher", "student", facts.distilled) if key in points["values"]]
    series = [svg.Series(facts.title(k), facts.role(k), points["target"], points["values"][k]) for k in models if k]
    alt = f"What {len(models)} models say against the target of {len(points['target'])} test {facts.headline.units}."
    return Drawing(
        "What they say, against the target",
        svg.dots(series, svg.Axis("target"), svg.Axis("what the model says"), alt),
        legend([(s.label, s.role) for s in series]),
        "On the diagonal both are equal.",
    )


def temperature(facts: Facts) -> dict[str, Any] | None:
    """What temperature does to the teacher's answers, how quality depends on it, and how it was scheduled."""
    found, drawings = facts.record.get("temperature"), []
    if found:
        drawings += _softness(facts, found)
    by_t = _by_temperature(facts)
    if by_t is not None:
        drawings.append(by_t)
    schedule = _schedule(facts)
    if schedule is not None:
        drawings.append(schedule)
    if not drawings:
        return None
    used = found["used"] if found else None
    said = ""
    if found and used in found["temperature"]:
        at = found["temperature"].index(used)
        said = (
            f"At T = {used:.3g} the teacher's soft targets have {percent(found['entropy'][at])} % of the largest "
            f"possible entropy, and give {percent(found['others'][at])} % to {facts.others}."
        )
        if "gradient" in found:
            start, end = (100 * values[at] for values in found["gradient"].values())
            said += f" The soft target makes {start:.0f} % of the gradient at the start, {end:.0f} % at the end."
    return {"drawings": drawings, "said": said}


def _softness(facts: Facts, found: Mapping[str, Any]) -> list[Drawing]:
    ts, x = found["temperature"], svg.Axis("temperature T (logarithmic)", log=True)
    share = svg.Axis("%", low=0, high=100)
    shown = [
        svg.Series("entropy, of the largest possible", "teacher", ts, [100 * v for v in found["entropy"]]),
        svg.Series(f"probability of {facts.others}", "term2", ts, [100 * v for v in found["others"]]),
    ]
    used = found["used"]
    line = f" The line is T = {used:.3g}, which was used." if used else ""
    first, last = shown[0].y[0], shown[0].y[-1]
    alt = f"Entropy of the teacher's soft targets from {first:.0f} % at T = 1 to {last:.0f} % at T = 20."
    drawings = [
        Drawing(
            "How soft the teacher's answers become",
            svg.lines(shown, x, share, alt, used),
            legend([(s.label, s.role) for s in shown]),
            "0 % is a hard label, 100 % says nothing." + line,
        )
    ]
    gradient = found.get("gradient")
    if gradient:
        parts = [
            svg.Series("an untrained student", "term2", ts, [100 * v for v in gradient["at the start"]]),
            svg.Series("the distilled student", "distilled", ts, [100 * v for v in gradient["at the end"]]),
        ]
        kd, hard = found["weights"]
        first, last = parts[0].y[0], parts[0].y[-1]
        alt = f"The soft target's share of the gradient is {first:.0f} % at T = 1 and {last:.0f} % at T = 20."
        drawings.append(
            Drawing(
                "Who drives the student",
                svg.lines(parts, x, svg.Axis("soft target's share, %", low=0, high=100), alt, used),
                legend([(s.label, s.role) for s in parts]),
                f"Norms of the gradients on the logits: {kd:g} · KD with its T², against {hard:g} · hard label.",
            )
        )
    return drawings


def _by_temperature(facts: Facts) -> Drawing | None:
    points = sorted(
        (t, key)
        for key, model in facts.models.items()
        if model["role"] == "distilled" and isinstance(t := facts.temperature(key), int | float)
    )
    if len({t for t, _ in points}) < 2:
        return None
    ys = [facts.shown(facts.value(key)) for _, key in points]
    sds = [facts.shown(facts.sd(key) or 0) for _, key in points]
    series = [
        svg.Series(
            "distilled",
            "distilled",
            [t for t, _ in points],
            ys,
            [y - sd for y, sd in zip(ys, sds, strict=True)],
            [y + sd for y, sd in zip(ys, sds, strict=True)],
        )
    ]
    for key in ("student", "control"):
        if key in facts.models:
            level = facts.shown(facts.value(key))
            series.append(svg.Series(facts.title(key), key, [points[0][0], points[-1][0]], [level, level]))
    alt = f"{facts.headline.name} of students distilled at {len(points)} temperatures: " + ", ".join(
        f"T = {t:.3g} {facts.headline.write(facts.value(key))}" for t, key in points
    )
    x = svg.Axis("temperature T (logarithmic)", log=True)
    note = "Mean ± standard deviation over seeds, on the test split; the best was chosen on the validation split."
    named = legend([(s.label, s.role) for s in series])
    return Drawing("Quality over temperature", svg.lines(series, x, svg.Axis(facts.axis), alt), named, note)


def _schedule(facts: Facts) -> Drawing | None:
    found = [
        (key, name, curve)
        for key, of in facts.record["training"].items()
        for name, curve in of.items()
        if name.startswith("kd/temperature") and facts.role(key) == "distilled" and len(set(curve["mean"])) > 1
    ]
    if not found:
        return None
    series = [
        svg.Series(
            f"{facts.title(k)} {n.removeprefix('kd/temperature').lstrip('/')}".strip(),
            "distilled",
            c["step"],
            c["mean"],
        )
        for k, n, c in found[:4]
    ]
    first = found[0][2]["mean"]
    alt = f"The temperature went from {first[0]:.3g} to {first[-1]:.3g}."
    return Drawing("The schedule as it ran", svg.lines(series, svg.Axis("step"), svg.Axis("T"), alt), note=alt)


def reproduce(facts: Facts) -> dict[str, Any]:
    """What it takes to have the same again."""
    found = facts.record["reproduce"]
    machine = {**found["machine"], "processor": facts.verdict["processor"]}
    return {
        **found,
        "machine": {key: value for key, value in machine.items() if value is not None},
        "config": json.dumps(found["config"], indent=2, ensure_ascii=False),
        "made": facts.record["made"],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
