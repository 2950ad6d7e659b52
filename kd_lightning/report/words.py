"""The verdict in words: a headline sentence, findings with their intervals, warnings."""

from collections.abc import Mapping
from typing import NamedTuple

from kd_lightning.headline import Headline
from kd_lightning.records import TITLES, Interval, Model, Verdict


class Words(NamedTuple):
    """What a verdict says.

    Attributes:
        sentence: whether distillation is worth it, by how much, and how much of the gap to the teacher it closes.
        findings: one to a line, at most six.
        warnings: what speaks against the figures, one line for each kind.
    """

    sentence: str
    findings: tuple[str, ...]
    warnings: tuple[str, ...]


def say(verdict: Verdict) -> Words:
    """Put a verdict into words. Intervals are at 95 %; differences are improvements, positive where they help."""
    findings = [*_softness(verdict), *_bits(verdict), *_training(verdict), *_served(verdict), *_parts(verdict)]
    return Words(_sentence(verdict), tuple(findings), tuple(_warnings(verdict)))


def title(key: str, model: Model) -> str:
    """Name a row: a quantised model's key says what was quantised, and how."""
    name = TITLES[model.role]
    if model.role == "quantized":
        return key
    return name if key == model.role else f"{name} {key}"


def percent(share: float | None) -> str:
    """Write a share without the sign: ``23.6``."""
    if share is None:
        return "–"
    text = f"{100 * share:.1f}"
    return text.lstrip("-") if float(text) == 0 else text  # no "-0.0"


def change(headline: Headline, interval: Interval) -> str:
    """Write an improvement with its sign and interval: ``+1.2 points (0.3 to 2.1)``."""
    return f"{_signed(headline, interval.mean)} ({_range(headline, interval)})"


def _signed(headline: Headline, difference: float) -> str:
    text = headline.write_difference(difference)
    return text if text.startswith("-") or float(headline.number(difference)) == 0 else f"+{text}"


def _range(headline: Headline, interval: Interval) -> str:
    return f"{headline.number(interval.low)} to {headline.number(interval.high)}"


def _by(headline: Headline, interval: Interval) -> str:
    """Write how much better, of an improvement, or the other way round: ``1.2 points (0.3 to 2.1)``."""
    return f"{headline.write_difference(interval.mean)} ({_range(headline, interval)})"


def _not_shown(headline: Headline, interval: Interval) -> str:
    """Write an improvement that was not shown, for parentheses: ``+0.2 points, -0.3 to 0.7``."""
    return f"{_signed(headline, interval.mean)}, {_range(headline, interval)}"


def _sentence(verdict: Verdict) -> str:
    models, headline, key = verdict.models, verdict.headline, verdict.distilled
    gain = verdict.differences.get("distilled-alone")
    if key is None or gain is None:
        missing = ["distilled student"] * (key is None) + ["student alone"] * ("student" not in models)
        return (
            f"Not decided: no {' and no '.join(missing)} was run, so whether distillation is worth it cannot be told. "
            "Run the missing stages with the same seeds."
        ) + ("" if key is None else f" Distilled: {headline.name} {headline.write(models[key].value)}.")
    chosen = ""
    if verdict.variants > 1:
        chosen = f" with {key!r} (of {verdict.variants} distilled models the best on the validation {headline.units})"
    before, after = headline.write(models["student"].value), headline.write(models[key].value)
    on = f"on {verdict.units:,} test {headline.units}"
    figures = f"{headline.name} {after} against {before} alone {on}"
    if verdict.reason == "learned_nothing":
        nothing = " and ".join(title(name, models[name]) for name in (key, "student") if models[name].learned_nothing)
        return (
            f"Not decided: {nothing} learned nothing ({figures}), so the comparison says nothing of distillation: "
            "lower the learning rate, or train for longer."
        )
    if verdict.reason == "one_seed":
        return (
            f"Not decided: one seed, and training again may differ by more. Distillation{chosen} gives {figures} "
            f"({_signed(headline, gain.mean)}; {_range(headline, gain)} is the 95 % interval over the test "
            f"{headline.units} alone{'' if headline.of_mean is None else ', by bootstrap'}). Run three seeds: "
            "seeds=[0,1,2]."
        )
    how = "" if headline.of_mean is None else f", bootstrap over test {headline.units}"
    if verdict.reason == "not_shown":
        text = f"Not worth it: that distillation{chosen} improves the student was not shown: {figures} "
        text += f"({_signed(headline, gain.mean)}, 95 % interval {_range(headline, gain)}{how})"
    else:
        by, decision, verb = (
            (-gain, "Not worth", "worsens") if verdict.reason == "costs" else (gain, "Worth", "improves")
        )
        text = f"{decision} it: distillation{chosen} {verb} the student's {headline.name} by "
        text += f"{headline.write_difference(by.mean)} (95 % interval {_range(headline, by)}{how}), from {before} to "
        text += f"{after} {on}"
    return f"{text}{_gap(verdict)}."


