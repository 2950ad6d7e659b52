"""Rows of numbers that fit into memory."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.data.in_memory import as_target, no_labels
from kd_lightning.data.loaders import Batched


class Table(Batched):
    """Rows as float32, and their targets.

    Shape: rows (N, D), target (N, ...): whole numbers of any type, which become int64, or float32.
    """

    def __init__(self, rows: NDArray[Any] | Tensor, target: NDArray[Any] | Tensor) -> None:
        self.rows, self.target = torch.as_tensor(rows).float(), as_target(target)

    def __len__(self) -> int:
        return len(self.target)

    def batch(self, samples: Sequence[int], epoch: int | None) -> tuple[Tensor, Tensor]:
        return self.rows[samples], self.target[samples]

    def content(self) -> bytes:
        """Return all that a fingerprint depends on."""
        return self.rows.numpy().tobytes() + self.target.numpy().tobytes()

    def joined(self, other: "Table") -> "Table":
        """Return the rows of both."""
        return Table(torch.cat([self.rows, other.rows]), torch.cat([self.target, other.target]))

    def without_labels(self) -> "Table":
        """Return the same rows with targets that say that there is no label."""
        bare = copy(self)
        bare.target = no_labels(self.target)
        return bare
