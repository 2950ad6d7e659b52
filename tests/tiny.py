"""Networks, data and a Trainer that are small enough for many trainings in a second."""

import csv
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule, Teacher
from kd_lightning.losses import KD, HardLabel

FEATURES, CLASSES = 6, 4

torch.set_num_threads(1)  # threads that share so little work mostly wait for each other


class Network(nn.Module):
    """Layers ``stem``, ``norm``, ``act``, ``drop`` and ``head``: batch statistics and dropout in one network."""

    def __init__(self, width: int = 8, classes: int = CLASSES, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, width)
        self.norm = nn.BatchNorm1d(width)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.act(self.norm(self.stem(x)))))


def network(seed: int = 0, **options: Any) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network(**options)


def samples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs around one centre a class, and the classes."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    centres = 2 * torch.eye(FEATURES)[:CLASSES]
    return centres[labels] + torch.randn(count, FEATURES, generator=random), labels


def loader(count: int = 32, batch_size: int = 8, seed: int = 0, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*samples(count, seed)), batch_size=batch_size, **options)


@cache
def _good_weights() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        teacher, (inputs, labels) = Network(16), samples(512, seed=9)
        optimizer = torch.optim.Adam(teacher.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(teacher(inputs), labels).backward()
            optimizer.step()
    return teacher.state_dict()


def good_teacher(dropout: float = 0.0) -> Network:
    """A network that classifies some 85 % of the samples, of another width than the students."""
    teacher = Network(16, dropout=dropout)
    teacher.load_state_dict(_good_weights())
    return teacher


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def distillation(student: nn.Module | None = None, teacher: Any = "good", **options: Any) -> DistillationModule:
    return DistillationModule(
        student=network() if student is None else student,
        teacher=Teacher(good_teacher()) if teacher == "good" else teacher,
        losses=options.pop("losses", None)
        or {"hard_label": HardLabel(weight=0.3), "kd": KD(temperature=4.0, weight=0.7)},
        optimizer=options.pop("optimizer", sgd),
        **options,
    )


def trainer(**options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **options})


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's state, buffers too."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bitwise."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """What Lightning's logger wrote: values by name and step."""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    with next(folder.rglob("metrics.csv")).open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    values[name][int(row["step"])] = float(value)
    return values
