"""The second front door: distillation for a LightningModule that stays as it is."""

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from kd_lightning.attachment import attach, check_averaging, check_loss, check_module, check_optimized, check_strategy
from kd_lightning.batch_reader import BatchReader
from kd_lightning.checkpoint import mismatch
from kd_lightning.divergence import Divergence, parts_of
from kd_lightning.first_step import check_first_step
from kd_lightning.logits_place import LogitsPlace
from kd_lightning.losses.base import DistillationLoss, is_finite_number
from kd_lightning.namespaces import Callback
from kd_lightning.objective import DistillationObjective, Term
from kd_lightning.outputs import AnyOutputs
from kd_lightning.preflight import check_optimizer, check_parts, check_task, check_teacher_score
from kd_lightning.progress import check_length_is_known, progress
from kd_lightning.rehearsal import Rehearsal, read_as_in_training
from kd_lightning.resume import Resumption, begin_with_next_epoch, rng_states
from kd_lightning.scoring import Scoring
from kd_lightning.selection import Selector
from kd_lightning.step_outputs import StepOutputs
from kd_lightning.student_calls import Calls, Seen, StudentCalls
from kd_lightning.tasks import Batch, Task, or_default
from kd_lightning.tasks.batch import Unwrapped
from kd_lightning.teachers import Teacher, TeacherSource
from kd_lightning.teachers.base import peers_of
from kd_lightning.tracking.metrics import log_measurements, log_terms, logs_this_step
from kd_lightning.tracking.step_clock import StepClock


