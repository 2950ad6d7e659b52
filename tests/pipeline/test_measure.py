"""What is timed, in what state networks come back, the sizes, and what files answer. Timings are not asserted."""

import math
import time
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from kd_lightning.export import export
from kd_lightning.export.batches import part
from kd_lightning.pipeline import measure as module
from kd_lightning.pipeline.measure import OpenFile, measure, measure_files, parameters, size_mb
from kd_lightning.records import FIGURES
from kd_lightning.tasks import Batch

LATENCIES = ("latency_ms_p50", "latency_ms_p95", "throughput_per_s")
WEIGHT = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


class Recorder(nn.Module):
    """Notes the batch size and the state under which it is called."""

    def __init__(self, name, calls):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.dropout = nn.Dropout(0.5)
        self.name, self.calls = name, calls

    def forward(self, x):
        self.calls.append((self.name, tuple(x.shape), self.dropout.training, torch.is_inference_mode_enabled()))
        return self.dropout(self.layer(x))


def test_every_network_is_timed_in_turn_at_batch_1_and_64_in_evaluation_mode():
    calls = []
    networks = {name: Recorder(name, calls) for name in "abc"}
    latency = measure(networks, torch.randn(1, 4), seconds=0.2)
    assert list(latency) == ["a", "b", "c"]
    for figures in latency.values():
        assert 0 < figures["latency_ms_p50"] <= figures["latency_ms_p95"]
        assert math.isfinite(figures["throughput_per_s"])
        assert figures["throughput_per_s"] > 0
    assert {shape for _, shape, _, _ in calls} == {(1, 4), (64, 4)}
    assert not any(training for _, _, training, _ in calls)
    assert all(inference for *_, inference in calls)
    turns = [name for i, (name, *_) in enumerate(calls) if i == 0 or calls[i - 1][0] != name]
    counts = [turns.count(name) for name in "abc"]
    assert max(counts) - min(counts) <= 2  # where batches of 1 end and of 64 begin, two turns of one may touch
    assert min(counts) > 3


def test_the_order_changes_from_round_to_round():
    calls = []
    measure({name: Recorder(name, calls) for name in "abc"}, torch.randn(1, 4), seconds=0.1)
    rounds = [tuple(name for name, *_ in calls[i : i + 18 : 6]) for i in range(0, 18 * 3, 18)]
    assert rounds == [("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")]


def test_units_are_milliseconds_and_samples_a_second():
    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.01)
            return x

    figures = measure({"slow": Slow()}, torch.zeros(1, 2), seconds=0.2)["slow"]
    assert figures["latency_ms_p50"] >= 10  # a sleep is never shorter
    assert figures["throughput_per_s"] <= 64 / 0.01
    assert figures["throughput_per_s"] > 640  # 64 samples are one call, even if a sleep takes ten times as long


def test_training_flags_come_back_one_by_one_even_after_an_error():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    network[1].eval()  # frozen batch norm in a network that trains
    before = network[1].running_mean.clone()
    measure({"network": network}, torch.randn(1, 4), seconds=0.02)
    assert (network.training, network[0].training, network[1].training) == (True, True, False)
    assert torch.equal(network[1].running_mean, before)
    with pytest.raises(RuntimeError):
        measure({"network": network}, torch.randn(1, 5), seconds=0.02)
    assert (network.training, network[0].training, network[1].training) == (True, True, False)


def test_threads_are_left_as_they_are():
    before = torch.get_num_threads()
    measure({"network": nn.Linear(4, 2)}, torch.randn(1, 4), seconds=0.02)
    assert torch.get_num_threads() == before


def test_a_slow_network_gets_at_least_one_round():
    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.02)
            return x

    figures = measure({"one": Slow(), "two": Slow()}, torch.zeros(1, 2), seconds=0.0)
    assert all(f["latency_ms_p50"] >= 20 for f in figures.values())


def test_no_networks_no_figures():
    assert measure({}, torch.zeros(1, 2)) == {}


