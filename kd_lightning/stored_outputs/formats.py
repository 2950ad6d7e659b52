"""How a teacher's logits are written: two bytes a class, one byte a class, or the best classes alone."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[Any]
_F2, _F4 = np.dtype("<f2"), np.dtype("<f4")
_TWO_BYTES = 2**16
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
        return logits.half().cpu().numpy()

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
        return np.concatenate([codes.cpu().numpy(), _as_bytes(highest), _as_bytes(scale)], -1)

    def decode(self, rows: Rows, classes: int) -> dict[str, Tensor]:
        ends = rows.view(_F4)
        highest, scale = torch.from_numpy(ends[..., -2:-1]), torch.from_numpy(ends[..., -1:])
        # In place and of one type: mixed types take three times as long, and so does a table of 256 levels.
        roots = torch.from_numpy(rows[..., :classes].astype(np.float32)).mul_(scale)
        return {"logits": torch.addcmul(highest, roots, roots, value=-1, out=roots)}


@dataclass(frozen=True)
class Best(Format):
    """The k best classes: indices, log-probabilities as float16, and the tail mass as float32, which scales them.

    An index has two bytes up to 65,536 classes; of more, as many bits as they need: 20 of a vocabulary of 151,936 and
    what belongs to them are 89 bytes.
    """

    k: int
    dtype = np.dtype("u1")

    def width(self, classes: int) -> int:
        if not 1 <= self.k < classes:
            raise ValueError(f"expected top1 to top{classes - 1} for {classes} classes, got top{self.k}")
        return _index_bytes(self.k, classes) + 2 * self.k + 4

    def encode(self, logits: Tensor) -> Rows:
        classes = logits.shape[-1]
        found = [self._best(rows) for rows in _chunks(logits)]
        indices, log_probs, tail = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        # float16 ends at e^-11.09 · 65504: what is rarer is not told apart.
        numbers = _as_bytes(log_probs.clamp(min=-65504).half())
        rows = np.concatenate([_packed(indices.numpy(), classes), numbers, _as_bytes(tail)], -1)
        return rows.reshape(*logits.shape[:-1], -1)

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best, indices = logits.topk(self.k, dim=-1)
        highest = best[..., :1]
        # Sums in double precision, terms in single: a large vocabulary takes three times as long in double.
        shares = (logits - highest).exp_()
        total = shares.sum(-1, keepdim=True, dtype=torch.float64)
        others = shares.scatter_(-1, indices, 0.0).sum(-1, keepdim=True, dtype=torch.float64)  # 1 − Σ would cancel
        return indices, (best - highest).double() - total.log(), (others / total).float()

    def decode(self, rows: Rows, classes: int) -> dict[str, Tensor]:
        indices, log_probs, _ = self._parts(rows, classes)
        return {"indices": indices, "log_probs": log_probs}

    def dense(self, rows: Rows, classes: int) -> Tensor:
        indices, log_probs, tail = self._parts(rows, classes)
        others = (tail / (classes - self.k)).clamp(min=torch.finfo(torch.float32).tiny).log()
        return others.expand(*others.shape[:-1], classes).scatter(-1, indices, log_probs)

    def _parts(self, rows: Rows, classes: int) -> tuple[Tensor, Tensor, Tensor]:
        first = _index_bytes(self.k, classes)
        second = first + 2 * self.k
        indices = torch.from_numpy(_unpacked(rows[..., :first], self.k, classes))
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
    errors: list[list[Tensor]] = [[] for _ in TEMPERATURES]
    for of_logits, of_stored in zip(_chunks(logits), _chunks(stored), strict=True):
        for t, found in zip(TEMPERATURES, errors, strict=True):
            exact, rounded = (x.double().div(t).log_softmax(-1) for x in (of_logits, of_stored))
            found.append((exact.exp() * (exact - rounded)).sum(-1).clamp(min=0))
    return [torch.cat(found) for found in errors]


def _chunks(logits: Tensor) -> Iterable[Tensor]:
    """Cut rows (..., C) into pieces (n, C) of some 32 MB in double precision: a batch of texts has gigabytes."""
    return torch.split(logits.flatten(0, -2), max(1, 2**22 // logits.shape[-1]))


def _index_bytes(count: int, classes: int) -> int:
    return 2 * count if classes <= _TWO_BYTES else -(-count * _bits(classes) // 8)


def _packed(indices: NDArray[np.int64], classes: int) -> Rows:
    """Write indices (n, k) one after the other, the lowest bit first: (n, bytes)."""
    if classes <= _TWO_BYTES:
        return _as_bytes(indices.astype("<u2"))
    bits = np.unpackbits(_as_bytes(indices.astype("<u4")), axis=-1, bitorder="little")
    kept = bits.reshape(*indices.shape, 32)[..., : _bits(classes)]
    return np.packbits(kept.reshape(len(indices), -1), axis=-1, bitorder="little")


def _unpacked(rows: Rows, count: int, classes: int) -> NDArray[np.int64]:
    if classes <= _TWO_BYTES:
        return _of_bytes(rows, np.dtype("<u2")).astype(np.int64)
    width = _bits(classes)
    bits = np.unpackbits(np.ascontiguousarray(rows), axis=-1, count=count * width, bitorder="little")
    numbers = np.zeros((*rows.shape[:-1], count, 32), np.uint8)
    numbers[..., :width] = bits.reshape(*rows.shape[:-1], count, width)
    return np.packbits(numbers, axis=-1, bitorder="little").view("<u4")[..., 0].astype(np.int64)


def _bits(classes: int) -> int:
    return (classes - 1).bit_length()


def _as_bytes(x: Tensor | Rows) -> Rows:
    array = x.cpu().numpy() if isinstance(x, Tensor) else x
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).view(np.uint8)


def _of_bytes(rows: Rows, kind: np.dtype[Any]) -> Rows:
    # A copy: one row of a wider array counts as contiguous, with strides that torch does not take.
    found: Rows = np.array(rows, order="C").view(kind).astype(kind.newbyteorder("="), copy=False)
    return found
