"""What a training step costs over the same step in a bare loop: python tests/benchmarks/step_overhead.py [rounds].

The bare step runs between the Trainer's own: step by step, in one process, so that whatever else the machine does
slows both. A round is 50 steps where they are short, as many as the Trainer takes from one logging to the next; of each
pair and variant the median of the rounds' ratios is printed, with the lowest and the highest. The peak memory
is that of a process each.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule
from kd_lightning.losses import KD, HardLabel
from kd_lightning.models import resnet8x4, resnet32x4
from kd_lightning.tracking import MLFlowLogger

THREADS = 1
# glibc then returns each tensor's memory at once; else its heap, and not the tensors, decides on the peak.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def multilayer_perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, width), nn.ReLU(), nn.Linear(width, 100))


PAIRS = {  # teacher, student, batch size, steps a round
    "resnet32x4 -> resnet8x4": (resnet32x4, resnet8x4, 32, 5),
    "MLP 2048 -> MLP 512": (lambda: multilayer_perceptron(2048), lambda: multilayer_perceptron(512), 64, 50),
}


def data(batch_size: int) -> DataLoader:
    torch.manual_seed(0)
    count = 4 * batch_size
    inputs, labels = torch.randn(count, 3, 32, 32), torch.randint(100, (count,))
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size)


def optimizer(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    soft = F.kl_div(
        F.log_softmax(student / 4, -1), F.log_softmax(teacher / 4, -1), reduction="batchmean", log_target=True
    )
    return 0.1 * F.cross_entropy(student, target) + 0.9 * 16 * soft


def bare_steps(teacher: nn.Module, student: nn.Module, loader: DataLoader) -> Iterator[None]:
    """Take a step each time that the next one is asked for."""
    teacher.eval().requires_grad_(False)
    stepper = optimizer(student.parameters())
    while True:
        for x, y in loader:
            with torch.no_grad():
                target = teacher(x)
            total = loss(student(x), target, y)
            stepper.zero_grad()
            total.backward()
            stepper.step()
            yield


class PlainLightning(LightningModule):
    """The same step without this package: what Lightning itself costs."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, [teacher.eval().requires_grad_(False)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self.teacher[0](batch[0])
        return loss(self.student(batch[0]), target, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self.student.parameters())


def distillation(teacher: nn.Module, student: nn.Module) -> DistillationModule:
    losses = {"hard_label": HardLabel(weight=0.1), "kd": KD(temperature=4.0, weight=0.9)}
    return DistillationModule(student, teacher, losses, optimizer, check_teacher=False)


class Between(Callback):
    """Takes a bare step after each of the Trainer's, and times both."""

    def __init__(self, bare: Iterator[None], steps: int) -> None:
        self.bare, self.steps = bare, steps
        self.theirs: list[float] = []
        self.ours: list[float] = []
        self.since = 0.0

    def on_train_batch_end(self, *_: object) -> None:
        ended = time.perf_counter()
        self.ours.append(ended - self.since)
        next(self.bare)
        self.since = time.perf_counter()
        self.theirs.append(self.since - ended)

    def ratios(self) -> list[float]:
        """One a round; the steps before the first one warm up."""
        starts = range(2, len(self.ours) - self.steps + 1, self.steps)
        return [sum(self.ours[i : i + self.steps]) / sum(self.theirs[i : i + self.steps]) for i in starts]


def trainer(**options: object) -> Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, max_epochs=-1, **quiet, **options)


def time_steps(pair: str, variant: str, rounds: int) -> None:
    make_teacher, make_student, batch_size, steps = PAIRS[pair]
    loader = data(batch_size)
    between = Between(bare_steps(make_teacher(), make_student(), loader), steps)
    make = PlainLightning if variant.startswith("Lightning") else distillation
    with tempfile.TemporaryDirectory() as folder:
        logger = MLFlowLogger(tracking_uri=f"sqlite:///{folder}/mlflow.db") if variant.endswith("MLflow") else False
        fit = trainer(max_steps=rounds * steps + 2, callbacks=[between], logger=logger)
        fit.fit(make(make_teacher(), make_student()), loader)
    ratios = between.ratios()
    step = 1e3 * statistics.median(between.theirs)
    print(
        f"{pair:26} {variant:34} {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) "
        f"of a bare step of {step:.1f} ms",
        flush=True,
    )


def peak_memory(kind: str) -> None:
    """Print the megabytes that some steps add to the process at their peak."""
    teacher, student, loader = resnet32x4(), resnet8x4(), data(64)
    makers = {"bare": None, "Lightning": PlainLightning, "distillation": distillation}
    make = makers[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if make is not None:
        trainer(max_steps=4, logger=False).fit(make(teacher, student), loader)
    else:
        steps = bare_steps(teacher, student, loader)
        for _ in range(4):
            next(steps)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, before / 1024)


def compare_memory(rounds: int) -> None:
    peaks: dict[str, list[float]] = {"bare": [], "Lightning": [], "distillation": []}
    for _ in range(rounds):
        for kind, values in peaks.items():
            command = [sys.executable, __file__, "--memory", kind]
            run = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **GIVE_BACK})
            values.append(float(run.stdout.split()[-2]))
    bare, plain, ours = (statistics.median(values) for values in peaks.values())
    print(
        f"peak memory of some steps: {bare:.0f} MB in a bare loop, {plain / bare:.3f} of that with Lightning alone, "
        f"{ours / bare:.3f} with distillation"
    )


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for pair in PAIRS:
        for variant in (
            "Lightning alone, without logging",
            "distillation, without logging",
            "distillation, logging to MLflow",
        ):
            time_steps(pair, variant, rounds)
    compare_memory(1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    if sys.argv[1:2] == ["--memory"]:
        peak_memory(sys.argv[2])
    else:
        main()