def _gap(verdict: Verdict) -> str:
    """Say how much of the gap was closed, where it is worth it, or why there is none."""
    headline, share, gap = verdict.headline, verdict.gap_closed, verdict.differences.get("teacher-alone")
    if gap is None:
        return "; the share of the gap closed is not known without a teacher among the results"
    if gap.worse:
        return f"; there is no gap to close: the teacher is worse than the student alone by {_by(headline, -gap)}"
    if not gap.better:
        return (
            "; there is no gap to close: that the teacher is better than the student alone was not shown "
            f"({_not_shown(headline, gap)})"
        )
    if verdict.worth_it and share.mean is not None and share.low is not None:
        closed, low, high = percent(share.mean), percent(share.low), percent(share.high)
        return f", and closes {closed} % of the gap to the teacher ({low} to {high} %)"
    return ""


def _softness(verdict: Verdict) -> list[str]:
    """What of it is due to the teacher's labels, and what to their softness."""
    headline, worth_it = verdict.headline, verdict.worth_it
    softness, labels = (verdict.differences.get(name) for name in ("distilled-control", "control-alone"))
    if not verdict.decided:
        return []
    if softness is None or labels is None:
        asked = "Whether softness helped was not asked: there is no control on the teacher's hard labels."
        return [asked] if verdict.hard_labels else []
    what = "the teacher's labels"
    if verdict.extra:
        what = f"the {verdict.extra:,} further {headline.units} that the teacher labelled"
    if softness.worse:
        text = f"The teacher's hard labels are better than its soft ones by {_by(headline, -softness)}"
        if worth_it or labels.better:
            alone = f"than the student alone by {_by(headline, labels)}"
            return [f"{text}, and {alone}: train on the teacher's hard labels."]
        return [f"{text}; that they are better than the student alone was not shown ({_not_shown(headline, labels)})."]
    if worth_it and softness.better:
        text = f"Softness helped, by {_by(headline, softness)} against hard labels"
        return [f"{text}; {what} helped too, by {_by(headline, labels)}." if labels.better else f"{text}."]
    if worth_it and labels.better:
        helped = f"{what[0].upper()}{what[1:]} helped, by {_by(headline, labels)}"
        return [f"{helped}; that softness helped was not shown ({_not_shown(headline, softness)})."]
    if worth_it:
        return [
            f"Why was not shown: neither that {what} helped ({_not_shown(headline, labels)}) nor that softness did "
            f"({_not_shown(headline, softness)})."
        ]
    if labels.better:
        better = f"The teacher's hard labels are better than the student alone by {_by(headline, labels)}"
        return [f"{better}: train on the teacher's hard labels."]
    return []


def _trained_again(verdict: Verdict) -> bool:
    """Tell whether there is a model after quantisation-aware training, with more than the one seed."""
    return verdict.qat is not None and len(verdict.models[verdict.qat].seeds) > 1


