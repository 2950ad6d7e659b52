"""The first batch of a training, and the few samples of it that everything is tried on."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from kd_lightning.first_batches import SCAN
from kd_lightning.objective import DistillationObjective
from kd_lightning.tasks import Batch, Task
from kd_lightning.teachers import TeacherSource


def first_batch(
    batches: Iterable[Any], objective: DistillationObjective, task: Task, read: Callable[[Any], Batch] | None = None
) -> tuple[Any, Batch]:
    """Check the first batch of a training, the first labelled one where a loss needs labels.

    Args:
        batches: Of the training.
        objective: Says what its losses need.
        task: Says which samples have a label.
        read: Reads a batch; the task unless given.

    Returns:
        The batch as it came, and as the task reads it.

    Raises:
        ValueError: For an empty loader, NaN in the inputs, targets that are not what the task reads, missing labels,
            and a batch smaller than a loss needs.
    """
    empty = True
    labels_needed = need_labels(objective)
    for raw in islice(batches, SCAN):
        empty = False
        batch = (read or task.read)(raw)
        _check_finite(batch)
        task.check_batch(batch)
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
    size = size_of(batch)
    name, loss = max(objective.named_losses().items(), key=lambda item: item[1].min_batch_size)
    if size is not None and size < loss.min_batch_size:
        raise ValueError(
            f"loss {name!r} compares samples and needs a batch of at least {loss.min_batch_size}, got {size}: raise "
            "the batch size"
        )
    return raw, batch


def check_source(teacher: TeacherSource | None, batch: Batch) -> None:
    """Raise ValueError for a teacher's outputs that nobody would read."""
    if teacher is not None and teacher.network is not None and not teacher.in_batch and batch.teacher is not None:
        raise ValueError(
            "the batches bring a teacher's outputs, which the network that is given as teacher would not read: pass "
            "teacher=FromBatch(), or leave them out of the batches"
        )


def check_precision(batch: Batch, student: nn.Module) -> None:
    """Raise ValueError for inputs in double precision to a student that is not, or the other way round."""
    weight = next((p for p in student.parameters() if p.is_floating_point()), None)
    for x in (*batch.args, *batch.kwargs.values()):
        if weight is None or not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        if (x.dtype == torch.float64) != (weight.dtype == torch.float64):
            raise ValueError(
                f"the inputs are {_name(x.dtype)} and the student's weights {_name(weight.dtype)}, expected one "
                f"precision: convert them in the data set, x.to(torch.{_name(weight.dtype)}), or pass the Trainer "
                'precision="64-true"'
            )


def converts_inputs(trainer: Trainer) -> bool:
    """Tell whether a Trainer brings inputs and weights to one precision."""
    return str(trainer.precision).endswith("-true") and trainer.precision != "32-true"


def need_labels(objective: DistillationObjective) -> list[str]:
    """Return the names of the losses that are nothing without labels."""
    return [name for name, loss in objective.named_losses().items() if loss.needs_labels and loss.weight > 0]


def take(batch: Batch, count: int, task: Task) -> Batch:
    """Return the first samples of a batch, labelled ones first, so that the few include some."""
    size, batch = size_of(batch), _labelled_first(batch, task)
    if size is None:
        return batch
    return Batch(*(_map(lambda x: x[:count] if len(x) == size else x, part) for part in batch))


def size_of(batch: Batch) -> int | None:
    """Return the number of samples, None where no input is a tensor."""
    tensors = [x for x in (*batch.args, *batch.kwargs.values()) if isinstance(x, Tensor) and x.ndim]
    return len(tensors[0]) if tensors else None


def _check_finite(batch: Batch) -> None:
    for x in (*batch.args, *batch.kwargs.values()):
        if isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all():
            bad = int((~x.isfinite()).sum())
            raise ValueError(
                f"the training inputs hold {bad} NaN or infinite values in a batch of shape {tuple(x.shape)}, expected "
                "finite numbers: look for a division by a standard deviation of zero, or a broken file"
            )


def _labelled(batch: Batch, task: Task) -> bool:
    target = batch.target
    if target is None:
        return False
    return not isinstance(target, Tensor) or not target.ndim or bool(task.has_label(target).any())


def _labelled_first(batch: Batch, task: Task) -> Batch:
    target = batch.target
    if not isinstance(target, Tensor) or target.ndim != 1 or target.is_floating_point():
        return batch
    order = torch.argsort((~task.has_label(target)).long(), stable=True)
    return Batch(*(_map(lambda x: x[order] if len(x) == len(order) else x, part) for part in batch))


def _map(function: Any, part: Any) -> Any:
    return apply_to_collection(part, Tensor, lambda x: function(x) if x.ndim else x)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
