"""Multi-level Logit Distillation (Jin et al., CVPR 2023), https://github.com/Jin-Ying/Multi-Level-Logit-Distillation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.losses.base import LogitLoss, check_same_shape, check_temperature
from kd_lightning.losses.kd import kd
from kd_lightning.outputs import Outputs


def class_correlation(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """‖P_tᵀP_t − P_sᵀP_s‖² / C with P = softmax(z / T): which classes are likely for the same samples.

    The products run over samples, so the value grows with the square of the batch. No factor T².

    Shape:
        student_logits, teacher_logits: (B, C). The largest intermediate is (C, C), or (B, B) for 2·B < C.

    Raises:
        ValueError: For a temperature ≤ 0, unequal shapes or other than one row a sample.
    """
    p_s, p_t = _probabilities(student_logits, teacher_logits, temperature)
    batch, classes = p_s.shape
    if 2 * batch >= classes:  # the cheaper way, up to there
        return (p_t.T @ p_t - p_s.T @ p_s).square().sum() / classes
    # With D = P_t - P_s and S = P_t + P_s the matrix is (DᵀS + SᵀD) / 2, and its norm is that of products over classes.
    # Not the norms of both sides apart, whose difference is lost to rounding where the student is near the teacher.
    difference, total = p_t - p_s, p_t + p_s
    mixed = total @ difference.T
    squares = (difference @ difference.T) * (total @ total.T) + mixed * mixed.T
    return squares.sum() / (2 * classes)


def batch_correlation(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """‖P_tP_tᵀ − P_sP_sᵀ‖² / B with P = softmax(z / T): which samples have the same likely classes. No factor T².

    Shape:
        student_logits, teacher_logits: (B, C). The largest intermediate is (B, B).

    Raises:
        ValueError: For a temperature ≤ 0, unequal shapes or other than one row a sample.
    """
    p_s, p_t = _probabilities(student_logits, teacher_logits, temperature)
    return (p_t @ p_t.T - p_s @ p_s.T).square().sum() / len(p_s)


class MLKD(LogitLoss):
    """KD, class correlation and batch correlation, summed over several temperatures; KD alone carries T².

    The logits are those of the one view of the batch that there is. The authors' recipe has a second, strong view,
    augmented by RandAugment: cross-entropy and KD count on both views, the correlations on the weak one. On the weak
    view their code masks the samples (for the class correlation: the classes) of which the teacher is surer than the
    median, but multiplies terms that are already averaged, which halves them; and the strong view's KD takes the weak
    view's logits at T = 2 and 6. Here are neither a second view nor masks.

    Args:
        temperatures: Each T > 0.
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
        gather: See :class:`~kd_lightning.losses.DistillationLoss`.

    Raises:
        ValueError: For no temperature, or one ≤ 0.
    """

    compares_samples = True

    def __init__(
        self,
        temperatures: Sequence[float] = (4.0, 3.0, 5.0, 2.0, 6.0),
        weight: float = 1.0,
        standardize: bool = False,
        gather: bool = False,
    ) -> None:
        super().__init__(weight, standardize, gather)
        self.temperatures = tuple(temperatures)
        if not self.temperatures:
            raise ValueError("expected at least one temperature, got none: the authors take [4, 3, 5, 2, 6]")
        for temperature in self.temperatures:
            check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        z_s, z_t = self.logits(student, teacher)
        terms = [
            loss(z_s, z_t, temperature=temperature)
            for temperature in self.temperatures
            for loss in (kd, class_correlation, batch_correlation)
        ]
        return torch.stack(terms).sum()


def _probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    check_temperature(temperature)
    check_same_shape(student_logits, teacher_logits)
    if student_logits.ndim != 2:
        raise ValueError(
            f"expected logits (B, C), one row a sample, got {tuple(student_logits.shape)}: for tokens and pixels take "
            "a loss that compares them one by one, such as kd"
        )
    return torch.softmax(student_logits / temperature, -1), torch.softmax(teacher_logits.detach() / temperature, -1)
