"""The second front door: distillation for a LightningModule that stays as it is."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from kd_lightning.batch_reader import BatchReader, check_count
from kd_lightning.checkpoint import mismatch
from kd_lightning.data.contract import class_names_of
from kd_lightning.divergence import Divergence, parts_of
from kd_lightning.first_batches import training_batches, training_loader
from kd_lightning.idle_heads import idle
from kd_lightning.logits_place import LogitsPlace
from kd_lightning.losses.base import DistillationLoss, is_finite_number
from kd_lightning.namespaces import Callback
from kd_lightning.objective import DistillationObjective, Term, find_objective
from kd_lightning.outputs import AnyOutputs, Outputs, Samples, TopK
from kd_lightning.preflight import (
    check_all_logits,
    check_class_names,
    check_heads,
    check_logits,
    check_networks,
    check_next_tokens,
    check_optimizer,
    check_outputs,
    check_parts,
    check_runs_without_logits,
    check_source,
    check_task,
    check_teacher_score,
    check_top_k,
    check_trainable,
    classes_of,
    compute_once,
    first_batch,
    need_labels,
    samples_needed,
    warn_of_missing_classes,
)
from kd_lightning.progress import check_length_is_known, progress
from kd_lightning.rehearsal import Rehearsal, few, read_as_in_training
from kd_lightning.resume import Resumption, begin_with_next_epoch, rng_states
from kd_lightning.selection import Selector, describe
from kd_lightning.several_calls import check_rows, join, repeated
from kd_lightning.student_calls import Calls, Seen, StudentCalls
from kd_lightning.tasks import Batch, Task, or_default, unwrapped
from kd_lightning.tasks.batch import Unwrapped
from kd_lightning.teachers import Ensemble, Momentum, Teacher, TeacherSource
from kd_lightning.teachers.base import BatchSource, peers_of
from kd_lightning.tracking.metrics import MetricsWithoutLabels, TeacherScores, agreement, log_terms, logs_this_step

_CHILD = "distillation"


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
            ``lambda output: output.prediction``. Its output, or ``.logits`` of that, unless given. Where one word
            names a layer and a part of the output: ``"layer:<name>"``, ``"output:<name>"``. Losses on layers alone
            need none.
        teacher_logits: The same for the teacher, or each teacher of an ensemble.
        teacher_inputs: The teacher's arguments in a batch: a key, an attribute, an index, or a function that returns a
            tensor, a tuple of positional or a mapping of keyword arguments. Needed where ``training_step`` never calls
            the student as a whole.
        target: The target in a batch: a key, an attribute, an index, or a function; its second part, or ``labels``,
            as the task reads it unless given.
        task_weight: Factor of the module's own loss; at 0 it is left out.
        check_teacher: Refuse a teacher that scores at chance on the training loader.
        task: What a batch means and what a good answer is; :class:`~kd_lightning.tasks.Classification` unless given,
            and for a language model of ``transformers`` :class:`~kd_lightning.tasks.LanguageModelling`.
        calls: Of a student that runs several times in a step, such as on two views: ``"all"`` calls, whose outputs are
            joined along the samples, and so are the teacher's for the same inputs, a target being that of each call;
            or the ``"first"``. An error unless given. The second pass of gradient checkpointing is no call.
        add_parameters: Add the losses' parameters, such as projectors, to the first group of an optimizer that leaves
            them out, as one made from ``self.model.parameters()`` does. Its learning rate, schedulers and other
            settings are theirs then.

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
        self.check_teacher, self.add_parameters = check_teacher, add_parameters
        labels_needed = any(loss.needs_labels for loss in self.objective.named_losses().values())
        self._given_task, self.task = task, or_default(task, None)
        check_task(self.task)
        self._batches = BatchReader(self.task, teacher_inputs, target, labels_needed, self._unwrap)
        self._calls = StudentCalls(
            student, LogitsPlace(logits), teacher_inputs is None, self.objective.reads_logits, calls
        )
        self._teacher_logits = LogitsPlace(teacher_logits, "teacher_logits")
        self._undo = ExitStack()
        self._rehearsal: Rehearsal | None = None
        self._pending: _Step | None = None
        self._evaluation, self._seen = ExitStack(), Seen()
        self._teacher_scores, self._metrics_without_labels = TeacherScores(self.task), MetricsWithoutLabels(self.task)
        self._scored = True
        self._steps = 0
        self._resumption = Resumption()
        self._divergence = Divergence()
        check_parts(self.teacher, self.objective)
        if self.teacher.copies_student:
            if teacher_logits is not None:
                raise ValueError(
                    f"the teacher is a copy of the student, {type(self.teacher).__name__}, expected its logits where "
                    "the student's are: leave teacher_logits= out"
                )
            self._teacher_logits = self._calls.logits
        elif teacher_logits is not None and not _running(self.teacher):
            raise ValueError(
                f"teacher_logits= is for a teacher whose network runs, got {type(self.teacher).__name__}: leave it out"
            )
        if calls == "all" and _reads_batches(self.teacher):
            raise ValueError(
                f"{type(self.teacher).__name__} reads outputs for one call of the student from a batch, expected a "
                'teacher that is called for each with calls="all": take calls="first"'
            )
        changing = list(self.objective.changing_losses)
        if changing:
            raise ValueError(
                f"losses {changing} change the student's architecture, expected a module that stays as it is: take "
                "DistillationModule, or change the network yourself where your module makes it"
            )

    # Before training, in the order of the calls.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            with suppress(ValueError):  # the module may make the student only in configure_model
                self._take_task(pl_module)
            return
        _check_module(pl_module)
        self._divergence = Divergence()
        self._rehearsal = Rehearsal(pl_module, trainer, self._calls)
        self._take_task(self._rehearsal.module)
        self._teacher_scores = TeacherScores(self.task)
        self._preflight(pl_module, self._rehearsal)
        _check_averaging(trainer, self)

        # Part of the module before configure_optimizers, so that self.parameters() has the projectors, DDP reduces
        # their gradients, clipping counts them, and they are moved along.
        pl_module.add_module(_CHILD, self.objective)
        self._undo.callback(pl_module.__delattr__, _CHILD)
        saving = pl_module.register_state_dict_post_hook(_leave_out)  # type: ignore[no-untyped-call]
        loading = pl_module.register_load_state_dict_post_hook(_is_not_missing)  # type: ignore[no-untyped-call]
        self._undo.callback(saving.remove)
        self._undo.callback(loading.remove)
        # torch.compile(module) has put a step of its own on the instance; otherwise the class has it.
        own = vars(pl_module).get("training_step")
        self._undo.callback(_restore_step, pl_module, own)
        pl_module.training_step = self._distilling_step(pl_module, pl_module.training_step)  # type: ignore[method-assign]

    def _take_task(self, module: LightningModule) -> None:
        """Take the task that was given, or that of the student, which is known only now."""
        task = or_default(self._given_task, self._calls.student_of(module))
        if vars(task) != vars(self.task) or type(task) is not type(self.task):
            self.task = self._batches.task = task
            self._teacher_scores, self._metrics_without_labels = TeacherScores(task), MetricsWithoutLabels(task)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        begin_with_next_epoch(trainer, checkpoint)
        if self._rehearsal is not None:
            self.teacher.prepare(self._calls.student_of(pl_module))  # ahead of its state, which comes next

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
        self.teacher.prepare(self._calls.student_of(pl_module))
        self._place_teacher(pl_module)
        self.teacher.start(self._calls.student_of(pl_module))
        self.objective.attach(self._calls.student_of(pl_module), self.teacher.network)
        optimized = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        missing = [name for name, p in self.objective.named_parameters() if p.requires_grad and id(p) not in optimized]
        if missing and self.add_parameters:
            parameters = dict(self.objective.named_parameters())
            _add_to_optimizer(trainer, [parameters[name] for name in missing])
        elif missing:
            raise ValueError(
                f"the optimizer leaves out {len(missing)} parameters of the losses ({', '.join(missing[:3])}), "
                "expected them to be trained: pass Distillation(..., add_parameters=True), which adds them to its "
                "first group, build it from self.parameters() in configure_optimizers, or take losses without "
                "projectors"
            )
        if trainer.optimizers and type(trainer.strategy).__name__ != "DeepSpeedStrategy":  # whose hold copies
            check_optimizer(trainer.optimizers, dict(self._calls.student_of(pl_module).named_parameters()))
        assert self._rehearsal is not None
        if self.check_teacher and self._scored:
            self._rehearsal.move_along(pl_module)
            read: Callable[[Any], Batch] = self._batches.read
            if self._calls.inputs:
                read = read_as_in_training(self._rehearsal, self._batches.target, self._unwrap)
            with self._read_teacher():
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
            unwrapped = self._unwrap(batch)
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
            _check_loss(result)
            total = self._distil(module, unwrapped, seen, task_loss)
            return {**result, "loss": total} if isinstance(result, Mapping) else total

        return step

    def _distil(self, module: LightningModule, unwrapped: Unwrapped, seen: Seen, task_loss: Tensor) -> Tensor:
        student = self.task.arranged(self._outputs_of(seen, repeated(unwrapped.samples, seen.calls)))
        teacher = None
        if self.objective.needs_teacher:
            with self._read_teacher(), idle(self.teacher.network, self.objective.idle_teacher_heads):
                batches = map(self._without_labels, self._batches_of_teacher(unwrapped, seen))
                teacher = join([self.teacher(batch, self.objective.teacher_layers) for batch in batches])
            teacher = self.task.arranged(teacher)
            check_rows(student, teacher)
        total: Tensor
        total, terms = self.objective(student, teacher, self._batches.target_for(unwrapped.batch, student, seen.calls))
        if self.task_weight:  # not 0 times a NaN, which the mean over no label is
            total = self.task_weight * task_loss + total
        whole = Batch(seen.inputs[0] if seen.inputs else (unwrapped.batch,), {}, None)
        every = {**terms, "task": Term(task_loss, task_loss)}
        network = self._calls.student_of(module)
        self._divergence.watch(module.trainer, total, lambda: parts_of(whole, network, student, teacher, every))
        if logs_this_step(module.trainer):
            terms = {**terms, "task": Term(task_loss, self.task_weight * task_loss)}
            values = {name: Term(term.raw.detach(), term.weighted.detach()) for name, term in terms.items()}
            soft_targets = None if teacher is None or not self._scored else teacher._replace(features={})
            self._pending = _Step(total.detach(), values, soft_targets, len(student.logits))
        return total

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._steps:  # gradients may be accumulated over several batches
            if self.teacher.learns:
                self.teacher.after_step(self._calls.student_of(pl_module), progress(trainer, self._steps))
            self._steps = trainer.global_step
        # Not in the step itself: the module may well log a "train/loss" of its own there, and twice is an error.
        step, self._pending = self._pending, None
        if step is not None:
            log_terms(pl_module, self.objective, step.total, step.terms, step.teacher, step.batch_size, self.task)

    # In validation and test.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._place_teacher(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._place_teacher(pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seen = self._evaluation.enter_context(self._calls.watch(pl_module))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._score(pl_module, batch, "val", dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._teacher_scores.settled = not (trainer.sanity_checking or self.teacher.learns)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seen = self._evaluation.enter_context(self._calls.watch(pl_module))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._score(pl_module, batch, "test", dataloader_idx)

    def _score(self, module: LightningModule, batch: Any, prefix: str, dataloader_idx: int) -> None:
        self._evaluation.close()
        seen, self._seen = self._seen, Seen()
        if not self._scored or not seen.outputs or (self._calls.inputs and not seen.inputs):
            return  # how the module validates is its own affair
        try:
            logits = seen.logits
        except ValueError:
            if self.objective.reads_logits:
                raise
            return  # there are none
        unwrapped = self._unwrap(batch)
        of_teacher = self._batches_of_teacher(unwrapped, seen)[0]
        if not self.teacher.can_teach(of_teacher):
            return
        with torch.no_grad(), module.trainer.precision_plugin.forward_context(), self._read_teacher():
            # Of several forward passes the first: student and teacher see the same there.
            teacher = self.task.arranged(self.teacher(of_teacher))
        student = self.task.arranged(Outputs(logits))
        if not self.task.labelled:
            self._metrics_without_labels.log(module, prefix, student, teacher, dataloader_idx)
            return
        target = self._batches.target_or_none(unwrapped.batch)
        if target is not None and not self._batches.fits(target, teacher):
            target = None
        same = agreement(self.task, student, teacher, target)
        if same is None:
            return
        if same.numel():
            name = f"{prefix}/agreement"
            module.log(name, same.mean(), on_step=False, on_epoch=True, sync_dist=True, batch_size=same.numel())
        if prefix == "val" and target is not None:
            self._teacher_scores.log(module, teacher, target, dataloader_idx)

    # At the end.

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._divergence.check_weights(self._calls.student_of(pl_module), self.objective.peers)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._divergence.check_weights(self._calls.student_of(pl_module), self.objective.peers)

    def state_dict(self) -> dict[str, Any]:
        state = {"losses": self.objective.state_dict(), "rng_states": rng_states()}
        return {**state, "teacher": self.teacher.state_dict()} if self.teacher.learns else state

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    def _leave(self) -> None:
        """Leave the module as it was."""
        self._evaluation.close()
        self._undo.close()
        self._rehearsal = self._pending = self._resumption.states = None
        self._seen = Seen()
        self.objective.cpu()  # as Lightning does with the module, of which it is no part any more

    def _preflight(self, module: LightningModule, rehearsal: Rehearsal) -> None:
        self._scored = True
        self._batches.begin()
        loader = training_loader(module)
        batches = training_batches(module, loader=loader)
        with self._batches.say_what_else_there_is():
            raw, first = first_batch(batches, self.objective, self.task, self._batches.read)
        unwrapped = self._unwrap(raw)
        raw = unwrapped.batch
        batch = few(raw, samples_needed(self.objective))
        try:
            seen = rehearsal.run(batch, self.objective.student_layers)
        except ValueError:
            if batch is raw:
                raise
            batch = raw  # a step may want whole batches
            seen = rehearsal.run(batch, self.objective.student_layers)
        attached = self._student_to_attach(module, rehearsal)
        check_networks(attached, self.teacher)
        check_trainable(self._calls.student_of(rehearsal.module))
        _check_loss(rehearsal.returned, trained_by=self.task_weight > 0)
        reads = self.objective.reads_logits
        if self.task.gives_logits and reads:
            check_logits("student", seen.logits, 'name the layer before the {} with logits="..."')
        if reads:
            _check_student_logits(seen.logits, self.task)
        seen_outputs = self._outputs_of(seen, None)
        unwrapped = _first(unwrapped, len(seen_outputs.logits) // seen.calls)._replace(batch=batch)
        of_teacher = self._batches_of_teacher(unwrapped, seen)
        check_source(self.teacher, of_teacher[0])
        self.teacher.prepare(attached)
        with self._read_teacher(in_any_case=True):
            layers = self.objective.teacher_layers
            teacher = self.task.arranged(join([self.teacher.dry(batch, layers) for batch in of_teacher]))
        features = {name: x.detach() for name, x in seen.features.items()}
        samples = repeated(unwrapped.samples, seen.calls)
        student = self.task.arranged(Outputs(seen_outputs.logits.detach(), features, samples))
        check_rows(student, teacher)
        target = repeated(self._batches.target(batch), seen.calls, len(student.logits))
        for args, kwargs in seen.inputs[:1]:
            check_next_tokens(attached, self.task, args, kwargs, self._batches.target(batch))
        check_outputs(self.objective, student, teacher, self.task, read=reads)
        if not reads:
            self._scored = self._can_be_scored(student, teacher, target)
        logits = reads or (self._scored and self.objective.names_heads)
        if logits and first.target is not None and need_labels(self.objective):
            names = class_names_of(module.trainer.datamodule)  # type: ignore[attr-defined]
            if self.task.gives_logits:
                check_class_names(names, student.logits)
            with self._batches.suggest_target(raw):
                self.task.check(first.target, student.logits)
                check_count(target, student.logits)
            if self.task.over_classes:
                warn_of_missing_classes(loader, classes_of(student), names)
        elif reads:
            self._scored = self._tells_classes(student, target)
            if self._scored:
                self._check_kind(student, first.target)
            self._batches.note_fit(target, student)
        self.objective.build(student, teacher, attached, self.teacher.network)
        # Of the copy, whose outputs these are: its setup may have loaded weights that the module does not have yet.
        if self.teacher.network is not None:
            heads, first_call = self.objective.idle_teacher_heads, self._without_labels(of_teacher[0])
            check_runs_without_logits("teacher", self.teacher.network, first_call, heads)
        check_heads(self.objective, student, teacher, self._calls.student_of(rehearsal.module), self.teacher.network)
        compute_once(self.objective, student, teacher, target)
        if reads:
            check_top_k(first.teacher, classes_of(student))

    def _check_kind(self, student: Outputs, target: Any) -> None:
        """Raise ValueError where outputs, or targets that no loss reads, are those of another task."""
        given = target if isinstance(target, Tensor) else None
        self.task.check_dimensions(student.logits, given)
        if given is not None:
            self.task.check_unread(given, student.logits)

    def _tells_classes(self, student: Outputs, target: Any) -> bool:
        """Tell whether outputs are those of the task, where no loss reads a target that would tell."""
        if not self.task.over_classes or any(loss.over_classes for loss in self.objective.named_losses().values()):
            return True
        quantities = isinstance(target, Tensor) and target.is_floating_point()
        return not quantities or target.shape[1:] == student.logits.shape[1:]

    def _can_be_scored(self, student: Outputs, teacher: AnyOutputs, target: Any) -> bool:
        """Tell whether outputs that no loss reads are logits all the same."""
        if not student.logits.numel() or not (isinstance(teacher, TopK) or teacher.logits.numel()):
            return False
        try:
            check_all_logits(student, teacher)
            self._check_kind(student, target)
        except ValueError:
            return False
        self._batches.note_fit(target, student)
        return True

    def _outputs_of(self, seen: Seen, samples: Samples | None) -> Outputs:
        try:
            logits = seen.logits
        except ValueError:
            if self.objective.reads_logits:
                raise
            feature = next(iter(seen.features.values()))
            logits = feature.new_zeros(len(feature), 0)
        return Outputs(logits, seen.features, samples)

    def _student_to_attach(self, module: LightningModule, rehearsal: Rehearsal) -> nn.Module:
        """Return the student itself, or the copy where the module makes it, or parts of it, only after this setup."""
        copied = self._calls.student_of(rehearsal.module)
        try:
            student = self._calls.student_of(module)
        except ValueError:
            return copied
        return student if dict(student.named_modules()).keys() == dict(copied.named_modules()).keys() else copied

    def _unwrap(self, batch: Any) -> Unwrapped:
        return unwrapped(batch, bare=self.teacher.in_batch)

    def _batches_of_teacher(self, unwrapped: Unwrapped, seen: Seen) -> list[Batch]:
        """Return what the teacher is called with, in the order of the student's calls."""
        own = not self._calls.inputs
        calls = [self._batches.arguments(unwrapped.batch)] if own else seen.inputs[: seen.calls]
        return [Batch(args, kwargs, None, unwrapped.samples, unwrapped.teacher) for args, kwargs in calls]

    def _without_labels(self, batch: Batch) -> Batch:
        """Leave labels out of a teacher's arguments where it gives no logits, of which it would compute a loss."""
        if not self.objective.idle_teacher_heads:
            return batch
        keys = self.task.label_keys
        return batch._replace(kwargs={name: value for name, value in batch.kwargs.items() if name not in keys})

    @contextmanager
    def _read_teacher(self, in_any_case: bool = False) -> Iterator[None]:
        """Take the logits out of what the teacher's networks return, while the context lives.

        Args:
            in_any_case: Also where a teacher takes them out by itself, to say what it would not.
        """
        place = self._teacher_logits
        with ExitStack() as hooks:
            needed = self.objective.reads_logits
            if in_any_case or place.selector is not None or not needed:
                for network in dict.fromkeys(_running(self.teacher)):
                    hooks.enter_context(place.alone(network, needed))
            yield

    def _place_teacher(self, module: LightningModule) -> None:
        student = self._calls.student_of(module)
        floating = [p.dtype for p in student.parameters() if p.is_floating_point()]
        self.teacher.to(module.device, floating[0] if floating else None)


