"""What the networks gave for a few samples: logits, of the same classes, that fit the losses."""

import math
from typing import Any

import torch
from torch import Tensor

from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import AnyOutputs, Outputs, PeerOutputs, TopK, class_dim, classes_last
from kd_lightning.tasks import Task

_PROBABILITIES = ("Sigmoid", "Softmax")
# What autograd calls an operation that leaves values as they are, and hooks of a module.
_VIEWS = (
    "Alias", "AsStrided", "BackwardHookFunction", "Clone", "Expand", "Permute", "Reshape", "ReshapeAlias", "Select",
    "Slice", "Split", "Squeeze", "T", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze", "View",
)  # fmt: skip


def check_outputs(
    objective: DistillationObjective,
    student: Outputs,
    teacher: AnyOutputs | None,
    task: Task,
    role: str = "teacher",
    read: bool = True,
) -> None:
    """Compare the classes of both, what the losses need of them and of the task, and whether the samples are known.

    Args:
        objective: Has the losses.
        student: Outputs for a few samples.
        teacher: Likewise; of peers, each is compared.
        task: Says what outputs mean.
        role: Of the teacher, for errors.
        read: Whether anybody reads the logits, which may be anything otherwise.

    Raises:
        ValueError: With what was expected, what came and what to do.
    """
    if isinstance(teacher, PeerOutputs):
        for name, peer in teacher.networks.items():
            check_outputs(objective, student, peer, task, f"peer {name!r}", read)
        return
    losses = objective.named_losses()
    refusals = {name: why for name, loss in losses.items() if (why := task.refuses(loss)) is not None}
    for name, why in refusals.items():
        raise ValueError(f"loss {name!r} {why}")
    if task.gives_logits and read:
        check_all_logits(student, teacher, role)
    comparing = [name for name, loss in losses.items() if loss.needs_teacher and loss.needs_same_classes]
    if not read:
        pass
    elif isinstance(teacher, TopK):
        objective.check_takes_top_k(f"its {teacher.k} best")
        check_top_k(teacher, classes_of(student))
    elif comparing and teacher is not None and classes_of(teacher) != classes_of(student):
        raise ValueError(
            f"the student has {classes_of(student)} classes and the {role} {classes_of(teacher)}, expected the same "
            f"classes in the same order, as losses {comparing} compare them: set num_classes, or slice the {role}'s "
            "logits in a module around it"
        )
    constant = [name for name, loss in losses.items() if loss.over_classes]
    if read and constant and classes_of(student) == 1:
        raise ValueError(
            f"the student has one output, expected two or more for losses {constant}: the softmax of one output is "
            "always 1, so that they are constant; give the student an output a class (for two classes, 0 and its "
            "logit), or pass task=Regression() with losses on values"
        )
    remembering = [name for name, loss in losses.items() if loss.needs_sample_ids]
    if remembering and student.samples is None:
        raise ValueError(
            f"losses {remembering} remember samples, expected batches that say which samples they hold: wrap the "
            "training set, DataLoader(kd_lightning.data.WithIds(dataset), ...)"
        )


def check_all_logits(student: Outputs, teacher: AnyOutputs | None, role: str = "teacher") -> None:
    """Raise ValueError for probabilities of a student, a teacher or a member of an ensemble."""
    check_logits("student", student.logits)
    if teacher is None or isinstance(teacher, TopK):
        return
    check_logits(role, teacher.logits)
    for i, logits in enumerate(teacher.members):
        check_logits(f"teacher {i} of the ensemble", logits)


def check_top_k(teacher: AnyOutputs | None, classes: int) -> None:
    """Raise ValueError where a teacher's best classes are not the student's, come twice, or are of no probability."""
    if not isinstance(teacher, TopK):
        return
    indices, log_probs = teacher.indices, teacher.log_probs
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


def check_logits(role: str, logits: Tensor, remedy: str = "leave the {} out of its forward") -> None:
    """Raise ValueError for probabilities.

    Those are outputs that are never negative and of which each row's sum is 1; and the outputs of a sigmoid or softmax,
    where the graph of their computation is there to tell.
    """
    last = _last_operation(logits.grad_fn)
    if last in _PROBABILITIES:
        raise ValueError(
            f"expected logits from the {role}, got probabilities (it ends in a {last.lower()}): "
            f"{remedy.format(last.lower())}"
        )
    rows = classes_last(logits.detach()).float()
    if rows.shape[-1] > 1 and bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() < 1e-2).all()):
        raise ValueError(
            f"expected logits from the {role}, got probabilities (no output is negative, each row sums to 1): "
            f"{remedy.format('softmax')}"
        )


def classes_of(outputs: AnyOutputs) -> int:
    """Return the number of classes."""
    return outputs.logits.shape[class_dim(outputs.logits)]


def _last_operation(node: Any) -> str:
    """Return autograd's name of the operation that made a tensor's values, empty where there is no graph."""
    while node is not None:
        name = type(node).__name__.partition("Backward")[0] or type(node).__name__.removesuffix("Backward")
        if name not in _VIEWS:
            return name
        node = node.next_functions[0][0] if node.next_functions else None
    return ""
