"""What tracking costs a training: python tests/benchmarks/tracking.py [rounds].

An epoch of 250 steps of some 10 ms that log four numbers each, with ``log_every_n_steps=1``: without a logger, with
this package's on SQLite, and with Lightning's own on SQLite. Rounds are interleaved in one process; of each the median
of the rounds' ratios to the epoch without a logger is printed, with the lowest and the highest, and the time that a
call of ``log_metrics`` takes from the training: median, 99th percentile and longest. What is
shipped at the end is timed apart.
"""

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import loggers as theirs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning.tracking import MLFlowLogger

STEPS = 250


class Module(LightningModule):
    """A step of some 10 ms on one core that logs what a distillation logs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
        self.seconds = 0.0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log_dict({"train/loss": loss, "train/loss/kd": loss, "kd/temperature": 4.0, "kd/teacher_entropy": 0.5})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_train_epoch_start(self) -> None:
        self.begun = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        self.seconds = time.perf_counter() - self.begun


def timed(logger: Any, waits: list[float]) -> Any:
    """Note how long each call of ``log_metrics`` takes."""
    log = logger.log_metrics

    def log_metrics(*arguments: Any, **options: Any) -> None:
        begun = time.perf_counter()
        log(*arguments, **options)
        waits.append(time.perf_counter() - begun)

    logger.log_metrics = log_metrics
    return logger


def epoch(logger: Any) -> tuple[float, float]:
    """Return the seconds of an epoch, and those from its end to that of ``fit``."""
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(STEPS * 64, 512), torch.randint(10, (STEPS * 64,))), batch_size=64)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=logger, log_every_n_steps=1, **quiet)
    module = Module()
    trainer.fit(module, data)
    return module.seconds, time.perf_counter() - module.begun - module.seconds


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{Path(folder)}/mlflow.db"
        waits: dict[str, list[float]] = {"this package's": [], "this package's, offline": [], "Lightning's": []}
        make: dict[str, Callable[[], Any]] = {
            "this package's": lambda: MLFlowLogger(tracking_uri=uri),
            "this package's, offline": lambda: MLFlowLogger(tracking_uri=uri, offline=True),
            "Lightning's": lambda: theirs.MLFlowLogger(tracking_uri=uri),
        }
        seconds: dict[str, list[float]] = {"none": [], **{name: [] for name in make}}
        ends: dict[str, list[float]] = {name: [] for name in make}
        for i in range(rounds + 1):  # the first warms up
            if i == 1:
                for found in (*seconds.values(), *waits.values(), *ends.values()):
                    found.clear()
            seconds["none"].append(epoch(False)[0])
            for name, logger in make.items():
                taken, end = epoch(timed(logger(), waits[name]))
                seconds[name].append(taken)
                ends[name].append(end)
    print(f"an epoch without a logger: {statistics.median(seconds['none']):.2f} s, {STEPS} steps")
    print("| logger | epoch, times that without | a logging call, ms: median, 99 %, longest | after the epoch, s |")
    print("|---|---|---|---|")
    for name in make:
        ratios = [one / none for one, none in zip(seconds[name], seconds["none"], strict=True)]
        calls = sorted(1000 * wait for wait in waits[name])
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        call = f"{statistics.median(calls):.3f}, {calls[int(0.99 * len(calls))]:.3f}, {calls[-1]:.1f}"
        print(f"| {name} | {ratio} | {call} | {statistics.median(ends[name]):.2f} |")


if __name__ == "__main__":
    main()
