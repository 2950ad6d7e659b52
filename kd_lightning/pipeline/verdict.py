"""Is distillation worth it here? The finished runs in; figures, a recommendation in words, JSON and a table out."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kd_lightning.pipeline.latency import Latency
from kd_lightning.pipeline.statistics import Interval, Share, gap_closed, paired_difference

Role = Literal["teacher", "student", "control", "distilled", "quantized"]

_TITLES: Mapping[str, str] = {
    "teacher": "teacher",
    "student": "student alone",
    "control": "teacher's hard labels",
    "distilled": "distilled",
    "quantized": "quantized",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """One finished run: which model it trained, and what that model predicts on the test images.

    Attributes:
        role: `student` is the small network alone on the labels, `control` the same network on the teacher's hard
            labels.
        label: names the model; runs of one model with several seeds share it. The role, unless an experiment has
            several models of one role ("T=4").
        seed: runs of one seed share data order and initialisation, and are compared with each other.
        predictions: (N,) predicted classes, on the same N test images in the same order for every run.
        target: (N,) true classes.
        val_accuracy: fraction, on the validation split: the only one that choices may look at.
        size_mb: megabytes (10^6 bytes) on disk.
        teacher_entropy: of the teacher's soft targets at `temperature`, as a share of log C.
    """

    role: Role
    label: str
    method: str
    seed: int
    predictions: NDArray[np.integer[Any]]
    target: NDArray[np.integer[Any]]
    val_accuracy: float
    train_seconds: float
    parameters: int
    size_mb: float
    temperature: float | None = None
    teacher_entropy: float | None = None

    @property
    def correct(self) -> NDArray[np.bool_]:
        return np.asarray(np.equal(self.predictions, self.target))

    @property
    def accuracy(self) -> float:
        """Fraction of the test images."""
        return float(self.correct.mean())

    def to_dict(self) -> dict[str, Any]:
        """For strict JSON: everything but the arrays, and the test accuracy that follows from them."""
        arrays = ("predictions", "target")
        values = {key: value for key, value in vars(self).items() if key not in arrays}
        return _strict(values | {"accuracy": self.accuracy})


@dataclass(frozen=True, kw_only=True)
class Model:
    """One row of the verdict: a model, over its seeds. None where a figure was not measured.

    Attributes:
        seeds: test accuracy by seed, in the seeds' order.
        sd: sample standard deviation over seeds; None with one seed.
        agreement: share of the test images on which it predicts what the teacher predicts.
        retention: accuracy divided by the teacher's.
        recall: by class name, the mean over seeds.
    """

    role: Role
    method: str
    accuracy: float
    sd: float | None
    seeds: tuple[float, ...]
    val_accuracy: float
    agreement: float | None
    retention: float | None
    gap_closed: Share | None
    params: int
    size_mb: float
    latency: Latency | None
    train_seconds: float
    temperature: float | None = None
    teacher_entropy: float | None = None
    recall: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "role": self.role,
            "method": self.method,
            "accuracy": {"mean": self.accuracy, "sd": self.sd, "seeds": list(self.seeds)},
            "val_accuracy": self.val_accuracy,
            "agreement": self.agreement,
            "retention": self.retention,
            "params": self.params,
            "size_mb": self.size_mb,
            "latency_ms_p50": self.latency and self.latency.p50_ms,
            "latency_ms_p95": self.latency and self.latency.p95_ms,
            "throughput_per_s": self.latency and self.latency.throughput_per_s,
            "train_seconds": self.train_seconds,
        }
        optional = {
            "gap_closed": self.gap_closed and asdict(self.gap_closed),
            "temperature": self.temperature,
            "teacher_entropy": self.teacher_entropy,
            "recall": dict(self.recall) or None,
        }
        return row | {key: value for key, value in optional.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The recommendation and all that it follows from.

    Attributes:
        worth_it: the distilled student was shown better than the student alone. False as well where that could not be
            asked: the sentence says so.
        distilled: key in `models` of the distilled model that the sentence is about.
        gap_closed: of that model; None for all three where teacher, student or distilled is missing.
        differences: of test accuracy, by "distilled-alone", "distilled-control", "control-alone", "teacher-alone",
            as far as both were run.
        models: by role; by label where a role has several models.
    """

    worth_it: bool
    sentence: str
    distilled: str | None
    gap_closed: Share
    differences: Mapping[str, Interval]
    models: Mapping[str, Model]

    def to_dict(self) -> dict[str, Any]:
        """For strict JSON: what is not a number is None."""
        return _strict(
            {
                "worth_it": self.worth_it,
                "sentence": self.sentence,
                "distilled": self.distilled,
                "gap_closed": asdict(self.gap_closed),
                "differences": {name: asdict(interval) for name, interval in self.differences.items()},
                "models": {key: model.to_dict() for key, model in self.models.items()},
            }
        )


