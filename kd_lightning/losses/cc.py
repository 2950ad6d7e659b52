"""Correlation Congruence for Knowledge Distillation (Peng et al., ICCV 2019), https://arxiv.org/abs/1904.01802."""

from torch import Tensor, nn

from kd_lightning.losses.base import FeatureLoss, check_batch, check_same_shape
from kd_lightning.losses.features import embedding, project
from kd_lightning.outputs import Outputs


def correlation_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over i of Σ_d Δ_i,d Δ_i+1,d with Δ = |e_s − e_t|: each sample's deviation times the next one's.

    This is the form that the authors shared with the code of published tables; the paper compares B × B matrices of
    kernel values. Averaged over the B − 1 neighbours, so the order of the samples counts.

    Shape:
        student, teacher: (B, D), equal.

    Raises:
        ValueError: For fewer than two samples, and for unequal shapes.
    """
    return _congruence(student, teacher.detach())


class CC(FeatureLoss):
    """Learnt linear embeddings of both networks' features, compared by :func:`correlation_congruence`.

    Both embeddings are trained, the teacher's too, as in the code of published tables.

    Args:
        student_layer: Name of a layer, usually the one that the classifier reads; the networks' outputs, such as
            embeddings, unless given. Maps are averaged over space.
        teacher_layer: The teacher's; the student's name unless given.
        width: Of the embeddings.
        weight: Factor of the term; published CIFAR-100 tables use 0.02.
        gather: See :class:`~kd_lightning.losses.DistillationLoss`.

    Raises:
        ValueError: For a width below 1.
    """

    compares_samples = True
    min_batch_size = 2
    student_embedding: nn.Module
    teacher_embedding: nn.Module

    def __init__(
        self,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
        width: int = 128,
        weight: float = 1.0,
        gather: bool = False,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight, gather)
        if width < 1:
            raise ValueError(f"expected width >= 1, got {width}: the authors' is 128")
        self.width = width
        self.student_embedding = nn.Identity()
        self.teacher_embedding = nn.Identity()

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        s, t = map(embedding, self.features(student, teacher))
        self.student_embedding = nn.Linear(s.shape[1], self.width)
        self.teacher_embedding = nn.Linear(t.shape[1], self.width)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        s, t = map(embedding, self.features(student, teacher))
        # Not the public function, which would keep the gradient from the teacher's embedding.
        return _congruence(project(self.student_embedding, s), project(self.teacher_embedding, t.detach()))


def _congruence(student: Tensor, teacher: Tensor) -> Tensor:
    check_batch(len(student), 2, "correlation_congruence")
    check_same_shape(student, teacher, "embeddings")
    deviation = (student - teacher).abs()
    return (deviation[:-1] * deviation[1:]).sum(1).mean()
