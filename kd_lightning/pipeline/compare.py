"""Is distillation worth it here? The finished runs in; figures and the decision out. No words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.pipeline.statistics import (
    Performance,
    gap_closed,
    holm,
    paired_contrast,
    paired_difference,
    paired_p_value,
)
from kd_lightning.records import (
    FIGURES,
    TITLES,
    Caution,
    Interval,
    Model,
    Quantized,
    Reason,
    Result,
    Role,
    Share,
    Verdict,
    best_on_validation,
)
from kd_lightning.tasks import Headline, Task

_SAME = 0.995
"""Share of the test units on which a file has to answer what the fake-quantised network answers."""
_PAIRS = {
    "distilled-alone": ("distilled", "alone"),
    "distilled-control": ("distilled", "control"),
    "control-alone": ("control", "alone"),
    "teacher-alone": ("teacher", "alone"),
    "ptq-distilled": ("ptq", "source"),
    "qat-continued": ("qat", "continued"),
    "qat-ptq": ("qat", "ptq"),
    "continued-distilled": ("continued", "source"),
    "served-teacher": ("served", "teacher"),
}
"""Differences, by the names of :class:`~kd_lightning.records.Verdict`; the source is what was quantised."""


def compare(
    results: Sequence[Result],
    task: Task,
    *,
    reference: str | None = None,
    extra: int = 0,
    runtime: str | None = None,
    processor: str | None = None,
) -> Verdict:
    """Compare the runs, paired by seed and test unit, and decide.

    A difference counts as shown where its 95 % interval excludes zero; with one seed, or of a model that has learned
    nothing, none does. Of several distilled models the decision is about the one with the best mean validation
    headline: the test units choose nothing. Roles that were not run leave out what would need them. Quantised students
    are compared with the distilled one that they were made of, and after quantisation-aware training with the one that
    had the same further steps in float.

    Args:
        results: One for each run, with all its figures; the teacher may have one seed for all.
        task: Has the headline, and says how far answers agree.
        reference: Label of the distilled model with which the other distilled models are compared.
        extra: How many units the distilled student and the control had beyond the labelled ones.
        runtime: In which the latencies were measured.
        processor: Instruction sets of the machine that measured them.

    Raises:
        ValueError: no results, other test units, a run given twice, two models where one is expected, no seed in
            common, or a reference that is no distilled model.
    """
    headline = task.headline
    trained = _checked(results, headline)
    of_role = {role: [label for label, model in trained.items() if model.role == role] for role in get_args(Role)}
    variants = of_role["distilled"]
    if reference is not None and reference not in variants:
        raise ValueError(f"reference {reference!r} is no distilled model, expected one of {variants}, or none")
    chosen = best_on_validation([run for run in results if run.label in variants], headline)
    ptq, qat = _quantized_of(trained, of_role["quantized"], variants)
    served = best_on_validation(
        [run for label in (ptq, qat) if label for run in trained[label].runs.values()], headline
    )

    alone, teacher, control, continued = (
        next(iter(of_role[role]), None) for role in ("student", "teacher", "control", "continued")
    )
    differences = _differences(
        trained,
        {
            "distilled": chosen,
            "alone": alone,
            "control": control,
            "teacher": teacher,
            "ptq": ptq,
            "qat": qat,
            "continued": continued,
            "source": trained[ptq or qat or ""].how.source if ptq or qat else None,
            "served": served,
        },
    )
    keys = {
        label: role if len(labels) == 1 and role != "quantized" else label
        for role, labels in of_role.items()
        for label in labels
    }
    order = [label for role in get_args(Role) if role != "quantized" for label in of_role[role]]
    order += sorted(of_role["quantized"], key=lambda label: _place(order, trained[label].how.source))
    models = {
        keys[label]: _model(trained[label], trained.get(teacher or ""), trained.get(alone or ""), task, keys)
        for label in order
    }
    models |= _against(reference, {keys[label]: trained[label] for label in variants}, models)
    distilled = keys[chosen] if chosen is not None else None
    share = models[distilled].gap_closed if distilled is not None else None
    seeds = len(_common_seeds(trained[chosen], trained[alone])) if chosen is not None and alone is not None else 0
    reason = _reason(models, differences, distilled, seeds)
    return Verdict(
        headline=headline,
        worth_it=reason == "shown",
        reason=reason,
        units=len(results[0].scores),
        seeds=seeds,
        distilled=distilled,
        variants=len(variants),
        extra=extra,
        hard_labels=task.over_classes,
        gap_closed=share or Share(None, None, None),
        differences=differences,
        ptq=ptq,
        qat=qat,
        served=served,
        models=models,
        cautions=_cautions(models),
        runtime=runtime,
        processor=processor,
    )


def against_teacher(result: Result, teacher: Result, task: Task) -> dict[str, float]:
    """Return ``agreement`` and ``retention`` of a run, as far as they can be said.

    Args:
        result: Of any model.
        teacher: The run that taught it, or would have.
        task: Says how far answers agree.
    """
    values = {
        "agreement": _agreement(result.answers, teacher.answers, task),
        "retention": _retention(task.headline.value(result.scores), task.headline.value(teacher.scores), task.headline),
    }
    return {name: value for name, value in values.items() if value is not None}


class _Trained:
    """A model, by its runs in the order of their seeds."""

    def __init__(self, runs: Mapping[int, Result], headline: Headline) -> None:
        self.runs = dict(sorted(runs.items()))
        self.one = next(iter(self.runs.values()))
        self.role, self.label = self.one.role, self.one.label
        self.headline = headline

    @property
    def how(self) -> Quantized:
        assert self.one.quantized is not None
        return self.one.quantized

    @cached_property
    def performance(self) -> Performance:
        return Performance.of(np.stack([run.scores for run in self.runs.values()]), self.headline)

    def at(self, seed: int) -> Result:
        """Return the run of a seed, or the only run of a model that was trained once."""
        return self.runs.get(seed, self.one)

    def on(self, seeds: Sequence[int]) -> Performance:
        rows = list(self.runs)
        return self.performance.seeds([rows.index(seed) if seed in self.runs else 0 for seed in seeds])


def _checked(results: Sequence[Result], headline: Headline) -> dict[str, _Trained]:
    """Return models by label, after all that can be wrong with the runs."""
    if not results:
        raise ValueError("expected at least one result, got none: run a stage before asking for the verdict")
    first, groups = results[0], dict[str, dict[int, Result]]()
    for result in results:
        name = f"{result.label!r} seed {result.seed}"
        if result.role not in TITLES:
            raise ValueError(f"{name} has role {result.role!r}, expected one of {', '.join(TITLES)}")
        sizes = [(len(run.answers), np.shape(run.scores)) for run in (result, first)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{name} has {sizes[0][0]} answers and scores {sizes[0][1]}, and {first.label!r} {sizes[1][0]} and "
                f"{sizes[1][1]}: test every model on the same {headline.units}"
            )
        if result.target_digest != first.target_digest:
            raise ValueError(
                f"{name} has another target than {first.label!r}: test both on the same {headline.units} in the same "
                "order"
            )
        runs = groups.setdefault(result.label, {})
        if result.seed in runs:
            raise ValueError(f"{name} is given twice: pass one result a run, or give the models different labels")
        roles = {run.role for run in runs.values()} | {result.role}
        if len(roles) > 1:
            other = next(iter(runs.values())).role
            raise ValueError(f"label {result.label!r} has roles {other} and {result.role}: one label, one model")
        if (result.role == "quantized") != (result.quantized is not None):
            raise ValueError(
                f"{name} has role {result.role!r} and quantized={result.quantized}: the one tells the other"
            )
        if result.label in TITLES and result.label != result.role:
            raise ValueError(f"label {result.label!r} names a role, and the run has role {result.role!r}: rename it")
        runs[result.seed] = result
    trained = {label: _Trained(runs, headline) for label, runs in groups.items()}
    for role in ("teacher", "student", "control", "continued"):
        labels = [label for label, model in trained.items() if model.role == role]
        if len(labels) > 1:
            raise ValueError(f"expected one model with role {role!r}, got {labels}: make one verdict for each")
    return trained


def _quantized_of(
    trained: Mapping[str, _Trained], quantized: Sequence[str], variants: Sequence[str]
) -> tuple[str | None, str | None]:
    """Return the labels of a distilled student after post-training quantisation and after training for it.

    The first of each kind that quantises activations too, as files in int8 do, and else the first.
    """
    made = {label: trained[label].how for label in quantized if trained[label].how.source in variants}
    found = []
    for training in (False, True):
        those = [label for label, how in made.items() if how.training == training]
        found.append(min(those, key=lambda label: made[label].activation_bits is None, default=None))
    return found[0], found[1]


def _differences(trained: Mapping[str, _Trained], labels: Mapping[str, str | None]) -> dict[str, Interval]:
    """Return the improvements between models whose labels are given by what they are in :data:`_PAIRS`."""
    pairs = {
        name: (trained[left], trained[right])
        for name, (one, other) in _PAIRS.items()
        if (left := labels[one]) is not None and (right := labels[other]) is not None
    }
    differences = {name: paired_difference(*_paired(*both)) for name, both in pairs.items()}
    if "qat-continued" in pairs and "ptq-distilled" in pairs:
        differences["qat-ptq beyond the steps"] = paired_contrast(
            *_paired(*pairs["qat-continued"], *pairs["ptq-distilled"])
        )
    return differences


def _common_seeds(*models: _Trained) -> list[int]:
    """Return the seeds that all models have; a teacher that was trained once goes with every seed."""
    several = [model for model in models if not (model.role == "teacher" and len(model.runs) == 1)] or [models[0]]
    seeds = sorted(set(several[0].runs).intersection(*(model.runs for model in several[1:])))
    if not seeds:
        named = ", ".join(f"{model.label!r} {list(model.runs)}" for model in several)
        raise ValueError(f"no seed in common ({named}): train models that are compared with the same seeds")
    return seeds


def _paired(*models: _Trained) -> list[Performance]:
    seeds = _common_seeds(*models)
    return [model.on(seeds) for model in models]


def _model(
    model: _Trained, teacher: _Trained | None, alone: _Trained | None, task: Task, keys: Mapping[str, str]
) -> Model:
    runs = list(model.runs.values())
    seeds = tuple(task.headline.value(run.scores) for run in runs)
    agreement = retention = share = None
    if teacher is not None:
        common = _common_seeds(model, teacher)
        agreements = [_agreement(model.at(seed).answers, teacher.at(seed).answers, task) for seed in common]
        agreement = _mean_of_known(agreements)
        quality = _mean(task.headline.value(run.scores) for run in teacher.runs.values())
        retention = _retention(_mean(seeds), quality, task.headline)
        of_teacher = model.role == "quantized" and model.how.source == teacher.label
        if alone is not None and not of_teacher and model.role in ("control", "distilled", "continued", "quantized"):
            share = gap_closed(*_paired(teacher, alone, model))
    means = {figure.key: _mean_of_known(run.figures.get(figure.key) for run in runs) for figure in FIGURES}
    quantized = model.one.quantized
    return Model(
        role=model.role,
        method=model.one.method,
        value=_mean(seeds),
        sd=float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None,
        seeds=seeds,
        agreement=agreement,
        retention=retention,
        gap_closed=share,
        figures={key: mean for key, mean in means.items() if mean is not None},
        temperature=model.one.temperature,
        parts={name: _mean(run.parts[name] for run in runs) for name in model.one.parts},
        learned_nothing=_stated({run.seed: run.learned_nothing for run in runs if run.learned_nothing}, len(runs)),
        quantized=quantized and replace(quantized, source=keys.get(quantized.source, quantized.source)),
    )


def _against(reference: str | None, variants: Mapping[str, _Trained], models: Mapping[str, Model]) -> dict[str, Model]:
    """Return the other distilled models, by key, with their improvements on the reference."""
    if reference is None:
        return {}
    other = next(model for model in variants.values() if model.label == reference)
    pairs = {key: _paired(model, other) for key, model in variants.items() if model is not other}
    # One seed says nothing of training again.
    several = {key: paired_p_value(*both) for key, both in pairs.items() if len(both[0].by_seed) > 1}
    adjusted = dict(zip(several, holm(list(several.values())), strict=True))
    return {
        key: replace(models[key], against_reference=paired_difference(*both), against_reference_p=adjusted.get(key))
        for key, both in pairs.items()
    }


def _reason(models: Mapping[str, Model], differences: Mapping[str, Interval], key: str | None, seeds: int) -> Reason:
    gain = differences.get("distilled-alone")
    if key is None or gain is None:
        return "missing"
    if models[key].learned_nothing or models["student"].learned_nothing:
        return "learned_nothing"
    if seeds == 1:
        return "one_seed"
    if gain.better:
        return "shown"
    return "costs" if gain.worse else "not_shown"


def _cautions(models: Mapping[str, Model]) -> dict[Caution, tuple[str, ...]]:
    found: dict[Caution, list[str]] = {}

    def add(caution: Caution, key: str, found_here: bool) -> None:
        if found_here:
            found.setdefault(caution, []).append(key)

    for key, model in models.items():
        how, figures = model.quantized, model.figures
        source = models.get(how.source) if how is not None else None
        said = source is not None and source.learned_nothing is not None
        add("learned_nothing", key, model.learned_nothing is not None and not said)
        if how is None:
            continue
        on_integers, layers = figures.get("integer_operators"), figures.get("quantized_layers")
        if how.activation_bits is not None and on_integers is not None and layers is not None:
            add("not_all_integers", key, on_integers < layers)
        add("file_differs", key, figures.get("agreement_file", 1.0) < _SAME)
        if source is not None and {"file_mb"} <= figures.keys() & source.figures.keys():
            add("file_larger", key, figures["file_mb"] >= source.figures["file_mb"])
    return {caution: tuple(keys) for caution, keys in found.items()}


def _stated(nothing: Mapping[int, str], runs: int) -> str | None:
    """Say what is wrong, and with which seeds where not with all."""
    if not nothing:
        return None
    what = " or ".join(dict.fromkeys(nothing.values()))
    seeds = f"{'seed' if len(nothing) == 1 else 'seeds'} {', '.join(map(str, nothing))}"
    return what if len(nothing) == runs else f"{what} ({seeds})"


def _agreement(student: NDArray[np.generic], teacher: NDArray[np.generic], task: Task) -> float | None:
    """Return the mean agreement of two runs; None of answers that cannot agree, such as other numbers of outputs."""
    if task.labelled and np.shape(student) != np.shape(teacher):
        return None  # without labels, it is by what answers agree that models are judged
    agreement = task.agreement(torch.from_numpy(np.asarray(student)), torch.from_numpy(np.asarray(teacher)))
    return float(agreement.double().mean())


def _retention(value: float, teacher: float, headline: Headline) -> float | None:
    """Return what is left of the teacher's headline: of an error, how often it goes into the student's."""
    good, best = (value, teacher) if headline.higher_is_better else (teacher, value)
    return good / best if best > 0 and good >= 0 else None


def _place(order: Sequence[str], label: str) -> int:
    return order.index(label) if label in order else len(order)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean([float(value) for value in values]))


def _mean_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None
