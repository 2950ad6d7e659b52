"""OpenVINO files: the ONNX graph, converted."""

from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from kd_lightning.export.formats import require
from kd_lightning.export.onnx_files import onnx_content
from kd_lightning.export.onnx_graph import quietly
from kd_lightning.quantization import is_prepared
from kd_lightning.tasks.batch import Batch


def openvino_contents(
    network: nn.Module, batch: Batch, precision: str, metadata: Mapping[str, str], name: str
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return the contents of ``name.xml`` and ``name.bin``, and the name of each layer's output in it."""
    import openvino

    compress = precision == "int4" and not is_prepared(network)
    if compress:
        require("int4 in openvino", ("nncf",), "openvino-int4")
    source = "float32" if compress or precision == "float16" else precision
    content, layers = onnx_content(network, batch, source, {})
    with TemporaryDirectory() as folder:
        path = Path(folder, name).with_suffix(".xml")
        path.with_suffix(".onnx").write_bytes(content)
        model = openvino.convert_model(path.with_suffix(".onnx"))
        if compress:
            model = _four_bit_products(model)
            kinds = Counter(op.get_element_type().get_type_name() for op in model.get_ops() if _is_weight(op))
            if not kinds["i4"]:
                raise ValueError(
                    f"{type(network).__name__} has no weight that int4 changes: expected matrix products, got weights "
                    f"of {dict(kinds)}; export it in float16"
                )
        for key, value in metadata.items():
            model.set_rt_info(value, ["kd_lightning", key])
        openvino.save_model(model, path, compress_to_fp16=precision == "float16")
        return {f.name: f.read_bytes() for f in (path.with_suffix(".bin"), path)}, layers


def _is_weight(op: object) -> bool:
    return op.get_type_name() == "Constant" and len(op.get_output_shape(0)) > 1  # type: ignore[attr-defined]


def _four_bit_products(model: Any) -> Any:
    """Return it with the weights of matrix products in 4 bits, and those of convolutions in 8.

    Also in 8 where the inputs are not a multiple of 16.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedCompressionParameters, GroupSizeFallbackMode

    with quietly("nncf"), redirect_stdout(StringIO()):
        return nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=32,
            all_layers=True,
            advanced_parameters=AdvancedCompressionParameters(
                group_size_fallback_mode=GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=16
            ),
        )
