"""f-Divergence Minimization for Sequence-Level Knowledge Distillation (Wen et al., ACL 2023).

https://arxiv.org/abs/2307.15190
"""

from torch import Tensor

from kd_lightning.losses.base import padding
from kd_lightning.losses.token_divergence import TokenLoss, log_probabilities
from kd_lightning.outputs import Outputs


def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """T·½ Σ |p_s − p_t| with p = softmax(z / T), summed over the vocabulary, averaged over the tokens that count.

    In [0, 1] at T = 1. The distance is of the first order in the logits' difference, so that T, not T², keeps the
    gradient's size when T changes. The gradient is zero where the student has one token only, however wrong.

    Shape:
        student_logits, teacher_logits: (B, S, V); or (B, C), (B, C, H, W).
        target: (B, S), ``ignore_index`` where a token does not count; zero, with a gradient of zero, where none does.

    Raises:
        ValueError: For a temperature ≤ 0, unequal logits' shapes, or a target of another shape.
    """
    student, teacher = log_probabilities(student_logits, teacher_logits, target, temperature, ignore_index)
    return 0.5 * temperature * (student.exp() - teacher.exp()).abs().sum() / max(len(student), 1)


class TotalVariation(TokenLoss):
    """Half the L1 distance of the next-token distributions; see :func:`total_variation`.

    Args:
        temperature: T > 0, of both sides and of the factor T.
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        return total_variation(*self.logits(student, teacher), tokens, temperature=self.temperature)
