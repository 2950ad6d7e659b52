"""Compare student and teacher in validation and test, however a module does them."""

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule

from kd_lightning.outputs import Outputs
from kd_lightning.step_outputs import StepOutputs
from kd_lightning.student_calls import Seen
from kd_lightning.tracking.metrics import MetricsWithoutLabels, TeacherScores, agreement, log_divergence


class Scoring:
    """Logs the agreement of student and teacher, and the teacher's own headline on the validation split.

    Args:
        outputs: Takes them out of what the module does.

    Attributes:
        possible: Whether outputs mean something to the task.
    """

    def __init__(self, outputs: StepOutputs) -> None:
        self._outputs, self._watching, self._seen, self.possible = outputs, ExitStack(), Seen(), True
        self._metrics_without_labels = MetricsWithoutLabels(outputs.task)
        self.begin_fit()

    def begin_fit(self) -> None:
        """Score the teacher anew."""
        self._teacher_scores = TeacherScores(self._outputs.task)

    def take_task(self) -> None:
        """Score by a task that is another now."""
        self._metrics_without_labels = MetricsWithoutLabels(self._outputs.task)
        self.begin_fit()

    def watch(self, module: LightningModule) -> None:
        """Begin with a batch."""
        self._seen = self._watching.enter_context(self._outputs.calls.watch(module))

    def leave(self) -> None:
        """Watch no more."""
        self._watching.close()
        self._seen = Seen()

    def score(self, module: LightningModule, batch: Any, prefix: str, dataloader_idx: int) -> None:
        """End with a batch."""
        seen, outputs = self._seen, self._outputs
        self.leave()
        if not self.possible or not seen.outputs or (outputs.calls.inputs and not seen.inputs):
            return  # how the module validates is its own affair
        try:
            logits = seen.logits
        except ValueError:
            if outputs.objective.reads_logits:
                raise
            return  # there are none
        unwrapped = outputs.batches.unwrap(batch)
        of_teacher = outputs.teacher_batches(unwrapped, seen)[0]
        if not outputs.teacher.can_teach(of_teacher):
            return
        task = outputs.task
        with torch.no_grad(), module.trainer.precision_plugin.forward_context(), outputs.reading_teacher():
            # Of several forward passes the first: student and teacher see the same there.
            teacher = task.arranged(outputs.teacher(of_teacher))
        student = task.arranged(Outputs(logits))
        if not task.labelled:
            self._metrics_without_labels.log(module, prefix, student, teacher, dataloader_idx)
            return
        outputs.batches.note_column(outputs.batches.target_or_none(unwrapped.batch), student)
        target = outputs.batches.target_or_none(unwrapped.batch)
        if target is not None and not outputs.batches.fits(target, teacher):
            target = None
        log_divergence(module, task, prefix, student, teacher, target)
        same = agreement(task, student, teacher, target)
        if same is None:
            return
        if same.numel():
            name = f"{prefix}/agreement"
            module.log(name, same.mean(), on_step=False, on_epoch=True, sync_dist=True, batch_size=same.numel())
        if prefix == "val" and target is not None:
            self._teacher_scores.log(module, teacher, target, dataloader_idx)

    def end_validation(self, module: LightningModule) -> None:
        """Take the teacher's score as known, where it does not change any more."""
        self._teacher_scores.settled = not (module.trainer.sanity_checking or self._outputs.teacher.learns)
