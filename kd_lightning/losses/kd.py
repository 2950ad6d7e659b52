"""Distilling the Knowledge in a Neural Network (Hinton et al., 2015), https://arxiv.org/abs/1503.02531."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import DistillationLoss, check_same_shape, check_temperature
from kd_lightning.outputs import Outputs


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T²·KL(softmax(z_t / T) ‖ softmax(z_s / T)), summed over classes, averaged over samples (section 2).

    T softens both sides; T² keeps the gradient's size about the same when T changes.

    Shape:
        student_logits, teacher_logits: (B, C) or (B, S, V), averaged over all positions.

    Raises:
        ValueError: For a temperature ≤ 0 or unequal shapes.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0, -1.0]])
        >>> kd(z, z, temperature=2.0).item()
        0.0
    """
    check_temperature(temperature)
    check_same_shape(student_logits, teacher_logits)
    student = F.log_softmax(student_logits / temperature, -1).flatten(0, -2)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, -1).flatten(0, -2)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class KD(DistillationLoss):
    """The teacher's softened distribution as target; see :func:`kd`.

    Args:
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term.
    """

    def __init__(self, temperature: float = 4.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        return kd(student.logits, teacher.logits, temperature=self.temperature)
