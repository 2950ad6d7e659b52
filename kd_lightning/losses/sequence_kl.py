"""Kullback-Leibler divergences between two language models' next tokens.

Forward: Distilling the Knowledge in a Neural Network (Hinton et al., 2015), https://arxiv.org/abs/1503.02531, for each
token as in Sequence-Level Knowledge Distillation (Kim & Rush, EMNLP 2016), https://arxiv.org/abs/1606.07947. Reverse:
MiniLLM (Gu et al., ICLR 2024), https://arxiv.org/abs/2306.08543, token by token. Both mixed: DistiLLM (Ko et al., ICML
2024), https://arxiv.org/abs/2402.03898.
"""

from torch import Tensor

from kd_lightning.losses.base import padding
from kd_lightning.losses.token_divergence import TokenLoss, kl_divergence, log_probabilities
from kd_lightning.losses.top_k_kl import top_k_kl
from kd_lightning.outputs import Outputs, TopK


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """T²·KL(p_t ‖ p_s) with p = softmax(z / T), summed over the vocabulary, averaged over the tokens that count.

    The divergence itself, zero where both agree; the authors' code leaves out the teacher's entropy, a constant. It
    covers all that the teacher might say. A token of logit −∞ on both sides (a padded vocabulary) adds nothing.

    Shape:
        student_logits, teacher_logits: (B, S, V); or (B, C), (B, C, H, W).
        target: (B, S), ``ignore_index`` where a token does not count; zero, with a gradient of zero, where none does.

    Raises:
        ValueError: For a temperature ≤ 0, unequal logits' shapes, or a target of another shape.
    """
    student, teacher = log_probabilities(student_logits, teacher_logits, target, temperature, ignore_index)
    return temperature**2 * kl_divergence(teacher, student)


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """T²·KL(p_s ‖ p_t): as :func:`forward_kl` with the sides swapped. It keeps to what the teacher does say."""
    student, teacher = log_probabilities(student_logits, teacher_logits, target, temperature, ignore_index)
    return temperature**2 * kl_divergence(student, teacher)


def symmetric_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    lam: float = 0.9,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """T²·[(1 − λ)·KL(p_t ‖ p_s) + λ·KL(p_s ‖ p_t)]; see :func:`forward_kl`. Symmetric at λ = ½.

    Raises:
        ValueError: For λ outside [0, 1].
    """
    _check_lam(lam)
    student, teacher = log_probabilities(student_logits, teacher_logits, target, temperature, ignore_index)
    return temperature**2 * ((1 - lam) * kl_divergence(teacher, student) + lam * kl_divergence(student, teacher))


class ForwardKL(TokenLoss):
    """The teacher's next-token distribution as target; see :func:`forward_kl`.

    Where only the teacher's k best tokens are known, it is :func:`~kd_lightning.losses.top_k_kl` with a tail.

    Args:
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    takes_top_k = True

    def forward(self, student: Outputs, teacher: Outputs | TopK, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        if isinstance(teacher, TopK) and not self.standardize:
            return top_k_kl(student.logits, teacher.indices, teacher.log_probs, tokens, temperature=self.temperature)
        return forward_kl(*self.logits(student, teacher), tokens, temperature=self.temperature)


class ReverseKL(TokenLoss):
    """The student's own likely tokens, judged by the teacher; see :func:`reverse_kl`.

    Args:
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        return reverse_kl(*self.logits(student, teacher), tokens, temperature=self.temperature)


class SymmetricKL(TokenLoss):
    """Both divergences; see :func:`symmetric_kl`.

    Args:
        lam: λ in [0, 1], the share of the reverse one.
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    def __init__(
        self, lam: float = 0.9, temperature: float = 1.0, weight: float = 1.0, standardize: bool = False
    ) -> None:
        super().__init__(temperature, weight, standardize)
        _check_lam(lam)
        self.lam = lam

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        return symmetric_kl(*self.logits(student, teacher), tokens, lam=self.lam, temperature=self.temperature)


def _check_lam(lam: float) -> None:
    if not 0 <= lam <= 1:
        raise ValueError(f"expected lam in [0, 1], got {lam}: 0 is forward_kl, 1 is reverse_kl")
