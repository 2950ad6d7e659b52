"""From a student to a file that serves without this package."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from kd_lightning.export.batches import as_batch
from kd_lightning.export.compare import Comparison, compare, in_two_batches, worst_layer
from kd_lightning.export.files import new_files
from kd_lightning.export.formats import check_format
from kd_lightning.export.metadata import check_normalisation, metadata_of
from kd_lightning.export.writers import WRITERS, Job, Written
from kd_lightning.models.lora import merge_lora
from kd_lightning.outputs import class_dim, run
from kd_lightning.quantization import is_prepared, set_fake_quantization, spec_of
from kd_lightning.tasks import Task, or_default

LEAST_AGREEMENT = {"float32": 1.0, "float16": 0.99, "int8": 0.98, "int8_dynamic": 0.95, "int4": 0.9}
"""Agreement on the example's samples. A prepared network is compared as it fake-quantises."""
_LEAST_OF_NUMBERS = 0.99  # whose answers, no classes, are never the very same
_MOST_DIFFERENCE = {"float32": 1e-3, "float16": 5e-2}  # of the largest logit


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with the network on the example.

    Attributes:
        path: Of the file.
        bytes: Of all files.
        agreement: Mean over the samples, tokens or pixels, in [0, 1]: of classes, the share with the same best one.
        max_difference: Of a logit.
        operators: How many of each kind are in the file.
    """

    path: Path
    bytes: int
    agreement: float
    max_difference: float
    operators: Mapping[str, int]


@torch.no_grad()
def export(
    student: nn.Module,
    example: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    path: str | PathLike[str],
    format: str = "onnx",
    precision: str = "float32",
    *,
    classes: Sequence[str] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    least_agreement: float | None = None,
    task: Task | None = None,
) -> ExportReport:
    """Write a student, for batches of any size, and compare the file with it before it takes its name.

    Inputs are float32 in every precision, by the name ``input`` (``input0`` … where there are several, the names of
    ``forward``'s arguments where the example has these); the output is ``logits``, float32, at temperature 1.

    Args:
        student: Returns logits, or an object with ``.logits``; stays as it is. ``int8``, and ``int4`` after training
            for it, take a network of :mod:`kd_lightning.quantization` that is calibrated.
        example: Real inputs, as the network gets them: some tens at least, since the file is judged by them.
        path: Ends in ``.onnx``, ``.xml`` (openvino; the weights lie beside it in ``.bin``), ``.pt2``
            (torch_export) or ``.safetensors`` (state_dict).
        format: ``onnx`` (opset 21), ``openvino``, ``torch_export`` or ``state_dict``.
        precision: ``float32``; ``float16``; ``int8``, static; ``int8_dynamic``, weights of matrix products, whose
            inputs are quantised as they come; ``int4``, weights alone. The metadata of quantised files says on which
            ``processors`` they are exact, and their ``weight_range``.
        classes: Names, in the order of the logits. With ``mean`` and ``std``, in the file's metadata.
        mean: Subtracted from the inputs: one number for each channel, or one for all.
        std: Likewise, what they were then divided by.
        least_agreement: Least agreement of file and network on the example; see ``LEAST_AGREEMENT``.
        task: Says what the outputs mean, and so what agreement is; :class:`~kd_lightning.tasks.Classification` unless
            given, and for a language model of ``transformers`` :class:`~kd_lightning.tasks.LanguageModelling`.

    Raises:
        ImportError: Where a package is missing.
        OSError: Where the file cannot be written.
        ValueError: For what cannot be exported, and for a file that does not agree with the network.

    Example::

        network.load_state_dict(load_student("last.ckpt"))
        export(network, images, "student.onnx")
    """
    path = Path(path)
    check_format(format, precision, path)
    task = or_default(task, student)
    least = least_agreement
    if least is None:
        least = LEAST_AGREEMENT[precision] if task.over_classes else min(LEAST_AGREEMENT[precision], _LEAST_OF_NUMBERS)
    if not 0 <= least <= 1:
        raise ValueError(f"expected least_agreement to be a share, from 0 to 1, got {least}")
    student = getattr(student, "_orig_mod", student)  # what torch.compile has wrapped
    batch, network = as_batch(example), copy.deepcopy(student).cpu().eval()
    check_normalisation(mean, std, batch)
    _check_preparation(network, precision)
    if not is_prepared(network):
        merge_lora(network)
    expected = run(network, batch.args, batch.kwargs).logits.float()
    _check_outputs(network, expected, classes)
    metadata = metadata_of(network, precision, classes, mean, std)
    with new_files(path) as folder:
        job = Job(network, batch, precision, metadata, folder / path.name, path)
        written = WRITERS[format](job)
        found = compare(expected, in_two_batches(written.session, batch), task)
        _check_agreement(student, format, job, written, found, least, expected)
        size = sum(file.stat().st_size for file in folder.iterdir())
    return ExportReport(path, size, found.agreement, found.max_difference, written.operators)


def _check_preparation(network: nn.Module, precision: str) -> None:
    if not is_prepared(network):
        if precision == "int8":
            raise ValueError(
                f"expected a prepared and calibrated network for int8, got {type(network).__name__} in float: "
                "prepare(network), then calibrate(network, loader), both of kd_lightning.quantization; or take "
                "precision='int8_dynamic' for one of linear layers"
            )
        return
    own = "int4" if spec_of(network).weight_bits <= 4 else "int8"
    if precision != own:
        raise ValueError(
            f"the network is prepared for weights of {spec_of(network).weight_bits} bits, expected precision={own!r}, "
            f"got {precision!r}: export the float network for that"
        )
    set_fake_quantization(network, True)


def _check_outputs(network: nn.Module, logits: Tensor, classes: Sequence[str]) -> None:
    bad = int((~torch.isfinite(logits)).flatten(1).any(1).sum())
    if bad:
        raise ValueError(
            f"{type(network).__name__} gives logits that are infinite or not a number for {bad} of {len(logits)} "
            "samples, expected numbers: look at the example, or export weights from before it diverged"
        )
    count = logits.shape[class_dim(logits)]
    if classes and len(classes) != count:
        raise ValueError(f"expected names of {count} classes, one for each logit, got {len(classes)}")


def _check_agreement(
    student: nn.Module, format: str, job: Job, written: Written, found: Comparison, least: float, logits: Tensor
) -> None:
    most = _MOST_DIFFERENCE.get(job.precision, float("inf")) * float(logits.abs().max())
    if found.finite and found.agreement >= least and found.max_difference <= most:
        return
    runtime = {"onnx": "onnxruntime", "openvino": "openvino"}.get(format)
    overflow = spec_of(job.network).mismatch() if is_prepared(job.network) else ""
    remedy = overflow or "take a higher precision, or train for this one; or lower least_agreement"
    where = ""
    if runtime and not overflow:  # whose layers, asked for their outputs, are computed in float, and do not overflow
        where = f"; {worst_layer(job.network, job.batch, job.file, runtime, written.layers)}"
    raise ValueError(
        f"{job.path.name} in {job.precision} agrees with {type(student).__name__} on "
        f"{found.agreement:.1%} of the {len(logits)} samples, its outputs differ by {found.max_difference:.2g} at "
        f"most; expected {least:.1%}"
        f"{f' and {most:.2g}' if most < float('inf') else ''}{where}. Nothing was written: {remedy}"
    )
