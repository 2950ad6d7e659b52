"""What a network costs to serve: latency, throughput, size. Eager PyTorch on the CPU, as it was trained."""

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_lightning.processor import describe

_BATCH = 64


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one sample (median and 95th percentile), and samples a second in batches of 64.

    Attributes:
        processor: Instruction sets of the machine that measured.
    """

    p50_ms: float
    p95_ms: float
    throughput_per_s: float
    runtime: str = "PyTorch"
    processor: str = ""


def measure(networks: Mapping[str, nn.Module], example: Tensor, *, seconds: float = 2.5) -> dict[str, Latency]:
    """Time all networks side by side, so that whatever else the machine does hits each of them alike.

    One round times every network, the next begins with another one; half of `seconds` goes to batches of 1 and half
    to batches of 64. Each network gets at least one round, so large ones may take longer than `seconds`, and their p95
    is then of few calls. PyTorch's number of threads is left as it is. Training flags come back as they were.

    Shape: example (1, ...), one sample as the networks take it.

    Raises:
        ValueError: the example is not one sample, or something is not on the CPU.
    """
    if example.ndim < 1 or example.shape[0] != 1:
        raise ValueError(f"example has shape {tuple(example.shape)}, expected one sample (1, ...): pass batch[:1]")
    tensors = {"the example": example}
    for name, network in networks.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in network.state_dict(keep_vars=True).items()}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}, latency is measured on the CPU: call .cpu() before")

    training = [(module, module.training) for network in networks.values() for module in network.modules()]
    try:
        for network in networks.values():
            network.eval()
        with torch.inference_mode():
            single = times_s(networks, example, calls=5, seconds=seconds / 2)
            batch = times_s(networks, batch_of(example), calls=1, seconds=seconds / 2)
    finally:
        for module, flag in training:
            module.training = flag
    return figures(single, batch, "PyTorch")


def size_mb(network: nn.Module) -> float:
    """Megabytes (10^6 bytes) of the state dict as `torch.save` stores it on disk."""
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.getbuffer().nbytes / 1e6


def parameters(network: nn.Module) -> int:
    """Number of parameters, trained or frozen; tied ones count once."""
    return sum(parameter.numel() for parameter in network.parameters())


def batch_of(example: Tensor) -> Tensor:
    """Repeat a sample 64 times."""
    return example.repeat(_BATCH, *[1] * (example.ndim - 1))


def figures(single: Mapping[str, list[float]], batch: Mapping[str, list[float]], runtime: str) -> dict[str, Latency]:
    """Sum up the seconds of calls with one sample, and with 64."""
    processor = describe()
    return {
        name: Latency(
            p50_ms=1000 * float(np.percentile(single[name], 50)),
            p95_ms=1000 * float(np.percentile(single[name], 95)),
            throughput_per_s=_BATCH / float(np.median(batch[name])),
            runtime=runtime,
            processor=processor,
        )
        for name in single
    }


def times_s(
    networks: Mapping[str, Callable[[Any], Any]], batch: Any, *, calls: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each timed call, by network."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    order = list(networks)
    end = time.perf_counter() + seconds
    warming_up = True  # the first round is not kept: allocator, threads and kernel choice settle in it
    while order and (warming_up or not times[order[0]] or time.perf_counter() < end):
        for name in order:
            network = networks[name]
            network(batch)  # not timed: it brings back the weights that the other networks drove from the cache
            for _ in range(calls):
                start = time.perf_counter()
                network(batch)
                if not warming_up:
                    times[name].append(time.perf_counter() - start)
        warming_up = False
        order = order[1:] + order[:1]
    return times
