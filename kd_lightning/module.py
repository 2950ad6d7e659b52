"""The first front door: distillation from two networks."""

from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, MetricCollection

from kd_lightning.data.contract import class_names_of
from kd_lightning.divergence import Divergence, parts_of
from kd_lightning.first_batches import training_batches, training_loader
from kd_lightning.idle_heads import idle
from kd_lightning.losses.base import DistillationLoss
from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import run
from kd_lightning.preflight import (
    check_checkpoint,
    check_factories,
    check_inputs,
    check_networks,
    check_optimizer,
    check_parts,
    check_task,
    check_teacher_score,
    converts_inputs,
    dry_run,
    need_labels,
    warn_of_missing_classes,
)
from kd_lightning.progress import check_length_is_known, progress
from kd_lightning.resume import Resumption, begin_with_next_epoch, rng_states
from kd_lightning.tasks import Batch, Task, or_default
from kd_lightning.teachers import Teacher, TeacherSource
from kd_lightning.teachers.base import peers_of
from kd_lightning.tracking.metrics import (
    TeacherScores,
    agreement,
    log_divergence,
    log_measurements,
    log_terms,
    logs_this_step,
)
from kd_lightning.tracking.step_clock import StepClock

_STUDENT, _OBJECTIVE = "student.", "objective."


