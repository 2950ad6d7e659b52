"""What a quantised network is: fake quantisation in place, for training or from data alone, and for export."""

from kd_lightning.quantization.exportable import exportable
from kd_lightning.quantization.onnx_graph import tidy
from kd_lightning.quantization.prepare import (
    LayerReport,
    Share,
    calibrate,
    check_ranges,
    is_prepared,
    prepare,
    quantized_layers,
    quantized_share,
    set_fake_quantization,
    set_observers,
    spec_of,
)
from kd_lightning.quantization.spec import QuantizationSpec
from kd_lightning.quantization.state import float_weights

__all__ = [
    "LayerReport",
    "QuantizationSpec",
    "Share",
    "calibrate",
    "check_ranges",
    "exportable",
    "float_weights",
    "is_prepared",
    "prepare",
    "quantized_layers",
    "quantized_share",
    "set_fake_quantization",
    "set_observers",
    "spec_of",
    "tidy",
]
