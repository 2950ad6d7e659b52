"""From a finished network to the file that serves it, and what that file predicts."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor, nn

from kd_lightning.export import export, integer_operators
from kd_lightning.pipeline.chance import AT_CHANCE, ONE_CLASS, at_chance
from kd_lightning.pipeline.lock import held
from kd_lightning.pipeline.recipe import Quantizing
from kd_lightning.pipeline.results import Quantized, Result
from kd_lightning.pipeline.runtimes import predictions
from kd_lightning.pipeline.stage_folder import Finished
from kd_lightning.quantization import calibrate, prepare, quantized_layers
from kd_lightning.tasks import Classification

_SAME = 0.995
"""Share of the test images on which a file has to predict what the fake-quantised network predicts."""
_EXAMPLES, _LEAST = 256, 0.5


def post_training(network: nn.Module, data: LightningDataModule, quantizing: Quantizing) -> float:
    """Quantise in place with ranges from training images; return the seconds that took."""
    start = time.perf_counter()
    data.setup("fit")
    loader = data.train_dataloader()
    batches = math.ceil(quantizing.images / (getattr(data, "batch_size", None) or 1))
    calibrate(prepare(network, quantizing.spec), loader, batches)
    return time.perf_counter() - start


def float_file(stage: Finished, data: LightningDataModule) -> Path:
    """Return a trained network's file in fp32, which is written where it is not there yet, or damaged."""
    with held(stage.folder.path, f"the stage {stage.recipe.name}"):
        if not stage.folder.has_file():
            export(stage.network(), _example(data), stage.folder.file, least_agreement=_LEAST, **described(data))
            stage.folder.record_file()
    return stage.folder.file


def serve(result: Result, network: nn.Module, data: LightningDataModule, file: Path, quantizing: Quantizing) -> Result:
    """Export a quantised network, and let the file predict.

    Args:
        result: Of the fake-quantised network; set up for test and validation, as `data` is.
        network: In eval mode, on the CPU.
        data: Whose validation and test images the file sees.
        file: To be written.
        quantizing: How it was quantised.
    """
    spec = quantizing.spec
    precision = "int4" if spec.weight_bits <= 4 else "int8"
    # What is less than equal is stated in the verdict, after all the training: refused is what is wrong altogether.
    export(network, _example(data), file, precision=precision, least_agreement=_LEAST, **described(data))
    on_test = predictions(file, _images(data.test_dataloader()))
    on_validation, target = predictions(file, _images(data.val_dataloader())), _targets(data.val_dataloader())
    layers = quantized_layers(network)
    quantized = Quantized(
        source=quantizing.source.result.label,
        training=quantizing.training,
        weight_bits=spec.weight_bits,
        activation_bits=spec.activation_bits,
        layers=sum(layer.weight_bits < 32 for layer in layers),
        float_layers=tuple(layer.name for layer in layers if layer.weight_bits == 32),
        integer_operators=sum(integer_operators(file).integer.values()),
        agreement_fp32=float(np.mean(on_test == quantizing.in_float.result.predictions)),
        agreement_file=float(np.mean(on_test == result.predictions)),
        file_mb=file.stat().st_size / 1e6,
    )
    float_mb = float_file(quantizing.source, data).stat().st_size / 1e6
    accuracy = float(np.mean(on_validation == target))
    served = replace(result, predictions=on_test, val_accuracy=accuracy, quantized=quantized)
    classes = int(max(target.max(), result.target.max())) + 1
    warnings = warnings_of(served, float_mb, classes, len(target), spec.mismatch())
    return replace(served, quantized=replace(quantized, warnings=warnings))


def warnings_of(result: Result, float_mb: float, classes: int, images: int, mismatch: str = "") -> tuple[str, ...]:
    """Say what would make the comparison with fp32 an empty one.

    ``mismatch`` is what :meth:`~kd_lightning.quantization.QuantizationSpec.mismatch` says of this machine.
    """
    how = result.quantized
    assert how is not None
    found = []
    if at_chance(result.val_accuracy, classes, images):
        found.append(f"it {AT_CHANCE}, with {result.val_accuracy:.1%} of the validation images right")
    if len(np.unique(result.predictions)) == 1:
        found.append(f"it {ONE_CLASS}")
    if how.activation_bits is not None and how.integer_operators < how.layers:
        found.append(f"{how.integer_operators} of {how.layers} quantised layers run on integers in ONNX Runtime")
    if how.agreement_file < _SAME:
        found.append(
            f"its file predicts what the fake-quantised network predicts on {how.agreement_file:.1%} of the test images"
            f"{': ' * bool(mismatch)}{mismatch}"
        )
    if how.file_mb >= float_mb:
        found.append(f"its file has {how.file_mb:.3f} MB, and that in fp32 {float_mb:.3f} MB")
    return tuple(found)


def described(data: LightningDataModule) -> dict[str, Any]:
    """Return what a data module says of its inputs and classes, by the names of :func:`~kd_lightning.export.export`."""
    named = {"classes": "class_names", "mean": "mean", "std": "std"}
    return {name: getattr(data, attribute, ()) for name, attribute in named.items()}


def _example(data: LightningDataModule) -> Tensor:
    data.setup("validate")
    return next(_images(data.val_dataloader()))[:_EXAMPLES]


def _images(loader: Any) -> Iterator[Tensor]:
    for batch in loader:
        yield Classification().read(batch).args[0]


def _targets(loader: Any) -> NDArray[Any]:
    targets = [Classification().read(batch).target for batch in loader]
    return np.concatenate([target.numpy() for target in targets if target is not None])