class DistillationModule(LightningModule):
    """Train a student network on a teacher's outputs.

    ``forward`` is the student's: temperature 1, no teacher. A checkpoint's ``state_dict`` holds the bare student under
    the names of its own ``state_dict()``; the losses' parameters are beside it, under ``losses``.

    Args:
        student: Returns logits, or an object with ``.logits``. To compile it, call ``student.compile()``.
        teacher: Gets the very tensors that the student gets. None for a student alone, with losses that need none.
        losses: By name, such as ``{"hard_label": HardLabel(weight=0.1), "kd": KD(temperature=4.0, weight=0.9)}``.
        optimizer: Called with the parameters of the student and of the losses.
        scheduler: Called with the optimizer; where it takes ``total_steps`` or ``T_max``, also with the number of
            optimizer steps of the whole training. Stepped after each optimizer step.
        task: What a batch means and what a good answer is. Unless given, that of a language model of ``transformers``;
            :class:`~kd_lightning.tasks.Regression` for losses on values, such as
            :class:`~kd_lightning.losses.TeacherRegression`; or :class:`~kd_lightning.tasks.Classification`.
        check_teacher: Refuse a teacher that scores at chance on the training loader.

    Attributes:
        rewrites: Functions of the module and a training batch, as the task has read it, that return what the networks
            get in its place; callbacks such as :class:`~kd_lightning.callbacks.OnPolicy` put theirs here.

    Raises:
        ValueError: At the start of ``fit``, for whatever :mod:`kd_lightning.preflight` finds.

    Example:
        >>> from kd_lightning.losses import KD, HardLabel
        >>> module = DistillationModule(
        ...     student=nn.Linear(4, 3),
        ...     teacher=Teacher(nn.Linear(4, 3)),
        ...     losses={"hard_label": HardLabel(weight=0.1), "kd": KD(temperature=4.0, weight=0.9)},
        ...     optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        ... )
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: TeacherSource | nn.Module | None,
        losses: Mapping[str, DistillationLoss],
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        task: Task | None = None,
        check_teacher: bool = True,
    ) -> None:
        super().__init__()
        check_networks(student, teacher)
        check_factories(optimizer, scheduler)
        self.student = student
        self.teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self.objective = DistillationObjective(losses, peers_of(self.teacher))
        self.task = or_default(task, student, losses.values())
        check_task(self.task)
        self.check_teacher = check_teacher
        self._optimizer, self._scheduler = optimizer, scheduler
        self.rewrites: list[Callable[[DistillationModule, Batch], Batch]] = []
        self._built = self._inputs_checked = False
        self._resumption = Resumption()
        self._divergence = Divergence()
        self._val_metrics = self.task.metrics().clone(prefix="val/")
        self._test_metrics = self.task.metrics().clone(prefix="test/")
        self._agreement = MeanMetric()
        self._teacher_scores = TeacherScores(self.task)
        self._clock = StepClock()
        check_parts(self.teacher, self.objective)

    @property
    def losses(self) -> nn.ModuleDict:
        """The losses by name; ``losses.kd.temperature`` is the path of a schedule."""
        return self.objective.losses

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.student(*args, **kwargs)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._build()

    def configure_model(self) -> None:
        # A moving average of the weights copies the module in its own setup, ahead of the one above, and calls this
        # for what has to be there by then. Lightning itself calls it after setup, and when it loads a checkpoint.
        if self._fitting():
            self._build()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = {**dict(self.student.named_parameters()), **dict(self.objective.named_parameters())}
        return configured(parameters, self._optimizer, self._scheduler, self.trainer)

    def on_fit_start(self) -> None:
        self._divergence = Divergence()
        for metric in (self._val_metrics, self._test_metrics, self._agreement):
            metric.reset()  # after trainer.validate, they are inference tensors, which cannot be updated in a fit
        self._teacher_scores, self._clock = TeacherScores(self.task), StepClock()
        self._place_teacher()
        if self.teacher is not None:
            if self.teacher.scheduled:
                check_length_is_known(self.trainer)
            self.teacher.start(self.student)
            if self.check_teacher:
                check_teacher_score(self, self.teacher, self.task)

    def on_validation_start(self) -> None:
        self._clock.restart()
        self._place_teacher()

    def on_test_start(self) -> None:
        self._place_teacher()

    def on_train_start(self) -> None:
        self._resumption.on_train_start(self.trainer)

    def on_train_epoch_start(self) -> None:
        self._resumption.on_train_epoch_start(self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        read = self.task.read(batch)
        for rewrite in self.rewrites:
            read = rewrite(self, read)
        # The teacher first: its activations are gone before the student's are kept for the backward pass.
        teacher = None
        if self.teacher is not None and self.objective.needs_teacher:
            with self._clock.teaching(self.device), idle(self.teacher.network, self.objective.idle_teacher_heads):
                teacher = self.task.arranged(self.teacher(read, self.objective.teacher_layers))
        with idle(self.student, self.objective.idle_student_heads) as inputs:
            student = self.task.arranged(run(self.student, read.args, read.kwargs, self.objective.student_layers))
        if not self._inputs_checked:
            check_inputs(self.objective, inputs, student)
            self._inputs_checked = True
        total: Tensor
        total, terms = self.objective(student._replace(samples=read.samples), teacher, read.target)
        self._divergence.watch(self.trainer, total, lambda: parts_of(read, self.student, student, teacher, terms))
        log_measurements(self, self.student, terms, self._clock, len(student.logits))
        if logs_this_step(self.trainer):
            log_terms(self, self.objective, total, terms, teacher, len(student.logits), self.task)
        return total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Not when the batch has ended: a checkpoint is written before the module hears of that.
        if self.teacher is not None and self.teacher.learns:
            self.teacher.after_step(self.student, progress(self.trainer))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._score(self.task.read(batch), "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._score(self.task.read(batch), "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the student's logits."""
        args, kwargs, *_ = self.task.read(batch)
        return run(self.student, args, kwargs).logits

    def on_validation_epoch_end(self) -> None:
        if self.teacher is not None:
            self._teacher_scores.settled = not (self.trainer.sanity_checking or self.teacher.learns)

    def on_train_end(self) -> None:
        self._divergence.check_weights(self.student, self.objective.peers)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._divergence.check_weights(self.student, self.objective.peers)
        state: dict[str, Tensor] = checkpoint["state_dict"]
        checkpoint["state_dict"] = _under(state, _STUDENT)
        checkpoint["losses"] = _under(state, _OBJECTIVE)
        checkpoint["rng_states"] = rng_states()
        of_teacher = {} if self.teacher is None else self.teacher.state_dict()
        if of_teacher:
            checkpoint["teacher"] = of_teacher

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_checkpoint(checkpoint["state_dict"], self.student)
        if self._trainer is not None:
            begin_with_next_epoch(self.trainer, checkpoint)
        losses = checkpoint.pop("losses", {})
        if not self._built:  # loaded outside a Trainer: the projectors' shapes are not known, nor are they needed
            losses = {name: value for name, value in losses.items() if name in self.objective.state_dict()}
        checkpoint["state_dict"] = {
            **{_STUDENT + name: value for name, value in checkpoint["state_dict"].items()},
            **{_OBJECTIVE + name: value for name, value in losses.items()},
        }
        self._resumption.states = checkpoint.get("rng_states")
        if self.teacher is not None and ("teacher" in checkpoint or self._fitting()):
            self.teacher.prepare(self.student)
            self.teacher.load_state_dict(checkpoint.get("teacher", {}))

    def _fitting(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    def _build(self) -> None:
        if not self._built:
            loader, names = training_loader(self), class_names_of(self.trainer.datamodule)  # type: ignore[attr-defined]
            classes = dry_run(
                training_batches(self, loader=loader),
                self.student,
                self.teacher,
                self.objective,
                self.task,
                class_names=names,
                any_precision=converts_inputs(self.trainer),
            )
            if need_labels(self.objective) and self.task.over_classes:
                warn_of_missing_classes(loader, classes, names)
            self._built = True

    def _place_teacher(self) -> None:
        if self.teacher is not None:
            floating = [p.dtype for p in self.student.parameters() if p.is_floating_point()]
            self.teacher.to(self.device, floating[0] if floating else None)

    def _score(self, batch: Batch, prefix: str) -> None:
        student, teacher = self.task.arranged(run(self.student, batch.args, batch.kwargs)), None
        if self.teacher is not None and self.teacher.can_teach(batch):
            teacher = self.task.arranged(self.teacher(batch))
        reference = batch.target if self.task.labelled else teacher
        metrics: MetricCollection = self._val_metrics if prefix == "val" else self._test_metrics
        if reference is not None:
            metrics.update(student, reference)
            self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True)
        if teacher is None or not self.task.labelled:
            return  # without labels, the metrics above are the agreement, of the whole split
        log_divergence(self, self.task, prefix, student, teacher, batch.target)
        same = agreement(self.task, student, teacher, batch.target)
        if same is None:
            return
        self._agreement.update(same)
        self.log(f"{prefix}/agreement", self._agreement, on_step=False, on_epoch=True, prog_bar=True)
        if prefix == "val":
            self._teacher_scores.log(self, teacher, batch.target)


def configured(
    parameters: Mapping[str, nn.Parameter],
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    scheduler: Callable[..., LRScheduler] | None,
    trainer: Trainer,
) -> OptimizerLRScheduler:
    """Make an optimizer of what is trained, and its scheduler, which is stepped after each optimizer step.

    Raises:
        ValueError: For an optimizer that is none, or leaves out parameters that require a gradient.
    """
    made = optimizer([p for p in parameters.values() if p.requires_grad])
    check_optimizer([made], parameters, "student and the losses")
    if scheduler is None:
        return made
    # A partial lists an argument that it has bound with the bound value as default.
    free = {n for n, p in signature(scheduler).parameters.items() if p.default in (p.empty, None)}
    steps = {name: trainer.estimated_stepping_batches for name in ("total_steps", "T_max") if name in free}
    return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler(made, **steps), "interval": "step"}}


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