class Distillation(Callback):
    """Add distillation to the training of a LightningModule that nobody edits.

    The student's inputs and logits are those of its own forward pass in ``training_step``: it runs once, and the
    teacher sees the same augmented view. The loss that ``training_step`` returns is kept, with ``task_weight``, and the
    losses here are added to it. Their projectors are among ``self.parameters()`` when ``configure_optimizers`` is
    called, and in this callback's part of the checkpoint; the checkpoint's ``state_dict`` is that of the plain module.

    Before the first step, ``training_step`` is tried once on a copy of the module, where nothing is logged; ``setup``
    and ``configure_model`` are called on the copy first. What the student did until the step ended, or broke off for
    want of something that only a running training has, is enough.

    In validation and test, ``agreement`` with the teacher is logged beside the module's own metrics.

    Losses that compute logits themselves, such as :class:`~kd_lightning.losses.FusedKL`, spare the teacher's logits and
    all that a loss makes of both sides' logits. What ``training_step`` computes is its own affair: where the student
    returns logits, those, and what the module's own loss makes of them, are in memory. To have none, let the step call
    the student's body alone, or take :class:`~kd_lightning.DistillationModule`.

    Args:
        teacher: Gets the very arguments that the student gets.
        losses: By name, such as ``{"kd": KD(temperature=4.0)}``. Layers are named relative to the student.
        student: Name of the student in the module; the module itself, by its ``forward``, unless given.
        logits: Where the student's logits are: the name of a layer, relative to the student (for a module that calls
            only parts of it); or else a key, an attribute or an index of its output, or a function of it, such as
            ``lambda output: output.scores``. Its output, or ``.logits`` or ``.prediction`` of that, unless given. Where
            one word names a layer and a part of the output: ``"layer:<name>"``, ``"output:<name>"``. Losses on layers
            alone need none.
        teacher_logits: The same for the teacher, or each teacher of an ensemble. What ``logits`` says, unless given,
            of a teacher of the student's class; and of another where that returns no tensor and has such a part.
        teacher_inputs: The teacher's arguments in a batch: a key, an attribute, an index, or a function that returns a
            tensor, a tuple of positional or a mapping of keyword arguments. Needed where ``training_step`` never calls
            the student as a whole.
        target: The target in a batch: a key, an attribute, an index, or a function. Unless given, its second part, or
            what it calls ``labels``, ``label``, ``target``, ``targets``, ``y`` or, beside an ``image``, ``mask``.
        task_weight: Factor of the module's own loss; at 0 it is left out.
        check_teacher: Refuse a teacher that scores at chance on the training loader.
        task: What a batch means and what a good answer is. Unless given, that of a language model of ``transformers``;
            :class:`~kd_lightning.tasks.Regression` for losses on values, such as
            :class:`~kd_lightning.losses.TeacherRegression`; or :class:`~kd_lightning.tasks.Classification`.
        calls: Of a student that runs several times in a step, such as on two views: ``"all"`` calls, whose outputs are
            joined along the samples, and so are the teacher's for the same inputs, a target being that of each call;
            or the ``"first"``. An error unless given. The second pass of gradient checkpointing is no call.
        add_parameters: Whether an optimizer that leaves out the losses' parameters, such as projectors, and has several
            groups, gets them in its first. An optimizer that has one, as made from ``self.model.parameters()``, gets
            them there in any case. The group's learning rate, schedulers and other settings are theirs then.

    Raises:
        ValueError: At the start of ``fit``: for manual optimization (several optimizers, hence: Lightning itself
            refuses them under automatic optimization), for an optimizer without the projectors, for a student that does
            not run exactly once in the step, for probabilities in place of logits, and for whatever
            :mod:`kd_lightning.preflight` finds.

    Example:
        >>> from kd_lightning.losses import KD
        >>> callback = Distillation(teacher=nn.Linear(4, 3), losses={"kd": KD(temperature=4.0)}, student="net")
    """

    def __init__(
        self,
        teacher: TeacherSource | nn.Module,
        losses: Mapping[str, DistillationLoss],
        student: str = "",
        logits: Selector | None = None,
        teacher_logits: Selector | None = None,
        teacher_inputs: Selector | None = None,
        target: Selector | None = None,
        task_weight: float = 1.0,
        check_teacher: bool = True,
        task: Task | None = None,
        calls: Calls = "once",
        add_parameters: bool = False,
    ) -> None:
        super().__init__()
        if not is_finite_number(task_weight) or task_weight < 0:
            raise ValueError(f"expected task_weight >= 0, got {task_weight!r}: 0 leaves the module's own loss out")
        self.teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self.objective = DistillationObjective(losses, peers_of(self.teacher))
        if "task" in losses:
            raise ValueError("'task' is the name of the module's own loss: give this one another")
        self.student_name, self.task_weight = student, task_weight
        self.check_teacher, self.add_parameters, self._given_task = check_teacher, add_parameters, task
        check_task(or_default(task, None))
        check_parts(self.teacher, self.objective)
        changing = list(self.objective.changing_losses)
        if changing:
            raise ValueError(
                f"losses {changing} change the student's architecture, expected a module that stays as it is: take "
                "DistillationModule, or change the network yourself where your module makes it"
            )
        self._calls = StudentCalls(
            student, LogitsPlace(logits), teacher_inputs is None, self.objective.reads_logits, calls
        )
        self._batches = BatchReader(
            or_default(task, None, losses.values()),
            teacher_inputs,
            target,
            labels_needed=any(loss.needs_labels for loss in self.objective.named_losses().values()),
            bare=self.teacher.in_batch,
        )
        place = LogitsPlace(teacher_logits, "teacher_logits")
        self._outputs = StepOutputs(self.objective, self.teacher, self._calls, self._batches, place)
        self._scoring = Scoring(self._outputs)
        self._undo = ExitStack()
        self._rehearsal: Rehearsal | None = None
        self._pending: _Step | None = None
        self._steps = 0
        self._resumption = Resumption()
        self._divergence, self._clock = Divergence(), StepClock()

    @property
    def task(self) -> Task:
        """What a batch means; that of the student's kind where none was given, once the student is known."""
        return self._outputs.task

    # Before training, in the order of the calls.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            with suppress(ValueError):  # the module may make the student only in configure_model
                self._take_task(pl_module)
            return
        check_module(pl_module)
        self._divergence, self._clock = Divergence(), StepClock()
        self._rehearsal = Rehearsal(pl_module, trainer, self._calls)
        self._take_task(self._rehearsal.module)
        self._scoring.begin_fit()
        self._scoring.possible = check_first_step(pl_module, self._rehearsal, self._outputs, self.task_weight)
        check_strategy(trainer.strategy, self.objective)
        check_averaging(trainer, self, self.objective)
        step = functools.partial(self._distilling_step, pl_module)
        self._undo.enter_context(attach(pl_module, self.objective, step))

    def _take_task(self, module: LightningModule) -> None:
        """Take the task that was given, or that of the student, which is known only now."""
        student = self._outputs.network(module)
        self._outputs.student_kind = type(student)
        task = or_default(self._given_task, student, self.objective.losses.values())
        if vars(task) != vars(self.task) or type(task) is not type(self.task):
            self._batches.task = task
            self._scoring.take_task()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        begin_with_next_epoch(trainer, checkpoint)
        if self._rehearsal is not None:
            self.teacher.prepare(self._outputs.network(pl_module))  # ahead of its state, which comes next

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._rehearsal is None:
            return  # validate and test need nothing of it
        problem = mismatch(self.objective, state_dict["losses"])
        if problem:
            raise ValueError(f"the checkpoint's losses are not those of this Distillation: {problem}")
        self.objective.load_state_dict(state_dict["losses"])
        self.teacher.load_state_dict(state_dict.get("teacher", {}))
        self._resumption.states = state_dict["rng_states"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.teacher.scheduled:
            check_length_is_known(trainer)
        self.teacher.prepare(self._outputs.network(pl_module))
        self._outputs.place_teacher(pl_module)
        self.teacher.start(self._outputs.network(pl_module))
        self.objective.attach(self._outputs.network(pl_module), self.teacher.network)
        check_optimized(trainer, self.objective, self.add_parameters)
        if trainer.optimizers and type(trainer.strategy).__name__ != "DeepSpeedStrategy":  # whose hold copies
            check_optimizer(trainer.optimizers, dict(self._outputs.network(pl_module).named_parameters()))
        assert self._rehearsal is not None
        if self.check_teacher and self._scoring.possible:
            self._rehearsal.move_along(pl_module)
            read: Callable[[Any], Batch] = self._batches.read
            if self._calls.inputs:
                read = read_as_in_training(self._rehearsal, self._batches.target, self._batches.unwrap)
            with self._outputs.reading_teacher():
                check_teacher_score(pl_module, self.teacher, self.task, self._batches.checking_counts(read))
        self._rehearsal = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resumption.on_train_start(trainer)
        self._steps = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resumption.on_train_epoch_start(trainer)

    # In training.

    def _distilling_step(self, module: LightningModule, training_step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(training_step)
        def step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            unwrapped = self._batches.unwrap(batch)
            batch = unwrapped.batch
            if not module.trainer.training:
                return training_step(batch, *args, **kwargs)  # of a validation_step that calls it
            try:
                with self._calls.watch(module, self.objective.student_layers, once=True) as seen:
                    result = training_step(batch, *args, **kwargs)
                    if result is None:
                        raise _Skipped  # past the complaint that the student did not run
            except _Skipped:
                return None
            task_loss = result.get("loss") if isinstance(result, Mapping) else result
            if task_loss is None:
                return result  # Lightning has its say about a mapping without a loss
            check_loss(result)
            total = self._distil(module, unwrapped, seen, task_loss)
            return {**result, "loss": total} if isinstance(result, Mapping) else total

        return step

    def _distil(self, module: LightningModule, unwrapped: Unwrapped, seen: Seen, task_loss: Tensor) -> Tensor:
        student, teacher = self._outputs.of_both(unwrapped, seen, self._clock)
        total: Tensor
        total, terms = self.objective(student, teacher, self._batches.target_for(unwrapped.batch, student, seen.calls))
        if self.task_weight:  # not 0 times a NaN, which the mean over no label is
            total = self.task_weight * task_loss + total
        whole = Batch(seen.inputs[0] if seen.inputs else (unwrapped.batch,), {}, None)
        every = {**terms, "task": Term(task_loss, task_loss)}
        network = self._outputs.network(module)
        self._divergence.watch(module.trainer, total, lambda: parts_of(whole, network, student, teacher, every))
        weighted = Term(task_loss, self.task_weight * task_loss)
        driving = {**terms, "task": weighted} if self.task_weight else terms
        log_measurements(module, network, driving, self._clock, len(student.logits))
        if logs_this_step(module.trainer):
            terms = {**terms, "task": weighted}
            values = {name: Term(term.raw.detach(), term.weighted.detach()) for name, term in terms.items()}
            soft_targets = None if teacher is None or not self._scoring.possible else teacher._replace(features={})
            self._pending = _Step(total.detach(), values, soft_targets, len(student.logits))
        return total

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._steps:  # gradients may be accumulated over several batches
            if self.teacher.learns:
                self.teacher.after_step(self._outputs.network(pl_module), progress(trainer, self._steps))
            self._steps = trainer.global_step
        # Not in the step itself: the module may well log a "train/loss" of its own there, and twice is an error.
        step, self._pending = self._pending, None
        if step is not None:
            log_terms(pl_module, self.objective, step.total, step.terms, step.teacher, step.batch_size, self.task)

    # In validation and test.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.restart()
        self._outputs.place_teacher(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._outputs.place_teacher(pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._scoring.watch(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._scoring.score(pl_module, batch, "val", dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scoring.end_validation(pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._scoring.watch(pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._scoring.score(pl_module, batch, "test", dataloader_idx)

    # At the end.

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._divergence.check_weights(self._outputs.network(pl_module), self.objective.peers)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._divergence.check_weights(self._outputs.network(pl_module), self.objective.peers)

    def state_dict(self) -> dict[str, Any]:
        state, of_teacher = (
            {"losses": self.objective.state_dict(), "rng_states": rng_states()},
            self.teacher.state_dict(),
        )
        return {**state, "teacher": of_teacher} if of_teacher else state

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    def _leave(self) -> None:
        """Leave the module as it was."""
        self._scoring.leave()
        self._undo.close()
        self._rehearsal = self._pending = self._resumption.states = None
        self.objective.cpu()  # as Lightning does with the module, of which it is no part any more


class _Skipped(Exception):  # noqa: N818
    """The step returned None: a batch that is not trained on."""


@dataclass
class _Step:
    """What is logged of a step: values, no graphs."""

    total: Tensor
    terms: dict[str, Term]
    teacher: AnyOutputs | None
    batch_size: int
