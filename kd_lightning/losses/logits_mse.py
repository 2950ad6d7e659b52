"""Do Deep Nets Really Need to be Deep? (Ba & Caruana, NeurIPS 2014), https://arxiv.org/abs/1312.6184."""

from torch import Tensor

from kd_lightning.losses.base import LogitLoss, check_same_shape, counted, padding
from kd_lightning.outputs import Outputs


def logits_mse(student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
    """Mean of (z_s − z_t)² over samples and classes (B·C); the paper sums over classes and halves.

    Shape:
        student_logits, teacher_logits: (B, C), (B, S, V) or (B, C, H, W), averaged over samples, tokens or pixels.
        target: Of those, -100 where one does not count; zero, with a gradient of zero, where none does.

    Raises:
        ValueError: For unequal shapes.

    Example:
        >>> import torch
        >>> logits_mse(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])).item()
        2.0
    """
    check_same_shape(student_logits, teacher_logits)
    z_s, z_t = counted(target, student_logits, teacher_logits.detach())
    return (z_s - z_t).square().sum() / max(z_s.numel(), 1)


class LogitsMSE(LogitLoss):
    """Regress the teacher's logits, the limit of :class:`KD` at high temperatures; see :func:`logits_mse`.

    For centred logits KD tends to half of this as T grows. Samples and pixels without label count, tokens that are
    ignored do not.

    Args:
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    def __init__(self, weight: float = 1.0, standardize: bool = False) -> None:
        super().__init__(weight, standardize)
        self.over_classes = standardize  # which takes the logits of a sample for comparable ones

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        return logits_mse(*self.logits(student, teacher), padding(student.logits, target))
