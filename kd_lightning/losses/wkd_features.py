"""WKD-F of "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation".

Lv et al., NeurIPS 2024, https://arxiv.org/abs/2412.08139.
"""

from torch import Tensor, nn

from kd_lightning.losses.base import FeatureLoss, check_not_negative
from kd_lightning.losses.features import check_maps, check_same_channels, project, projector
from kd_lightning.outputs import Outputs

_EPSILON = 1e-5


def wkd_features(student: Tensor, teacher: Tensor, *, mean_weight: float, std_weight: float) -> Tensor:
    """mean_weight·‖μ_s − μ_t‖² + std_weight·‖σ_s − σ_t‖², summed over channels, averaged over the batch.

    μ and σ are a sample's mean and standard deviation over space, one of each a channel. With both weights 1 this is
    the squared 2-Wasserstein distance between two Gaussians of diagonal covariance. As in the authors' code
    σ² = 1e-5 + Σ(f − μ)² / (H·W − 1); of a single pixel σ² = 1e-5.

    Shape:
        student: (B, C, H, W); teacher: (B, C, H', W').

    Raises:
        ValueError: For other than maps, or another number of channels.
    """
    check_maps(student, "wkd_features")
    check_maps(teacher, "wkd_features")
    check_same_channels(student, teacher, "wkd_features")
    mean_s, std_s = _gaussian(student)
    mean_t, std_t = _gaussian(teacher.detach())
    means, stds = (mean_s - mean_t).square().sum(1), (std_s - std_t).square().sum(1)
    return (mean_weight * means + std_weight * stds).mean()


class WKDFeatures(FeatureLoss):
    """Match the Gaussian that each channel's values over space follow, wherever in the map they are.

    A learnt 1×1 convolution takes the student's channels to the teacher's; the authors let batch norm and a ReLU follow
    it, which is not done here. Heights and widths may differ. The authors' code can also compare the cells of a coarse
    grid one by one; here, as in their runs on CIFAR-100, the whole map is the one cell.

    Args:
        student_layer: The student's layer, of maps.
        teacher_layer: The teacher's; the student's name unless given.
        mean_weight: ≥ 0, of the means; the authors' 4 on CIFAR-100.
        std_weight: ≥ 0, of the standard deviations.
        weight: Factor of the term; the authors' 0.08 on CIFAR-100.

    Raises:
        ValueError: For a negative weight; in :meth:`build`, for layers that give no maps.
    """

    projector: nn.Module

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str | None = None,
        mean_weight: float = 4.0,
        std_weight: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        check_not_negative(mean_weight=mean_weight, std_weight=std_weight)
        self.mean_weight, self.std_weight = mean_weight, std_weight
        self.projector = nn.Identity()

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        s, t = self.features(student, teacher)
        check_maps(s, "wkd_features")
        self.projector = projector(s, t, "wkd_features")

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        s, t = self.features(student, teacher)
        weights = {"mean_weight": self.mean_weight, "std_weight": self.std_weight}
        return wkd_features(project(self.projector, s), t, **weights)


def _gaussian(maps: Tensor) -> tuple[Tensor, Tensor]:
    pixels = maps.flatten(2)
    mean = pixels.mean(-1, keepdim=True)
    # By hand it takes less than half of the time of Tensor.var.
    variance = (pixels - mean).square().sum(-1) / max(pixels.shape[-1] - 1, 1)
    return mean.squeeze(-1), (variance + _EPSILON).sqrt()
