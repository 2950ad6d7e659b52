"""Activation Boundaries Formed by Hidden Neurons (Heo et al., AAAI 2019), https://arxiv.org/abs/1811.03233."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.base import LayersLoss, check_not_negative, check_same_shape
from kd_lightning.losses.features import check_maps, project, same_size
from kd_lightning.outputs import Outputs


def activation_boundary(student: Tensor, teacher: Tensor, *, margin: float = 1.0) -> Tensor:
    """(m − s)²₊ where the teacher's neuron is active (t > 0), (m + s)²₊ where it is not.

    Summed over neurons, averaged over samples: the value without the factor 3/1000 of the authors' code, which is the
    default weight of :class:`AB`. Zero where each neuron is on the teacher's side of the boundary by the margin, and
    so not at student = teacher.

    Shape:
        student, teacher: equal, (B, C, H, W) or (B, D); the outputs before the activation function.
    """
    check_same_shape(student, teacher, "features")
    side = 1 - 2 * (teacher.detach() > 0).to(student.dtype)  # torch.where takes three times as long
    return F.relu(margin + side * student).square().sum() / len(student)


class AB(LayersLoss):
    """The student's neurons active where the teacher's are; see :func:`activation_boundary`.

    Σ_i 2^(i−L+1) of the L pairs of layers, i from 0: the last counts fully, each earlier one half of the next. A 1×1
    convolution with batch normalisation connects the student's channels to the teacher's. Where the maps differ in
    size, the larger is average-pooled to the smaller.

    The authors train with this loss alone in a first phase: a schedule of the weights does that.

    Args:
        student_layers: Names of layers before an activation function (batch normalisations, say), shallow to deep.
        teacher_layers: As many of the teacher's; the student's names unless given.
        margin: m ≥ 0.
        weight: Factor of the term; 3/1000 as in the authors' code unless given.

    Raises:
        ValueError: In :meth:`build`, for layers that give no maps.
    """

    def __init__(
        self,
        student_layers: Sequence[str],
        teacher_layers: Sequence[str] | None = None,
        margin: float = 1.0,
        weight: float = 0.003,
    ) -> None:
        super().__init__(student_layers, teacher_layers, weight)
        check_not_negative(margin=margin)
        self.margin = margin
        self.connectors = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        for s, t in self.pairs(student, teacher):
            check_maps(s, "ab")
            check_maps(t, "ab")
            convolution = nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False)
            self.connectors.append(nn.Sequential(convolution, nn.BatchNorm2d(t.shape[1])))

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        terms = []
        for pair, connector in zip(self.pairs(student, teacher), self.connectors, strict=True):
            s, t = same_size(*pair)
            terms.append(activation_boundary(project(connector, s), t, margin=self.margin))
        return torch.stack([term / 2**i for i, term in enumerate(reversed(terms))]).sum()
