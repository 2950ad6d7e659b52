"""What a stranger wants to know first: worth it or not, why, at which temperature, at which price."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from kd_lightning.headline import Headline
from kd_lightning.records import Interval
from kd_lightning.report.facts import SHOWN_SECONDS, Facts, duration, times
from kd_lightning.report.words import change, percent


class Card(NamedTuple):
    """One question with its answer.

    Attributes:
        question: As one would ask it.
        answer: In a few words.
        why: In a sentence or two.
        tone: ``good``, ``bad`` or ``open``, beside the words.
    """

    question: str
    answer: str
    why: str
    tone: str = "open"


def cards(facts: Facts) -> list[Card]:
    """Return the answers, the most important one first."""
    found = [_worth_it(facts), _reason(facts), _temperature(facts), _price(facts)]
    file = _file(facts)
    return found if file is None else [*found, file]


def _worth_it(facts: Facts) -> Card:
    verdict = facts.verdict
    if not verdict["decided"]:
        return Card("Is distillation worth it here?", "Not decided", verdict["sentence"], "open")
    said = verdict["sentence"].partition(": ")[2] or verdict["sentence"]
    said = said[0].upper() + said[1:]
    if verdict["worth_it"]:
        beyond = _beyond(facts)
        answer = "Yes, for a small model" if beyond else "Yes"
        return Card("Is distillation worth it here?", answer, said + beyond, "good")
    return Card("Is distillation worth it here?", "No", said, "bad")


def _beyond(facts: Facts) -> str:
    """Say by how much the teacher stays better than what was distilled."""
    if facts.distilled is None or "teacher" not in facts.models:
        return ""
    teacher, distilled = facts.value("teacher"), facts.value(facts.distilled)
    if not facts.headline.better(teacher, distilled):
        return ""
    difference = facts.headline.write_difference(abs(teacher - distilled))
    return f" The teacher stays {difference} better, at {facts.headline.write(teacher)}."


def _reason(facts: Facts) -> Card:
    """What of it is due to the teacher's labels, what to their softness."""
    differences, verdict, headline = facts.verdict["differences"], facts.verdict, facts.headline
    softness, labels = (differences.get(name) for name in ("distilled-control", "control-alone"))
    if not verdict["decided"]:
        return Card("Why?", "Too early to say", "One has to know first whether it helps.")
    if softness is None and not facts.details["hard_labels"]:
        answer = "What the teacher says" if verdict["worth_it"] else "It was not shown to help"
        why = "The teacher answers with numbers, not classes: it has no hard labels with which to compare softness."
        if facts.details["extra"]:
            why += f" It also answers {facts.details['extra']:,} {headline.units} that have no label."
        return Card("Why?", answer, why, "good" if verdict["worth_it"] else "open")
    if softness is None or labels is None:
        why = "There is no control on the teacher's hard labels, so what softness adds was not asked."
        return Card("Why?", "Not asked", why)
    why = (
        f"The teacher's hard labels, its first choices, bring the student {_signed(headline, labels)}"
        f"{_if_shown(labels)}. Its probabilities for all classes, their softness, bring {_signed(headline, softness)} "
        f"on top of that{_if_shown(softness)}."
    )
    if softness["low"] > 0:
        also = labels["low"] > 0
        answer = "Softness, and the teacher's labels" if also else "The softness of the teacher's answers"
        return Card("Why?", answer, why, "good")
    if labels["low"] > 0:
        return Card("Why?", "The teacher's labels, not their softness", why)
    return Card("Why?", "Neither was shown to help", why)


def _temperature(facts: Facts) -> Card:
    key = facts.distilled
    question = "At which temperature?"
    if key is None:
        return Card(question, "–", "There is no distilled student.")
    t, tried = facts.temperature(key), _tried(facts)
    if t is None:
        return Card(question, "None", f"{facts.models[key]['method']} has no temperature.")
    if isinstance(t, tuple):
        return Card(question, f"T from {t[0]:.3g} to {t[1]:.3g}", "It was scheduled, or learnt." + _softer(facts, t[0]))
    if len(tried) > 1:
        others = ", ".join(f"{x:.3g}" for x in sorted(tried) if x != t)
        why = f"The best on the validation {facts.headline.units}; {others} were tried as well."
    else:
        why = "The only one that was tried: another may be better."
        if str(facts.models[key]["method"]).startswith("kd-T"):
            why += " To try others: the same command with -m losses.kd.temperature=1,2,4,8."
    return Card(question, f"T = {t:.3g}", why + _softer(facts, t))


def _softer(facts: Facts, t: float) -> str:
    """Say what the temperature makes of the teacher's answers."""
    found = facts.record.get("temperature")
    if not found or t not in found["temperature"] or t == 1:
        return ""
    at, one = found["temperature"].index(t), found["temperature"].index(1.0)
    return (
        f" The teacher gives {percent(found['others'][one])} % of the probability to {facts.others} at T = 1, and "
        f"{percent(found['others'][at])} % at T = {t:.3g}: that is what softness adds."
    )


def _tried(facts: Facts) -> set[float]:
    found = (facts.temperature(key) for key, model in facts.models.items() if model["role"] == "distilled")
    return {t for t in found if isinstance(t, float | int)}


