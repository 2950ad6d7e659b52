"""Files in ONNX Runtime and OpenVINO: what comes out. Timings themselves are not asserted."""

from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from kd_lightning.pipeline import runtimes
from kd_lightning.pipeline.runtimes import measure_files, predictions

WEIGHT = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def write(path, nodes, **tensors):
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 6])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "linear", [image], [logits], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.fixture
def in_float(tmp_path):
    return write(tmp_path / "float.onnx", [helper.make_node("MatMul", ["image", "w"], ["logits"])], w=WEIGHT)


@pytest.fixture
def in_int8(tmp_path):
    """The same in integers, its inputs in steps of 1/16."""
    scale = np.abs(WEIGHT).max(0) / 127
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"]),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["logits"]),
    ]
    return write(
        tmp_path / "int8.onnx",
        nodes,
        s=np.float32(1 / 16),
        z=np.uint8(128),
        wq=np.round(WEIGHT / scale).astype(np.int8),
        ws=scale.astype(np.float32),
        wz=np.zeros(4, np.int8),
    )


def test_predictions_are_those_of_the_files_matrix(in_float, in_int8):
    images = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    expected = (images.numpy() @ WEIGHT).argmax(-1)
    assert np.array_equal(predictions(in_float, images.split(20)), expected)
    assert (predictions(in_int8, images.split(20)) == expected).mean() > 0.9


def test_every_file_has_figures_in_every_runtime_that_is_there(in_float, in_int8, monkeypatch):
    example = torch.zeros(1, 6)
    measured = measure_files({"float": in_float, "int8": in_int8}, example, seconds=0.1)
    assert set(measured) == {name for name in ("onnxruntime", "openvino") if find_spec(name)}
    for figures in measured.values():
        assert list(figures) == ["float", "int8"]
        assert all(0 < f.p50_ms <= f.p95_ms and f.throughput_per_s > 0 for f in figures.values())
    assert measured["onnxruntime"]["int8"].runtime == "ONNX Runtime"
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == "openvino" else find_spec(name))
    assert set(measure_files({"float": in_float}, example, seconds=0.0)) == {"onnxruntime"}
