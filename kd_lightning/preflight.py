"""What can be known to be wrong before the first training step."""

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from kd_lightning.checkpoint import mismatch
from kd_lightning.dry_forward import dry_forward
from kd_lightning.lookahead import SCAN, training_batches
from kd_lightning.objective import TOP_K_REMEDY, DistillationObjective
from kd_lightning.outputs import Outputs, class_dim, classes_last
from kd_lightning.tasks import Batch, Classification
from kd_lightning.teachers import TeacherSource

_TEACHER_SAMPLES = 256
_TOO_FEW_TO_JUDGE = 100


def check_parts(teacher: TeacherSource | None, objective: DistillationObjective) -> None:
    """Raise ValueError when a loss needs a teacher, or its network, and none is there."""
    if teacher is None and objective.needs_teacher:
        names = [name for name, loss in objective.named_losses().items() if loss.needs_teacher]
        raise ValueError(f"losses {names} need a teacher, got teacher=None: pass a Teacher, or leave these losses out")
    looking = [name for name, loss in objective.named_losses().items() if loss.needs_teacher_network]
    if looking and teacher is not None and teacher.network is None:
        raise ValueError(
            f"losses {looking} look into the teacher's network, expected one that is there, got "
            f"{type(teacher).__name__}: pass Teacher(network), or leave these losses out"
        )


def check_source(teacher: TeacherSource | None, batch: Batch) -> None:
    """Raise ValueError for a teacher's outputs that nobody would read."""
    if teacher is not None and teacher.network is not None and not teacher.in_batch and batch.teacher is not None:
        raise ValueError(
            "the batches bring a teacher's outputs, which the network that is given as teacher would not read: pass "
            "teacher=FromBatch(), or leave them out of the batches"
        )


def check_checkpoint(state: Mapping[str, Tensor], student: nn.Module) -> None:
    """Raise ValueError when a checkpoint does not hold this student."""
    problem = mismatch(student, state)
    if problem:
        raise ValueError(f"the checkpoint does not fit the student {type(student).__name__}: {problem}")


def dry_run(
    batches: Iterable[Any],
    student: nn.Module,
    teacher: TeacherSource | None,
    objective: DistillationObjective,
    task: Classification,
) -> None:
    """Run both networks on a few samples of the training, build the losses, compute them once.

    Leaves networks and random number generators as they were.

    Args:
        batches: Of the training; see :func:`training_batches` and :func:`loader_batches`.
        student: Without a trace of this afterwards.
        teacher: Likewise.
        objective: Has its projectors afterwards.
        task: Reads the batches.

    Raises:
        ValueError: With what was expected, what came and what to do.
    """
    _, batch = first_batch(batches, objective, task)
    few = _take(_labelled_first(batch, task), samples_needed(objective), _size(batch))
    target = few.target

    def student_outputs() -> Outputs:
        outputs = dry_forward("student", student, few.args, few.kwargs, objective.student_layers)
        return outputs._replace(samples=few.samples)

    check_source(teacher, few)
    if teacher is not None:
        teacher.prepare(student)
    first, teacher_outputs = student_outputs(), None
    if teacher is not None:
        teacher_outputs = teacher.dry(few, objective.teacher_layers)
    check_outputs(objective, first, teacher_outputs, target, task)
    objective.build(first, teacher_outputs, student, teacher.network if teacher is not None else None)
    built = student_outputs() if objective.changes_student else first
    compute_once(objective, built, teacher_outputs, target)
    check_top_k(batch.teacher, _classes(first))
    if batch.target is not None:
        check_labels(batch.target, _classes(first), task)


def first_batch(batches: Iterable[Any], objective: DistillationObjective, task: Classification) -> tuple[Any, Batch]:
    """Check the first batch of a training, the first labelled one where a loss needs labels.

    Returns:
        The batch as it came, and as the task reads it.

    Raises:
        ValueError: For an empty loader, NaN in the inputs, missing labels, and a batch smaller than a loss needs.
    """
    empty = True
    labels_needed = _need_labels(objective)
    for raw in islice(batches, SCAN):
        empty = False
        batch = task.read(raw)
        _check_finite(batch)
        if not labels_needed or _labelled(batch, task):
            break
    else:
        if empty:
            raise ValueError(
                "the training loader is empty, expected at least one batch: is the data set smaller than a batch with "
                "drop_last=True, or its folder wrong?"
            )
        raise ValueError(
            f"losses {labels_needed} need labels, got none in the first {SCAN} training batches (all -100, or no "
            "target): give the labels, or leave these losses out for unlabelled data"
        )
    size = _size(batch)
    name, loss = max(objective.named_losses().items(), key=lambda item: item[1].min_batch_size)
    if size is not None and size < loss.min_batch_size:
        raise ValueError(
            f"loss {name!r} compares samples and needs a batch of at least {loss.min_batch_size}, got {size}: raise "
            "the batch size"
        )
    return raw, batch


