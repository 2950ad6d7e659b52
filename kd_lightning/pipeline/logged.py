"""What MLflow is told of a finished stage: its network, and the file that serves it, as models."""

from collections.abc import Mapping, Sequence
from typing import Any

from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.objective import DistillationObjective
from kd_lightning.pipeline.folder import FinishedStage
from kd_lightning.records import Verdict
from kd_lightning.tracking.models import digest_of


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
