"""Weights in fewer bits: the file does what the fake-quantised network does, in the operators that were promised."""

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.export import export, integer_operators
from kd_lightning.export.sessions import openvino_core
from kd_lightning.models import CNN8, MLP32
from tests.export.networks import images, outputs, quantized, resnet, seeded

onnx, onnxruntime, openvino, _ = (
    pytest.importorskip(name, exc_type=ImportError) for name in ("onnx", "onnxruntime", "openvino", "onnxscript")
)
INPUTS, COLOURED = images(), images(32, 3, 32)
SUFFIX = {"onnx": ".onnx", "openvino": ".xml"}


def stored(path: Path) -> Counter[str]:
    """How many values of weights the file has of each type."""
    if path.suffix == ".onnx":
        weights = [x for x in onnx.load(path).graph.initializer if len(x.dims) > 1]
        sizes = [(onnx.TensorProto.DataType.Name(x.data_type).lower(), x.dims) for x in weights]
    else:
        constants = [op for op in openvino_core().read_model(path).get_ops() if op.get_type_name() == "Constant"]
        weights = [(op.get_element_type().get_type_name(), op.get_output_shape(0)) for op in constants]
        sizes = [("int" + kind[1:] if kind in ("i4", "i8") else kind, s) for kind, s in weights if len(s) > 1]
    total: Counter[str] = Counter()
    for kind, shape in sizes:
        total[kind] += int(torch.Size(shape).numel())
    return total


def metadata(path: Path) -> dict[str, str]:
    if path.suffix == ".onnx":
        return {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    said = openvino_core().read_model(path).get_rt_info()["kd_lightning"]
    return {key: value.value for key, value in said.items()}


def matrices(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters() if weight.ndim > 1)


@pytest.mark.parametrize(("format", "bits"), [("onnx", 8), ("onnx", 4), ("openvino", 8), ("openvino", 4)])
def test_a_prepared_network_is_stored_in_its_bits_and_gives_what_it_gave(tmp_path, format, bits) -> None:
    network = quantized(seeded(), INPUTS, weight_bits=bits, activation_bits=8 if bits == 8 else None)
    before = copy.deepcopy(network.state_dict())
    expected = network.eval()(INPUTS).detach()
    report = export(network, INPUTS, tmp_path / f"s{SUFFIX[format]}", format, f"int{bits}")
    assert stored(report.path)[f"int{bits}"] >= matrices(network)
    assert metadata(report.path)["processors"] == "any processor"
    assert json.loads(metadata(report.path)["weight_range"]) == ([-63, 63] if bits == 8 else [-7, 7])
    assert report.agreement >= 0.98
    for count in (1, 5):
        got = outputs(report.path, INPUTS[:count])
        assert (got - expected[:count]).norm() < (0.05 if bits == 8 else 1e-4) * expected[:count].norm()
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items() if isinstance(x, Tensor))


def test_every_convolution_and_product_of_an_int8_file_runs_on_integers(tmp_path) -> None:
    network = quantized(resnet(), COLOURED)
    layers = Counter(type(m).__name__ for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    found = integer_operators(export(network, COLOURED, tmp_path / "int8.onnx", precision="int8").path)
    assert found.integer["QLinearConv"] == layers["QuantizedConv2d"]
    assert sum(found.integer.values()) == sum(layers.values())
    assert found.floating == {}
    in_float = integer_operators(export(resnet(), COLOURED, tmp_path / "float32.onnx").path)
    assert in_float.integer == {}
    assert sum(in_float.floating.values()) == sum(layers.values())
    assert str(in_float) == "in integers: none; in floats: 9 Conv, 1 Gemm"


def test_dynamic_int8_takes_the_matrix_products(tmp_path) -> None:
    network = seeded(MLP32)
    report = export(network, INPUTS, tmp_path / "s.onnx", precision="int8_dynamic")
    assert stored(report.path) == {"int8": matrices(network)}
    assert metadata(report.path)["processors"] == "any processor"
    codes = [onnx.numpy_helper.to_array(x).astype(int) for x in onnx.load(report.path).graph.initializer]
    largest = max(abs(x).max() for x in codes if x.ndim > 1)
    assert 60 < largest <= json.loads(metadata(report.path)["weight_range"])[1] == 64
    assert sum(integer_operators(report.path).integer.values()) == 2
    expected = network(INPUTS).detach()
    assert (outputs(report.path, INPUTS[:3]) - expected[:3]).norm() < 0.05 * expected[:3].norm()


def test_dynamic_int8_of_convolutions_says_how_little_it_does(tmp_path) -> None:
    with pytest.warns(UserWarning, match="int8_dynamic leaves 58% of the weights in float32: prepare and calibrate it"):
        export(seeded(), INPUTS, tmp_path / "s.onnx", precision="int8_dynamic")


@pytest.mark.parametrize("make", [CNN8, MLP32])
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_weights_of_any_network_in_four_bits(tmp_path, format, make) -> None:
    if format == "openvino":
        pytest.importorskip("nncf", exc_type=ImportError)
    network = seeded(make).eval()
    report = export(network, INPUTS, tmp_path / f"s{SUFFIX[format]}", format, "int4", least_agreement=0.5)
    products = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))
    if format == "onnx":  # convolutions in 4 bits too; products in blocks, which are stored as bytes
        assert report.operators["MatMulNBits"] == sum(isinstance(m, nn.Linear) for m in network.modules())
        assert stored(report.path)["int4"] == matrices(network) - products
        assert stored(report.path)["float"] < matrices(network) / 16  # scales
    else:
        assert stored(report.path)["int4"] == products
    expected = network(INPUTS).detach()
    assert (outputs(report.path, INPUTS) - expected).norm() < 0.2 * expected.norm()


def test_a_quantiser_that_finds_nothing_is_an_error(tmp_path) -> None:
    for precision in ("int8_dynamic", "int4"):
        with pytest.raises(ValueError, match=f"Flatten has no weight that {precision} changes: expected .* Reshape"):
            export(nn.Flatten(), INPUTS, tmp_path / "s.onnx", precision=precision)
    assert not list(tmp_path.iterdir())


SILENT = """
import logging, pathlib, sys
from kd_lightning.export import export
from tests.export.networks import images, seeded

for name, format in (("s.onnx", "onnx"), ("s.xml", "openvino")):
    export(seeded(), images(), pathlib.Path(sys.argv[1], name), format, "int4", least_agreement=0.5)
assert not logging.getLogger().handlers
assert logging.getLogger().level == logging.WARNING
"""


def test_the_packages_that_quantise_stay_silent(tmp_path) -> None:
    """One of them sets up the root logger where nobody has yet, as pytest has: in a process of its own."""
    pytest.importorskip("nncf", exc_type=ImportError)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SILENT, tmp_path]
    done = subprocess.run(command, timeout=300, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
