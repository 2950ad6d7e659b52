"""ABKD: knowledge distillation via α-β-divergence (Wang et al., ICML 2025), https://arxiv.org/abs/2505.04560."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import LogitLoss, check_same_shape, check_temperature, counted, padding
from kd_lightning.outputs import Outputs

_LEAST = 1e-4  # below, α + β counts as 0: its digits would be lost in float32


def alpha_beta_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    alpha: float,
    beta: float,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """T²·Σ [p_t^(α+β) / (β(α+β)) + p_s^(α+β) / (α(α+β)) − p_t^α·p_s^β / (αβ)], averaged over samples.

    p = softmax(z / T). The limits: for β = 0 Σ [p_t^α·α·log(p_t / p_s) − p_t^α + p_s^α] / α², which at α = 1 is
    KL(p_t ‖ p_s), plain KD; for α = 0 the same with the sides exchanged, at β = 1 KL(p_s ‖ p_t); for both 0,
    ½·Σ (log p_t − log p_s)². The authors' code has no T², and divides the limits by α and β in place of their squares.

    Shape:
        student_logits, teacher_logits: (B, C), (B, S, V) or (B, C, H, W), averaged over samples, tokens or pixels.
        target: Of those, -100 where one does not count; zero, with a gradient of zero, where none does.

    Raises:
        ValueError: For a negative α or β, a temperature ≤ 0, or unequal shapes.
    """
    _check_powers(alpha, beta)
    check_temperature(temperature)
    check_same_shape(student_logits, teacher_logits)
    z_s, z_t = counted(target, student_logits, teacher_logits.detach())
    log_s, log_t = F.log_softmax(z_s / temperature, -1), F.log_softmax(z_t / temperature, -1)
    return temperature**2 * _divergence(log_s, log_t, alpha, beta).sum() / max(len(z_s), 1)


class ABKD(LogitLoss):
    """A divergence between forward and reverse KL and beyond; see :func:`alpha_beta_divergence`.

    A smaller α looks more at the classes where the student errs most, a larger β at those it is confident in. Samples
    and pixels without label count, tokens that are ignored do not.

    Args:
        alpha: Power of the teacher's probabilities, ≥ 0.
        beta: Power of the student's probabilities, ≥ 0.
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    def __init__(
        self, alpha: float, beta: float, temperature: float = 1.0, weight: float = 1.0, standardize: bool = False
    ) -> None:
        super().__init__(weight, standardize)
        _check_powers(alpha, beta)
        check_temperature(temperature)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        z_s, z_t = self.logits(student, teacher)
        return alpha_beta_divergence(z_s, z_t, tokens, alpha=self.alpha, beta=self.beta, temperature=self.temperature)


def _divergence(log_s: Tensor, log_t: Tensor, alpha: float, beta: float) -> Tensor:
    """Return each class's term, ≥ 0.

    It is [(p_t^(α+β) − w) / β + (p_s^(α+β) − w) / α] / (α+β) with w = p_t^α·p_s^β. With the larger of the two taken out
    of each difference nothing overflows, and no digits are lost where α or β is small or both sides are about equal.
    """
    total, distance = alpha + beta, log_t - log_s
    if total < _LEAST:
        return 0.5 * distance.square()
    mixed = (alpha * log_t + beta * log_s).exp()
    by_alpha, by_beta = (_one_minus_power(distance.abs(), power) for power in (alpha, beta))
    above = (total * log_t).exp() * by_beta - mixed * by_alpha
    below = (total * log_s).exp() * by_alpha - mixed * by_beta
    return torch.where(distance > 0, above, below) / total


def _one_minus_power(distance: Tensor, power: float) -> Tensor:
    """Return (1 − e^(−power·distance)) / power, whose limit for a power of 0 is the distance."""
    return -torch.expm1(-power * distance) / power if power else distance


def _check_powers(alpha: float, beta: float) -> None:
    for name, power in (("alpha", alpha), ("beta", beta)):
        if not power >= 0:
            raise ValueError(
                f"expected {name} >= 0, got {power}: a negative power divides by probabilities that may be 0; pass 0 "
                "for the limit (alpha=1, beta=0 is KD, alpha=0, beta=1 reverse KL)"
            )