def samples_needed(objective: DistillationObjective) -> int:
    """Return how many samples the losses can be computed on, 2 at least."""
    return max(2, *(loss.min_batch_size for loss in objective.named_losses().values()))


def check_outputs(
    objective: DistillationObjective,
    student: Outputs,
    teacher: Outputs | None,
    target: Tensor | None,
    task: Classification,
) -> None:
    """Compare classes, labels and whether the samples are known.

    Raises:
        ValueError: With what was expected, what came and what to do.
    """
    for role, outputs in (("student", student), ("teacher", teacher)):
        if outputs is not None and outputs.top_k is None:
            check_logits(role, outputs.logits)
    for i, logits in enumerate(teacher.members.logits if teacher is not None and teacher.members is not None else ()):
        check_logits(f"teacher {i} of the ensemble", logits)
    losses = objective.named_losses()
    if teacher is not None and teacher.top_k is not None:
        refused = [name for name, loss in losses.items() if loss.needs_teacher and not loss.takes_top_k]
        if refused:
            raise ValueError(
                f"losses {refused} read the teacher's logits of all classes, got its "
                f"{teacher.top_k.indices.shape[-1]} best: {TOP_K_REMEDY}"
            )
        check_top_k(teacher, _classes(student))
    comparing = [name for name, loss in losses.items() if loss.needs_teacher and loss.needs_same_classes]
    if comparing and teacher is not None and teacher.top_k is None and _classes(teacher) != _classes(student):
        raise ValueError(
            f"the student has {_classes(student)} classes and the teacher {_classes(teacher)}, expected the same "
            f"classes in the same order, as losses {comparing} compare them: set num_classes, or slice the teacher's "
            "logits in a module around it"
        )
    remembering = [name for name, loss in losses.items() if loss.needs_sample_ids]
    if remembering and student.samples is None:
        raise ValueError(
            f"losses {remembering} remember samples, expected batches that say which samples they hold: wrap the "
            "training set, DataLoader(kd_lightning.data.WithIds(dataset), ...)"
        )
    if target is not None:
        check_labels(target, _classes(student), task)


def compute_once(
    objective: DistillationObjective, student: Outputs, teacher: Outputs | None, target: Tensor | None
) -> None:
    """Compute the losses, in eval mode: nothing is remembered of these samples.

    Raises:
        ValueError: For a loss that is not finite.
    """
    mode = objective.training
    objective.eval()
    with torch.no_grad():
        device = student.logits.device
        total, _ = objective(
            student,
            None if teacher is None else move_data_to_device(teacher, device),
            None if target is None else target.to(device),
        )
    objective.train(mode)
    if not torch.isfinite(total):
        raise ValueError(
            f"the losses give {total.item()} before the first step, expected a finite value: look for NaN or infinite "
            "weights in student and teacher"
        )


def check_top_k(teacher: Outputs | None, classes: int) -> None:
    """Raise ValueError where a teacher's best classes are not the student's, come twice, or are of no probability."""
    if teacher is None or teacher.top_k is None:
        return
    indices, log_probs = teacher.top_k
    filled = log_probs > -math.inf
    wrong = indices[filled & ((indices < 0) | (indices >= classes))]
    if wrong.numel():
        raise ValueError(
            f"the teacher's best classes hold {int(wrong[0])}, expected 0 to {classes - 1}, as the student has "
            f"{classes} classes: set num_classes, or map the teacher's classes to the student's"
        )
    mass = log_probs.exp().sum(-1)
    if not bool((mass <= 1 + 1e-2).all()):
        raise ValueError(
            f"the teacher's best classes have a probability of {mass.max():.3g} together, expected log-probabilities "
            "at T = 1 of a sum up to 1: got logits or probabilities? take log_softmax over all classes, then the best"
        )
    ordered = torch.where(filled, indices, -1 - torch.arange(indices.shape[-1], device=indices.device)).sort(-1).values
    if bool((ordered.diff(dim=-1) == 0).any()):
        raise ValueError("the teacher's best classes hold a class twice, expected different ones: add up what belongs")