def _bits(verdict: Verdict) -> list[str]:
    """Say what fewer bits cost: post-training (PTQ), and after training for them (QAT)."""
    key = verdict.ptq or verdict.qat
    ptq = verdict.differences.get("ptq-distilled")
    qat = verdict.differences.get("qat-continued") if _trained_again(verdict) else None
    costs = {how: x for how, x in (("PTQ", ptq), ("QAT", qat)) if x is not None}
    if key is None or not costs:
        return []
    bits, headline = bits_of(verdict.models[key]), verdict.headline
    if all(not x.better and not x.worse for x in costs.values()):
        changes = ", ".join(f"{how} {change(headline, x)}" for how, x in costs.items())
        return [f"In {bits} no loss was shown: {changes}."]
    said = "; ".join(_cost(headline, how, x) for how, x in costs.items())
    return [f"In {bits}, against fp32: {said}."]


def _cost(headline: Headline, how: str, difference: Interval) -> str:
    if difference.worse:
        return f"{how} lost {_by(headline, -difference)}"
    if difference.better:
        return f"{how} is better by {_by(headline, difference)}"
    return f"a loss by {how} was not shown: {change(headline, difference)}"


def bits_of(model: Model) -> str:
    """Say it as people do: ``int8``, ``4-bit weights``, ``4-bit weights and 8-bit activations``."""
    assert model.quantized is not None
    weights, activations = model.quantized.weight_bits, model.quantized.activation_bits
    if weights == activations == 8:
        return "int8"
    return f"{weights}-bit weights" + ("" if activations is None else f" and {activations}-bit activations")


def _training(verdict: Verdict) -> list[str]:
    """Whether quantisation-aware training beat post-training quantisation, and whether that was the training alone."""
    headline = verdict.headline
    gain, beyond = verdict.differences.get("qat-ptq"), verdict.differences.get("qat-ptq beyond the steps")
    if gain is None or not _trained_again(verdict):
        return []
    if gain.worse:
        return [f"QAT is worse than PTQ by {_by(headline, -gain)}: leave it out."]
    if not gain.better:
        not_shown = f"was not shown better than PTQ ({_not_shown(headline, gain)})"
        if verdict.served == verdict.qat:
            return [f"QAT, which the validation split preferred, {not_shown}: PTQ may be enough."]
        return [f"QAT {not_shown}: PTQ is enough."]
    text = f"QAT is better than PTQ by {_by(headline, gain)}"
    if beyond is not None and beyond.better:
        text += f", {_by(headline, beyond)} beyond what the same further steps bring in fp32"
    elif beyond is not None:
        text += (
            "; that it is more than the same further steps bring in fp32 was not shown "
            f"({_not_shown(headline, beyond)})"
        )
    return [f"{text}."]


def _served(verdict: Verdict) -> list[str]:
    """Compare the quantised student with its own file in fp32, and with the teacher."""
    key = verdict.served
    if key is None:
        return []
    model = verdict.models[key]
    assert model.quantized is not None
    lines = []
    # On a small network, converting to integers and back may take longer than it saves.
    source, teacher = verdict.models.get(model.quantized.source), verdict.models.get("teacher")
    if source is not None and (found := _costs(verdict, model.figures, source.figures)):
        lines.append(f"Against its fp32 file {key} is {', '.join(found)}.")
    if teacher is not None and (found := _costs(verdict, model.figures, teacher.figures, batches=False)):
        found.append(_quality(verdict, model, teacher))
        lines.append(f"Against the teacher {'it' if lines else key} is {', '.join(found)}.")
    return lines


