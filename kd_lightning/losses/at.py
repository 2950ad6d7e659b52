"""Paying More Attention to Attention (Zagoruyko and Komodakis, ICLR 2017), https://arxiv.org/abs/1612.03928."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import LayersLoss
from kd_lightning.losses.features import check_maps, same_size
from kd_lightning.outputs import Outputs


def attention_transfer(student: Tensor, teacher: Tensor, *, p: float = 2) -> Tensor:
    """Mean (Q_s − Q_t)², with the attention map Q = q / ‖q‖₂, q = mean over channels of |f|ᵖ, of each sample.

    Averaged over samples and places. The larger of two maps is average-pooled to the smaller. Where a map is zero, so
    are its attention and its gradient.

    Shape:
        student: (B, C, H, W); teacher: (B, D, I, J). Channels and sizes may differ.

    Raises:
        ValueError: For p < 1, and for features that are no maps.
    """
    _check_p(p)
    check_maps(student, "attention_transfer")
    check_maps(teacher, "attention_transfer")
    student, teacher = same_size(student, teacher.detach())
    return F.mse_loss(_attention(student, p), _attention(teacher, p))


class AT(LayersLoss):
    """Show the student where the teacher looks, at one or more depths; see :func:`attention_transfer`.

    Args:
        student_layers: Names of layers that give maps, usually the ends of the stages.
        teacher_layers: As many of the teacher's; the student's names unless given.
        p: Power of the activations, ≥ 1: the higher, the more the attention is where activations are largest.
        weight: Factor of the sum over layers; published CIFAR-100 tables use 1000.
    """

    def __init__(
        self,
        student_layers: Sequence[str],
        teacher_layers: Sequence[str] | None = None,
        p: float = 2,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers, weight)
        _check_p(p)
        self.p = p

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        return torch.stack([attention_transfer(s, t, p=self.p) for s, t in self.pairs(student, teacher)]).sum()


def _check_p(p: float) -> None:
    if not p >= 1:
        raise ValueError(f"expected p >= 1, got {p}: below, the gradient is infinite where an activation is 0")


def _attention(feature: Tensor, p: float) -> Tensor:
    return F.normalize(feature.abs().pow(p).mean(1).flatten(1))
