"""Transformed Teacher Matching (TTM, WTTM; Zheng & Yang, ICLR 2024), https://arxiv.org/abs/2402.11148."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import LogitLoss, check_same_shape, counted, padding
from kd_lightning.outputs import Outputs


def ttm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    gamma: float = 0.1,
    weighted: bool = False,
) -> Tensor:
    """KL(q ‖ p_s) of q = p_t^γ / Σ p_t^γ, which is softmax(γ·z_t), and p_s = softmax(z_s); averaged over samples.

    Only the teacher is softened, by the temperature 1/γ; there is no factor T². ``weighted`` (WTTM) multiplies each
    sample's divergence by Σ p_t^γ, from 1 for a teacher that is sure to C^(1 − γ) for one that knows nothing (γ < 1).

    Shape:
        student_logits, teacher_logits: (B, C), (B, S, V) or (B, C, H, W), averaged over samples, tokens or pixels.
        target: Of those, -100 where one does not count; zero, with a gradient of zero, where none does.

    Raises:
        ValueError: For γ ≤ 0 or unequal shapes.
    """
    _check_gamma(gamma)
    check_same_shape(student_logits, teacher_logits)
    z_s, z_t = counted(target, student_logits, teacher_logits.detach())
    powers = gamma * F.log_softmax(z_t, -1)
    divergence = F.kl_div(F.log_softmax(z_s, -1), F.log_softmax(powers, -1), reduction="none", log_target=True).sum(-1)
    if weighted:
        divergence = powers.logsumexp(-1).exp() * divergence
    return divergence.sum() / max(len(z_s), 1)


class TTM(LogitLoss):
    """The teacher's distribution raised to a power as target of the student's own, unsoftened one; see :func:`ttm`.

    Samples and pixels without label count, tokens that are ignored do not.

    Args:
        gamma: The power, > 0: one over the teacher's temperature.
        weighted: Whether the teacher's uncertain samples count for more (WTTM).
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    def __init__(
        self, gamma: float = 0.1, weighted: bool = False, weight: float = 1.0, standardize: bool = False
    ) -> None:
        super().__init__(weight, standardize)
        _check_gamma(gamma)
        self.gamma = gamma
        self.weighted = weighted

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        return ttm(*self.logits(student, teacher), tokens, gamma=self.gamma, weighted=self.weighted)


def _check_gamma(gamma: float) -> None:
    if not gamma > 0:
        raise ValueError(
            f"expected gamma > 0, got {gamma}: it is one over the teacher's temperature, 0.1 to 0.5 soften"
        )