def _costs(
    verdict: Verdict, small: Mapping[str, float], large: Mapping[str, float], *, batches: bool = True
) -> list[str]:
    """Say how much smaller and faster a file is, as far as both were measured."""
    found = _ratio(large, small, "file_mb", "smaller", "larger")
    for prefix, runtime in (("", verdict.runtime), ("openvino_", "OpenVINO"))[: 2 if batches else 1]:
        single = _ratio(large, small, f"{prefix}latency_ms_p50", "faster", "slower")
        batch = _ratio(small, large, f"{prefix}throughput_per_s", "faster", "slower")
        if single and batch:
            found.append(f"in {runtime} {single[0]} (batch 64: {batch[0]})" if batches else single[0])
    return found


def _quality(verdict: Verdict, model: Model, teacher: Model) -> str:
    headline, difference = verdict.headline, verdict.differences.get("served-teacher")
    if difference is None or len(model.seeds) == 1:
        return f"with {headline.name} {headline.write(model.value)} against {headline.write(teacher.value)}"
    if difference.worse:
        return f"worse by {_by(headline, -difference)}"
    if difference.better:
        return f"better by {_by(headline, difference)}"
    return f"not shown worse ({_not_shown(headline, difference)})"


def _ratio(over: Mapping[str, float], under: Mapping[str, float], figure: str, more: str, less: str) -> list[str]:
    """Say how often one figure goes into another, where both are known."""
    if not (over.get(figure) and under.get(figure)):
        return []
    ratio = over[figure] / under[figure]
    if 0.95 < ratio < 1.05:
        return [f"not {more}"]
    return [f"{max(ratio, 1 / ratio):.1f} times {more if ratio >= 1 else less}"]


def _parts(verdict: Verdict) -> list[str]:
    """Say the headline on parts of the test units: of the models that the decision is about, and of what is served."""
    keys = ["teacher", "student", "control", verdict.distilled, verdict.served]
    models = {key: verdict.models[key] for key in keys if key is not None and key in verdict.models}
    names = dict.fromkeys(name for model in models.values() for name in model.parts)
    said = []
    for name in names:
        values = (f"{title(k, m)} {verdict.headline.write(m.parts.get(name))}" for k, m in models.items())
        said.append(f"{name[0].upper()}{name[1:]}: {', '.join(values)}.")
    return [" ".join(said)] if said else []


def _warnings(verdict: Verdict) -> list[str]:
    models, said = verdict.models, []
    for caution, keys in verdict.cautions.items():
        about = {key: models[key] for key in keys}
        who = title(keys[0], models[keys[0]]) if len(keys) == 1 else f"{len(keys)} models"
        if caution == "learned_nothing":
            each = ", ".join(f"{title(key, model)} {model.learned_nothing}" for key, model in about.items())
            said.append(f"Figures that say nothing of the method: {each}.")
        elif caution == "not_all_integers":
            on_integers, layers = (_spread(about, name, ".0f") for name in ("integer_operators", "quantized_layers"))
            those = f"{on_integers} of {layers} quantised layers"
            said.append(f"{who} {'does' if len(keys) == 1 else 'do'} not run on integers alone: {those} do.")
        elif caution == "file_differs":
            why = next((m.quantized.mismatch for m in about.values() if m.quantized and m.quantized.mismatch), "")
            same = _spread(about, "agreement_file", ".1%").replace("%", " %")
            said.append(
                f"{_files(who, keys)} the fake-quantised network's answers on {same} of the test "
                f"{verdict.headline.units} only{': ' * bool(why)}{why}."
            )
        else:
            sizes = _spread(about, "file_mb", ".3f")
            said.append(f"{who} {'has' if len(keys) == 1 else 'have'} a file no smaller than in fp32: {sizes} MB.")
    return said


def _files(who: str, keys: tuple[str, ...]) -> str:
    return f"{who}'s file gives" if len(keys) == 1 else f"Files of {who} give"


def _spread(models: Mapping[str, Model], figure: str, form: str) -> str:
    """Write a figure with its range over models: ``5 to 7``."""
    values = [model.figures[figure] for model in models.values()]
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
