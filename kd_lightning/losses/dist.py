"""Knowledge Distillation from A Stronger Teacher (DIST; Huang et al., NeurIPS 2022), https://arxiv.org/abs/2205.10536."""

import torch
from torch import Tensor

from kd_lightning.losses.base import (
    LogitLoss,
    check_batch,
    check_not_negative,
    check_same_shape,
    check_temperature,
    counted,
    padding,
)
from kd_lightning.outputs import Outputs

_EPSILON = 1e-8
"""Of the authors' code, beside the product of two norms: silences classes that no sample of the batch is likely in."""


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """τ²·[β·mean_b(1 − ρ(p_s[b], p_t[b])) + γ·mean_c(1 − ρ(p_s[:, c], p_t[:, c]))], p = softmax(z / τ).

    ρ is Pearson's correlation, Σab / (‖a‖·‖b‖ + 1e-8) of centred a and b. The first term (inter-class) relates the
    classes of a sample, the second (intra-class) the samples of the batch in a class, for which it needs two; γ = 0
    leaves it out. What is constant correlates with nothing, 1 − ρ = 1. A student of constant logits, such as one whose
    classifier starts at zero, gets a finite but very large gradient (that of a·b / 1e-8): clip it.

    Shape:
        student_logits, teacher_logits: (B, C), (B, S, V) or (B, C, H, W); tokens or pixels are samples.
        target: Of those, -100 where one does not count; zero, with a gradient of zero, where none does.

    Raises:
        ValueError: For a temperature ≤ 0, unequal shapes, or one sample only.
    """
    check_temperature(temperature)
    check_same_shape(student_logits, teacher_logits)
    z_s, z_t = counted(target, student_logits, teacher_logits.detach())
    if not len(z_s):
        return 0.0 * student_logits.sum()
    p_s, p_t = torch.softmax(z_s / temperature, -1), torch.softmax(z_t / temperature, -1)
    total = beta * (1 - _correlation(p_s, p_t)).mean()
    if gamma:
        check_batch(len(z_s), 2, "dist")
        total = total + gamma * (1 - _correlation(p_s.mT, p_t.mT)).mean()
    return temperature**2 * total


class DIST(LogitLoss):
    """Keep the teacher's relations between classes and between samples, not its exact probabilities; see :func:`dist`.

    A sample's loss depends on its batch, of at least two. Samples without label count, tokens that are ignored do not.

    Args:
        beta: Factor of the inter-class term (rows), ≥ 0.
        gamma: Factor of the intra-class term (columns), ≥ 0.
        temperature: τ > 0, of both sides and of the factor τ².
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
        gather: See :class:`~kd_lightning.losses.DistillationLoss`.
    """

    compares_samples = True
    min_batch_size = 2

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        weight: float = 1.0,
        standardize: bool = False,
        gather: bool = False,
    ) -> None:
        super().__init__(weight, standardize, gather)
        check_not_negative(beta=beta, gamma=gamma)
        check_temperature(temperature)
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        z_s, z_t = self.logits(student, teacher)
        return dist(z_s, z_t, tokens, beta=self.beta, gamma=self.gamma, temperature=self.temperature)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    # vector_norm has the gradient 0 at 0, where a square root would have none.
    norms: Tensor = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1) / (norms + _EPSILON)
