"""What the pipeline's runs gave, and what follows from them: the records behind ``verdict.json``."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_lightning.pipeline.latency import Latency
from kd_lightning.pipeline.statistics import Interval, Share

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


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What a network was quantised to, and what came of it.

    Attributes:
        source: label of the model whose weights it has, or began with.
        training: quantisation-aware training; without, the ranges alone were found, on training images.
        activation_bits: None where the weights alone are quantised.
        layers: how many are quantised, of those with weights.
        float_layers: names of those that stay in float.
        integer_operators: how many matrix products and convolutions of the file run on integers in ONNX Runtime.
        agreement_fp32: share of the test images on which it predicts what its own network in fp32 predicts: the
            source, or after quantisation-aware training the one with the same further steps.
        agreement_file: share of the test images on which the file predicts what the fake-quantised network predicts.
        file_mb: megabytes (10^6 bytes) of the exported file, which the predictions come from.
        warnings: what speaks against the figures, such as a single predicted class.
    """

    source: str
    training: bool
    weight_bits: int
    activation_bits: int | None
    layers: int
    float_layers: tuple[str, ...]
    integer_operators: int
    agreement_fp32: float | None
    agreement_file: float
    file_mb: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """One finished run: which model it trained, and what that model predicts on the test images.

    Attributes:
        role: `student` is the small network alone on the labels, `control` the same network on the teacher's hard
            labels; an `assistant` stands between teacher and student, taught by the one, teaching the other;
            `continued` is the distilled student after the same further steps in float that `quantized` students had
            with quantisation-aware training.
        label: names the model; runs of one model with several seeds share it. The role, unless an experiment has
            several models of one role ("T=4").
        seed: runs of one seed share data order and initialisation, and are compared with each other.
        predictions: (N,) predicted classes, on the same N test images in the same order for every run.
        target: (N,) true classes.
        val_accuracy: fraction, on the validation split: the only one that choices may look at.
        size_mb: megabytes (10^6 bytes) on disk.
        temperature: of the first loss that has one, at the last step.
        teacher_entropy: of the teacher's soft targets at `temperature`, as a share of log C.
        quantized: of the role of that name; its predictions are those of the exported file.
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
    quantized: Quantized | None = None

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
        values["quantized"] = self.quantized and asdict(self.quantized)
        return _strict(values | {"accuracy": self.accuracy})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **arrays: Any) -> "Result":
        """Read what :meth:`to_dict` returned."""
        fields = {key: value for key, value in values.items() if key != "accuracy"} | arrays
        if fields.get("quantized") is not None:
            lists = {key: tuple(fields["quantized"][key]) for key in ("float_layers", "warnings")}
            fields["quantized"] = Quantized(**fields["quantized"] | lists)
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class Model:
    """One row of the verdict: a model, over its seeds. None where a figure was not measured.

    Attributes:
        seeds: test accuracy by seed, in the seeds' order.
        sd: sample standard deviation over seeds; None with one seed.
        agreement: share of the test images on which it predicts what the teacher predicts.
        retention: accuracy divided by the teacher's.
        recall: by class name, the mean over seeds.
        learned_nothing: why its figures say nothing of its method, with the seeds: it predicts a single class, or is at
            chance. None where it has learned something.
        against_reference: difference of test accuracy to the reference among several distilled models.
        against_reference_p: its p-value, adjusted for the number of these comparisons (Holm); None with one seed.
        file_mb: of the ONNX file that is served.
        latency: in the runtime that it names.
        latency_openvino: the same in OpenVINO, where that is installed.
        quantized: of the role of that name; agreements and file size are means over seeds.
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
    learned_nothing: str | None = None
    against_reference: Interval | None = None
    against_reference_p: float | None = None
    file_mb: float | None = None
    latency_openvino: Latency | None = None
    quantized: Quantized | None = None

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
            "runtime": self.latency and self.latency.runtime,
            "train_seconds": self.train_seconds,
        }
        optional = {
            "gap_closed": self.gap_closed and asdict(self.gap_closed),
            "temperature": self.temperature,
            "teacher_entropy": self.teacher_entropy,
            "recall": dict(self.recall) or None,
            "learned_nothing": self.learned_nothing,
            "against_reference": self.against_reference and asdict(self.against_reference),
            "against_reference_p": self.against_reference_p,
            "file_mb": self.file_mb,
            "openvino": self.latency_openvino and _latency(self.latency_openvino),
            "agreement_fp32": self.quantized and self.quantized.agreement_fp32,
            "quantized": self.quantized and asdict(self.quantized),
        }
        return row | {key: value for key, value in optional.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The recommendation and all that it follows from.

    Attributes:
        worth_it: the distilled student was shown better than the student alone, over several seeds. False where it was
            not, and where that is not `decided`.
        decided: that could be asked: both were run, with more than one seed, and both have learned something.
        distilled: key in `models` of the distilled model that the sentence is about.
        gap_closed: of that model; None for all three where teacher, student or distilled is missing.
        differences: of test accuracy, by "distilled-alone", "distilled-control", "control-alone", "teacher-alone",
            and of its int8 students "ptq-distilled", "qat-continued", "qat-ptq", "continued-distilled", as far as
            both were run; "qat-ptq beyond the steps" is the third without the fourth.
        models: by role; by label where a role has several models, and where it is `quantized`.
    """

    worth_it: bool
    decided: bool
    sentence: str
    distilled: str | None
    gap_closed: Share
    differences: Mapping[str, Interval]
    models: Mapping[str, Model]

    @property
    def processor(self) -> str | None:
        """Return the instruction sets of the machine that measured the speed, where it was measured."""
        measured = (model.latency.processor for model in self.models.values() if model.latency is not None)
        return next((processor for processor in measured if processor), None)

    def to_dict(self) -> dict[str, Any]:
        """For strict JSON: what is not a number is None."""
        return _strict(
            {
                "worth_it": self.worth_it,
                "decided": self.decided,
                "sentence": self.sentence,
                "distilled": self.distilled,
                "gap_closed": asdict(self.gap_closed),
                "differences": {name: asdict(interval) for name, interval in self.differences.items()},
                "processor": self.processor,
                "models": {key: model.to_dict() for key, model in self.models.items()},
            }
        )


def _latency(latency: Latency) -> dict[str, float]:
    return {
        "latency_ms_p50": latency.p50_ms,
        "latency_ms_p95": latency.p95_ms,
        "throughput_per_s": latency.throughput_per_s,
    }


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
