"""The names under which a distillation is logged, whichever front door it came through."""

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import MetricCollection

from kd_lightning.objective import DistillationObjective, Term
from kd_lightning.outputs import AnyOutputs, Outputs
from kd_lightning.tasks import HeadlineMetric, Task
from kd_lightning.tasks.calibration_error import CalibrationError
from kd_lightning.tracking.gradient_norms import gradient_norms, measures_gradients
from kd_lightning.tracking.step_clock import StepClock


def logs_this_step(trainer: Trainer) -> bool:
    """Tell whether the logger takes this step's values, so that others are not computed for nothing."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return (trainer.global_step + 1) % max(interval, 1) == 0


def log_measurements(
    module: LightningModule, student: nn.Module, terms: Mapping[str, Term], clock: StepClock, samples: int
) -> None:
    """Log how fast the training goes, and at some steps which term drives the student.

    To the loggers themselves: Lightning repeats what a module has logged at each further step of the epoch.
    """
    trainer = module.trainer
    logged = logs_this_step(trainer)
    values = clock.step(samples, module.device, logged)
    if logged and measures_gradients(trainer, student):
        values |= {name: float(norm) for name, norm in gradient_norms(terms, student).items()}
    if values:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


@torch.no_grad()
def log_terms(
    module: LightningModule,
    objective: DistillationObjective,
    total: Tensor,
    terms: Mapping[str, Term],
    teacher: AnyOutputs | None,
    batch_size: int,
    task: Task,
) -> None:
    """Log the total, each term raw and weighted, the temperature, and the entropy of the teacher's soft targets.

    With several losses that have a temperature, each is logged under its own name, ``kd/temperature/<loss>``; the
    entropy is that of the first. Where only the teacher's best classes are known, or its logits were not computed, its
    entropy is not known, and is left out.
    """
    values: dict[str, Tensor | float] = {}
    for name, term in terms.items():
        values[f"train/loss/{name}"] = term.raw
        values[f"train/loss_weighted/{name}"] = term.weighted
    temperatures = objective.temperatures()
    for name, temperature in temperatures.items():
        values["kd/temperature" if len(temperatures) == 1 else f"kd/temperature/{name}"] = temperature
    temperature = next(iter(temperatures.values()), 1.0)
    softened = None if teacher is None else teacher.softened(temperature)
    if isinstance(softened, Outputs) and softened.logits.numel():
        entropy = task.entropy(softened.logits, temperature)
        if entropy is not None:
            values["kd/teacher_entropy"] = entropy
    module.log("train/loss", total.detach(), prog_bar=True, batch_size=batch_size)
    module.log_dict(values, batch_size=batch_size)


def agreement(task: Task, student: Outputs, teacher: AnyOutputs, target: Tensor | None = None) -> Tensor | None:
    """Tell how far both agree on each unit: (n,) in [0, 1]. None where they tell other things apart."""
    if not task.comparable(student, teacher):
        return None
    return task.agreement(*(task.without_padding(task.answers(of), target) for of in (student, teacher)))


def log_divergence(
    module: LightningModule, task: Task, prefix: str, student: Outputs, teacher: AnyOutputs, target: Tensor | None
) -> None:
    """Log how far the student's probabilities are from the teacher's: ``val/kl_teacher``, the mean over the split."""
    values = task.divergence(student, teacher, target)
    if values is not None and values.numel():
        name = f"{prefix}/kl_teacher"
        module.log(name, values.mean(), on_step=False, on_epoch=True, sync_dist=True, batch_size=values.numel())


class MetricsWithoutLabels:
    """Logs the metrics of a task whose units have no labels, which compare with the teacher, for any module."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._metrics: dict[tuple[str, int], MetricCollection] = {}

    def log(
        self, module: LightningModule, prefix: str, student: Outputs, teacher: AnyOutputs, dataloader_idx: int
    ) -> None:
        """Count a batch of a split and a loader."""
        metrics = self._metrics.setdefault((prefix, dataloader_idx), self.task.metrics()).to(module.device)
        metrics.update(student, teacher)
        for name, metric in metrics.items():
            key = f"{prefix}/{name}"
            module.log(key, metric, on_step=False, on_epoch=True, metric_attribute=key)


class TeacherScores:
    """Logs a teacher's headline on the validation split, that of each member of an ensemble, and its calibration.

    Attributes:
        settled: Whether they are known, so that nothing is logged any more.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.settled = task, False
        self._metrics: dict[tuple[str, int], HeadlineMetric | CalibrationError] = {}

    def log(self, module: LightningModule, teacher: AnyOutputs, target: Tensor | None, dataloader_idx: int = 0) -> None:
        """Count a batch; nothing of a batch without labels."""
        if self.settled or target is None or not self.task.labelled:
            return
        name = f"val/teacher_{self.task.headline.key}"
        every: dict[str, AnyOutputs] = {name: teacher}
        every |= {f"{name}/{i}": Outputs(logits) for i, logits in enumerate(teacher.members)}
        made: dict[str, HeadlineMetric | CalibrationError] = {key: HeadlineMetric(self.task) for key in every}
        if self.task.has_confidence:
            every["val/teacher_ece"], made["val/teacher_ece"] = teacher, CalibrationError(self.task)
        for key, outputs in every.items():
            metric = self._metrics.setdefault((key, dataloader_idx), made[key]).to(module.device)
            metric.update(outputs, target)
            if metric.count.any():
                module.log(key, metric, on_step=False, on_epoch=True, metric_attribute=key)
