"""DistiLLM: Towards Streamlined Distillation for Large Language Models (Ko et al., ICML 2024).

https://arxiv.org/abs/2402.03898
"""

import math

import torch
from torch import Tensor

from kd_lightning.losses.base import padding
from kd_lightning.losses.token_divergence import TokenLoss, kl_divergence, log_probabilities
from kd_lightning.outputs import Outputs


def skewed_forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    lam: float = 0.1,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """T²·KL(p_t ‖ m) with m = λ·p_t + (1 − λ)·p_s, p = softmax(z / T); :func:`forward_kl` at λ = 0.

    Summed over the vocabulary, averaged over the tokens that count. The divergence itself, zero where both agree: the
    authors' code leaves out the teacher's entropy, a constant. At most −T²·log λ, whatever the student says.

    Shape:
        student_logits, teacher_logits: (B, S, V); or (B, C), (B, C, H, W).
        target: (B, S), ``ignore_index`` where a token does not count; zero, with a gradient of zero, where none does.

    Raises:
        ValueError: For λ outside [0, 1), a temperature ≤ 0, unequal logits' shapes, or a target of another shape.
    """
    _check_lam(lam)
    student, teacher = log_probabilities(student_logits, teacher_logits, target, temperature, ignore_index)
    return temperature**2 * kl_divergence(teacher, _mixture(teacher, student, lam))


def skewed_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    lam: float = 0.1,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """T²·KL(p_s ‖ m) with m = (1 − λ)·p_t + λ·p_s: as :func:`skewed_forward_kl`, sides swapped."""
    _check_lam(lam)
    student, teacher = log_probabilities(student_logits, teacher_logits, target, temperature, ignore_index)
    return temperature**2 * kl_divergence(student, _mixture(student, teacher, lam))


class _SkewedKL(TokenLoss):
    def __init__(
        self, lam: float = 0.1, temperature: float = 1.0, weight: float = 1.0, standardize: bool = False
    ) -> None:
        super().__init__(temperature, weight, standardize)
        _check_lam(lam)
        self.lam = lam


class SkewedForwardKL(_SkewedKL):
    """The teacher against a mixture of both; see :func:`skewed_forward_kl`.

    Args:
        lam: λ in [0, 1), the teacher's share of the mixture.
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        return skewed_forward_kl(*self.logits(student, teacher), tokens, lam=self.lam, temperature=self.temperature)


class SkewedReverseKL(_SkewedKL):
    """The student against a mixture of both; see :func:`skewed_reverse_kl`.

    Args:
        lam: λ in [0, 1), the student's share of the mixture.
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        return skewed_reverse_kl(*self.logits(student, teacher), tokens, lam=self.lam, temperature=self.temperature)


def _check_lam(lam: float) -> None:
    if not 0 <= lam < 1:
        raise ValueError(f"expected lam in [0, 1), got {lam}: 0 is the plain divergence, at 1 it is zero")


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Return log(share·p + (1 − share)·q)."""
    return torch.logaddexp(log_p + (math.log(share) if share else -math.inf), log_q + math.log1p(-share))
