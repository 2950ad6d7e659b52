"""What ONNX Runtime computes in integers."""

from collections import Counter
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from kd_lightning.export.formats import require
from kd_lightning.export.sessions import leave_to_this_process

_INTEGER = frozenset(
    {
        *("QLinearConv", "ConvInteger", "QLinearConvTranspose", "QGemm", "QLinearMatMul", "MatMulInteger"),
        *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention", "DynamicQuantizeLSTM"),
    }
)
_FLOAT = frozenset(
    {
        *("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits"),
        *("Attention", "MultiHeadAttention", "LSTM", "GRU", "RNN", "Einsum"),
    }
)


class IntegerOperators(NamedTuple):
    """Convolutions and matrix products, and how many of each, by the operator that computes them.

    Attributes:
        integer: On integers.
        floating: On floats, 4-bit weights (``MatMulNBits``) included.
    """

    integer: Mapping[str, int]
    floating: Mapping[str, int]

    def __str__(self) -> str:
        integer, floating = (
            ", ".join(f"{n} {name}" for name, n in x.items()) or "none" for x in (self.integer, self.floating)
        )
        return f"in integers: {integer}; in floats: {floating}"


def integer_operators(path: str | PathLike[str]) -> IntegerOperators:
    """Count the operators of the graph that ONNX Runtime makes of a file on this machine, after its optimisations.

    Raises:
        ImportError: Without the packages.
    """
    require("integer_operators", ("onnx", "onnxruntime"), "onnx")
    import onnx
    import onnxruntime

    leave_to_this_process()
    with TemporaryDirectory() as folder:
        settings = onnxruntime.SessionOptions()
        settings.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        settings.log_severity_level = 3  # it warns that such a file is for this machine alone
        onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        found = Counter(node.op_type for node in onnx.load(settings.optimized_model_filepath).graph.node)
    integer = {name: count for name, count in sorted(found.items()) if name in _INTEGER}
    return IntegerOperators(integer, {name: count for name, count in sorted(found.items()) if name in _FLOAT})
