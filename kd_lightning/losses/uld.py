"""Universal Logit Distillation (Boizard et al., TMLR 2025), https://arxiv.org/abs/2402.12030."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import check_temperature, counted, padding
from kd_lightning.losses.token_divergence import TokenLoss
from kd_lightning.outputs import Outputs, classes_last


def sorted_probabilities(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """T·Σ_i |p_s(i) − p_t(i)|, p = softmax(z / T) sorted from the largest down, averaged over the tokens that count.

    The vocabularies may differ, the smaller gets outcomes of probability 0: only how sure the teacher is counts, not of
    what. At most 2 at T = 1. It is of the first order in the logits' difference, so that T, not T², keeps the
    gradient's size when T changes. The authors average over each text's tokens first, then over the texts.

    Shape:
        student_logits, teacher_logits: (B, S, V) and (B, S, W); or (B, C), (B, C, H, W).
        target: (B, S), ``ignore_index`` where a token does not count; zero, with a gradient of zero, where none does.

    Raises:
        ValueError: For a temperature ≤ 0, different numbers of tokens, or a target of another shape.
    """
    check_temperature(temperature)
    if classes_last(student_logits).shape[:-1] != classes_last(teacher_logits).shape[:-1]:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} differ in "
            "more than their classes: cut both to the tokens that correspond"
        )
    z_s, z_t = counted(target, student_logits, teacher_logits.detach(), ignore_index=ignore_index)
    student, teacher = (F.softmax(z / temperature, -1).sort(-1, descending=True).values for z in (z_s, z_t))
    missing = teacher.shape[-1] - student.shape[-1]
    difference = F.pad(student, (0, max(missing, 0))) - F.pad(teacher, (0, max(-missing, 0)))
    return temperature * difference.abs().sum() / max(len(student), 1)


class ULD(TokenLoss):
    """The teacher's confidences, whatever its vocabulary; see :func:`sorted_probabilities`.

    Args:
        temperature: T > 0, of both sides and of the factor T.
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    needs_same_classes = False

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        return sorted_probabilities(*self.logits(student, teacher), tokens, temperature=self.temperature)
