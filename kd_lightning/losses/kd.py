"""Distilling the Knowledge in a Neural Network (Hinton et al., 2015), https://arxiv.org/abs/1503.02531."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import LogitLoss, check_same_shape, check_temperature, counted, padding
from kd_lightning.losses.top_k_kl import top_k_kl
from kd_lightning.outputs import Outputs, TopK


def kd(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, *, temperature: float | Tensor = 4.0
) -> Tensor:
    """T²·KL(softmax(z_t / T) ‖ softmax(z_s / T)), summed over classes, averaged over samples (section 2).

    T softens both sides; T² keeps the gradient's size about the same when T changes.

    Shape:
        student_logits, teacher_logits: (B, C), (B, S, V) or (B, C, H, W), averaged over samples, tokens or pixels.
        target: Of those, -100 where one does not count; zero, with a gradient of zero, where none does.

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
    z_s, z_t = counted(target, student_logits, teacher_logits.detach())
    student, teacher = F.log_softmax(z_s / temperature, -1), F.log_softmax(z_t / temperature, -1)
    total = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return temperature**2 * total / max(len(z_s), 1)


class KD(LogitLoss):
    """The teacher's softened distribution as target; see :func:`kd`.

    Samples and pixels without label count, tokens that are ignored do not. Where only the teacher's k best classes are
    known, it is :func:`~kd_lightning.losses.top_k_kl` with a tail.

    Args:
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    takes_top_k = True

    def __init__(self, temperature: float = 4.0, weight: float = 1.0, standardize: bool = False) -> None:
        super().__init__(weight, standardize)
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs | TopK, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        if isinstance(teacher, TopK) and not self.standardize:
            return top_k_kl(student.logits, teacher.indices, teacher.log_probs, tokens, temperature=self.temperature)
        return kd(*self.logits(student, teacher), tokens, temperature=self.temperature)
