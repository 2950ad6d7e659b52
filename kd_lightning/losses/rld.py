"""Knowledge Distillation with Refined Logits (RLD; Sun et al., ICCV 2025), https://arxiv.org/abs/2408.07703."""

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

_MASKED = -1e9  # not -inf, whose differences are NaN: where all classes are masked, both sides become uniform


def rld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
    scd_temperature: float | Tensor = 1.0,
) -> Tensor:
    """α·T'²·SCD + β·T²·MCD, averaged over the samples with a label y.

    SCD (sample confidence) = KL of (p, 1 − p), the teacher's p of its prediction against the student's p of the label,
    p = softmax(z / T'), T' the ``scd_temperature``. MCD (masked correlation) = KL of softmax(z / T) over the classes
    that the teacher finds less likely than the label, z_t < z_t,y; zero where there are fewer than two. KL(teacher ‖
    student). Zero where the student equals a teacher that is right.

    Shape:
        student_logits, teacher_logits: (B, C), (B, S, V) or (B, C, H, W), with at least two classes.
        target: int64 of those, without the classes; -100 for a sample without label. Zero, with a gradient of zero,
            where none has one.

    Raises:
        ValueError: For a temperature ≤ 0, unequal shapes, one class only, or probabilities as target.
    """
    check_temperature(temperature)
    check_temperature(scd_temperature)
    check_same_shape(student_logits, teacher_logits)
    labels, z_s, z_t = labelled(target, student_logits, teacher_logits.detach())
    label_s, _ = _apart(z_s / scd_temperature, labels)
    prediction_t, _ = _apart(z_t / scd_temperature, z_t.argmax(-1))
    scd = F.kl_div(label_s, prediction_t, reduction="sum", log_target=True)
    masked = z_t >= z_t.gather(-1, labels[:, None])
    student, teacher = (F.log_softmax((z / temperature).masked_fill(masked, _MASKED), -1) for z in (z_s, z_t))
    mcd = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return (alpha * scd_temperature**2 * scd + beta * temperature**2 * mcd) / max(len(labels), 1)


class RLD(LogitLoss):
    """The teacher's confidence and class relations, without what contradicts the label where it errs; see :func:`rld`.

    Samples without label add nothing.

    Args:
        alpha: Factor of the confidence, ≥ 0.
        beta: Factor of the relations between the classes below the label, ≥ 0.
        temperature: T > 0 of the relations, on both sides, and of their factor T².
        scd_temperature: T' > 0 of the confidence, on both sides, and of its factor T'².
        weight: Factor of the term. The authors raise it from 0 in the first 20 epochs (CIFAR-100; 1 on ImageNet).
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    needs_labels = True

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        scd_temperature: float = 1.0,
        weight: float = 1.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(weight, standardize)
        check_not_negative(alpha=alpha, beta=beta)
        check_temperature(temperature)
        check_temperature(scd_temperature)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.scd_temperature = scd_temperature

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        if target is None:
            return nothing(student)
        return rld(
            *self.logits(student, teacher),
            target,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            scd_temperature=self.scd_temperature,
        )