def _first(unwrapped: Unwrapped, count: int) -> Unwrapped:
    """Cut what came with a batch to its first samples."""
    samples, teacher = apply_to_collection((unwrapped.samples, unwrapped.teacher), Tensor, lambda x: x[:count])
    return unwrapped._replace(samples=samples, teacher=teacher)


def _running(teacher: TeacherSource) -> list[nn.Module]:
    """Return the networks that a source calls for its outputs."""
    if isinstance(teacher, Ensemble):
        return [network for member in teacher.teachers for network in _running(member)]
    if teacher.peers:
        return list(teacher.peers.values())
    runs = isinstance(teacher, Teacher | Momentum) and teacher.network is not None
    return [teacher.network] if runs and teacher.network is not None else []


def _reads_batches(teacher: TeacherSource) -> bool:
    if isinstance(teacher, Ensemble):
        return any(_reads_batches(member) for member in teacher.teachers)
    return isinstance(teacher, BatchSource)


class _Skipped(Exception):  # noqa: N818
    """The step returned None: a batch that is not trained on."""


@dataclass
class _Step:
    """What is logged of a step: values, no graphs."""

    total: Tensor
    terms: dict[str, Term]
    teacher: AnyOutputs | None
    batch_size: int


def _check_module(module: LightningModule) -> None:
    name = type(module).__name__
    if find_objective(module) is not None:
        raise ValueError(
            f"{name} is distilled already: one DistillationModule, or one Distillation, with all the losses"
        )
    if hasattr(module, _CHILD):
        raise ValueError(f"{name} has an attribute {_CHILD!r} of its own, where the losses are to hang: rename it")
    if not module.automatic_optimization:
        raise ValueError(
            f"{name} optimizes manually, expected automatic optimization: its training_step makes the backward pass "
            "before a loss could be added; call kd_lightning.objective.DistillationObjective there, in one line, as "
            'the README shows under "Manual optimization"'
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(f"{name}.training_step takes dataloader_iter, expected it to take the batch")


def _check_loss(returned: Any, trained_by: bool = False) -> None:
    """Raise ValueError for what ``training_step`` returns as its loss, and is none.

    Args:
        returned: By the step; None where it skips the batch.
        trained_by: Whether it is part of the total.
    """
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if loss is None:
        return
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"training_step returns {describe(loss)}, expected its loss, a tensor of one number: return that, or a "
            "mapping that has it as 'loss'"
        )
    if trained_by and not loss.requires_grad:
        raise ValueError(
            "the loss that training_step returns has no graph, expected one to train by: is it detached, or computed "
            "under torch.no_grad()? task_weight=0 leaves it out"
        )


