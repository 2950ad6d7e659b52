"""Factor transfer, "Paraphrasing Complex Network" (Kim et al., NeurIPS 2018), https://arxiv.org/abs/1802.04977."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.base import FeatureLoss, check_not_negative
from kd_lightning.losses.features import check_maps, project, same_size
from kd_lightning.outputs import Outputs


def factor_transfer(student: Tensor, teacher: Tensor, *, p1: int = 2, p2: int = 1) -> Tensor:
    """|q_s − q_t|^p2, averaged over samples and positions; q is the mean of f^p1 over channels, over its L2 norm.

    As in the code of the published CIFAR-100 tables. The authors' own normalises the factors as they are, over channels
    and positions together, and so compares channel with channel.

    Shape:
        student: factors (B, K, H, W); teacher: (B, L, H, W). K and L may differ.

    Raises:
        ValueError: For factors that are no maps, or of another number of samples or another size.
    """
    check_maps(student, "factor_transfer")
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"factor_transfer: the student's factors are {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}, expected maps of one size: pool the larger"
        )
    return (_normalised(student, p1) - _normalised(teacher.detach(), p1)).abs().pow(p2).mean()


class FT(FeatureLoss):
    """A translator gives the student's factors, a paraphraser the teacher's; see :func:`factor_transfer`.

    The paraphraser is an autoencoder of the teacher's features, and its code is the teacher's factors. The authors
    train it before the student, and freeze it. Here it is trained alongside: its squared reconstruction error, averaged
    over everything, is added to the loss, and no gradient of the transfer reaches it, nor one of the reconstruction the
    student. The factors that the student is to reach thus still move in the first epochs.

    Where the factors differ in size, the larger are average-pooled to the smaller.

    Args:
        student_layer: Of maps, such as the last stage.
        teacher_layer: Likewise; the student's name unless given.
        rate: Factors for each of the teacher's channels.
        p1: Power of the factors before the mean over channels.
        p2: Power of the difference.
        reconstruction_weight: Factor of the reconstruction error, relative to the transfer.
        weight: Factor of the term, of transfer and reconstruction both.

    Raises:
        ValueError: In :meth:`build`, for layers that give no maps.
    """

    translator: nn.Module
    encoder: nn.Module
    decoder: nn.Module

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str | None = None,
        rate: float = 0.5,
        p1: int = 2,
        p2: int = 1,
        reconstruction_weight: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        check_not_negative(reconstruction_weight=reconstruction_weight)
        if not (rate > 0 and p1 >= 1 and p2 >= 1):
            raise ValueError(f"expected rate > 0, p1 >= 1 and p2 >= 1, got {rate}, {p1} and {p2}")
        self.rate, self.p1, self.p2, self.reconstruction_weight = rate, p1, p2, reconstruction_weight

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        s, t = self.features(student, teacher)
        check_maps(s, "ft")
        check_maps(t, "ft")
        channels = t.shape[1]
        factors = max(1, int(self.rate * channels))
        self.translator = _layers(s.shape[1], s.shape[1], factors, factors, normalise=True)
        self.encoder = _layers(channels, channels, factors, factors)
        # Its last layer is linear: features before an activation function can be reconstructed, too.
        self.decoder = nn.Sequential(_layers(factors, factors, channels), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        s, t = self.features(student, teacher)
        factors = project(self.encoder, t.detach())
        reconstruction = F.mse_loss(project(self.decoder, factors), t.detach())
        pair = same_size(project(self.translator, s), factors)
        return factor_transfer(*pair, p1=self.p1, p2=self.p2) + self.reconstruction_weight * reconstruction


def _normalised(factors: Tensor, power: int) -> Tensor:
    return F.normalize(factors.pow(power).mean(1).flatten(1))


def _layers(*channels: int, normalise: bool = False) -> nn.Sequential:
    """Make 3×3 convolutions from each width to the next, with leaky ReLUs."""
    layers: list[nn.Module] = []
    for here, there in pairwise(channels):
        layers.append(nn.Conv2d(here, there, 3, padding=1))
        layers.extend([nn.BatchNorm2d(there)] if normalise else [])
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers)
