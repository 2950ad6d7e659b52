import copy
from collections import Counter

import pytest
import torch
from torch import nn

from kd_lightning.export.sessions import openvino_core
from kd_lightning.models import CNN8, CNN64, resnet8x4
from kd_lightning.processor import adds_8_bit_products_exactly
from kd_lightning.quantization import QuantizationSpec, calibrate, exportable, prepare, tidy
from tests.quantization.networks import FunctionalResidual, PreActivation, Transformer, Untraceable, settled
from tests.quantization.test_prepare import batches, images

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FLOAT = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "NhwcFusedConv", "ConvTranspose"}
INTEGER = {"QLinearConv", "QGemm", "MatMulIntegerToFloat", "QLinearMatMul"}


def write(network, x, path, bits=8):
    module = exportable(network)
    shapes = ({0: "batch"},)
    program = torch.onnx.export(module, (x[:2],), dynamo=True, dynamic_shapes=shapes, opset_version=21, verbose=False)
    tidy(program.model, bits)
    program.save(path, external_data=False)


def serve(path, x, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    graph = onnx.load(options.optimized_model_filepath).graph
    return torch.from_numpy(y), Counter(node.op_type for node in graph.node)


def convolution(kind, norm, **options):
    return nn.Sequential(kind(3, 8, 3, **options), norm(8), nn.ReLU(), nn.Flatten(1), nn.LazyLinear(5))


NETWORKS = {
    "cnn8": (CNN8, (1, 28, 28), 4),
    "cnn64": (CNN64, (1, 28, 28), 6),
    "resnet8x4": (resnet8x4, (3, 32, 32), 11),
    "functional residual": (FunctionalResidual, (3, 16, 16), 6),
    "pre-activation": (PreActivation, (3, 16, 16), 4),
    "untraceable": (Untraceable, (12,), 2),
    "transformer": (Transformer, (5, 8), 4),
    "conv1d": (lambda: convolution(nn.Conv1d, nn.BatchNorm1d), (3, 16), 2),
    "no batch norm": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten()), (3, 8, 8), 2),
    "linear with batch norm": (
        lambda: nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)),
        (12,),
        2,
    ),
    "linear on tokens": (lambda: nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 4)), (5, 6), 2),
}


def calibrated(make, shape, spec=None):
    torch.manual_seed(0)
    x = images(*shape, count=64)
    network = make()
    network(x)  # lazy layers
    network = settled(network)
    return calibrate(prepare(network, spec), batches(x)), x


@pytest.mark.parametrize("name", NETWORKS)
def test_all_layers_run_in_integers_and_give_what_the_fake_quantised_network_gives(name, tmp_path):
    make, shape, layers = NETWORKS[name]
    network, x = calibrated(make, shape)
    expected = network(x).detach()
    write(network, x, tmp_path / "int8.onnx")
    y, operators = serve(tmp_path / "int8.onnx", x, tmp_path)
    assert sum(count for kind, count in operators.items() if kind in INTEGER) == layers, operators
    assert name == "transformer" or not FLOAT & operators.keys(), operators  # attention is reported to stay in float
    # A value between two codes may fall to either: where sums differ in the last place.
    assert (y - expected).norm() / expected.norm() < 0.02
    assert (y.argmax(-1) == expected.argmax(-1)).float().mean() > 0.96
    assert torch.equal(network(x), expected)  # it stays as it was


@pytest.mark.parametrize(
    ("name", "make", "shape"),
    [
        ("conv3d", lambda: convolution(nn.Conv3d, nn.BatchNorm3d), (3, 6, 6, 6)),
        ("transposed", lambda: convolution(nn.ConvTranspose2d, nn.BatchNorm2d, stride=2), (3, 6, 6)),
        (
            "transposed groups",
            lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)),
            (4, 6, 6),
        ),
    ],
)
def test_what_the_runtime_has_no_integers_for_is_right_in_float(name, make, shape, tmp_path):
    network, x = calibrated(make, shape)
    expected = network(x).detach()
    write(network, x, tmp_path / "int8.onnx")
    y, _ = serve(tmp_path / "int8.onnx", x, tmp_path)
    assert (y - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("per_channel", [True, False])
def test_batch_norm_folds_exactly(per_channel, tmp_path):
    """Negative factors included: weights alone are quantised, so that nothing else rounds."""
    network, x = calibrated(CNN8, (1, 28, 28), QuantizationSpec(activation_bits=None, per_channel=per_channel))
    assert any((module.weight < 0).any() for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    write(network, x, tmp_path / "weights.onnx")
    y, _ = serve(tmp_path / "weights.onnx", x, tmp_path)
    torch.testing.assert_close(y, network(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        QuantizationSpec(),
        pytest.param(
            QuantizationSpec(target="vnni"),
            marks=pytest.mark.skipif(not adds_8_bit_products_exactly(), reason="8 bits overflow on this processor"),
        ),
        QuantizationSpec(symmetric=True),
        QuantizationSpec(per_channel=False, observer="mse"),
        QuantizationSpec(weight_bits=3, learned_scales=True),
        QuantizationSpec(skip=("first", "last")),
    ],
    ids=str,
)
def test_every_spec_is_served_as_it_was_trained(spec, tmp_path):
    network, x = calibrated(CNN8, (1, 28, 28), spec)
    expected = network(x).detach()
    write(network, x, tmp_path / "int8.onnx", spec.weight_bits)
    y, _ = serve(tmp_path / "int8.onnx", x, tmp_path)
    assert (y - expected).norm() / expected.norm() < 0.02


def test_four_bits_take_four_bits(tmp_path):
    sizes = {}
    for bits in (8, 4):
        network, x = calibrated(
            lambda: nn.Sequential(nn.Conv2d(1, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, 256)),
            (1, 8, 8),
            QuantizationSpec(weight_bits=bits, activation_bits=None),
        )
        write(network, x, tmp_path / f"{bits}.onnx", bits)
        y, _ = serve(tmp_path / f"{bits}.onnx", x, tmp_path)
        expected = network(x).detach()
        assert (y - expected).norm() / expected.norm() < 0.02
        sizes[bits] = (tmp_path / f"{bits}.onnx").stat().st_size
    assert sizes[4] < 0.52 * sizes[8]


def test_openvino_serves_the_same_file(tmp_path):
    pytest.importorskip("openvino")
    network, x = calibrated(FunctionalResidual, (3, 16, 16))
    write(network, x, tmp_path / "int8.onnx")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    y = torch.from_numpy(openvino_core().compile_model(str(tmp_path / "int8.onnx"), "CPU", options)(x.numpy())[0])
    expected = network(x).detach()
    assert (y - expected).norm() / expected.norm() < 0.02


def test_hooks_and_copies_are_not_needed_twice():
    network, _ = calibrated(CNN8, (1, 28, 28))
    copied = copy.deepcopy(network)
    exportable(network)
    assert network.state_dict().keys() == copied.state_dict().keys()


def test_what_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match="expected a prepared network, got one in float"):
        exportable(CNN8())
    with pytest.raises(ValueError, match=r"4 ranges have seen no data \(block1.0.input_quantizer, .*calibrate"):
        exportable(prepare(CNN8()))
    network, _ = calibrated(CNN8, (1, 28, 28), QuantizationSpec(activation_bits=4))
    with pytest.raises(ValueError, match="expected activations of 8 bits in a file, got 4"):
        exportable(network)
