"""What MLflow is told of a finished stage: its network, and the file that serves it, as models."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.objective import DistillationObjective
from kd_lightning.pipeline.folder import FinishedStage
from kd_lightning.records import Verdict
from kd_lightning.tracking.models import digest_of

_OF_TEST = ("agreement", "retention", "kl_teacher", "acceptance", "agreement_fp32", "agreement_file")
_MEASURED_ON = {"final/teacher_entropy": "training", **{f"final/{figure}": "test" for figure in _OF_TEST}}
"""The split that a figure beside the headline was measured on, by its name; others are of no samples."""
_OF_THE_NETWORK = ("final/size_mb", "final/train_seconds", "final/tokens_per_s")
"""What is measured of a network, and not of its file."""


def network_model(stage: FinishedStage) -> dict[str, Any] | None:
    """Describe the network as :func:`kd_lightning.tracking.models.model` takes it.

    Returns:
        None for one that its configuration alone does not make: a quantised one, which its file serves, one that a loss
        has changed, and one that takes more than tensors.
    """
    training, network = stage.training, stage.training.config.get("network")
    changed = (
        training.quantization is not None
        or any(isinstance(callback, QuantizationAwareTraining) for callback in training.callbacks())
        or (training.is_taught and DistillationObjective(training.losses()).changing_losses)
    )
    if changed or not isinstance(network, Mapping) or not stage.folder.example.is_file():
        return None
    digest = digest_of("network", stage.folder.digests()["weights"], network)
    return _described(stage, "", digest) | {"weights_path": stage.folder.weights, "network": network}


def file_model(stage: FinishedStage) -> dict[str, Any] | None:
    """Describe the exported file likewise; None where there is none."""
    file = stage.folder.digests().get("file")
    if file is None or not stage.folder.example.is_file():
        return None
    return _described(stage, "-onnx", digest_of("onnx", file)) | {"file_path": stage.folder.file}


def figures_of(
    model: Mapping[str, Any], stage: FinishedStage, values: Mapping[str, float], measured_at: int
) -> dict[str, Any]:
    """Describe what was measured of a model as :func:`kd_lightning.tracking.models.figures` takes it.

    A file has the figures of its network on the test split, with which it was compared when it was written.

    Args:
        model: As :func:`network_model` or :func:`file_model` describes it.
        stage: Whose model it is.
        values: What its run was told, by name.
        measured_at: In milliseconds since 1970, as its run was told.
    """
    key = stage.training.task.headline.key
    on = {f"final/{key}": "test", f"final/val_{key}": "validation", **_MEASURED_ON}
    left_out = _OF_THE_NETWORK if "file_path" in model else ()
    groups: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        if name not in left_out and math.isfinite(value):  # MLflow would have another number for it
            groups.setdefault(on.get(name, ""), {})[name] = value
    datasets = {of["context"]: {"name": of["name"], "digest": of["digest"]} for of in stage.inputs()}
    measured = [{"values": group, "dataset": datasets.get(context)} for context, group in groups.items()]
    return {"digest": model["digest"], "measured": measured, "measured_at": measured_at}


def figures_of_serving(
    stage: FinishedStage, values: Mapping[str, float], measured_at: int, *, of_file: bool
) -> list[dict[str, Any]]:
    """Describe likewise what it costs to serve a stage, of its file or of its network, whichever was timed."""
    of_network = {name: x for name, x in values.items() if name in _OF_THE_NETWORK}
    models = [(network_model(stage), of_network if of_file else values)]
    if of_file:
        models.append((file_model(stage), values))
    return [figures_of(model, stage, group, measured_at) for model, group in models if model is not None and group]


def best_model(verdict: Verdict, finished: Sequence[FinishedStage]) -> dict[str, Any] | None:
    """Return the model to register: what the verdict would serve, or else its best distilled student.

    The file where there is one, of the first seed, which is the one that was measured.
    """
    chosen = verdict.served or verdict.distilled
    for stage in finished:
        if chosen is not None and chosen in (stage.result.label, stage.result.role):
            return file_model(stage) or network_model(stage)
    return None


def _described(stage: FinishedStage, suffix: str, digest: str) -> dict[str, Any]:
    training = stage.training
    return {
        "name": f"{training.name}{suffix}",
        "digest": digest,
        "example_path": stage.folder.example,
        "tags": {"kd.role": training.role, "kd.method": training.method, "kd.seed": str(training.seed)},
    }