def test_wrong_examples_and_devices_are_refused():
    with pytest.raises(ValueError, match=r"shape \(8, 4\), expected one sample \(1, ...\): pass batch\[:1\]"):
        measure({"network": nn.Linear(4, 2)}, torch.zeros(8, 4))
    with pytest.raises(ValueError, match=r"student.weight is on meta, latency is measured on the CPU: call .cpu\(\)"):
        measure({"student": nn.Linear(4, 2, device="meta")}, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="the example is on meta"):
        measure({"student": nn.Linear(4, 2)}, torch.zeros(1, 4, device="meta"))


def test_size_is_that_of_the_file_in_megabytes_and_parameters_are_counted_once(tmp_path):
    network = nn.Sequential(nn.Linear(500, 500, bias=False), nn.Linear(500, 500, bias=False))
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    assert size_mb(network) == pytest.approx((tmp_path / "weights.pt").stat().st_size / 1e6, rel=0.01)
    assert size_mb(network) == pytest.approx(2.0, rel=0.02)
    assert parameters(network) == 500_000
    network[1].weight = network[0].weight
    assert parameters(network) == 250_000
    assert size_mb(network) == pytest.approx(1.0, rel=0.02)  # tied weights are stored once
    network[0].weight.requires_grad_(False)
    assert parameters(network) == 250_000


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


def predictions(path, batches):
    file = OpenFile(path)
    return torch.cat([file(Batch((batch,), {}, None)).best() for batch in batches]).numpy()


def test_predictions_are_those_of_the_files_matrix(in_float, in_int8):
    images = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    expected = (images.numpy() @ WEIGHT).argmax(-1)
    assert np.array_equal(predictions(in_float, images.split(20)), expected)
    assert (predictions(in_int8, images.split(20)) == expected).mean() > 0.9


class Two(nn.Module):
    """Takes two inputs by name, and one that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, numbers, mask, positions=None):
        return self.layer(numbers * mask)


def test_inputs_by_name_are_timed_and_answered_as_networks_and_as_files(tmp_path):
    """In whatever order a batch has them; one that the network does not use may be missing in the file."""
    network = Two().eval()
    numbers, mask = torch.randn(6, 4), torch.randint(2, (6, 4))
    export(network, {"numbers": numbers, "mask": mask}, tmp_path / "two.onnx", least_agreement=0)
    batch = Batch((), {"mask": mask, "positions": torch.arange(6)[:, None], "numbers": numbers}, None)
    outputs = OpenFile(tmp_path / "two.onnx")(batch)
    torch.testing.assert_close(outputs.logits, network(numbers, mask).detach(), rtol=1e-4, atol=1e-5)
    one = part(batch, slice(1))
    for figures in (measure({"two": network}, one, seconds=0.02), measure_files({"two": tmp_path / "two.onnx"}, one)):
        assert figures["two"]["latency_ms_p50"] > 0


def test_every_file_has_figures_in_every_runtime_that_is_there(in_float, in_int8, monkeypatch):
    example = torch.zeros(1, 6)
    measured = measure_files({"float": in_float, "int8": in_int8}, example, seconds=0.1)
    assert list(measured) == ["float", "int8"]
    prefixes = ["", *(["openvino_"] if find_spec("openvino") else [])]
    names = {f"{prefix}{name}" for prefix in prefixes for name in LATENCIES}
    for figures, file in zip(measured.values(), (in_float, in_int8), strict=True):
        assert figures.keys() == {"file_mb", *names}
        assert figures["file_mb"] == file.stat().st_size / 1e6
        for prefix in prefixes:
            p50, p95, throughput = (figures[f"{prefix}{name}"] for name in LATENCIES)
            assert 0 < p50 <= p95
            assert throughput > 0
    assert names | {"file_mb"} <= {figure.key for figure in FIGURES}
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "openvino" else find_spec(name))
    assert set(measure_files({"float": in_float}, example, seconds=0.0)["float"]) == {"file_mb", *LATENCIES}
