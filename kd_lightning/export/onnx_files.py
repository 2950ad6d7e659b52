"""ONNX files, in each precision."""

import copy
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from kd_lightning.export.onnx_graph import clear, layers_of, quietly, to_onnx
from kd_lightning.quantization import QuantizationSpec, exportable, is_prepared, prepare, spec_of, tidy
from kd_lightning.quantization.prepare import placement_of
from kd_lightning.tasks.batch import Batch

_MOST_BYTES = 2**31
"""That one ONNX file can hold."""
_BLOCK = 32
"""Weights that share a scale, in a product with 4-bit weights."""


def onnx_content(
    network: nn.Module, batch: Batch, precision: str, metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, str]]:
    """Return the file of a network in eval mode, and the name of each layer's output in it."""
    dtype = torch.float16 if precision == "float16" else None
    size = sum(x.numel() for x in network.parameters()) * (2 if dtype else 4)
    if size >= _MOST_BYTES:
        raise ValueError(
            f"{type(network).__name__} has weights of {size / 1e9:.1f} GB, expected less than {_MOST_BYTES / 1e9:.1f}, "
            "which an ONNX graph holds: take format='torch_export' or 'state_dict', or float16"
        )
    convolutions = [m for m in network.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    if precision == "int4" and not is_prepared(network) and convolutions:
        linear = tuple(name for name, m in network.named_modules() if isinstance(m, nn.Linear))
        network = prepare(copy.deepcopy(network), QuantizationSpec(4, None, observer="mse", skip=linear))
        # Products get 4 bits below, with a scale for a few values each, which is more exact than one a channel.
    if is_prepared(network):
        module, folds = exportable(network), placement_of(network).folds
    else:
        module, folds = copy.deepcopy(network).to(dtype), {}
    model = to_onnx(module, batch, dtype=dtype)
    layers = {folds.get(layer, layer): value for layer, value in layers_of(model).items()}
    if is_prepared(network):
        tidy(model, spec_of(network).weight_bits)
    clear(model)
    model.metadata_props.update(metadata)
    content = _proto(model)
    if precision == "int8_dynamic":
        content = _dynamic(content)
    if precision == "int4":
        content = _four_bit_products(content)
    present = {name for node in content.graph.node for name in node.output}
    _check_quantized(network, content, precision)
    return content.SerializeToString(), {layer: value for layer, value in layers.items() if value in present}


def _check_quantized(network: nn.Module, model: Any, precision: str) -> None:
    """Raise ValueError where a quantiser has left everything as it was, warn where it has left the most of it."""
    from onnx import TensorProto

    kinds = {"int8": TensorProto.INT8, "int4": TensorProto.INT4, "int8_dynamic": TensorProto.INT8}
    if precision not in kinds:
        return
    weights = [x for x in model.graph.initializer if len(x.dims) > 1]
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    remedy = "prepare and calibrate it, and take int8" if precision == "int8_dynamic" else "take float16"
    if not products and not any(x.data_type == kinds[precision] for x in weights):
        found = sorted({node.op_type for node in model.graph.node})
        layers = "matrix products" if precision == "int8_dynamic" else "convolutions or matrix products"
        raise ValueError(
            f"{type(network).__name__} has no weight that {precision} changes: expected {layers} with constant "
            f"weights, got the operators {', '.join(found)}; {remedy}"
        )
    scales = {node.input[2] for node in products}
    left = sum(math.prod(x.dims) for x in weights if x.data_type == TensorProto.FLOAT and x.name not in scales)
    total = sum(x.numel() for _, x in network.named_parameters(remove_duplicate=False) if x.ndim > 1)
    if left > total / 2:
        rank_zero_warn(f"{precision} leaves {left / total:.0%} of the weights in float32: {remedy}")


def _proto(model: Any) -> Any:
    import onnx_ir as ir

    return ir.to_proto(model)


def _dynamic(model: Any) -> Any:
    """Store the weights of matrix products in int8; activations are quantised batch by batch, when it runs."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        with quietly(""):
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                reduce_range=True,  # weights of 7 bits, so that sums are exact on every processor
            )
        return onnx.load(path)


def _four_bit_products(model: Any) -> Any:
    """Store the weights of matrix products in 4 bits."""
    from onnxruntime.quantization.onnx_model import ONNXModel

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    finally:  # the import calls logging.basicConfig, and everybody's lines would be printed from then on
        root.handlers[:] = handlers
        root.setLevel(level)

    wrapped = ONNXModel(model)
    wrapped.replace_gemm_with_matmul()  # the quantiser passes over Gemm without a word
    quantizer = MatMulNBitsQuantizer(wrapped.model, block_size=_BLOCK, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    return quantizer.model.model
