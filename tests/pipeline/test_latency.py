"""What is timed, in what state the networks come back, and the sizes. Timings themselves are not asserted."""

import math
import time

import pytest
import torch
from torch import nn

from kd_lightning.pipeline.latency import measure, parameters, size_mb


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
        assert 0 < figures.p50_ms <= figures.p95_ms
        assert math.isfinite(figures.throughput_per_s)
        assert figures.throughput_per_s > 0
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
    assert figures.p50_ms >= 10  # a sleep is never shorter
    assert figures.throughput_per_s <= 64 / 0.01
    assert figures.throughput_per_s > 640  # 64 samples are one call, even if a sleep takes ten times as long


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
    assert all(f.p50_ms >= 20 for f in figures.values())


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
