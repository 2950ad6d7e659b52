"""Data sets that augment, and a teacher for them."""

import contextlib
import io
import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from kd_lightning.durable_files import unseal
from kd_lightning.stored_outputs import store_outputs
from kd_lightning.stored_outputs.layout import Manifest
from tests.tiny import FEATURES, good_teacher, samples

ROWS_OF_A_SHARD = {"shard_bytes": 40 * 12}  # 40 rows of 4 classes as uint8


class Jitter:
    """Draws from all three generators."""

    def __init__(self, scale: float = 0.1) -> None:
        self.scale = scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * (torch.randn(FEATURES) + random.random() + float(np.random.randn()))


class Augmented(Dataset):
    def __init__(self, count: int = 50, transform: Any = None, seed: int = 0) -> None:
        self.inputs, self.labels = samples(count, seed)
        self.transform = transform or Jitter()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(self.inputs[index]), self.labels[index]


def store(path: Any, dataset: Any = None, teacher: Any = None, **options: Any) -> Manifest:
    with contextlib.redirect_stdout(io.StringIO()):
        return store_outputs(
            teacher or good_teacher(),
            Augmented() if dataset is None else dataset,
            path,
            **{"batch_size": 16, **options},
        )


def files(folder: Any) -> dict[str, Any]:
    """The bytes of each file; of JSON the values, without how long writing took."""
    found = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): comparable(file.name, file.read_bytes()) for file in found}


def comparable(name: str, content: bytes) -> Any:
    if not name.endswith(".json"):
        return content
    values = unseal(content)
    assert values.pop("seconds") >= 0
    return values
