"""Learning Deep Representations with Probabilistic Knowledge Transfer (Passalis and Tefas, ECCV 2018).

https://arxiv.org/abs/1803.10837
"""

import torch
from torch import Tensor

from kd_lightning.losses.base import FeatureLoss, check_batch
from kd_lightning.losses.features import embedding
from kd_lightning.outputs import Outputs

_EPSILON = 1e-7  # the authors'


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of q_t log((q_t + ε) / (q_s + ε)), q the batch's similarities (1 + cos) / 2, each row divided by its sum.

    Averaged over B² pairs, a sample with itself included: 1/B of the mean divergence of a row, as in the authors' code.

    Shape:
        student: (B, D); teacher: (B, E). D and E may differ.

    Raises:
        ValueError: For fewer than two samples.
    """
    check_batch(len(student), 2, "pkt")
    q_s, q_t = _similarities(student), _similarities(teacher.detach())
    return (q_t * ((q_t + _EPSILON).log() - (q_s + _EPSILON).log())).mean()


class PKT(FeatureLoss):
    """Which samples of a batch are alike, as a distribution over them; see :func:`pkt`.

    Args:
        student_layer: Name of a layer, usually the one that the classifier reads; the networks' outputs, such as
            embeddings, unless given. Maps are averaged over space.
        teacher_layer: The teacher's; the student's name unless given.
        weight: Factor of the term; published CIFAR-100 tables use 30000.
        gather: See :class:`~kd_lightning.losses.DistillationLoss`.
    """

    compares_samples = True
    min_batch_size = 2

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        s, t = map(embedding, self.features(student, teacher))
        return pkt(s, t)


def _similarities(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    # A vector of zeros has no direction to be changed: without the where, its gradient would be 1/ε times too large.
    directions = (x / (norm + _EPSILON)).where(norm > 0, 0.0)
    similarities: Tensor = ((1 + directions @ directions.T) / 2).clamp_min(
        0
    )  # rounding gives -1e-7, of which there is no log
    return similarities / similarities.sum(1, keepdim=True)