def make_verdict(
    results: Sequence[Result],
    latency: Mapping[str, Latency],
    *,
    recall_classes: Mapping[int, str] | None = None,
    extra_images: int = 0,
) -> Verdict:
    """Compare the runs, paired by seed and test image, and say what follows.

    A difference counts as shown where its 95 % interval excludes zero. Of several distilled models the sentence is
    about the one with the best mean validation accuracy: the test images choose nothing. Roles that were not run
    leave out what would need them.

    Args:
        results: one for each run; the teacher may have one seed for all.
        latency: by label; a model without one gets None.
        recall_classes: classes whose recall is of interest on its own (one that the student never sees), with names.
        extra_images: how many images the distilled student and the control had beyond the labelled ones.

    Raises:
        ValueError: no results, other test images, a run given twice, two models where one is expected, no seed in
            common, or a recall class that no test image has.
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

    pairs = {
        "distilled-alone": (distilled, alone),
        "distilled-control": (distilled, control),
        "control-alone": (control, alone),
        "teacher-alone": (teacher, alone),
    }
    differences = {
        name: paired_difference(*_paired(left, right)) for name, (left, right) in pairs.items() if left and right
    }
    models, keys = {}, {}
    for role in get_args(Role):  # the order in which the pipeline trains, whatever order they came in
        for label in labels[role]:
            keys[label] = role if len(labels[role]) == 1 else label
            models[keys[label]] = _model(groups[label], teacher, alone, latency.get(label), recall_classes or {})
    distilled_key = keys[chosen] if chosen is not None else None
    share = models[distilled_key].gap_closed if distilled_key is not None else None
    seeds = len(_common_seeds(distilled, alone)) if distilled and alone else 0
    worth_it, sentence = _sentence(models, differences, distilled_key, share, len(variants), seeds, extra_images)
    return Verdict(
        worth_it=worth_it,
        sentence=sentence,
        distilled=distilled_key,
        gap_closed=share or Share(None, None, None),
        differences=differences,
        models=models,
    )


def write_verdict(verdict: Verdict, path: str | os.PathLike[str]) -> None:
    """Write `verdict.json` under a temporary name and rename it: a reader never sees half a file."""
    path = Path(path)
    text = json.dumps(verdict.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def print_verdict(verdict: Verdict, console: Console) -> None:
    """Quality and cost of every model, then the sentence. Two tables, so that both are readable at 100 columns."""
    rows = {key: Text(_title(key, model)) for key, model in verdict.models.items()}
    models = verdict.models.values()
    with_temperature = any(model.temperature is not None for model in models)
    with_entropy = any(model.teacher_entropy is not None for model in models)
    classes = list(dict.fromkeys(name for model in models for name in model.recall))

    wide = console.width >= 100
    quality = _table(wide, "test acc. %", "agreement %", "retention %", "gap closed %")
    quality.columns[1].no_wrap = True  # "79.0 ± 0.4" stays on one line
    if with_temperature:
        quality.add_column("T", justify="right")
    if with_entropy:
        quality.add_column(Text("teacher entropy %"), justify="right")
    for name in classes:
        quality.add_column(Text(f"recall {name} %"), justify="right")
    cost = _table(wide, "parameters", "size MB", "p50 ms", "p95 ms", "per s at 64", "training s")
    for key, model in verdict.models.items():
        share = model.gap_closed
        cells = [
            f"{_percent(model.accuracy)} ± {_percent(model.sd)}",
            _percent(model.agreement),
            _percent(model.retention),
            _percent(share.mean if share and share.low is not None else None),  # else any share could be true
        ]
        if with_temperature:
            cells.append(_number(model.temperature, "g"))
        if with_entropy:
            cells.append(_percent(model.teacher_entropy))
        cells += [_percent(model.recall.get(name)) for name in classes]
        quality.add_row(rows[key], *cells)
        speed = model.latency
        cost.add_row(
            rows[key],
            f"{model.params:,}",
            _number(model.size_mb, ".2f"),
            _number(speed.p50_ms if speed else None, ".2f"),
            _number(speed.p95_ms if speed else None, ".2f"),
            _number(speed.throughput_per_s if speed else None, ",.0f"),
            _number(model.train_seconds, ",.1f"),
        )
    for table in (quality, cost):
        console.print(table)
        console.print()
    console.print(Text(verdict.sentence))


# --- from runs to figures ---------------------------------------------------------------------------------------------

_Runs = dict[int, Result]  # of one model, by seed


def _checked(results: Sequence[Result]) -> dict[str, _Runs]:
    """The runs by label and seed, after all that can be wrong with them."""
    if not results:
        raise ValueError("expected at least one result, got none: run a stage before asking for the verdict")
    first, groups = results[0], dict[str, _Runs]()
    for result in results:
        name = f"{result.label!r} seed {result.seed}"
        if result.role not in _TITLES:
            raise ValueError(f"{name} has role {result.role!r}, expected one of {', '.join(_TITLES)}")
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
        if result.label in _TITLES and result.label != result.role:
            raise ValueError(f"label {result.label!r} names a role, and the run has role {result.role!r}: rename it")
        runs[result.seed] = result
    for role in ("teacher", "student", "control"):
        labels = [label for label, runs in groups.items() if _role(runs) == role]
        if len(labels) > 1:
            raise ValueError(f"expected one model with role {role!r}, got {labels}: make one verdict for each")
    return groups


def _role(runs: _Runs) -> Role:
    return next(iter(runs.values())).role


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
    latency: Latency | None,
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
        if alone and one.role not in ("teacher", "student"):
            share = gap_closed(*_paired(teacher, alone, runs))
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
        latency=latency,
        train_seconds=_mean(run.train_seconds for run in ordered),
        temperature=one.temperature,
        teacher_entropy=_mean_or_none(run.teacher_entropy for run in ordered),
        recall={
            name: _mean(run.correct[np.asarray(run.target) == index].mean() for run in ordered)
            for index, name in recall_classes.items()
        },
    )


def _mean(values: Iterable[Any]) -> float:
    return float(np.mean([float(value) for value in values]))


def _mean_or_none(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


# --- from figures to words --------------------------------------------------------------------------------------------


def _sentence(
    models: Mapping[str, Model],
    differences: Mapping[str, Interval],
    key: str | None,
    share: Share | None,
    variants: int,
    seeds: int,
    extra_images: int,
) -> tuple[bool, str]:
    gain = differences.get("distilled-alone")
    if key is None or gain is None:
        missing = ["distilled student"] * (key is None) + ["student alone"] * ("student" not in models)
        return False, (
            f"Not decided: no {' and no '.join(missing)} was run, so whether distillation is worth it cannot be told. "
            "Run the missing stages with the same seeds."
        )
    distilled, alone = models[key], models["student"]
    who = "the distilled student"
    if variants > 1:
        who += f" {key!r} (of {variants} distilled models the best on the validation images)"
    figures = f"{_percent(distilled.accuracy)} % of the test images right against {_percent(alone.accuracy)} %"
    if gain.low > 0:
        worth_it = True
        text = f"Worth it: {who} is {_points(gain)} better than the student alone ({figures})"
        if share and share.mean is not None and share.low is not None:
            text += (
                f", and closes {_percent(share.mean)} % of the gap to the teacher "
                f"({_percent(share.low)} to {_percent(share.high)} %)"
            )
    elif gain.high < 0:
        worth_it = False
        loss = Interval(-gain.mean, -gain.high, -gain.low)
        text = f"Not worth it: distillation costs {_points(loss)}: {who} has {figures}"
    else:
        worth_it = False
        text = (
            f"Not worth it: no difference was shown: the student alone is as good "
            f"({who} has {figures}: a difference of {_inside(gain)})"
        )
    parts = [text, *_why(differences, worth_it, extra_images), *_gap(differences)]
    for name in distilled.recall:
        recalls = ", ".join(f"{_title(k, m)} {_percent(m.recall[name])} %" for k, m in models.items())
        parts.append(f"Recall on {name!r}: {recalls}")
    if seeds == 1:
        parts.append("One seed only: the intervals know nothing of how training again would differ")
    return worth_it, ". ".join(parts) + "."


def _why(differences: Mapping[str, Interval], worth_it: bool, extra_images: int) -> list[str]:
    """What of it is due to the teacher's labels, and what to their softness."""
    softness, labels = differences.get("distilled-control"), differences.get("control-alone")
    if softness is None or labels is None:
        return ["Whether softness helped was not asked: there is no control on the teacher's hard labels"]
    what = f"the {extra_images:,} further images that the teacher labelled" if extra_images else "the teacher's labels"
    helped = f"{what} helped"
    if softness.high < 0:
        worse = Interval(-softness.mean, -softness.high, -softness.low)
        text = f"The teacher's hard labels are {_points(worse)} better than its soft ones"
        if worth_it or labels.low > 0:
            return [f"{text}, and {_points(labels)} better than the student alone: train on the teacher's hard labels"]
        return [f"{text}; that they are better than the student alone was not shown ({_inside(labels)})"]
    if worth_it and softness.low > 0:
        text = f'Softness ("dark knowledge") is part of why: {_points(softness)} better than the teacher\'s hard labels'
        return [text + (f"; {helped} too ({_inside(labels)} without softness)" if labels.low > 0 else "")]
    if worth_it and labels.low > 0:
        text = f"{helped}; that softness helped was not shown: the teacher's hard labels did as well"
        return [f"{text[0].upper()}{text[1:]} (a difference of {_inside(softness)})"]
    if worth_it:
        return [
            f"Why was not shown: neither that {helped} (hard labels against the student alone: {_inside(labels)}) "
            f"nor that softness did (against hard labels: {_inside(softness)})"
        ]
    if labels.low > 0:
        better = f"The teacher's hard labels are {_points(labels)} better than the student alone"
        return [f"{better}: train on the teacher's hard labels"]
    return []


