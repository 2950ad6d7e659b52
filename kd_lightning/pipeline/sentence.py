"""The verdict in words, and how its figures are written."""

import math
from collections.abc import Mapping

from kd_lightning.pipeline.results import TITLES, Model
from kd_lightning.pipeline.statistics import Interval, Share


def sentence(
    models: Mapping[str, Model],
    differences: Mapping[str, Interval],
    key: str | None,
    share: Share | None,
    variants: int,
    seeds: int,
    extra_images: int,
) -> tuple[bool | None, str]:
    """Return whether distillation is worth it, None where that is not decided, and say what follows."""
    gain = differences.get("distilled-alone")
    if key is None or gain is None:
        missing = ["distilled student"] * (key is None) + ["student alone"] * ("student" not in models)
        return None, (
            f"Not decided: no {' and no '.join(missing)} was run, so whether distillation is worth it cannot be told. "
            "Run the missing stages with the same seeds."
        )
    distilled, alone = models[key], models["student"]
    who = "the distilled student"
    if variants > 1:
        who += f" {key!r} (of {variants} distilled models the best on the validation images)"
    figures = f"{percent(distilled.accuracy)} % of the test images right against {percent(alone.accuracy)} %"
    parts = [f"Beware of {title(k, m)}: it {m.learned_nothing}" for k, m in models.items() if m.learned_nothing]
    for name in distilled.recall:
        recalls = ", ".join(f"{title(k, m)} {percent(m.recall[name])} %" for k, m in models.items())
        parts.append(f"Recall on {name!r}: {recalls}")
    open_question = _why_not_decided(models, key, figures, gain, seeds)
    if open_question is not None:
        chosen = [f"Distilled is here {key!r}, of {variants} the best on the validation images"] * (variants > 1)
        return None, ". ".join([open_question, *chosen, *parts]) + "."
    if gain.low > 0:
        worth_it = True
        text = f"Worth it: {who} is {stated(gain)} better than the student alone ({figures})"
        if share and share.mean is not None and share.low is not None:
            text += (
                f", and closes {percent(share.mean)} % of the gap to the teacher "
                f"({percent(share.low)} to {percent(share.high)} %)"
            )
    elif gain.high < 0:
        worth_it = False
        text = f"Not worth it: distillation costs {stated(-gain)}: {who} has {figures}"
    else:
        worth_it = False
        text = (
            f"Not worth it: no difference was shown: the student alone is as good "
            f"({who} has {figures}: a difference of {within(gain)})"
        )
    parts = [text, *_why(differences, worth_it, extra_images), *_gap(differences), *parts]
    return worth_it, ". ".join(parts) + "."


def _why_not_decided(models: Mapping[str, Model], key: str, figures: str, gain: Interval, seeds: int) -> str | None:
    nothing = [title(name, models[name]) for name in (key, "student") if models[name].learned_nothing]
    if nothing:
        return (
            f"Not decided: {' and '.join(nothing)} learned nothing ({figures}), so the comparison says nothing of "
            "distillation: lower the learning rate, or train for longer"
        )
    if seeds == 1:
        return (
            f"Not decided: one seed, and training again may differ by more ({figures}: a difference of {points(gain)} "
            "points, of which the 95 % interval knows the test images alone): run three seeds, seeds=[0,1,2]"
        )
    return None


def _why(differences: Mapping[str, Interval], worth_it: bool, extra_images: int) -> list[str]:
    """What of it is due to the teacher's labels, and what to their softness."""
    softness, labels = differences.get("distilled-control"), differences.get("control-alone")
    if softness is None or labels is None:
        return ["Whether softness helped was not asked: there is no control on the teacher's hard labels"]
    what = f"the {extra_images:,} further images that the teacher labelled" if extra_images else "the teacher's labels"
    helped = f"{what} helped"
    if softness.high < 0:
        text = f"The teacher's hard labels are {stated(-softness)} better than its soft ones"
        if worth_it or labels.low > 0:
            return [f"{text}, and {stated(labels)} better than the student alone: train on the teacher's hard labels"]
        return [f"{text}; that they are better than the student alone was not shown ({within(labels)})"]
    if worth_it and softness.low > 0:
        text = f'Softness ("dark knowledge") is part of why: {stated(softness)} better than the teacher\'s hard labels'
        return [text + (f"; {helped} too ({within(labels)} without softness)" if labels.low > 0 else "")]
    if worth_it and labels.low > 0:
        text = f"{helped}; that softness helped was not shown: the teacher's hard labels did as well"
        return [f"{text[0].upper()}{text[1:]} (a difference of {within(softness)})"]
    if worth_it:
        return [
            f"Why was not shown: neither that {helped} (hard labels against the student alone: {within(labels)}) "
            f"nor that softness did (against hard labels: {within(softness)})"
        ]
    if labels.low > 0:
        better = f"The teacher's hard labels are {stated(labels)} better than the student alone"
        return [f"{better}: train on the teacher's hard labels"]
    return []


def _gap(differences: Mapping[str, Interval]) -> list[str]:
    gap = differences.get("teacher-alone")
    if gap is None:
        return ["There is no teacher among the results, so the share of the gap that was closed is not known"]
    if gap.high < 0:
        return [f"There is no gap to close: the teacher is {stated(-gap)} worse than the student alone"]
    if gap.low <= 0:
        return [
            "There is no gap to close: that the teacher is better than the student alone was not shown "
            f"(a difference of {within(gap)})"
        ]
    return []


def stated(interval: Interval) -> str:
    low, high = percent(interval.low), percent(interval.high)
    return f"{percent(interval.mean)} points (95 % interval {low} to {high})"


def within(interval: Interval) -> str:
    """The same within parentheses."""
    return stated(interval).replace(" (", ", ").rstrip(")")


def points(interval: Interval | None) -> str:
    """The same in a table: ``+1.2 (0.3 to 2.1)``."""
    if interval is None:
        return "–"
    mean, low, high = (f"{100 * value:.1f}" for value in (interval.mean, interval.low, interval.high))
    return f"{'' if mean.startswith('-') else '+'}{mean} ({low} to {high})"


def percent(value: float | None) -> str:
    return number(None if value is None else 100 * value, ".1f")


def number(value: float | None, form: str) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    text = format(value, form)
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text  # no "-0.0"


def title(key: str, model: Model) -> str:
    name = TITLES[model.role]
    if model.role == "quantized":
        return key  # says what was quantised, and how
    return name if key == model.role else f"{name} {key}"
