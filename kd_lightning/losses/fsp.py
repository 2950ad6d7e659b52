"""A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning (Yim et al., 2017).

CVPR 2017, https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import LayersLoss
from kd_lightning.losses.features import check_maps, check_same_channels, same_size
from kd_lightning.outputs import Outputs


def fsp(student_pair: tuple[Tensor, Tensor], teacher_pair: tuple[Tensor, Tensor]) -> Tensor:
    """Mean (G_s − G_t)², with G[i, j] the mean over space of channel i of the first map times channel j of the second.

    Averaged over samples and entries of G. The larger map of a pair is average-pooled to the smaller.

    Shape:
        student_pair: (B, C, H, W) and (B, D, I, J).
        teacher_pair: (B, C, ...) and (B, D, ...): the student's channels; sizes may differ.

    Raises:
        ValueError: For other channels than the student's, and for features that are no maps.
    """
    for s, t in zip(student_pair, teacher_pair, strict=True):
        _check(s, t)
    return F.mse_loss(_flow(*student_pair), _flow(*teacher_pair).detach())


class FSP(LayersLoss):
    """How features flow from each layer to the next in the list; see :func:`fsp`, summed over neighbours in the list.

    The authors first train on this loss alone, then on the labels.

    Args:
        student_layers: Names of two or more layers that give maps, in their order.
        teacher_layers: As many of the teacher's, with the same numbers of channels; the student's names unless given.
        weight: Factor of the sum; published CIFAR-100 tables use 50.

    Raises:
        ValueError: For fewer than two layers; in :meth:`build`, for other channels on both sides.
    """

    def __init__(
        self, student_layers: Sequence[str], teacher_layers: Sequence[str] | None = None, weight: float = 1.0
    ) -> None:
        super().__init__(student_layers, teacher_layers, weight)
        if len(self.student_layers) < 2:
            raise ValueError(
                f"fsp relates a layer to the next, expected two or more, got {list(self.student_layers)}: name the "
                "ends of the stages"
            )

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        for s, t in self.pairs(student, teacher):
            _check(s, t)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        neighbours = pairwise(self.pairs(student, teacher))
        return torch.stack([fsp((s, s_next), (t, t_next)) for (s, t), (s_next, t_next) in neighbours]).sum()


def _check(student: Tensor, teacher: Tensor) -> None:
    check_maps(student, "fsp")
    check_maps(teacher, "fsp")
    check_same_channels(student, teacher, "fsp")


def _flow(first: Tensor, second: Tensor) -> Tensor:
    first, second = (x.flatten(2) for x in same_size(first, second))
    return first @ second.mT / first.shape[2]
