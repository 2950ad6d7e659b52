"""Run both networks on a few samples of the training, and compute the losses once."""

from collections.abc import Iterable, Sequence
from traceback import walk_tb
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from kd_lightning.dry_forward import dry_forward
from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import AnyOutputs, Outputs, TopK
from kd_lightning.preflight.batches import check_precision, check_source, first_batch, take
from kd_lightning.preflight.heads import check_heads, check_runs_without_logits
from kd_lightning.preflight.labels import check_class_names
from kd_lightning.preflight.networks import check_networks, check_trainable
from kd_lightning.preflight.next_tokens import check_next_tokens
from kd_lightning.preflight.outputs import check_logits, check_outputs, check_top_k, classes_of
from kd_lightning.selection import describe
from kd_lightning.tasks import Task
from kd_lightning.teachers import TeacherSource


def dry_run(
    batches: Iterable[Any],
    student: nn.Module,
    teacher: TeacherSource | None,
    objective: DistillationObjective,
    task: Task,
    class_names: Sequence[str] | None = None,
    any_precision: bool = True,
) -> int:
    """Run both networks on a few samples of the training, build the losses, compute them once.

    Leaves networks and random number generators as they were.

    Args:
        batches: Of the training; see :func:`training_batches` and :func:`loader_batches`.
        student: Without a trace of this afterwards.
        teacher: Likewise.
        objective: Has its projectors afterwards.
        task: Says what the batches and the outputs mean.
        class_names: Those of the data, where it names them.
        any_precision: Whether inputs may be of another precision than the student, as the Trainer converts them.

    Returns:
        The student's number of outputs: classes, labels or values.

    Raises:
        ValueError: With what was expected, what came and what to do.
    """
    check_networks(student, teacher)
    check_trainable(student)
    _, batch = first_batch(batches, objective, task)
    check_next_tokens(student, task, batch.args, batch.kwargs, batch.target)
    if not any_precision:
        check_precision(batch, student)
    few = take(batch, samples_needed(objective), task)

    def student_outputs() -> Outputs:
        outputs = dry_forward("student", student, few.args, few.kwargs, objective.student_layers, with_graph=True)
        if task.gives_logits:
            check_logits("student", outputs.logits)
        features = {name: x.detach() for name, x in outputs.features.items()}
        logits = task.arrange(outputs.logits.detach())
        return outputs._replace(logits=logits, features=features, samples=few.samples)

    check_source(teacher, few)
    if teacher is not None:
        teacher.prepare(student)
    first, teacher_outputs = student_outputs(), None
    if teacher is not None:
        teacher_outputs = task.arranged(teacher.dry(few, objective.teacher_layers))
    if task.gives_logits:
        check_class_names(class_names, first.logits)
    check_outputs(objective, first, teacher_outputs, task)
    if batch.target is not None:
        task.check(batch.target, first.logits)
    task.check_dimensions(first.logits, batch.target)
    objective.build(first, teacher_outputs, student, teacher.network if teacher is not None else None)
    check_heads(objective, first, teacher_outputs, student, teacher.network if teacher is not None else None)
    check_runs_without_logits("student", student, few, objective.idle_student_heads)
    if teacher is not None and teacher.network is not None:
        check_runs_without_logits("teacher", teacher.network, few, objective.idle_teacher_heads)
    built = student_outputs() if objective.changing_losses else first
    compute_once(objective, built, teacher_outputs, few.target)
    check_top_k(batch.teacher, classes_of(first))
    return classes_of(first)


def samples_needed(objective: DistillationObjective) -> int:
    """Return how many samples the losses can be computed on, 2 at least."""
    return max(2, *(loss.min_batch_size for loss in objective.named_losses().values()))


def compute_once(
    objective: DistillationObjective, student: Outputs, teacher: AnyOutputs | None, target: Tensor | None
) -> None:
    """Compute the losses, in eval mode: nothing is remembered of these samples.

    Raises:
        ValueError: For a loss that is not finite.
    """
    modes = {module: module.training for module in objective.modules()}  # peers may have parts that stay in eval mode
    objective.eval()
    with torch.no_grad():
        device = student.logits.device
        try:
            total, _ = objective(
                student,
                None if teacher is None else move_data_to_device(teacher, device),
                None if target is None else target.to(device),
            )
        except (RuntimeError, TypeError, LookupError, AttributeError) as error:
            frames = [frame for frame, _ in walk_tb(error.__traceback__)]
            failed = {
                f"{name!r} ({type(loss).__name__})": loss
                for name, loss in objective.named_losses().items()
                if any(frame.f_locals.get("self") is loss for frame in frames)
            }
            got = [f"of the student {tuple(student.logits.shape)}"]
            if teacher is not None:
                of_teacher = teacher.indices if isinstance(teacher, TopK) else teacher.logits
                got.append(f"of the teacher {tuple(of_teacher.shape)}")
            raise ValueError(
                f"loss {', '.join(failed)} fails on outputs {' and '.join(got)}, {describe(target)} as target: "
                f"{type(error).__name__}: {str(error).partition(chr(10))[0]}; expected one that takes them: look at "
                "its layers, its arguments and the target's shape"
            ) from error
    for module, mode in modes.items():
        module.training = mode
    if not torch.isfinite(total):
        raise ValueError(
            f"the losses give {total.item()} before the first step, expected a finite value: look for NaN or infinite "
            "weights in student and teacher"
        )
