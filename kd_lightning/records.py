"""The records that go through the pipeline: of a finished run, of a model over its seeds, of the verdict.

Each figure is declared once, in :data:`FIGURES`: runs carry them by key, and MLflow's ``final/<key>``, ``verdict.json``
and the tables walk the declaration.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kd_lightning.headline import Headline

Role = Literal["teacher", "assistant", "student", "control", "distilled", "continued", "quantized"]

TITLES: Mapping[str, str] = {
    "teacher": "teacher",
    "assistant": "assistant",
    "student": "student alone",
    "control": "teacher's hard labels",
    "distilled": "distilled",
    "continued": "distilled, further steps",
    "quantized": "quantized",
}


class Figure(NamedTuple):
    """A number that belongs to a finished run or to its file, beside the headline.

    Attributes:
        key: in ``verdict.json``, and in MLflow as ``final/<key>``.
        title: of its column.
        form: how it is written: ``headline`` (as the task writes its headline), ``percent`` (a share from 0 to 1),
            ``count``, or a format specification.
    """

    key: str
    title: str
    form: str


# Megabytes are 10^6 bytes, latencies milliseconds for one sample, throughput samples a second in batches of 64. The
# first latencies are of the runtime that the verdict names.
FIGURES: tuple[Figure, ...] = (
    Figure("val", "validation", "headline"),  # the only figure that choices may look at
    Figure("params", "parameters", "count"),
    Figure("size_mb", "weights MB", ".3f"),  # the state dict as torch.save stores it
    Figure("file_mb", "file MB", ".3f"),  # the exported file that is served
    Figure("latency_ms_p50", "p50 ms", ".3f"),
    Figure("latency_ms_p95", "p95 ms", ".3f"),
    Figure("throughput_per_s", "per s at 64", ",.0f"),
    Figure("openvino_latency_ms_p50", "OpenVINO p50 ms", ".3f"),
    Figure("openvino_latency_ms_p95", "OpenVINO p95 ms", ".3f"),
    Figure("openvino_throughput_per_s", "OpenVINO per s at 64", ",.0f"),
    Figure("train_seconds", "training s", ",.1f"),
    Figure("store_seconds", "storing s", ",.1f"),  # of the stored outputs that it was trained on
    Figure("kl_teacher", "KL to teacher", ".3f"),  # of a language model, in bits a token
    Figure("acceptance", "accepted %", "percent"),  # of its tokens, by the teacher in speculative decoding
    Figure("tokens_per_s", "tokens per s", ",.0f"),  # written one by one, with a cache of keys and values, in PyTorch
    Figure("teacher_entropy", "teacher entropy", "percent"),  # of the soft targets, as a share of log C
    Figure("agreement_fp32", "as in fp32", "percent"),  # with its own network in fp32: see Quantized
    Figure("agreement_file", "file as network", "percent"),  # of the file with the fake-quantised network
    Figure("quantized_layers", "quantised layers", "count"),
    Figure("integer_operators", "on integers", "count"),  # matrix products and convolutions, in ONNX Runtime
)


@dataclass(frozen=True)
class Interval:
    """An improvement with its 95 % interval, in the headline's own numbers (0.01 is one point of accuracy).

    What the interval excludes is shown; an improvement is neither better nor worse where that was not shown.
    """

    mean: float
    low: float
    high: float

    @property
    def better(self) -> bool:
        """Whether an improvement was shown."""
        return self.low > 0

    @property
    def worse(self) -> bool:
        """Whether the contrary was shown."""
        return self.high < 0

    def __neg__(self) -> "Interval":
        """Return the same difference, taken the other way round."""
        return Interval(-self.mean, -self.high, -self.low)


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval; 1.0 is the whole gap.

    `mean` is None where the gap is not positive: a share of it would mean nothing. `low` and `high` are None where the
    gap cannot be told from zero: then no share, however large, can be excluded.
    """

    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What a network was quantised to.

    Its figures stand among :data:`FIGURES`. ``agreement_fp32`` is the agreement with the source, or after
    quantisation-aware training with the model that had the same further steps in fp32.

    Attributes:
        source: label of the model whose weights it has, or began with.
        training: quantisation-aware training; without, the ranges alone were found, on training samples.
        activation_bits: None where the weights alone are quantised.
        float_layers: names of those that stay in float.
        mismatch: why its file may give something else on this processor, and the remedy
            (:meth:`~kd_lightning.quantization.QuantizationSpec.mismatch`); empty where there is no reason.
    """

    source: str
    training: bool
    weight_bits: int
    activation_bits: int | None
    float_layers: tuple[str, ...] = ()
    mismatch: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """One finished run: which model it trained, and how that model does on the test units.

    Attributes:
        role: `student` is the small network alone on the labels, `control` the same network on the teacher's hard
            labels; an `assistant` stands between teacher and student, taught by the one, teaching the other;
            `continued` is the distilled student after the same further steps in float that `quantized` students had
            with quantisation-aware training.
        label: names the model; runs of one model with several seeds share it. The role, unless an experiment has
            several models of one role ("T=4").
        seed: runs of one seed share data order and initialisation, and are compared with each other.
        answers: (N, ...), what :meth:`~kd_lightning.tasks.Task.answers` keeps of each test unit, in the same order
            for every run; of a `quantized` model those of the exported file.
        scores: (M, ...), :meth:`~kd_lightning.tasks.Task.scores` of the M labelled test units.
        target_digest: of the test targets, so that runs on other test data are never compared.
        figures: by the keys of :data:`FIGURES`, as far as they were measured.
        temperature: of the first loss that has one; (first, last) where it was scheduled or learnt.
        quantized: of the role of that name.
        learned_nothing: why the figures say nothing of the method ("predicts a single class"), by the task.
        parts: the headline of parts of the test units, by :meth:`~kd_lightning.tasks.Task.parts`.
    """

    role: Role
    label: str
    method: str
    seed: int
    answers: NDArray[Any]
    scores: NDArray[np.float64]
    target_digest: str
    figures: Mapping[str, float] = field(default_factory=dict)
    temperature: float | tuple[float, float] | None = None
    quantized: Quantized | None = None
    learned_nothing: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(self.figures.keys() - {figure.key for figure in FIGURES})
        if unknown:
            raise ValueError(f"figures {unknown} of {self.label!r} are not declared: add them to records.FIGURES")

    def metrics(self, headline: Headline) -> dict[str, float]:
        """Return what MLflow shows of the run, by ``final/<key>``."""
        named = {f"final/{_name(figure.key, headline.key)}": self.figures.get(figure.key) for figure in FIGURES}
        values = {f"final/{headline.key}": headline.value(self.scores)}
        return values | {name: value for name, value in named.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """For strict JSON: everything but the arrays."""
        values = {key: value for key, value in vars(self).items() if key not in ("answers", "scores")}
        values["quantized"] = self.quantized and asdict(self.quantized)
        return strict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **others: Any) -> "Result":
        """Read what :meth:`to_dict` returned; ``others`` are the arrays, and what is to replace a value."""
        fields = dict(values)
        if fields["quantized"] is not None:
            layers = tuple(fields["quantized"]["float_layers"])
            fields["quantized"] = Quantized(**fields["quantized"] | {"float_layers": layers})
        if isinstance(fields["temperature"], list):
            fields["temperature"] = tuple(fields["temperature"])
        fields["figures"] = {key: math.nan if value is None else value for key, value in fields["figures"].items()}
        return cls(**fields | others)


@dataclass(frozen=True, kw_only=True)
class Model:
    """One row of the verdict: a model, over its seeds.

    Attributes:
        value: mean of `seeds`.
        sd: sample standard deviation over seeds; None with one seed.
        seeds: test headline by seed, in the seeds' order.
        agreement: with the teacher, mean share of the test units; None where that was not asked.
        retention: the headline divided by the teacher's; the other way round where lower is better, so that 1 is as
            good as the teacher and less is worse.
        gap_closed: share of the gap between teacher and student alone.
        figures: by the keys of :data:`FIGURES`, means over the seeds that have them.
        parts: means over seeds.
        learned_nothing: why its figures say nothing of its method, with the seeds. None where it has learned something.
        against_reference: improvement on the reference among several distilled models.
        against_reference_p: its p-value, adjusted for the number of these comparisons (Holm); None with one seed.
    """

    role: Role
    method: str
    value: float
    sd: float | None
    seeds: tuple[float, ...]
    agreement: float | None
    retention: float | None
    gap_closed: Share | None
    figures: Mapping[str, float]
    temperature: float | tuple[float, float] | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    learned_nothing: str | None = None
    against_reference: Interval | None = None
    against_reference_p: float | None = None
    quantized: Quantized | None = None

    def to_dict(self, headline: Headline) -> dict[str, Any]:
        """For strict JSON. Every figure is there, None where it was not measured."""
        name = headline.name.replace(" ", "_")
        row: dict[str, Any] = {
            "role": self.role,
            "method": self.method,
            name: {"mean": self.value, "sd": self.sd, "seeds": list(self.seeds)},
            "agreement": self.agreement,
            "retention": self.retention,
        }
        row |= {_name(figure.key, name): _whole(self.figures.get(figure.key), figure.form) for figure in FIGURES}
        optional = {
            "gap_closed": self.gap_closed and asdict(self.gap_closed),
            "temperature": self.temperature,
            "parts": dict(self.parts) or None,
            "learned_nothing": self.learned_nothing,
            "against_reference": self.against_reference and asdict(self.against_reference),
            "against_reference_p": self.against_reference_p,
            "quantized": self.quantized and asdict(self.quantized),
        }
        return strict(row | {key: value for key, value in optional.items() if value is not None})


Reason = Literal["shown", "costs", "not_shown", "one_seed", "learned_nothing", "missing"]
"""What decided: the distilled student was shown better or worse than the student alone, or no difference was shown;
or nothing could be decided, after one seed, of a model that learned nothing, or without one of the two."""

Caution = Literal["learned_nothing", "not_all_integers", "file_differs", "file_larger"]
"""What speaks against a model's figures: not all its quantised layers run on integers; its file does not answer what
the fake-quantised network answers; its file is no smaller than that in fp32."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The decision and all that it follows from. :mod:`kd_lightning.report` says it.

    Attributes:
        headline: what the models are judged by.
        worth_it: the distilled student was shown better than the student alone, over several seeds. False where it was
            not, and where that is not `decided`.
        reason: why.
        units: number of test units with a score.
        seeds: number of those that the distilled student and the student alone have in common.
        distilled: key in `models` of the distilled model that the decision is about.
        variants: number of distilled models, of which that is the best on the validation split.
        extra: number of units that the distilled student and the control had beyond the labelled ones.
        hard_labels: whether outputs are of classes, so that a control on the teacher's hard labels makes sense.
        gap_closed: of the distilled model; None for all three where teacher, student or distilled is missing.
        differences: improvements of the test headline, positive where the first is better, by "distilled-alone",
            "distilled-control", "control-alone", "teacher-alone", and of the quantised students "ptq-distilled",
            "qat-continued", "qat-ptq", "continued-distilled", "served-teacher", as far as both were run; "qat-ptq
            beyond the steps" is the third without the fourth.
        ptq: key of the distilled student after post-training quantisation.
        qat: key of the one after quantisation-aware training.
        served: key of the better of these two on the validation split; without training where they are as good.
        models: by role; by label where a role has several models, and where it is `quantized`.
        cautions: keys of the models that they are about.
        runtime: in which the latencies were measured.
        processor: instruction sets of the machine that measured them.
    """

    headline: Headline
    worth_it: bool
    reason: Reason
    units: int
    seeds: int
    distilled: str | None
    variants: int
    extra: int
    hard_labels: bool
    gap_closed: Share
    differences: Mapping[str, Interval]
    ptq: str | None
    qat: str | None
    served: str | None
    models: Mapping[str, Model]
    cautions: Mapping[Caution, tuple[str, ...]]
    runtime: str | None = None
    processor: str | None = None

    @property
    def decided(self) -> bool:
        """Whether the question could be asked: both were run, with several seeds, and have learned something."""
        return self.reason in ("shown", "costs", "not_shown")

    @property
    def objective(self) -> float | None:
        """What a Hydra sweeper optimises: the distilled model's headline on the validation split.

        Accuracies and other headlines of which more is better are to be maximised, errors to be minimised: set the
        sweeper's ``direction`` to that.
        """
        chosen = self.models.get(self.distilled or "")
        return chosen.figures.get("val") if chosen is not None else None

    def metrics(self) -> dict[str, float | None]:
        """Return what MLflow shows of the verdict in the parent run: by it pipelines are compared.

        The names that a run of the distilled student has, with its means over the seeds; and ``<headline>_alone`` and
        ``<headline>_teacher``.
        """
        key, distilled = self.headline.key, self.models.get(self.distilled or "")
        values: dict[str, float | None] = {}
        if distilled is not None:
            figures = {f"final/{_name(figure.key, key)}": distilled.figures.get(figure.key) for figure in FIGURES}
            values = {
                f"final/{key}": distilled.value,
                f"final/{key}_sd": distilled.sd,
                "final/agreement": distilled.agreement,
                "final/retention": distilled.retention,
                **figures,
            }
        for name, role in (("alone", "student"), ("teacher", "teacher")):
            values[f"final/{key}_{name}"] = self.models[role].value if role in self.models else None
        return {
            **values,
            "final/worth_it": float(self.worth_it),
            "final/decided": float(self.decided),
            "final/gap_closed": self.gap_closed.mean,
            "final/gap_closed_low": self.gap_closed.low,
            "final/gap_closed_high": self.gap_closed.high,
        }

    def to_dict(self) -> dict[str, Any]:
        """For strict JSON: what is not a number is None."""
        said = ("name", "key", "units", "higher_is_better", "percent", "symbol")
        return strict(
            {
                "worth_it": self.worth_it,
                "decided": self.decided,
                "reason": self.reason,
                "headline": {name: getattr(self.headline, name) for name in said},
                "units": self.units,
                "distilled": self.distilled,
                "gap_closed": asdict(self.gap_closed),
                "differences": {name: asdict(interval) for name, interval in self.differences.items()},
                "cautions": {kind: list(keys) for kind, keys in self.cautions.items()},
                "runtime": self.runtime,
                "processor": self.processor,
                "models": {key: model.to_dict(self.headline) for key, model in self.models.items()},
            }
        )


def best_on_validation(results: Iterable[Result], headline: Headline) -> str | None:
    """Return the label of the model with the best mean validation headline over its seeds; None of no results.

    Raises:
        ValueError: a model without, where there are several.
    """
    by_label: dict[str, list[float]] = {}
    for result in results:
        by_label.setdefault(result.label, []).append(result.figures.get("val", math.nan))
    means = {label: float(np.mean(values)) for label, values in by_label.items()}
    for label, mean in means.items():
        if len(means) > 1 and not math.isfinite(mean):
            raise ValueError(
                f"{label!r} has validation {headline.name} {mean}: the best of {len(means)} is chosen on it"
            )
    return (max if headline.higher_is_better else min)(means, key=lambda label: means[label], default=None)


def strict(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same with Python's own numbers, and None for what JSON has no number for."""
    return {str(key): _strict_value(value) for key, value in mapping.items()}


def _strict_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return strict(value)
    if isinstance(value, list | tuple):
        return [_strict_value(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _name(key: str, headline: str) -> str:
    """Name a figure; the one that is the headline on another split says so: ``val_acc``."""
    return f"{key}_{headline}" if key == "val" else key


def _whole(value: float | None, form: str) -> float | None:
    return int(value) if value is not None and form == "count" and float(value).is_integer() else value
