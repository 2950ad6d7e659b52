"""Masked Generative Distillation (Yang et al., ECCV 2022), https://arxiv.org/abs/2205.01529."""

import torch
from torch import Tensor, nn

from kd_lightning.losses.base import FeatureLoss, check_same_shape
from kd_lightning.losses.features import check_maps, project, same_size
from kd_lightning.outputs import Outputs


def mgd(generated: Tensor, teacher: Tensor) -> Tensor:
    """‖G(masked f_s) − f_t‖², summed over channels and positions, averaged over samples.

    Shape:
        generated, teacher: equal, (B, C, H, W).
    """
    check_same_shape(generated, teacher, "features")
    return (generated - teacher.detach()).square().sum() / len(generated)


class MGD(FeatureLoss):
    """The teacher's map is generated from the student's, of which a random part is masked; see :func:`mgd`.

    The student's map goes through a 1×1 convolution to the teacher's channels where it has others, is masked, and then
    goes through two 3×3 convolutions with a ReLU between. Where the maps differ in size, the larger is average-pooled
    to the smaller. In eval mode nothing is masked.

    Args:
        student_layer: Of maps.
        teacher_layer: Likewise; the student's name unless given.
        mask: What is masked, for each sample anew: ``"spatial"`` positions, or whole channels, ``"channel"``.
        mask_ratio: Probability with which each is masked, in [0, 1).
        weight: Factor of the term.

    Raises:
        ValueError: In :meth:`build`, for layers that give no maps.
    """

    projector: nn.Module
    generator: nn.Module

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str | None = None,
        mask: str = "spatial",
        mask_ratio: float = 0.5,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        if mask not in ("spatial", "channel"):
            raise ValueError(f"expected mask='spatial' or 'channel', got {mask!r}")
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"expected mask_ratio in [0, 1), got {mask_ratio}: it is the part that is masked")
        self.mask, self.mask_ratio = mask, mask_ratio

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        s, t = self.features(student, teacher)
        check_maps(s, "mgd")
        check_maps(t, "mgd")
        channels = t.shape[1]
        self.projector = nn.Identity() if s.shape[1] == channels else nn.Conv2d(s.shape[1], channels, 1)
        self.generator = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        s, t = same_size(*self.features(student, teacher))
        s = project(self.projector, s)
        if self.training:
            samples, channels, height, width = s.shape
            shape = (samples, 1, height, width) if self.mask == "spatial" else (samples, channels, 1, 1)
            s = s * (torch.rand(shape, device=s.device) >= self.mask_ratio)
        return mgd(project(self.generator, s), t)
