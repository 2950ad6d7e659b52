"""What torch's exporter cannot do to the ONNX graph of an :func:`~kd_lightning.quantization.exportable` network."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir


def tidy(model: "ir.Model", weight_bits: int) -> None:
    """Change a graph in place.

    An activation function between a quantised value and its users goes, where it changes none of the values that the
    codes stand for: it would keep the layers around it from running in integers. Weights of four bits and less are
    stored in four. Stack traces go: they weigh as much as the weights of a small network.

    Args:
        model: ``torch.onnx.export(exportable(network), ..., dynamo=True).model``, of opset 21 at least for 4 bits.
        weight_bits: Of the :class:`~kd_lightning.quantization.QuantizationSpec`.
    """
    import onnx_ir as ir

    for node in list(model.graph):
        node.metadata_props.clear()
        before = node.inputs[0] if node.inputs else None
        source = before.producer() if before is not None else None
        if before is not None and source is not None and _changes_nothing(node, source):
            ir.convenience.replace_all_uses_with(node.outputs[0], before, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
    if weight_bits <= 4:
        for node in model.graph:
            if node.op_type == "DequantizeLinear":
                _pack(node)


def _changes_nothing(node: "ir.Node", source: "ir.Node") -> bool:
    if node.op_type not in ("Relu", "Clip") or source.op_type != "DequantizeLinear":
        return False
    scale, zero_point = _value(source.inputs[1]), _value(source.inputs[2])
    if scale is None or zero_point is None or zero_point.dtype != "uint8" or zero_point.size != 1 or zero_point.any():
        return False  # there are values below zero
    if node.op_type == "Relu":
        return True
    limits = [_value(x) if x is not None else None for x in (*node.inputs[1:], None, None)][:2]
    low = limits[0] is None or float(limits[0]) <= 0
    high = limits[1] is None or float(limits[1]) >= 255 * float(scale) * (1 - 1e-6)
    return low and high


def _pack(node: "ir.Node") -> None:
    import ml_dtypes
    import onnx_ir as ir

    for value in (node.inputs[0], node.inputs[2]):
        codes = _value(value)
        if value is not None and codes is not None and codes.dtype == "int8":  # a weight's; activations have uint8
            value.const_value = ir.tensor(codes.astype(ml_dtypes.int4), name=value.name)
            value.dtype = ir.DataType.INT4


def _value(value: "ir.Value | None") -> Any:
    return None if value is None or value.const_value is None else value.const_value.numpy()
