"""The task's own loss: cross-entropy with the labels."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import DistillationLoss
from kd_lightning.outputs import Outputs


def hard_label(
    student_logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = -100
) -> Tensor:
    """Cross-entropy −log softmax(z_s)_y, averaged over the samples that have a label.

    Zero, with a gradient of zero, where none has one.

    Shape:
        student_logits: (B, C), (B, S, V) or (B, C, H, W).
        target: int64 (B,), (B, S) or (B, H, W), ``ignore_index`` for a sample without label; or probabilities of the
            logits' shape (mixup).
    """
    if target.is_floating_point():
        return F.cross_entropy(student_logits, target.to(student_logits.dtype), label_smoothing=label_smoothing)
    if target.shape == student_logits.shape[:-1]:
        student_logits, target = student_logits.flatten(0, -2), target.flatten()
    total = F.cross_entropy(
        student_logits, target, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction="sum"
    )
    return total / (target != ignore_index).sum().clamp_min(1)


class HardLabel(DistillationLoss):
    """Cross-entropy with the labels; unlabelled samples (-100) and unlabelled batches add nothing.

    Args:
        weight: Factor of the term.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 4)
        >>> round(HardLabel()(Outputs(logits), Outputs(logits), torch.tensor([3, -100])).item(), 4)  # log 4
        1.3863
    """

    needs_labels = True
    needs_teacher = False

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(weight)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"expected label_smoothing in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        if target is None:
            return 0.0 * student.logits.sum()
        return hard_label(student.logits, target, label_smoothing=self.label_smoothing)