def _check_averaging(trainer: Trainer, callback: Distillation) -> None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    earlier = callbacks[: callbacks.index(callback)]
    # As WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging call their copy, by which they go through
    # both modules' parameters side by side.
    name = next((type(c).__name__ for c in earlier if hasattr(c, "_average_model")), None)
    if name is not None and next(callback.objective.parameters(), None) is not None:
        raise ValueError(
            f"{name} has copied the module before it gets the projectors, expected to come later: put Distillation "
            "before it in callbacks"
        )


def _check_student_logits(logits: Tensor, task: Task) -> None:
    if not logits.requires_grad:
        raise ValueError(
            "the student's outputs have no graph, expected losses on them to train it: does it run under "
            "torch.no_grad(), on detached inputs to a frozen part, or in a checkpoint(..., use_reentrant=True)? Take "
            "use_reentrant=False there"
        )
    if task.over_classes and logits.ndim < 2:
        raise ValueError(
            f"the student's logits have the shape {tuple(logits.shape)}, expected one a class for each sample, (B, C): "
            "a softmax would be over the samples; name others with logits=, or pass task= for one number a sample"
        )


def _add_to_optimizer(trainer: Trainer, parameters: list[nn.Parameter]) -> None:
    # Into a group that is there, not one of their own: schedulers are made already, and count the groups. And before
    # a checkpoint's optimizer states are loaded, which Lightning does after on_fit_start.
    optimizer = trainer.optimizers[0]
    made = type(optimizer).__name__
    if optimizer.state or type(trainer.strategy).__name__ in ("DeepSpeedStrategy", "FSDPStrategy"):
        why = f"with {type(trainer.strategy).__name__}" if not optimizer.state else "as it has made its state already"
        raise ValueError(
            f"add_parameters=True cannot add to {made} {why}, expected to before the first step: build the optimizer "
            "from self.parameters() in configure_optimizers"
        )
    optimizer.param_groups[0]["params"].extend(parameters)


def _restore_step(module: LightningModule, own: Callable[..., Any] | None) -> None:
    del module.training_step
    if own is not None:
        module.training_step = own  # type: ignore[method-assign]


# Plain functions: torch sets an attribute on them, and a copy of the module has them too.
def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: object) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}{_CHILD}.")]:
        del state[key]


def _is_not_missing(module: nn.Module, incompatible: Any) -> None:
    own = tuple(f".{_CHILD}.{name}" for name in getattr(module, _CHILD).state_dict())
    # With a prefix where the module is part of another, as in an AveragedModel.
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not f".{k}".endswith(own)]
