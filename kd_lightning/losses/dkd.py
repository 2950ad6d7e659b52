"""Decoupled Knowledge Distillation (Zhao et al., CVPR 2022), https://arxiv.org/abs/2203.08679."""

import torch
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
from kd_lightning.outputs import Outputs


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
) -> Tensor:
    """T²·[α·TCKD + β·NCKD], averaged over the samples with a label.

    TCKD = KL of (p_y, 1 − p_y), the label's class against all others; NCKD = KL of the softmax over the classes other
    than the label's; p = softmax(z / T), KL(teacher ‖ student). Plain KD is TCKD + (1 − p_t,y)·NCKD.

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
    binary_s, others_s = _apart(z_s / temperature, labels)
    binary_t, others_t = _apart(z_t / temperature, labels)
    tckd = F.kl_div(binary_s, binary_t, reduction="sum", log_target=True)
    nckd = F.kl_div(F.log_softmax(others_s, -1), F.log_softmax(others_t, -1), reduction="sum", log_target=True)
    return temperature**2 * (alpha * tckd + beta * nckd) / max(len(labels), 1)


class DKD(LogitLoss):
    """KD's two parts weighed apart, of which KD lets a confident teacher suppress the second; see :func:`dkd`.

    Samples without label add nothing.

    Args:
        alpha: Factor of the label's class against the others, ≥ 0.
        beta: Factor of the distribution over the others, ≥ 0.
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term. The authors raise it from 0 in the first 20 epochs (CIFAR-100; 1 on ImageNet).
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    needs_labels = True

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        weight: float = 1.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(weight, standardize)
        check_not_negative(alpha=alpha, beta=beta)
        check_temperature(temperature)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        if target is None:
            return nothing(student)
        z_s, z_t = self.logits(student, teacher)
        return dkd(z_s, z_t, target, alpha=self.alpha, beta=self.beta, temperature=self.temperature)


def _apart(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(p, 1 − p) of one class of each row (N, 2), and the logits of its other classes (N, C − 1)."""
    if logits.shape[-1] < 2:
        raise ValueError("expected at least 2 classes, got 1: this loss compares the label's class with the others")
    own = classes[:, None]
    # From the class on, the next one's. Not picked by a mask, which takes several times as long, and waits for a GPU.
    after = torch.arange(logits.shape[-1] - 1, device=logits.device) >= own
    others = torch.where(after, logits[:, 1:], logits[:, :-1])
    # log(1 - p) from the others' logits: 1 - p itself is 0 where p rounds to 1.
    binary = torch.cat([logits.gather(-1, own), others.logsumexp(-1, keepdim=True)], -1)
    return F.log_softmax(binary, -1), others