def _gap(differences: Mapping[str, Interval]) -> list[str]:
    gap = differences.get("teacher-alone")
    if gap is None:
        return ["There is no teacher among the results, so the share of the gap that was closed is not known"]
    if gap.high < 0:
        worse = Interval(-gap.mean, -gap.high, -gap.low)
        return [f"There is no gap to close: the teacher is {_points(worse)} worse than the student alone"]
    if gap.low <= 0:
        return [
            "There is no gap to close: that the teacher is better than the student alone was not shown "
            f"(a difference of {_inside(gap)})"
        ]
    return []


def _points(interval: Interval) -> str:
    low, high = _percent(interval.low), _percent(interval.high)
    return f"{_percent(interval.mean)} points (95 % interval {low} to {high})"


def _inside(interval: Interval) -> str:
    """The same within parentheses."""
    return _points(interval).replace(" (", ", ").rstrip(")")


def _percent(value: float | None) -> str:
    return _number(None if value is None else 100 * value, ".1f")


def _number(value: float | None, form: str) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    text = format(value, form)
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text  # no "-0.0"


def _title(key: str, model: Model) -> str:
    title = _TITLES[model.role]
    return title if key == model.role else f"{title} {key}"


def _table(wide: bool, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=wide)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _strict(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The same with Python's own numbers, and None for what JSON has no number for."""
    return {str(key): _strict_value(value) for key, value in mapping.items()}


def _strict_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _strict(value)
    if isinstance(value, list | tuple):
        return [_strict_value(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
