"""Supervised Contrastive Learning (Khosla et al., NeurIPS 2020), https://arxiv.org/abs/2004.11362."""

import torch
from torch import Tensor

from kd_lightning.losses.base import DistillationLoss, check_batch, is_finite_number, labelled
from kd_lightning.losses.features import directions
from kd_lightning.outputs import Outputs


def supervised_contrastive(vectors: Tensor, target: Tensor, *, tau: float = 0.1) -> Tensor:
    """Mean over anchors i of −1/|P(i)| Σ_p∈P(i) log(exp(z_i·z_p / τ) / Σ_a≠i exp(z_i·z_a / τ)) (eq. 2, "out").

    z are the vectors divided by their length, P(i) the other samples of i's class. A sample that is alone of its class
    is no anchor; one without label is left out altogether. Zero, with a gradient of zero, where there is no anchor.

    Shape:
        vectors: (B, D). target: int64 (B,), -100 for a sample without label.

    Raises:
        ValueError: For fewer than two samples, and for targets that are probabilities.
    """
    check_batch(len(vectors), 2, "supervised_contrastive")
    labels, kept = labelled(target, vectors)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels) & ~itself
    anchors = positive.any(1)
    if not anchors.any():
        return 0.0 * vectors.sum()
    z = directions(kept)
    scores = z @ z.T / tau
    log_p = scores - scores.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    means = log_p.where(positive, 0.0).sum(1) / positive.sum(1).clamp_min(1)
    return -means[anchors].mean()


class SupCon(DistillationLoss):
    """Embeddings learnt from labels: close together within a class, apart otherwise; :func:`supervised_contrastive`.

    Needs no teacher: it trains the teacher, and the student alone. The authors compare two augmented views of each
    image; here the positives are a batch's other samples of the class, so batches have to be large enough for some.
    τ divides the cosines; it is no temperature of soft targets, and no schedule of temperatures changes it.

    Args:
        tau: τ > 0; the authors' is 0.1.
        weight: Factor of the term.
        gather: See :class:`~kd_lightning.losses.DistillationLoss`.

    Raises:
        ValueError: For τ ≤ 0; in training, for outputs that are no vectors, and for a batch of one.
    """

    needs_labels = True
    needs_teacher = False
    over_classes = False
    compares_samples = True
    min_batch_size = 2

    def __init__(self, tau: float = 0.1, weight: float = 1.0, gather: bool = False) -> None:
        super().__init__(weight, gather=gather)
        if not is_finite_number(tau) or not tau > 0:
            raise ValueError(f"expected tau > 0, got {tau!r}: the authors take 0.1")
        self.tau = tau

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        vectors = student.logits
        if vectors.ndim != 2:
            raise ValueError(
                f"supcon: expected vectors (B, D), got outputs {tuple(vectors.shape)}: average over tokens or pixels "
                "in the network"
            )
        if target is None:
            return 0.0 * vectors.sum()
        return supervised_contrastive(vectors, target, tau=self.tau)
