"""Distilling Knowledge via Knowledge Review (Chen et al., CVPR 2021), https://arxiv.org/abs/2104.09044."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.base import LayersLoss, check_batch, check_same_shape
from kd_lightning.losses.features import check_maps, check_same_kind, project
from kd_lightning.outputs import Outputs


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """Weighted mean of squared errors: of the maps, and of both average-pooled to 4×4, 2×2 and 1×1.

    The maps count 1, the first pooled size ½, the next ¼, then ⅛; sizes that are not smaller than the maps are left out
    and halve nothing. The sum is divided by the sum of these weights.

    Shape:
        student, teacher: equal, (B, C, H, W); or (B, C), whose mean squared error it is.
    """
    check_same_shape(student, teacher, "features")
    teacher = teacher.detach()
    total, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for size in (4, 2, 1):
        if student.ndim == 4 and size < min(student.shape[2:]):
            weight /= 2
            weights += weight
            pooled = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
            total = total + weight * F.mse_loss(*pooled)
    return total / weights


class ReviewKD(LayersLoss):
    """Each of the teacher's layers is learnt from the student's layer and all deeper ones.

    From deep to shallow, the student's features are reduced to a common width, fused with what was passed up, resized
    to the teacher's map, passed on, and expanded to the teacher's channels for :func:`hierarchical_context`, which is
    summed over layers. The fusion is the authors' attention: two maps in (0, 1) weigh the layer's own features and
    those passed up, which are resized to them (nearest neighbour).

    Args:
        student_layers: From shallow to deep; maps, or vectors (the pooled features, as the last).
        teacher_layers: As many of the teacher's; the student's names unless given.
        width: Largest common width; it is the deepest student layer's channels where those are fewer.
        weight: Factor of the term.

    Raises:
        ValueError: In :meth:`build`, for layers of different kinds (a map and a vector) and for tokens. In training,
            for one sample where a layer gives vectors, which batch normalisation cannot normalise.
    """

    def __init__(
        self,
        student_layers: Sequence[str],
        teacher_layers: Sequence[str] | None = None,
        width: int = 512,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers, weight)
        if width < 1:
            raise ValueError(f"expected width >= 1, got {width}")
        self.width = width
        self.fusions = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        pairs = self.pairs(student, teacher)
        for s, t in pairs:
            check_same_kind(s, t, "review_kd")
            check_maps(_as_map(s), "review_kd")
        width = min(self.width, pairs[-1][0].shape[1])
        for i, (s, t) in enumerate(pairs):
            self.fusions.append(_Fusion(s.shape[1], width, t.shape[1], fuses=i + 1 < len(pairs)))

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        passed, terms = None, []
        for (s, t), fusion in reversed(list(zip(self.pairs(student, teacher), self.fusions, strict=True))):
            if self.training and min(_as_map(s).shape[2:].numel(), _as_map(t).shape[2:].numel()) == 1:
                check_batch(len(s), 2, "review_kd, with batch normalisation of vectors,")
            output, passed = fusion(_as_map(s), passed, _as_map(t).shape[2:])
            terms.append(hierarchical_context(output, _as_map(t)))
        return torch.stack(terms).sum()


class _Fusion(nn.Module):
    """Fuse a layer with what the deeper ones passed on; give the teacher's map, and what is passed on."""

    def __init__(self, channels: int, width: int, teacher_channels: int, fuses: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuses else None
        convolution = nn.Conv2d(width, teacher_channels, 3, padding=1, bias=False)
        self.expand = nn.Sequential(convolution, nn.BatchNorm2d(teacher_channels))

    def forward(self, x: Tensor, passed: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        fused = project(self.reduce, x)
        if self.attention is not None and passed is not None:
            passed = F.interpolate(passed, fused.shape[2:])
            attention = project(self.attention, torch.cat([fused, passed], 1))
            fused = fused * attention[:, :1] + passed * attention[:, 1:]
        if fused.shape[2:] != size:
            fused = F.interpolate(fused, size)
        return project(self.expand, fused), fused


def _as_map(feature: Tensor) -> Tensor:
    return feature[:, :, None, None] if feature.ndim == 2 else feature
