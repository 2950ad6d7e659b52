"""A network as an ONNX file, in int8, and its way through a runtime."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kd_lightning.export.batches import feed
from kd_lightning.export.formats import FORMATS, require
from kd_lightning.export.onnx_graph import clear, to_onnx
from kd_lightning.processor import adds_8_bit_products_exactly
from kd_lightning.tasks.batch import Batch

_FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}  # int8 is made by onnxruntime for both


def check_runtime(runtime: str) -> None:
    """Raise ValueError for an unknown runtime, ImportError where its packages are missing."""
    if runtime not in _FORMATS:
        raise ValueError(f"expected runtime to be one of {', '.join(_FORMATS)}, got {runtime!r}")
    known = FORMATS[_FORMATS[runtime]]
    require(f"a teacher through {runtime}", known.packages, known.extra)


def write(network: nn.Module, batch: Batch, layers: Sequence[str], path: Path) -> None:
    """Write a network in eval mode; for batches of any size of samples with the shape of these."""
    import onnx_ir

    model = to_onnx(network, batch, layers)
    clear(model)
    onnx_ir.save(model, path)


def quantize(source: Path, target: Path, batches: Sequence[Batch]) -> None:
    """Write an int8 file: static ranges from these batches, one scale for each output channel of a weight."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else feed(batch)

    prepared = source.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        target,
        Reader(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=not adds_8_bit_products_exactly(),
    )