def check_labels(target: Tensor, classes: int, task: Classification) -> None:
    """Raise ValueError for a label that is no class, or probabilities over other classes."""
    if target.is_floating_point() and target.shape[class_dim(target)] != classes:
        got = target.shape[class_dim(target)]
        raise ValueError(f"the targets are probabilities over {got} classes, expected {classes}")
    labels = task.labels(target)
    wrong = labels[((labels < 0) & (labels != -100)) | (labels >= classes)]
    if wrong.numel():
        raise ValueError(
            f"label {int(wrong[0])} is out of range, expected 0 to {classes - 1}, or -100 for an unlabelled sample: "
            "set num_classes to that of the data set, or map the labels"
        )


def check_logits(role: str, logits: Tensor, remedy: str = "leave the softmax out of its forward") -> None:
    """Raise ValueError for probabilities: no value negative, and each row's sum 1."""
    rows = classes_last(logits.detach()).float()
    if rows.shape[-1] > 1 and bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() < 1e-2).all()):
        raise ValueError(
            f"expected logits from the {role}, got probabilities (no output is negative, each row sums to 1): {remedy}"
        )


@torch.no_grad()
def check_teacher_accuracy(module: LightningModule, teacher: TeacherSource, task: Classification) -> None:
    """Print the teacher's accuracy on some training samples; refuse a teacher at chance.

    Raises:
        ValueError: For an accuracy not above chance (1/C plus three standard errors), or labels out of range.
    """
    if teacher.learns:
        return
    precision = module.trainer.precision_plugin
    correct = count = classes = 0
    for raw in training_batches(module, SCAN):
        batch = task.read(precision.convert_input(move_data_to_device(raw, module.device)))
        if batch.target is None:
            return
        if not teacher.can_teach(batch):
            continue
        with precision.forward_context():
            outputs = teacher(batch)
        if outputs.top_k is None:
            classes = _classes(outputs)
            check_labels(batch.target, classes, task)
        else:
            classes = max(classes, int(outputs.top_k.indices.max()) + 1)
        hits = task.correct_outputs(outputs, batch.target)
        correct, count = correct + int(hits.sum()), count + hits.numel()
        if count >= _TEACHER_SAMPLES:
            break
    if count == 0:
        return
    accuracy, chance = correct / count, 1 / classes
    rank_zero_info(f"teacher: {accuracy:.1%} on {count} training samples (chance is {chance:.1%})")
    if count >= _TOO_FEW_TO_JUDGE and accuracy <= chance + 3 * math.sqrt(chance * (1 - chance) / count):
        raise ValueError(
            f"the teacher is at chance on this loader: {accuracy:.1%} on {count} samples of {classes} classes, "
            f"expected well above {chance:.1%}: is the normalisation another than in its training, is the order of the "
            "classes, or were its weights never loaded? check_teacher=False (teacher.check=false on the command "
            "line) trains on it all the same"
        )


def _classes(outputs: Outputs) -> int:
    return outputs.logits.shape[class_dim(outputs.logits)]


def _check_finite(batch: Batch) -> None:
    for x in (*batch.args, *batch.kwargs.values()):
        if isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all():
            bad = int((~x.isfinite()).sum())
            raise ValueError(
                f"the training inputs hold {bad} NaN or infinite values in a batch of shape {tuple(x.shape)}, expected "
                "finite numbers: look for a division by a standard deviation of zero, or a broken file"
            )


def _need_labels(objective: DistillationObjective) -> list[str]:
    return [name for name, loss in objective.named_losses().items() if loss.needs_labels and loss.weight > 0]


def _labelled(batch: Batch, task: Classification) -> bool:
    return batch.target is not None and bool((task.labels(batch.target) != -100).any())


def _labelled_first(batch: Batch, task: Classification) -> Batch:
    """Sort a batch so that the few samples taken from it include labelled ones."""
    if batch.target is None or batch.target.ndim != 1:
        return batch
    order = torch.argsort((task.labels(batch.target) == -100).long(), stable=True)
    return Batch(*(_map(lambda x: x[order] if len(x) == len(order) else x, part) for part in batch))


def _take(batch: Batch, count: int, size: int | None) -> Batch:
    if size is None:
        return batch
    return Batch(*(_map(lambda x: x[:count] if len(x) == size else x, part) for part in batch))


def _map(function: Any, part: Any) -> Any:
    return apply_to_collection(part, Tensor, lambda x: function(x) if x.ndim else x)


def _size(batch: Batch) -> int | None:
    tensors = [x for x in (*batch.args, *batch.kwargs.values()) if isinstance(x, Tensor) and x.ndim]
    return len(tensors[0]) if tensors else None
