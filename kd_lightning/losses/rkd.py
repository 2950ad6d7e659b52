"""Relational Knowledge Distillation (Park et al., CVPR 2019), https://arxiv.org/abs/1904.05068."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import FeatureLoss, check_batch, check_not_negative
from kd_lightning.losses.features import embedding
from kd_lightning.outputs import Outputs


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the pairwise distances of the two batches, each divided by its mean distance.

    Averaged over B² pairs, a sample with itself included. The mean distance is that of the pairs that do not coincide,
    as in the code that published tables were made with.

    Shape:
        student: (B, D); teacher: (B, E). D and E may differ.

    Raises:
        ValueError: For fewer than two samples.
    """
    check_batch(len(student), 2, "rkd_distance")
    return F.smooth_l1_loss(_relative(_distances(student)), _relative(_distances(teacher.detach())))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the cosines of the angles that every three samples span, averaged over B³ triples.

    Memory grows with B³. An angle at a sample that coincides with one of the other two has the cosine 0.

    Shape:
        student: (B, D); teacher: (B, E). D and E may differ.

    Raises:
        ValueError: For fewer than three samples.
    """
    check_batch(len(student), 3, "rkd_angle")
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher.detach()))


class RKD(FeatureLoss):
    """Distances and angles between the samples of a batch; see :func:`rkd_distance` and :func:`rkd_angle`.

    Args:
        student_layer: Name of a layer, usually the one that the classifier reads; the networks' outputs, such as
            embeddings, unless given. Maps are averaged over space.
        teacher_layer: The teacher's; the student's name unless given.
        distance_weight: Factor of the distances.
        angle_weight: Factor of the angles.
        weight: Factor of both.
        gather: See :class:`~kd_lightning.losses.DistillationLoss`.

    Raises:
        ValueError: For a negative factor; in training, for a batch of fewer than three samples.
    """

    compares_samples = True
    min_batch_size = 3

    def __init__(
        self,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        weight: float = 1.0,
        gather: bool = False,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight, gather)
        check_not_negative(distance_weight=distance_weight, angle_weight=angle_weight)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        s, t = map(embedding, self.features(student, teacher))
        return self.distance_weight * rkd_distance(s, t) + self.angle_weight * rkd_angle(s, t)


def _distances(x: Tensor) -> Tensor:
    # Without a (B, B, D) tensor. In this mode of cdist close samples keep their distance, which is lost to rounding in
    # |x|² + |y|² - 2xy, and the gradient is 0 where samples coincide, not NaN.
    distances: Tensor = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return distances


def _relative(distances: Tensor) -> Tensor:
    mean = distances.sum() / (distances > 0).sum().clamp_min(1)
    return distances / mean.clamp_min(1e-12)


def _cosines(x: Tensor) -> Tensor:
    """Return the cosine of the angle at sample i between samples j and k, (B, B, B), by the law of cosines."""
    # From distances, that of close samples keeps its digits; a Gram matrix of the samples would lose them.
    distances = _distances(x)
    halves = distances.square() / 2
    apart = halves >= torch.finfo(x.dtype).tiny
    inverse = (1 / distances.where(apart, 1.0)).where(apart, 0.0)
    products = halves[:, :, None] + halves[:, None] - halves  # ⟨x_j − x_i, x_k − x_i⟩
    return products * inverse[:, :, None] * inverse[:, None]
