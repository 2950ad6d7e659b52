"""The teacher's labels in the place of the data's, for several labels a sample."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import DistillationLoss, check_same_shape
from kd_lightning.outputs import Outputs


def sigmoid_hard(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """−log σ(z_s) where the teacher sets the label (z_t > 0), −log(1 − σ(z_s)) where not; mean over labels.

    What eq. 3 of Touvron et al. (ICML 2021), :func:`~kd_lightning.losses.deit_hard`, is for classes.

    Shape:
        student_logits, teacher_logits: (B, L), or of any other shape: each logit is a label's own.

    Raises:
        ValueError: For unequal shapes.

    Example:
        >>> import torch
        >>> round(sigmoid_hard(torch.zeros(1, 2), torch.tensor([[3.0, -1.0]])).item(), 4)  # log 2
        0.6931
    """
    check_same_shape(student_logits, teacher_logits)
    labels = (teacher_logits.detach() > 0).to(student_logits.dtype)
    return F.binary_cross_entropy_with_logits(student_logits, labels)


class SigmoidHard(DistillationLoss):
    """The teacher's labels: its corrections without its doubts, hence the control beside :class:`SigmoidKD`.

    Args:
        weight: Factor of the term.
    """

    over_classes = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        return sigmoid_hard(student.logits, teacher.logits)
