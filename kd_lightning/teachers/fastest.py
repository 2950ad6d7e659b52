"""Find the fastest way to run a network on this machine."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from kd_lightning.first_batches import untouched_rng
from kd_lightning.outputs import Outputs, classes_last
from kd_lightning.tasks.batch import Batch
from kd_lightning.teachers.accelerate import Way, candidates, device_of, run_in, set_memory_format

MAX_KL = 1e-4
"""Nats at temperature 1, the mean of a batch: by how much the probabilities may differ from those of the plain way."""
MAX_ERROR = 0.02
"""Relative, root mean square: by how much logits and features may differ. bfloat16 has some 0.5 % in a ResNet-32."""
_WORTH_IT = 0.95  # of the plain time: a smaller gain is within the noise
_ROUNDS, _SECONDS = 3, 1.0
_ROWS = 1024


def fastest(network: nn.Module, batch: Batch, layers: Sequence[str] = ()) -> Way:
    """Time the ways on a batch, log the result, and return the fastest of those whose outputs are equal.

    Each way runs once to warm up and be compared, then up to three times; not again once a second is over. The random
    number generators and the network are left as they were.
    """
    device, plain = device_of(network, batch), Way()
    times, notes = {plain: math.inf}, {plain: ""}
    with untouched_rng(), _weights_in_both_formats(network) as take_format:
        expected = run_in(plain, network, batch, layers)
        for way in candidates(network, device):
            take_format(way.channels_last)
            try:
                kl, error = differences(expected, run_in(way, network, batch, layers))
            except (RuntimeError, TypeError) as failure:
                notes[way] = f"fails: {str(failure).splitlines()[0]}"
                continue
            equal = kl <= MAX_KL and error <= MAX_ERROR
            notes[way] = f"{'' if equal else 'differs: '}KL {kl:.1e}, error {error:.1e}"
            if equal:
                times[way] = math.inf
        for _ in _rounds():
            for way in times:
                take_format(way.channels_last)
                begun = _now(device)
                run_in(way, network, batch, layers)
                times[way] = min(times[way], _now(device) - begun)
    best = min(times, key=times.__getitem__)
    if times[best] > _WORTH_IT * times[plain]:
        best = plain
    _log(best, times, notes, layers)
    return best


def differences(expected: Outputs, outputs: Outputs) -> tuple[float, float]:
    """Return the mean KL divergence of the probabilities in nats, and the largest relative error of logits or features.

    Both are infinite where something is not finite.
    """
    p, q = (_some_rows(x.logits).double().log_softmax(-1) for x in (expected, outputs))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    pairs = [(expected.logits, outputs.logits), *((x, outputs.features[n]) for n, x in expected.features.items())]
    error = max(((b - a).norm() / a.norm().clamp_min(1e-30)).item() for a, b in pairs)
    return (kl, error) if math.isfinite(kl + error) else (math.inf, math.inf)


def _some_rows(logits: Tensor) -> Tensor:
    """Of a language model's or of dense logits not all, which would be a copy of gigabytes."""
    rows = classes_last(logits).flatten(0, -2)
    return rows[:: max(1, len(rows) // _ROWS)]


@contextmanager
def _weights_in_both_formats(network: nn.Module) -> Iterator["_TakeFormat"]:
    take_format = _TakeFormat(network)
    try:
        yield take_format
    finally:
        take_format(False)


class _TakeFormat:
    def __init__(self, network: nn.Module) -> None:
        self.weights = [weight for weight in (*network.parameters(), *network.buffers()) if weight.ndim == 4]
        self.plain = [weight.data for weight in self.weights]
        set_memory_format(network, channels_last=True)
        self.channels_last = [weight.data for weight in self.weights]
        self(False)

    def __call__(self, channels_last: bool) -> None:
        for weight, data in zip(self.weights, self.channels_last if channels_last else self.plain, strict=True):
            weight.data = data


def _rounds() -> Iterator[None]:
    ends = time.perf_counter() + _SECONDS
    for done in range(_ROUNDS):
        if done and time.perf_counter() > ends:
            return
        yield


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def _log(best: Way, times: dict[Way, float], notes: dict[Way, str], layers: Sequence[str]) -> None:
    if len(notes) == 1:
        rank_zero_info("teacher: accelerate='auto' runs it as it is, this machine has nothing that may be faster")
        return

    def about(way: Way) -> str:
        took = f"{1e3 * times[way]:.3g} ms" if way in times else ""
        return f"{way} ({', '.join(filter(None, (took, notes[way])))})"

    where = f", layers {', '.join(layers)}," if layers else ""
    others = ", ".join(about(way) for way in notes if way != best)
    rank_zero_info(f"teacher{where}: accelerate='auto' picked {about(best)} for this batch; left {others}")
