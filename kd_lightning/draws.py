"""Classes and tokens drawn from a network's distribution, the same in whatever batch they come."""

import torch
from torch import Tensor

_PLACES = 2**20


def hashed_uniform(seed: int, ids: Tensor, places: int) -> Tensor:
    """Return a number in [0, 1) for each place of each sample, a function of (seed, id, place): (B, places).

    The same in whatever batch, epoch, process and device: a counter-based generator, the finaliser of MurmurHash3's
    64-bit variant in two rounds.
    """
    counter = ids[:, None].long() * _PLACES + torch.arange(places, device=ids.device)
    x = counter + (seed + 1) * 0x1E3779B97F4A7C15
    for _ in range(2):
        x = (x ^ _shifted(x, 33)) * -0x00AE502812AA7333
        x = (x ^ _shifted(x, 33)) * -0x3B314601E57A13AD
        x = x ^ _shifted(x, 33)
    return _shifted(x, 40).to(torch.float32) / 2**24


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right as if int64 had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return the first class whose cumulated probability exceeds a number in [0, 1): logits (n, C), uniform (n,).

    To (n,) int64.
    """
    cumulated = torch.softmax(logits.float(), -1).cumsum(-1)
    last = cumulated[:, -1:]  # 1 but for rounding
    return (
        torch.searchsorted(cumulated, uniform[:, None].to(cumulated) * last, right=True)
        .squeeze(1)
        .clamp_max(logits.shape[-1] - 1)
    )
