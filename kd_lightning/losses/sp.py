"""Similarity-Preserving Knowledge Distillation (Tung and Mori, ICCV 2019), https://arxiv.org/abs/1907.09682."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import FeatureLoss, check_batch
from kd_lightning.outputs import Outputs


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """‖G_s − G_t‖²_F / B², where G = f fᵀ between the flattened features of a batch, each row divided by its norm.

    Where a sample's features are all zero, so are its row and its gradient.

    Shape:
        student: (B, ...); teacher: (B, ...). All but B may differ.

    Raises:
        ValueError: For fewer than two samples: the row of a single one is always 1.
    """
    check_batch(len(student), 2, "similarity_preserving")
    return F.mse_loss(_similarities(student), _similarities(teacher.detach()))


class SP(FeatureLoss):
    """Samples that activate the teacher alike shall activate the student alike; see :func:`similarity_preserving`.

    Args:
        student_layer: Name of a layer; the authors' is the last that gives maps, which are not averaged over space.
            The networks' outputs, such as embeddings, unless given.
        teacher_layer: The teacher's; the student's name unless given.
        weight: Factor of the term; published CIFAR-100 tables use 3000.
        gather: See :class:`~kd_lightning.losses.DistillationLoss`.
    """

    compares_samples = True
    min_batch_size = 2

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        return similarity_preserving(*self.features(student, teacher))


def _similarities(feature: Tensor) -> Tensor:
    flat = feature.flatten(1)
    products = flat @ flat.T
    # At a row of zeros normalize's gradient is 1e12 times too large.
    return F.normalize(products).where(products.diagonal()[:, None] > 0, 0.0)
