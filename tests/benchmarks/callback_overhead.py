"""The callback against the same loss in a training_step by hand: python tests/benchmarks/callback_overhead.py [rounds].

Two Trainers take turns, a step each, in one process, so that whatever else the machine does slows both. A round is 50
steps, as many as a Trainer takes from one logging to the next; the median of the rounds' ratios is printed, with the
lowest and the highest. The peak memory is that of a process each.
"""

import resource
import statistics
import subprocess
import sys
import threading
import time
import warnings
from os import environ

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from step_overhead import GIVE_BACK, THREADS, data, loss, multilayer_perceptron, optimizer, trainer
from torch import Tensor, nn

from kd_lightning import Distillation
from kd_lightning.losses import KD

STEPS = 50
SIZES = {"step": (1024, 256, 64), "memory": (8192, 8192, 256)}  # widths of teacher and student, batch size


class Plain(LightningModule):
    """Somebody's module: its own loss, nothing of a teacher."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        total = F.cross_entropy(self.student(batch[0]), batch[1])
        self.log("train/own", total)
        return total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self.parameters())


class ByHand(Plain):
    """The distillation loss in the step, as one writes it who does not use this package."""

    def __init__(self, student: nn.Module, teacher: nn.Module, teacher_first: bool) -> None:
        super().__init__(student)
        self.teacher, self.teacher_first = [teacher.eval().requires_grad_(False)], teacher_first

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.teacher_first:
            soft = self.soft_targets(batch[0])
            logits = self.student(batch[0])
        else:
            logits = self.student(batch[0])
            soft = self.soft_targets(batch[0])
        total = loss(logits, soft, batch[1])
        self.log("train/loss", total)
        return total

    @torch.no_grad()
    def soft_targets(self, x: Tensor) -> Tensor:
        return self.teacher[0](x)


def made(kind: str, teacher_width: int, width: int) -> tuple[LightningModule, list[Callback]]:
    torch.manual_seed(0)
    teacher, student = multilayer_perceptron(teacher_width), multilayer_perceptron(width)
    if kind != "callback":
        return ByHand(student, teacher, teacher_first=kind == "teacher first"), []
    losses = {"kd": KD(temperature=4.0, weight=0.9)}
    return Plain(student), [Distillation(teacher, losses, "student", task_weight=0.1, check_teacher=False)]


class Turns(Callback):
    """Lets the other Trainer take a step after each of this one's, and times its own; the last of the callbacks."""

    def __init__(self, mine: threading.Semaphore, others: threading.Semaphore) -> None:
        self.mine, self.others, self.times = mine, others, list[float]()
        self.since = 0.0

    def on_train_start(self, *_: object) -> None:
        self.mine.acquire()
        self.since = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter() - self.since)
        self.others.release()
        self.mine.acquire()
        self.since = time.perf_counter()

    def on_train_end(self, *_: object) -> None:
        self.others.release()


def compare_steps(rounds: int) -> None:
    one, other = threading.Semaphore(1), threading.Semaphore(0)
    turns = {"by hand": Turns(one, other), "callback": Turns(other, one)}

    def fit(kind: str) -> None:
        *widths, batch_size = SIZES["step"]
        module, callbacks = made(kind, *widths)
        fitting = trainer(max_steps=(rounds + 1) * STEPS, callbacks=[*callbacks, turns[kind]], logger=False)
        fitting.fit(module, data(batch_size))

    second = threading.Thread(target=fit, args=("callback",))
    second.start()
    fit("by hand")
    second.join()
    hand, ours = turns["by hand"].times[STEPS:], turns["callback"].times[STEPS:]  # the first round warms up
    ratios = [sum(ours[i : i + STEPS]) / sum(hand[i : i + STEPS]) for i in range(0, len(ours), STEPS)]
    print(
        f"step: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) of "
        f"{1e3 * statistics.median(hand):.1f} ms by hand, over {rounds} rounds",
        flush=True,
    )


def peak_memory(kind: str) -> None:
    """Print the megabytes that some steps add to the process at their peak."""
    *widths, batch_size = SIZES["memory"]
    module, callbacks = made(kind, *widths)
    loader = data(batch_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer(max_steps=4, logger=False, callbacks=callbacks).fit(module, loader)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, before / 1024)


def compare_memory(rounds: int) -> None:
    peaks: dict[str, list[float]] = {"by hand": [], "teacher first": [], "callback": []}
    for _ in range(rounds):
        for kind, values in peaks.items():
            command = [sys.executable, __file__, "--memory", kind]
            run = subprocess.run(command, capture_output=True, text=True, check=True, env={**environ, **GIVE_BACK})
            values.append(float(run.stdout.split()[-2]))
    hand, first, ours = (statistics.median(values) for values in peaks.values())
    print(
        f"peak memory that a training adds: {ours / hand:.3f} of {hand:.0f} MB by hand, {ours / first:.3f} of "
        f"{first:.0f} MB by hand with the teacher before the student"
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    if sys.argv[1:2] == ["--memory"]:
        peak_memory(sys.argv[2])
    else:
        compare_steps(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
        compare_memory(3)
