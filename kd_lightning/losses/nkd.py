"""From Knowledge Distillation to Self-Knowledge Distillation (NKD; Yang et al., ICCV 2023).

https://arxiv.org/abs/2303.13005
"""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import (
    LogitLoss,
    check_not_negative,
    check_same_shape,
    check_temperature,
    labelled,
    nothing,
)
from kd_lightning.losses.dkd import _apart
from kd_lightning.outputs import Outputs


def nkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """−p_t,y·log p_s,y − γT²·Σ_{i≠y} N(p_t)_i·log N(p_s)_i, averaged over the samples with a label.

    p = softmax(z) at temperature 1; N(p) = softmax(z / T) over the classes other than the label's y. Both terms are
    cross-entropies: at student = teacher they are p_y·(−log p_y) and γT² times the entropy of N(p_t), not zero.

    Shape:
        student_logits, teacher_logits: (B, C), (B, S, V) or (B, C, H, W), with at least two classes.
        target: int64 of those, without the classes; -100 for a sample without label. Zero, with a gradient of zero,
            where none has one.

    Raises:
        ValueError: For a temperature ≤ 0, unequal shapes, one class only, or probabilities as target.
    """
    check_temperature(temperature)
    check_same_shape(student_logits, teacher_logits)
    labels, z_s, z_t = labelled(target, student_logits, teacher_logits.detach())
    (binary_s, others_s), (binary_t, others_t) = _apart(z_s, labels), _apart(z_t, labels)
    own = -(binary_t[:, 0].exp() * binary_s[:, 0]).sum()
    others = -(F.softmax(others_t / temperature, -1) * F.log_softmax(others_s / temperature, -1)).sum()
    return (own + gamma * temperature**2 * others) / max(len(labels), 1)


class NKD(LogitLoss):
    """The teacher's confidence in the label, and its distribution over the other classes, normalised; see :func:`nkd`.

    Samples without label add nothing.

    Args:
        gamma: Factor of the other classes, ≥ 0.
        temperature: T > 0, of the other classes on both sides and of their factor T².
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    needs_labels = True

    def __init__(
        self, gamma: float = 1.5, temperature: float = 1.0, weight: float = 1.0, standardize: bool = False
    ) -> None:
        super().__init__(weight, standardize)
        check_not_negative(gamma=gamma)
        check_temperature(temperature)
        self.gamma = gamma
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        if target is None:
            return nothing(student)
        return nkd(*self.logits(student, teacher), target, gamma=self.gamma, temperature=self.temperature)
