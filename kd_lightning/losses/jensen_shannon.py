"""On-Policy Distillation of Language Models (GKD; Agarwal et al., ICLR 2024), https://arxiv.org/abs/2306.13649."""

from torch import Tensor

from kd_lightning.losses.base import padding
from kd_lightning.losses.skewed_kl import _mixture
from kd_lightning.losses.token_divergence import TokenLoss, kl_divergence, log_probabilities
from kd_lightning.outputs import Outputs


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """T²·[β·KL(p_t ‖ m) + (1 − β)·KL(p_s ‖ m)], m = β·p_t + (1 − β)·p_s, p = softmax(z / T).

    Summed over the vocabulary, averaged over the tokens that count. At most T² times the entropy of (β, 1 − β), log 2
    at β = ½. Divided by β it becomes the forward KL for β → 0, divided by 1 − β the reverse KL for β → 1. DistiLLM's
    code has λ = 1 − β.

    Shape:
        student_logits, teacher_logits: (B, S, V); or (B, C), (B, C, H, W).
        target: (B, S), ``ignore_index`` where a token does not count; zero, with a gradient of zero, where none does.

    Raises:
        ValueError: For β outside (0, 1), a temperature ≤ 0, unequal logits' shapes, or a target of another shape.
    """
    _check_beta(beta)
    student, teacher = log_probabilities(student_logits, teacher_logits, target, temperature, ignore_index)
    mixture = _mixture(teacher, student, beta)
    return temperature**2 * (beta * kl_divergence(teacher, mixture) + (1 - beta) * kl_divergence(student, mixture))


class JensenShannon(TokenLoss):
    """The generalised Jensen-Shannon divergence; see :func:`jensen_shannon`.

    Args:
        beta: β in (0, 1), the teacher's share of the mixture.
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    def __init__(
        self, beta: float = 0.5, temperature: float = 1.0, weight: float = 1.0, standardize: bool = False
    ) -> None:
        super().__init__(temperature, weight, standardize)
        _check_beta(beta)
        self.beta = beta

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        return jensen_shannon(*self.logits(student, teacher), tokens, beta=self.beta, temperature=self.temperature)


def _check_beta(beta: float) -> None:
    if not 0 < beta < 1:
        raise ValueError(
            f"expected beta in (0, 1), got {beta}: at 0 and 1 the divergence is zero, take forward_kl or reverse_kl"
        )
