"""The multi-label task's own loss: binary cross-entropy with the labels."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import DistillationLoss, nothing
from kd_lightning.outputs import Outputs


def bce(student_logits: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """−y·log σ(z_s) − (1 − y)·log(1 − σ(z_s)), averaged over the labels that are known.

    Zero, with a gradient of zero, where none is.

    Shape:
        student_logits: (B, L), or of any other shape: each logit is a label's own.
        target: Of the logits' shape: 1 for a label that is set, 0 for one that is not, or a probability between;
            ``ignore_index`` where it is not known.

    Raises:
        ValueError: For a target of another shape.

    Example:
        >>> import torch
        >>> round(bce(torch.zeros(1, 3), torch.tensor([[1, 0, -100]])).item(), 4)  # log 2
        0.6931
    """
    if target.shape != student_logits.shape:
        raise ValueError(
            f"expected a target of the logits' shape {tuple(student_logits.shape)}, one 0 or 1 for each label, got "
            f"{tuple(target.shape)}: class indices become labels by torch.nn.functional.one_hot(target, labels)"
        )
    known = target != ignore_index
    z, y = student_logits[known], target[known].to(student_logits.dtype)
    return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / max(y.numel(), 1)


class BCE(DistillationLoss):
    """Binary cross-entropy with the labels, each on its own; labels that are not known (-100) add nothing.

    For several labels a sample, or for two classes and a single output.

    Args:
        weight: Factor of the term.
    """

    over_classes = False
    needs_labels = True
    needs_teacher = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        return nothing(student) if target is None else bce(student.logits, target)
