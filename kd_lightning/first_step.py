"""What can be known to be wrong before the first step of a module that somebody else wrote."""

from typing import Any

from lightning.pytorch import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from kd_lightning.attachment import check_loss
from kd_lightning.batch_reader import check_count
from kd_lightning.data.contract import class_names_of
from kd_lightning.first_batches import training_batches, training_loader
from kd_lightning.outputs import AnyOutputs, Outputs, TopK
from kd_lightning.preflight import (
    check_all_logits,
    check_class_names,
    check_heads,
    check_logits,
    check_networks,
    check_next_tokens,
    check_outputs,
    check_runs_without_logits,
    check_source,
    check_top_k,
    check_trainable,
    classes_of,
    compute_once,
    first_batch,
    need_labels,
    samples_needed,
    warn_of_missing_classes,
)
from kd_lightning.rehearsal import Rehearsal, few
from kd_lightning.several_calls import check_rows, join, repeated
from kd_lightning.step_outputs import StepOutputs
from kd_lightning.student_calls import Seen
from kd_lightning.tasks import Task
from kd_lightning.tasks.batch import Unwrapped


def check_first_step(module: LightningModule, rehearsal: Rehearsal, outputs: StepOutputs, task_weight: float) -> bool:
    """Try the step on the first few samples, and make the losses' parameters of what comes out.

    Args:
        module: That is trained.
        rehearsal: A copy of it.
        outputs: Takes student's and teacher's outputs.
        task_weight: Factor of the module's own loss.

    Returns:
        Whether outputs mean something to the task, so that they can be scored.

    Raises:
        ValueError: With what was expected, what came and what to do.
    """
    objective, teacher_source, batches, task = outputs.objective, outputs.teacher, outputs.batches, outputs.task
    batches.begin()
    loader = training_loader(module)
    with batches.say_what_else_there_is():
        raw, first = first_batch(training_batches(module, loader=loader), objective, task, batches.read)
    unwrapped = batches.unwrap(raw)
    raw = unwrapped.batch
    batch, seen = _run(rehearsal, raw, outputs)
    attached, copied = _student_to_attach(module, rehearsal, outputs), outputs.network(rehearsal.module)
    check_networks(attached, teacher_source)
    check_trainable(copied)
    check_loss(rehearsal.returned, trained_by=task_weight > 0)
    reads = objective.reads_logits
    if task.gives_logits and reads:
        check_logits("student", seen.logits, 'name the layer before the {} with logits="..."')
    if reads:
        _check_student_logits(seen.logits, task)

    count = len(outputs.of_student(seen).logits) // seen.calls
    unwrapped = _first(unwrapped, count)._replace(batch=batch)
    student = task.arranged(_detached(outputs.of_student(seen, unwrapped.samples)))
    of_teacher = outputs.teacher_batches(unwrapped, seen)
    check_source(teacher_source, of_teacher[0])
    teacher_source.prepare(attached)
    with outputs.reading_teacher(in_any_case=True):
        calls = [teacher_source.dry(each, objective.teacher_layers) for each in of_teacher]
    teacher = task.arranged(join(calls))
    check_rows(student, teacher)

    batches.note_column(batches.target(batch), student)
    target, labels = repeated(batches.target(batch), seen.calls, len(student.logits)), batches.target(raw)
    for args, kwargs in seen.inputs[:1]:
        check_next_tokens(attached, task, args, kwargs, batches.target(batch))
    check_outputs(objective, student, teacher, task, read=reads)
    scored = reads or _can_be_scored(outputs, student, teacher, target)
    if (reads or (scored and objective.names_heads)) and labels is not None and need_labels(objective):
        names = class_names_of(module.trainer.datamodule)  # type: ignore[attr-defined]
        if task.gives_logits:
            check_class_names(names, student.logits)
        with batches.suggest_target(raw):
            task.check(labels, student.logits)
            check_count(target, student.logits)
        if task.over_classes:
            warn_of_missing_classes(loader, classes_of(student), names)
    elif reads:
        scored = _tells_classes(outputs, student, target)
        if scored:
            _check_kind(task, student, labels)
        batches.note_fit(target, student)

    objective.build(student, teacher, attached, teacher_source.network)
    # Of the copy, whose outputs these are: its setup may have loaded weights that the module does not have yet.
    if teacher_source.network is not None:
        heads, first_call = objective.idle_teacher_heads, outputs.without_labels(of_teacher[0])
        check_runs_without_logits("teacher", teacher_source.network, first_call, heads)
    check_heads(objective, student, teacher, copied, teacher_source.network)
    compute_once(objective, student, teacher, target)
    if reads:
        check_top_k(first.teacher, classes_of(student))
    return scored


def _run(rehearsal: Rehearsal, batch: Any, outputs: StepOutputs) -> tuple[Any, Seen]:
    """Run the step on a few samples, or on all where it wants whole batches."""
    some, layers = few(batch, samples_needed(outputs.objective)), outputs.objective.student_layers
    try:
        return some, rehearsal.run(some, layers)
    except ValueError:
        if some is batch:
            raise
        return batch, rehearsal.run(batch, layers)


def _student_to_attach(module: LightningModule, rehearsal: Rehearsal, outputs: StepOutputs) -> nn.Module:
    """Return the student itself, or the copy where the module makes it, or parts of it, only after this setup."""
    copied = outputs.network(rehearsal.module)
    try:
        student = outputs.network(module)
    except ValueError:
        return copied
    return student if dict(student.named_modules()).keys() == dict(copied.named_modules()).keys() else copied


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


def _first(unwrapped: Unwrapped, count: int) -> Unwrapped:
    """Cut what came with a batch to its first samples."""
    samples, teacher = apply_to_collection((unwrapped.samples, unwrapped.teacher), Tensor, lambda x: x[:count])
    return unwrapped._replace(samples=samples, teacher=teacher)


def _detached(outputs: Outputs) -> Outputs:
    features = {name: x.detach() for name, x in outputs.features.items()}
    return outputs._replace(logits=outputs.logits.detach(), features=features)


def _check_kind(task: Task, student: Outputs, target: Any) -> None:
    """Raise ValueError where outputs, or targets that no loss reads, are those of another task."""
    given = target if isinstance(target, Tensor) else None
    task.check_dimensions(student.logits, given)
    if given is not None:
        task.check_unread(given, student.logits)


def _tells_classes(outputs: StepOutputs, student: Outputs, target: Any) -> bool:
    """Tell whether outputs are those of the task, where no loss reads a target that would tell."""
    losses = outputs.objective.named_losses().values()
    if not outputs.task.over_classes or any(loss.over_classes for loss in losses):
        return True
    quantities = isinstance(target, Tensor) and target.is_floating_point()
    return not quantities or target.shape[1:] == student.logits.shape[1:]


def _can_be_scored(outputs: StepOutputs, student: Outputs, teacher: AnyOutputs, target: Any) -> bool:
    """Tell whether outputs that no loss reads are logits all the same."""
    if not student.logits.numel() or not (isinstance(teacher, TopK) or teacher.logits.numel()):
        return False
    try:
        check_all_logits(student, teacher)
        _check_kind(outputs.task, student, target)
    except ValueError:
        return False
    outputs.batches.note_fit(target, student)
    return True
