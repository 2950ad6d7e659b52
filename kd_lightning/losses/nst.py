"""Like What You Like: Knowledge Distill via Neuron Selectivity Transfer (Huang and Wang, 2017).

https://arxiv.org/abs/1707.01219
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import LayersLoss
from kd_lightning.losses.features import check_maps, same_size
from kd_lightning.outputs import Outputs


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean k(t, t) + mean k(s, s) − 2 mean k(s, t), k(a, b) = (aᵀb)²: the squared maximum mean discrepancy.

    a and b run over the channels of one sample, each channel's map divided by its norm over space. Averaged over
    channel pairs and samples. The larger of two maps is average-pooled to the smaller.

    Shape:
        student: (B, C, H, W); teacher: (B, D, I, J). Channels and sizes may differ.

    Raises:
        ValueError: For features that are no maps.
    """
    check_maps(student, "nst")
    check_maps(teacher, "nst")
    s, t = (F.normalize(x.flatten(2), dim=2) for x in same_size(student, teacher.detach()))
    return _mean_kernel(t, t) + _mean_kernel(s, s) - 2 * _mean_kernel(s, t)


class NST(LayersLoss):
    """Match the places to which channels respond, as a distribution over channels; see :func:`nst`.

    Args:
        student_layers: Names of layers that give maps.
        teacher_layers: As many of the teacher's; the student's names unless given.
        weight: Factor of the sum over layers; published CIFAR-100 tables use 50.
    """

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        return torch.stack([nst(s, t) for s, t in self.pairs(student, teacher)]).sum()


def _mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT).square().mean()
