"""Is distillation worth it here? The finished runs in; figures and a recommendation in words out."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from kd_lightning.durable_files import write_atomically
from kd_lightning.pipeline.chance import learned_nothing
from kd_lightning.pipeline.latency import Latency
from kd_lightning.pipeline.quantized_sentence import quantized_sentence
from kd_lightning.pipeline.results import TITLES, Model, Quantized, Result, Role, Verdict
from kd_lightning.pipeline.sentence import sentence
from kd_lightning.pipeline.statistics import (
    Share,
    gap_closed,
    holm,
    paired_contrast,
    paired_difference,
    paired_p_value,
)


def make_verdict(
    results: Sequence[Result],
    latency: Mapping[str, Latency],
    *,
    recall_classes: Mapping[int, str] | None = None,
    reference: str | None = None,
    extra_images: int = 0,
    latency_openvino: Mapping[str, Latency] | None = None,
    files_mb: Mapping[str, float] | None = None,
) -> Verdict:
    """Compare the runs, paired by seed and test image, and say what follows.

    A difference counts as shown where its 95 % interval excludes zero; with one seed, or of a model that has learned
    nothing, none does. Of several distilled models the sentence is
    about the one with the best mean validation accuracy: the test images choose nothing. Roles that were not run
    leave out what would need them. Quantised students are compared with the distilled one that they were made of, and
    after quantisation-aware training with the one that had the same further steps in float.

    Args:
        results: one for each run; the teacher may have one seed for all.
        latency: by label; a model without one gets None.
        recall_classes: classes whose recall is of interest on its own (one that the student never sees), with names.
        reference: label of the distilled model with which the other distilled models are compared.
        extra_images: how many images the distilled student and the control had beyond the labelled ones.
        latency_openvino: by label; what `latency` has in another runtime, measured in OpenVINO.
        files_mb: by label, megabytes of the exported files; quantised models bring theirs along.

    Raises:
        ValueError: no results, other test images, a run given twice, two models where one is expected, no seed in
            common, a recall class that no test image has, or a reference that is no distilled model.
    """
    groups = _checked(results)
    target = np.asarray(results[0].target)
    for index, name in (recall_classes or {}).items():
        if not (target == index).any():
            raise ValueError(f"no test image has class {index} ({name!r}), so it has no recall: leave it out")
    labels = {role: [label for label, runs in groups.items() if _role(runs) == role] for role in get_args(Role)}
    variants = labels["distilled"]
    chosen = max(variants, key=lambda label: _validation(groups[label], label, len(variants)), default=None)
    teacher, alone, control = (
        groups[labels[role][0]] if labels[role] else None for role in ("teacher", "student", "control")
    )
    distilled = groups[chosen] if chosen is not None else None
    if reference is not None and reference not in variants:
        raise ValueError(f"reference {reference!r} is no distilled model, expected one of {variants}, or none")

    pairs = {
        "distilled-alone": (distilled, alone),
        "distilled-control": (distilled, control),
        "control-alone": (control, alone),
        "teacher-alone": (teacher, alone),
    }
    ptq, qat = _quantized_of(groups, labels, variants)
    if ptq is not None or qat is not None:
        continued = groups[labels["continued"][0]] if labels["continued"] else None
        source = groups[_quantized(groups[ptq or qat or ""]).source]
        after_ptq, after_qat = (groups[label] if label is not None else None for label in (ptq, qat))
        pairs |= {
            "ptq-distilled": (after_ptq, source),
            "qat-continued": (after_qat, continued),
            "qat-ptq": (after_qat, after_ptq),
            "continued-distilled": (continued, source),
        }
    differences = {
        name: paired_difference(*_paired(left, right)) for name, (left, right) in pairs.items() if left and right
    }
    four = [pairs[name] for name in ("qat-continued", "ptq-distilled") if name in pairs]
    runs_of_four = [group for pair in four for group in pair if group]
    if len(runs_of_four) == 4:
        differences["qat-ptq beyond the steps"] = paired_contrast(*_paired(*runs_of_four))
    models, keys = {}, dict[str, str]()
    for label in _in_order(groups, labels):
        role = _role(groups[label])
        keys[label] = role if len(labels[role]) == 1 and role != "quantized" else label
        of_student = role != "quantized" or _quantized(groups[label]).source not in labels["teacher"]
        model = _model(groups[label], teacher, alone if of_student else None, recall_classes or {})
        model = replace(
            model,
            latency=latency.get(label),
            latency_openvino=(latency_openvino or {}).get(label),
            file_mb=model.quantized.file_mb if model.quantized is not None else (files_mb or {}).get(label),
        )
        if model.quantized is not None:
            made_of = model.quantized.source
            model = replace(model, quantized=replace(model.quantized, source=keys.get(made_of, made_of)))
        if role == "distilled" and reference is not None and label != reference:
            both = _paired(groups[label], groups[reference])
            p = paired_p_value(*both) if len(both[0]) > 1 else None  # one seed says nothing of training again
            model = replace(model, against_reference=paired_difference(*both), against_reference_p=p)
        models[keys[label]] = model
    compared = {
        key: model.against_reference_p for key, model in models.items() if model.against_reference_p is not None
    }
    for key, adjusted in zip(compared, holm(list(compared.values())), strict=True):
        models[key] = replace(models[key], against_reference_p=adjusted)
    distilled_key = keys[chosen] if chosen is not None else None
    share = models[distilled_key].gap_closed if distilled_key is not None else None
    seeds = len(_common_seeds(distilled, alone)) if distilled and alone else 0
    worth_it, text = sentence(models, differences, distilled_key, share, len(variants), seeds, extra_images)
    text = " ".join([text, *(f"{part}." for part in quantized_sentence(models, differences, ptq, qat))])
    return Verdict(
        worth_it=bool(worth_it),
        decided=worth_it is not None,
        sentence=text,
        distilled=distilled_key,
        gap_closed=share or Share(None, None, None),
        differences=differences,
        models=models,
    )


def write_verdict(verdict: Verdict, path: str | os.PathLike[str]) -> None:
    """Write `verdict.json` under a temporary name and rename it: a reader never sees half a file."""
    text = json.dumps(verdict.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(Path(path), text.encode())


_Runs = dict[int, Result]  # of one model, by seed


def _checked(results: Sequence[Result]) -> dict[str, _Runs]:
    """The runs by label and seed, after all that can be wrong with them."""
    if not results:
        raise ValueError("expected at least one result, got none: run a stage before asking for the verdict")
    first, groups = results[0], dict[str, _Runs]()
    for result in results:
        name = f"{result.label!r} seed {result.seed}"
        if result.role not in TITLES:
            raise ValueError(f"{name} has role {result.role!r}, expected one of {', '.join(TITLES)}")
        sizes = np.shape(result.predictions), np.shape(result.target), np.shape(first.target)
        if len(set(sizes)) > 1 or len(sizes[0]) != 1:
            raise ValueError(
                f"{name} has predictions {sizes[0]} for target {sizes[1]}, and {first.label!r} target {sizes[2]}: "
                "test every model on the same images"
            )
        if not np.array_equal(result.target, first.target):
            raise ValueError(
                f"{name} has another target than {first.label!r}: test both on the same images in the same order"
            )
        runs = groups.setdefault(result.label, {})
        if result.seed in runs:
            raise ValueError(f"{name} is given twice: pass one result a run, or give the models different labels")
        if runs and _role(runs) != result.role:
            raise ValueError(f"label {result.label!r} has roles {_role(runs)} and {result.role}: one label, one model")
        if (result.role == "quantized") != (result.quantized is not None):
            raise ValueError(
                f"{name} has role {result.role!r} and quantized={result.quantized}: the one tells the other"
            )
        if result.label in TITLES and result.label != result.role:
            raise ValueError(f"label {result.label!r} names a role, and the run has role {result.role!r}: rename it")
        runs[result.seed] = result
    for role in ("teacher", "student", "control", "continued"):
        labels = [label for label, runs in groups.items() if _role(runs) == role]
        if len(labels) > 1:
            raise ValueError(f"expected one model with role {role!r}, got {labels}: make one verdict for each")
    return groups


def _role(runs: _Runs) -> Role:
    return next(iter(runs.values())).role


def _quantized(runs: _Runs) -> Quantized:
    found = next(iter(runs.values())).quantized
    assert found is not None
    return found


def _quantized_of(
    groups: Mapping[str, _Runs], labels: Mapping[str, Sequence[str]], variants: Sequence[str]
) -> tuple[str | None, str | None]:
    """Return the labels of a distilled student after post-training quantisation and after training for it.

    The first of each kind that quantises activations too, as files in int8 do, and else the first.
    """
    made = {label: _quantized(groups[label]) for label in labels["quantized"]}
    made = {label: how for label, how in made.items() if how.source in variants}
    found = []
    for training in (False, True):
        those = [label for label, how in made.items() if how.training == training]
        found.append(min(those, key=lambda label: made[label].activation_bits is None, default=None))
    return found[0], found[1]


def _in_order(groups: Mapping[str, _Runs], labels: Mapping[str, Sequence[str]]) -> list[str]:
    """Return labels in the order in which the pipeline trains, teacher and student alone with what was quantised."""
    ordered = []
    for role in (role for role in get_args(Role) if role != "quantized"):
        for label in labels[role]:
            ordered.append(label)
            if role != "distilled":  # behind which come the further steps in float
                ordered += [other for other in labels["quantized"] if _quantized(groups[other]).source == label]
    return [*ordered, *(label for label in labels["quantized"] if label not in ordered)]


def _validation(runs: _Runs, label: str, variants: int) -> float:
    accuracy = _mean(run.val_accuracy for run in runs.values())
    if variants > 1 and not math.isfinite(accuracy):
        raise ValueError(f"{label!r} has validation accuracy {accuracy}: the best of {variants} is chosen on it")
    return accuracy


def _common_seeds(*groups: _Runs) -> list[int]:
    """Seeds that all models have; a teacher that was trained once goes with every seed."""
    several = [runs for runs in groups if not (_role(runs) == "teacher" and len(runs) == 1)] or [groups[0]]
    seeds = sorted(set(several[0]).intersection(*several[1:]))
    if not seeds:
        named = ", ".join(f"{next(iter(runs.values())).label!r} {sorted(runs)}" for runs in several)
        raise ValueError(f"no seed in common ({named}): train models that are compared with the same seeds")
    return seeds


def _paired(*groups: _Runs) -> list[NDArray[np.bool_]]:
    """Which predictions are right, (seeds, N) for each model, on the seeds that all have."""
    seeds = _common_seeds(*groups)
    return [np.stack([_at(runs, seed).correct for seed in seeds]) for runs in groups]


def _at(runs: _Runs, seed: int) -> Result:
    """The run of a seed, or the only run of a model that was trained once."""
    return runs[seed] if seed in runs else next(iter(runs.values()))


def _model(
    runs: _Runs,
    teacher: _Runs | None,
    alone: _Runs | None,
    recall_classes: Mapping[int, str],
) -> Model:
    one = next(iter(runs.values()))
    ordered = [runs[seed] for seed in sorted(runs)]
    seeds = tuple(run.accuracy for run in ordered)
    agreement = retention = share = None
    if teacher:
        common = _common_seeds(runs, teacher)
        agreement = _mean(np.mean(_at(runs, s).predictions == _at(teacher, s).predictions) for s in common)
        quality = _mean(run.accuracy for run in teacher.values())
        retention = _mean(seeds) / quality if quality > 0 else None
        if alone and one.role in ("control", "distilled", "continued", "quantized"):
            share = gap_closed(*_paired(teacher, alone, runs))
    collapsed = {run.seed: what for run in ordered if (what := learned_nothing(run.predictions, run.target))}
    return Model(
        role=one.role,
        method=one.method,
        accuracy=_mean(seeds),
        sd=float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None,
        seeds=seeds,
        val_accuracy=_mean(run.val_accuracy for run in ordered),
        agreement=agreement,
        retention=retention,
        gap_closed=share,
        params=one.parameters,
        size_mb=_mean(run.size_mb for run in ordered),
        latency=None,
        train_seconds=_mean(run.train_seconds for run in ordered),
        temperature=one.temperature,
        teacher_entropy=_mean_or_none(run.teacher_entropy for run in ordered),
        recall={
            name: _mean(run.correct[np.asarray(run.target) == index].mean() for run in ordered)
            for index, name in recall_classes.items()
        },
        learned_nothing=_stated(collapsed, len(ordered)) if one.role != "quantized" else None,
        quantized=_over_seeds([run.quantized for run in ordered if run.quantized is not None]),
    )


def _stated(collapsed: Mapping[int, str], runs: int) -> str | None:
    """Say what is wrong, and with which seeds where not with all."""
    if not collapsed:
        return None
    what = " or ".join(dict.fromkeys(collapsed.values()))
    seeds = f"{'seed' if len(collapsed) == 1 else 'seeds'} {', '.join(map(str, collapsed))}"
    return what if len(collapsed) == runs else f"{what} ({seeds})"


def _over_seeds(runs: Sequence[Quantized]) -> Quantized | None:
    """The first seed's, with means and all warnings."""
    if not runs:
        return None
    return replace(
        runs[0],
        agreement_fp32=_mean_or_none(run.agreement_fp32 for run in runs),
        agreement_file=_mean(run.agreement_file for run in runs),
        file_mb=_mean(run.file_mb for run in runs),
        warnings=tuple(dict.fromkeys(warning for run in runs for warning in run.warnings)),
    )


def _mean(values: Iterable[Any]) -> float:
    return float(np.mean([float(value) for value in values]))


def _mean_or_none(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None
