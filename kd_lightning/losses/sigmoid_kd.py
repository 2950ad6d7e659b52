"""Multi-Label Knowledge Distillation (Yang et al., ICCV 2023), https://arxiv.org/abs/2308.06453."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import DistillationLoss, check_same_shape, check_temperature
from kd_lightning.outputs import Outputs


def sigmoid_kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """T²·KL(σ(z_t / T) ‖ σ(z_s / T)) of each label's two outcomes, averaged over samples and labels.

    At T = 1 it is the paper's multi-label logits distillation (MLD), which sums over labels: there it is L times as
    large. T² keeps the gradient's size about the same when T changes, as in :func:`~kd_lightning.losses.kd`.

    Shape:
        student_logits, teacher_logits: (B, L), or of any other shape: each logit is a label's own.

    Raises:
        ValueError: For a temperature ≤ 0 or unequal shapes.

    Example:
        >>> z = torch.tensor([[2.0, 0.0, -1.0]])
        >>> sigmoid_kd(z, z, temperature=2.0).item()
        0.0
    """
    check_temperature(temperature)
    check_same_shape(student_logits, teacher_logits)
    z_s, z_t = student_logits / temperature, teacher_logits.detach() / temperature
    kl = torch.sigmoid(z_t) * (F.logsigmoid(z_t) - F.logsigmoid(z_s))
    kl = kl + torch.sigmoid(-z_t) * (F.logsigmoid(-z_t) - F.logsigmoid(-z_s))
    return temperature**2 * kl.mean()


class SigmoidKD(DistillationLoss):
    """The teacher's softened probability of each label as its target; see :func:`sigmoid_kd`.

    Samples and labels without a target count: the teacher knows something of them. Also for two classes and a single
    output, on which :class:`~kd_lightning.losses.KD` would be constant.

    Args:
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term.
    """

    over_classes = False

    def __init__(self, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        return sigmoid_kd(student.logits, teacher.logits, temperature=self.temperature)
