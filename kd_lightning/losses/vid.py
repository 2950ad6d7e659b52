"""Variational Information Distillation (Ahn et al., CVPR 2019), https://arxiv.org/abs/1904.05835."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.base import LayersLoss, check_same_shape
from kd_lightning.losses.features import project, projector, same_size
from kd_lightning.outputs import Outputs

_LEAST = 1e-5
"""What the authors add to the softplus, so that no variance becomes zero."""


def vid(mean: Tensor, teacher: Tensor, *, variance: Tensor) -> Tensor:
    """½·[(μ − f_t)² / σ² + log σ²], averaged over everything: −log N(f_t; μ(f_s), σ²) without its constant ½·log 2π.

    May be negative. Differentiable in the mean, which is computed from the student's features, and in the variance.

    Shape:
        mean, teacher: equal; (B, C, H, W), (B, S, C) or (B, C).
        variance: (C,), one σ² > 0 for each of the teacher's channels.

    Raises:
        ValueError: For unequal shapes, and for another number of variances than channels.
    """
    check_same_shape(mean, teacher, "features")
    channels = 1 if teacher.ndim == 4 else -1
    if variance.shape != (teacher.shape[channels],):
        raise ValueError(
            f"expected one variance for each of the teacher's {teacher.shape[channels]} channels, got a tensor of "
            f"shape {tuple(variance.shape)}"
        )
    # As log N is a mean over elements, log σ² counts each channel alike.
    squared = (mean - teacher.detach()).square().movedim(channels, -1)
    return 0.5 * (squared / variance + variance.log()).mean()


class VID(LayersLoss):
    """Maximise a bound on the mutual information between pairs of layers, summed over the pairs; see :func:`vid`.

    For each pair a network of three 1×1 convolutions (linear layers for vectors and tokens), as wide as the teacher's
    layer, predicts the mean; the variance of each of the teacher's channels is learnt, softplus(a) + 1e-5. Where the
    maps differ in size, the larger is average-pooled to the smaller.

    Args:
        student_layers: Names of the student's layers.
        teacher_layers: As many of the teacher's; the student's names unless given.
        initial_variance: Of every channel, > 1e-5.
        weight: Factor of the term.

    Raises:
        ValueError: In :meth:`build`, for layers of different kinds (a map and a vector).
    """

    def __init__(
        self,
        student_layers: Sequence[str],
        teacher_layers: Sequence[str] | None = None,
        initial_variance: float = 5.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers, weight)
        if not initial_variance > _LEAST:
            raise ValueError(f"expected initial_variance > {_LEAST}, got {initial_variance}")
        self.initial_variance = initial_variance
        self.means, self.raw_variances = nn.ModuleList(), nn.ParameterList()

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        # The inverse of the softplus; log(expm1(x)) would overflow.
        raw = self.initial_variance - _LEAST + math.log(-math.expm1(_LEAST - self.initial_variance))
        for s, t in self.pairs(student, teacher):
            last = [layer for _ in range(2) for layer in (nn.ReLU(), projector(t, t, "vid"))]
            self.means.append(nn.Sequential(projector(s, t, "vid"), *last))
            self.raw_variances.append(nn.Parameter(torch.full((t.shape[1 if t.ndim == 4 else -1],), raw)))

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        terms = []
        for pair, mean, raw in zip(self.pairs(student, teacher), self.means, self.raw_variances, strict=True):
            s, t = same_size(*pair)
            terms.append(vid(project(mean, s), t, variance=F.softplus(raw.to(t.dtype)) + _LEAST))
        return torch.stack(terms).sum()
