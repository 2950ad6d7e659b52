"""Stages that take a fraction of a second, made in Python: for what a stage leaves, reads and waits for."""

from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from kd_lightning.losses import KD, HardLabel
from kd_lightning.pipeline.folder import FinishedStage
from kd_lightning.pipeline.run import run_stage
from kd_lightning.pipeline.training import Training
from kd_lightning.tasks import Classification
from tests.tiny import Network, loader, sgd, trainer


class TinyData(LightningDataModule):
    batch_size = 8

    def __init__(self, role: str, seed: int) -> None:
        super().__init__()

    def fingerprint(self) -> str:
        return "tiny"

    def train_dataloader(self) -> DataLoader:
        return loader(32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return loader(24, seed=1)

    def test_dataloader(self) -> DataLoader:
        return loader(40, seed=2)


def make_trainer(**options: Any) -> Any:
    return trainer(**{"max_epochs": 2, **options, "enable_checkpointing": True})


def training(role: str = "student", seed: int = 0, **changes: Any) -> Training:
    losses = {"hard_label": HardLabel()} if role in ("teacher", "student") else {"kd": KD()}
    given = {
        "role": role,
        "label": role,
        "method": "kd-T4" if "kd" in losses else "hard_label",
        "seed": seed,
        "config": {"role": role, "seed": seed},
        "task": Classification(),
        "network": partial(Network, 16 if role == "teacher" else 8),
        "losses": lambda: {name: type(loss)() for name, loss in losses.items()},
        "data": TinyData,
        "trainer": make_trainer,
        "optimizer": sgd,
        "check_teacher": False,
        **changes,
    }
    return Training(**given)


def run(stages: Path, training: Training, teacher: FinishedStage | None = None, **options: Any) -> FinishedStage:
    return run_stage(training, teacher, stages, lambda folder: None, [], **options)


def made(stages: Path, role: str = "student", teacher: FinishedStage | None = None, **changes: Any) -> FinishedStage:
    """Train the stage, or use it again."""
    return run(stages, training(role, **changes), teacher)
