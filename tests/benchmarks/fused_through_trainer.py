"""Steps of a large vocabulary, by the Trainer: python -m tests.benchmarks.fused_through_trainer [V [rounds [B]]].

A GPT of width 256 learns from another, in batches of B = 8 texts of 256 tokens, in float32 on one thread, by SGD.
Whole: losses on logits; fused: the losses that compute them chunk by chunk, so that a step has none. Time is the
processor's for one step, the networks' bodies, backward pass and optimizer included, whole and fused in turn in each
round: the median of the rounds' ratios is printed, with the lowest and the highest. Memory is measured in a process of
its own for each: what the step adds at its peak to what is there before it; of it, the part that is not there with a
vocabulary of 80 is called the loss's.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule
from kd_lightning.losses import (
    DistillationLoss,
    ForwardKL,
    FusedDivergence,
    FusedHardLabel,
    FusedKL,
    HardLabel,
    ReverseKL,
)
from kd_lightning.models import GPT
from kd_lightning.processor import describe
from kd_lightning.tasks import LanguageModelling
from tests.tiny import trainer

TOKENS, WIDTH = 256, 256
# glibc then returns each tensor's memory at once; else its heap, and not the tensors, decides on the peak.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SIDES = ("norm", "head", "norm", "head")
OBJECTIVES: Mapping[str, Mapping[str, Callable[[], dict[str, DistillationLoss]]]] = {
    "KL": {"whole": lambda: {"kl": ForwardKL()}, "fused": lambda: {"kl": FusedKL(*SIDES)}},
    "labels and KL": {
        "whole": lambda: {"hard_label": HardLabel(0.1), "kl": ForwardKL(weight=0.9)},
        "fused": lambda: {"hard_label": FusedHardLabel("norm", "head", 0.1), "kl": FusedKL(*SIDES, weight=0.9)},
    },
    "reverse KL": {
        "whole": lambda: {"kl": ReverseKL()},
        "fused": lambda: {"kl": FusedDivergence("reverse_kl", *SIDES)},
    },
}


class Watch(Callback):
    """Times the step, and reads the peak of the process's memory in it, in MB."""

    seconds = before = peak = 0.0

    def on_train_start(self, *args: Any) -> None:
        self.before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def on_train_batch_start(self, *args: Any) -> None:
        self.begun = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds = time.process_time() - self.begun
        self.peak = status("VmHWM") - self.before


def status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def train(objective: str, kind: str, vocabulary: int, batch: int) -> Watch:
    torch.manual_seed(0)
    tokens = torch.randint(vocabulary, (batch, TOKENS + 1))
    loader = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=batch)
    student, teacher = (GPT(vocabulary, TOKENS, layers=2, width=WIDTH) for _ in range(2))
    watch = Watch()
    module = DistillationModule(
        student,
        teacher,
        OBJECTIVES[objective][kind](),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        task=LanguageModelling(),
        check_teacher=False,
    )
    trainer(callbacks=[watch]).fit(module, loader)
    return watch


def peak(objective: str, kind: str, vocabulary: int, batch: int) -> float:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.fused_through_trainer",
        "--peak",
        objective,
        kind,
        str(vocabulary),
        str(batch),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **GIVE_BACK})
    return float(run.stdout.split()[-1])


def main(vocabulary: int = 32768, rounds: int = 5, batch: int = 8) -> None:
    print(f"{vocabulary} tokens in the vocabulary, {batch * TOKENS} in a batch; a processor {describe()}")
    print("| objective | peak of a step: whole logits | fused | the loss's part, fused / whole | time, fused / whole |")
    print("|" + "---|" * 5)
    for objective in OBJECTIVES:
        body = peak(objective, "whole", 80, batch)
        whole, fused = (peak(objective, kind, vocabulary, batch) for kind in ("whole", "fused"))
        pairs = [
            [train(objective, kind, vocabulary, batch).seconds for kind in ("whole", "fused")] for _ in range(rounds)
        ]
        ratios = [of_fused / of_whole for of_whole, of_fused in pairs]
        took = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        memory = f"{whole:.0f} MB | {fused:.0f} MB | {(fused - body) / (whole - body):.3f}"
        print(f"| {objective} | {memory} | {took} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--peak"]:
        print(train(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])).peak)
    else:
        main(*map(int, sys.argv[1:]))
