"""How a teacher's logits are written: two bytes a class, one byte a class, or the best classes alone."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[Any]
_F2, _F4 = np.dtype("<f2"), np.dtype("<f4")
TEMPERATURES = (1.0, 4.0)
"""At which the error of a format is measured."""


class Format(ABC):
    """Rows of logits to rows of numbers, and back.

    Shape: logits (..., C) of float32; rows (..., :meth:`width`) of :attr:`dtype`.
    """

    dtype: np.dtype[Any]

    @abstractmethod
    def width(self, classes: int) -> int: ...

    @abstractmethod
    def encode(self, logits: Tensor) -> Rows: ...

    @abstractmethod
    def decode(self, rows: Rows, classes: int) -> dict[str, Tensor]:
        """Return what a batch brings along: ``logits``, or ``indices`` and ``log_probs`` of the best classes."""

    def dense(self, rows: Rows, classes: int) -> Tensor:
        """Return logits of all classes, whose softmax is what the rows say."""
        return self.decode(rows, classes)["logits"].float()


class Float16(Format):
    """Two bytes a class."""

    dtype = np.dtype("<f2")

    def width(self, classes: int) -> int:
        return classes

    def encode(self, logits: Tensor) -> Rows:
        largest = float(logits.abs().max())
        if largest > 65504:
            raise ValueError(f"float16 holds numbers up to 65,504, got a teacher's {largest:.0f}: take format='uint8'")
        return logits.half().numpy()

    def decode(self, rows: Rows, classes: int) -> dict[str, Tensor]:
        return {"logits": torch.from_numpy(rows)}


class Uint8(Format):
    """One byte a class, in levels that lie closer the nearer they are to a row's highest logit, where the softmax is.

    logit = highest − (scale · code)². Behind the codes, at a multiple of four bytes, come highest and scale as float32.
    The KL divergence is half the rounding error's variance under the softmax p: at temperature 1 on average
    R · E_p[highest − logit] / (6 · 255²), at most R · H(p) / 390,150 nats, R being highest − lowest logit and H the
    entropy.
    """

    dtype = np.dtype("u1")

    def width(self, classes: int) -> int:
        return -(-classes // 4) * 4 + 8

    def encode(self, logits: Tensor) -> Rows:
        highest = logits.amax(-1, keepdim=True)
        scale = (highest - logits.amin(-1, keepdim=True)).sqrt() / 255
        squares = (highest - logits) / scale.square().clamp(min=torch.finfo(torch.float32).tiny)
        # Half way from level k² to (k + 1)² is (k + 1/2)² + 1/4.
        codes = squares.sub_(0.25).clamp_(min=0).sqrt_().round_().clamp_(max=255).byte()
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 4))
        return np.concatenate([codes.numpy(), _as_bytes(highest), _as_bytes(scale)], -1)

    def decode(self, rows: Rows, classes: int) -> dict[str, Tensor]:
        ends = rows.view(_F4)
        highest, scale = torch.from_numpy(ends[..., -2:-1]), torch.from_numpy(ends[..., -1:])
        # In place and of one type: mixed types take three times as long, and so does a table of 256 levels.
        roots = torch.from_numpy(rows[..., :classes].astype(np.float32)).mul_(scale)
        return {"logits": torch.addcmul(highest, roots, roots, value=-1, out=roots)}


@dataclass(frozen=True)
class Best(Format):
    """The k best classes: indices, log-probabilities as float16, and the tail mass as float32, which scales them."""

    k: int
    dtype = np.dtype("u1")

    def width(self, classes: int) -> int:
        if not 1 <= self.k < classes:
            raise ValueError(f"expected top1 to top{classes - 1} for {classes} classes, got top{self.k}")
        return self.k * (_index(classes).itemsize + 2) + 4

    def encode(self, logits: Tensor) -> Rows:
        log_probs, indices = logits.double().log_softmax(-1).topk(self.k, dim=-1)
        others = logits.double().log_softmax(-1).exp().scatter(-1, indices, 0.0)  # 1 − Σ of the best would cancel
        tail = others.sum(-1, keepdim=True).float()
        numbers = indices.numpy().astype(_index(logits.shape[-1]))
        # float16 ends at e^-11.09 · 65504: what is rarer is not told apart.
        return np.concatenate([_as_bytes(numbers), _as_bytes(log_probs.clamp(min=-65504).half()), _as_bytes(tail)], -1)

    def decode(self, rows: Rows, classes: int) -> dict[str, Tensor]:
        indices, log_probs, _ = self._parts(rows, classes)
        return {"indices": indices, "log_probs": log_probs}

    def dense(self, rows: Rows, classes: int) -> Tensor:
        indices, log_probs, tail = self._parts(rows, classes)
        others = (tail / (classes - self.k)).clamp(min=torch.finfo(torch.float32).tiny).log()
        return others.expand(*others.shape[:-1], classes).scatter(-1, indices, log_probs)

    def _parts(self, rows: Rows, classes: int) -> tuple[Tensor, Tensor, Tensor]:
        kind = _index(classes)
        first, second = self.k * kind.itemsize, self.k * (kind.itemsize + 2)
        indices = torch.from_numpy(_of_bytes(rows[..., :first], kind).astype(np.int64))
        log_probs = torch.from_numpy(_of_bytes(rows[..., first:second], _F2).astype(np.float32))
        tail = torch.from_numpy(_of_bytes(rows[..., second:], _F4))
        # The rounded probabilities and the tail add up to 1 again.
        return indices, log_probs + torch.log1p(-tail.clamp(max=1 - 1e-7)) - log_probs.logsumexp(-1, keepdim=True), tail


def find_format(name: str) -> Format:
    """Return the format of that name.

    Raises:
        ValueError: For an unknown one.
    """
    best = re.fullmatch(r"top([1-9]\d*)", name)
    if best:
        return Best(int(best[1]))
    known: Mapping[str, type[Format]] = {"float16": Float16, "uint8": Uint8}
    if name not in known:
        raise ValueError(f"expected format float16, uint8 or top<k> such as top10, got {name!r}")
    return known[name]()


def kl_errors(logits: Tensor, stored: Tensor) -> list[Tensor]:
    """Return KL(softmax(logits / T) ‖ softmax(stored / T)) in nats of each row, at each of :data:`TEMPERATURES`.

    Shape: both (..., C); to (N,) each.
    """
    errors = []
    for t in TEMPERATURES:
        exact, rounded = (x.flatten(0, -2).double().div(t).log_softmax(-1) for x in (logits, stored))
        errors.append((exact.exp() * (exact - rounded)).sum(-1).clamp(min=0))
    return errors


def _index(classes: int) -> np.dtype[Any]:
    return np.dtype("<u2") if classes <= 2**16 else np.dtype("<u4")


def _as_bytes(x: Tensor | Rows) -> Rows:
    array = x.numpy() if isinstance(x, Tensor) else x
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).view(np.uint8)


def _of_bytes(rows: Rows, kind: np.dtype[Any]) -> Rows:
    found: Rows = np.ascontiguousarray(rows).view(kind).astype(kind.newbyteorder("="), copy=False)
    return found