def _price(facts: Facts) -> Card:
    question, key, served = "At which price?", facts.distilled, facts.served
    if key is None or served is None:
        return Card(question, "–", "There is no distilled student.")
    own, further = facts.seconds(key), facts.further(key)
    spent = f"{duration(own)} of training for the student"
    if "student" in facts.models:
        spent += f" (alone: {duration(facts.seconds('student'))})"
    if further >= SHOWN_SECONDS:
        spent += f" and {duration(further)} for its bits"
    teacher = facts.seconds("teacher") if "teacher" in facts.models else 0.0
    storing = facts.storing(key)
    before = [f"{duration(teacher)} for the teacher"] if teacher else []
    whose = "its" if teacher else "the teacher's"
    before += [f"{duration(storing)} for storing {whose} outputs"] if storing else []
    if before:
        spent += f", after {' and '.join(before)}"
    said = f"{spent}. {serving(facts)} {_paid_back(facts)}"
    return Card(question, duration(own + further + teacher + storing) + " of training", said.strip())


def _paid_back(facts: Facts) -> str:
    """Say after how many requests the student's training has saved as much time as it took."""
    served, key = facts.served, facts.distilled
    if served is None or key is None or "teacher" not in facts.models:
        return ""
    large, small = (facts.figure(of, "latency_ms_p50") for of in ("teacher", served))
    if not large or not small:
        return ""
    if large <= small:
        return "As it is no faster, no number of requests pays for the student's training."
    storing = facts.storing(key)
    saved = (large - small) / 1000
    seconds = facts.seconds(key) + facts.further(key) + storing
    requests = seconds / saved
    power = 10.0 ** max(0, math.floor(math.log10(max(requests, 1))) - 2)
    what = "the storing and the student's training" if storing else "the student's training"
    count = f"{round(requests / power) * power:,.0f} requests"
    return (
        f"In its place it saves {1000 * saved:.3g} ms a request: {count} make up for {what}, {duration(seconds)}; "
        "the teacher is needed either way."
    )


def _file(facts: Facts) -> Card | None:
    """Say which file is the fastest, which the smallest, and which is as good as the teacher."""
    if facts.distilled is None:
        return None
    students = [facts.distilled, *facts.quantized_from(facts.distilled)]
    figures = {"fastest": ("latency_ms_p50", "ms"), "smallest": ("file_mb", "MB")}
    best: dict[str, str] = {}
    for what, (name, _) in figures.items():
        known = {key: x for key in students if (x := facts.figure(key, name))}
        if known:
            best[what] = min(known, key=lambda key: known[key])
    if len(students) < 2 or len(best) < 2:
        return None

    def said(what: str) -> str:
        name, unit = figures[what]
        return f"{facts.written(best[what], name)} {unit}, {facts.headline.write(facts.value(best[what]))}"

    if best["fastest"] == best["smallest"]:
        answer = facts.title(best["fastest"])
        why = f"The fastest and the smallest ({said('fastest')}; {said('smallest').partition(',')[0]})."
    else:
        answer = f"{facts.title(best['fastest'])}, or {facts.title(best['smallest'])}"
        slower = f"{facts.written(best['smallest'], 'latency_ms_p50')} ms"
        why = f"The one is the fastest ({said('fastest')}), the other the smallest ({said('smallest')}, {slower})."
    return Card("Which file to serve?", answer, why + _of_teacher(facts))


def _of_teacher(facts: Facts) -> str:
    """Say what quantising the teacher alone gives."""
    key = next((key for key in facts.quantized_from("teacher") if facts.figure(key, "latency_ms_p50")), None)
    if key is None:
        return ""
    large, small = (facts.figure(of, "latency_ms_p50") for of in ("teacher", key))
    if not large or not small:
        return ""
    ratio = large / small
    how = f"{times(max(ratio, 1 / ratio))} {'faster' if ratio >= 1 else 'slower'} than in float"
    return f" Where no {facts.headline.name} may be lost: {key}, {facts.headline.write(facts.value(key))}, {how}."


def serving(facts: Facts) -> str:
    """Say what serving the student saves against the teacher, and what it costs."""
    served = facts.served
    if served is None or "teacher" not in facts.models:
        return ""
    found = []
    for name, more, less in (("file_mb", "smaller", "larger"), ("latency_ms_p50", "faster", "slower")):
        large, small = facts.figure("teacher", name), facts.figure(served, name)
        if large and small:
            ratio = large / small
            found.append(f"{times(max(ratio, 1 / ratio))} {more if ratio >= 1 else less}")
    difference = facts.headline.write_difference(abs(facts.value("teacher") - facts.value(served)))
    better = facts.headline.better(facts.value(served), facts.value("teacher"))
    found.append(f"{difference} {'better' if better else 'worse'} in {facts.headline.name}")
    against = facts.verdict["differences"].get("served-teacher")
    if against is not None and _if_shown(against):
        found[-1] += " (not shown)"
    *first, last = found
    return f"Against the teacher, {facts.title(served)} is {', '.join(first)}{' and ' if first else ''}{last}."


def _if_shown(interval: Mapping[str, float]) -> str:
    return "" if interval["low"] > 0 or interval["high"] < 0 else ", no gain shown"


def _signed(headline: Headline, interval: Mapping[str, float]) -> str:
    return change(headline, Interval(interval["mean"], interval["low"], interval["high"]))
