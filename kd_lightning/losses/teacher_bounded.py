"""Learning Efficient Object Detection Models with Knowledge Distillation (Chen et al., NeurIPS 2017).

https://papers.nips.cc/paper/6676-learning-efficient-object-detection-models-with-knowledge-distillation
"""

import torch
from torch import Tensor

from kd_lightning.losses.base import DistillationLoss, check_not_negative, nothing
from kd_lightning.losses.value_error import check_values
from kd_lightning.outputs import Outputs


def teacher_bounded(student: Tensor, teacher: Tensor, target: Tensor, *, margin: float = 0.0) -> Tensor:
    """‖R_s − y‖² where ‖R_s − y‖² + m > ‖R_t − y‖², else 0 (L_b, section 3.3); mean over the labelled samples.

    The teacher's error is a bound: a student that is better by the margin is left alone. Zero, with a gradient of zero,
    where no sample has a label.

    Shape:
        student, teacher: (B, D), or (B, ...) with all values of a sample in the norm.
        target: Of the same shape; NaN where a value is not known, which is then left out of both norms.

    Raises:
        ValueError: For unequal shapes, or a negative margin.

    Example:
        >>> import torch
        >>> student, teacher, y = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [2.0]]), torch.zeros(2, 1)
        >>> teacher_bounded(student, teacher, y).item()  # the first is better than the teacher: (0 + 9) / 2
        4.5
    """
    check_not_negative(margin=margin)
    check_values(student, teacher)
    check_values(student, target)
    known = ~target.isnan()
    y = torch.where(known, target, 0).to(student.dtype)
    of_student, of_teacher = (((r - y) * known).square().flatten(1).sum(1) for r in (student, teacher.detach()))
    behind = of_student.detach() + margin > of_teacher
    return (of_student * behind).sum() / known.flatten(1).any(1).sum().clamp_min(1)


class TeacherBounded(DistillationLoss):
    """The squared error where the student is no better than the teacher, else 0; see :func:`teacher_bounded`.

    Its authors take it beside the smooth L1 loss, which is :class:`~kd_lightning.losses.LabelRegression` with the form
    ``huber``.

    Args:
        margin: m ≥ 0: how far below the teacher's the student's squared error has to be, in the target's units squared.
        weight: Factor of the term; ν in the paper.
    """

    over_classes, of_values = False, True
    needs_labels = True

    def __init__(self, margin: float = 0.0, weight: float = 0.5) -> None:
        super().__init__(weight)
        check_not_negative(margin=margin)
        self.margin = margin

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        if target is None:
            return nothing(student)
        return teacher_bounded(student.logits, teacher.logits, target, margin=self.margin)
