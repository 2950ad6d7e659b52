"""A Comprehensive Overhaul of Feature Distillation (Heo et al., ICCV 2019), https://arxiv.org/abs/1904.01866."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_lightning.losses.base import LayersLoss, check_same_shape
from kd_lightning.losses.features import check_maps, project, same_size
from kd_lightning.outputs import Outputs, find_layer


def partial_l2(student: Tensor, teacher: Tensor, *, margin: Tensor) -> Tensor:
    """(s − t')², t' = max(t, m), but zero where s ≤ t' ≤ 0: a neuron that is inactive enough is left alone.

    Summed over neurons, averaged over samples, as in the authors' code. The margin ReLU max(·, m) is the teacher's; the
    student's features are compared as they are.

    Shape:
        student, teacher: equal, (B, C, H, W) or (B, C); the outputs before the ReLU.
        margin: (C,), m < 0 for each channel.

    Raises:
        ValueError: For unequal shapes, and for another number of margins than channels.
    """
    check_same_shape(student, teacher, "features")
    channels = teacher.shape[1]
    if margin.shape != (channels,):
        raise ValueError(f"expected a margin for each of {channels} channels, got a tensor of {tuple(margin.shape)}")
    aim = torch.maximum(teacher.detach(), margin.reshape(-1, *[1] * (teacher.ndim - 2)))
    inactive = (student <= aim) & (aim <= 0)
    return (student - aim).square().masked_fill(inactive, 0.0).sum() / len(student)


class OFD(LayersLoss):
    """Features before the ReLU, through a margin ReLU on the teacher's side; see :func:`partial_l2`.

    Σ_i 2^(i−L+1) of the L pairs of layers, i from 0: the last counts fully, each earlier one half of the next. A 1×1
    convolution with batch normalisation connects the student's channels to the teacher's. Where the maps differ in
    size, the larger is average-pooled to the smaller.

    A channel's margin is the expected value of its negative responses. A response after batch normalisation is taken as
    normal with the mean β and the standard deviation |γ| of the teacher's layer: m = E[x | x < 0] = β − |γ|·φ(r)/Φ(−r),
    r = β / |γ|. The authors' code takes −3·|γ| where fewer than one response in a thousand is negative.

    Args:
        student_layers: Names of layers before a ReLU, shallow to deep.
        teacher_layers: As many of the teacher's, each a batch normalisation before a ReLU (which is not in-place); the
            student's names unless given.
        weight: Factor of the term; the authors take 1e-3.

    Raises:
        ValueError: In :meth:`build`, for layers that give no maps; in :meth:`attach`, for a teacher's layer that is no
            batch normalisation.
    """

    needs_teacher_network = True

    def __init__(
        self, student_layers: Sequence[str], teacher_layers: Sequence[str] | None = None, weight: float = 1.0
    ) -> None:
        super().__init__(student_layers, teacher_layers, weight)
        self.connectors = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        for s, t in self.pairs(student, teacher):
            check_maps(s, "ofd")
            check_maps(t, "ofd")
            convolution = nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False)
            self.connectors.append(nn.Sequential(convolution, nn.BatchNorm2d(t.shape[1])))

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        assert teacher is not None
        for i, name in enumerate(self.teacher_layers):
            layer = find_layer(teacher, name)
            if not isinstance(layer, _BatchNorm):
                raise ValueError(
                    f"ofd: the teacher's layer {name!r} is a {type(layer).__name__}, expected a batch normalisation "
                    "before a ReLU, from which the margin follows: name that one"
                )
            # Not in checkpoints: they follow from the teacher.
            self.register_buffer(f"margin{i}", _margin(layer), persistent=False)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        terms = []
        for i, (pair, connector) in enumerate(zip(self.pairs(student, teacher), self.connectors, strict=True)):
            s, t = same_size(*pair)
            margin = self.get_buffer(f"margin{i}").to(t)  # made where the teacher was at that time
            terms.append(partial_l2(project(connector, s), t, margin=margin))
        return torch.stack([term / 2**i for i, term in enumerate(reversed(terms))]).sum()


@torch.no_grad()
def _margin(layer: _BatchNorm) -> Tensor:
    """Return E[x | x < 0] of x ~ N(β, γ²), for each channel; β or 0 where γ is 0."""
    if layer.weight is None:  # affine=False
        return torch.full((layer.num_features,), -math.sqrt(2 / math.pi))
    deviation, mean = layer.weight.double().abs().clamp_min(1e-12), layer.bias.double()
    # erfcx(x) = exp(x²)·erfc(x), so this is φ(r) / Φ(−r), also where both are zero in floating point.
    ratio = math.sqrt(2 / math.pi) / torch.special.erfcx(mean / deviation / math.sqrt(2))
    margin: Tensor = (mean - deviation * ratio).clamp_max(0.0).to(layer.weight.dtype)
    return margin
