"""FitNets: Hints for Thin Deep Nets (Romero et al., ICLR 2015), https://arxiv.org/abs/1412.6550."""

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.base import FeatureLoss, check_same_shape
from kd_lightning.losses.features import project, projector, same_size
from kd_lightning.outputs import Outputs


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between the projected guided layer and the hint layer (eq. 3, mean in place of ½·sum).

    Shape:
        student, teacher: equal; (B, C, H, W), (B, S, D) or (B, D).
    """
    check_same_shape(student, teacher, "features")
    return F.mse_loss(student, teacher.detach())


class Hint(FeatureLoss):
    """Regress a teacher's layer from a student's layer through a learnt projector.

    The projector is a convolution for maps and a linear layer otherwise; its channels come from the dry forward pass.
    Where the maps differ in size, the larger is average-pooled to the smaller.

    Args:
        student_layer: The guided layer; the networks' outputs, such as embeddings, unless given.
        teacher_layer: The hint layer; the student's name unless given.
        kernel_size: Of the convolution, odd.
        weight: Factor of the term; published CIFAR-100 tables use 100.

    Raises:
        ValueError: For an even kernel; in :meth:`build`, for layers of different kinds (a map and a vector).
    """

    projector: nn.Module

    def __init__(
        self,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
        kernel_size: int = 1,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        if kernel_size % 2 != 1:
            raise ValueError(f"expected an odd kernel_size, got {kernel_size}: the map has to keep its size")
        self.kernel_size = kernel_size
        self.projector = nn.Identity()

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        self.projector = projector(*self.features(student, teacher), "hint", self.kernel_size)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        s, t = same_size(*self.features(student, teacher))
        return hint(project(self.projector, s), t)
