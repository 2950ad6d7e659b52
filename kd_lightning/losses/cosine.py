"""Cosine distance to the teacher's vectors, as in DistilBERT (Sanh et al., 2019), https://arxiv.org/abs/1910.01108."""

from torch import Tensor, nn

from kd_lightning.losses.base import FeatureLoss, check_same_shape
from kd_lightning.losses.features import directions, embedding, project
from kd_lightning.outputs import Outputs


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over samples of 1 − cos(s, t), in [0, 2]; section 3 of the paper.

    The lengths of the vectors do not count. A vector of zeros has the cosine 0, and a gradient of zero.

    Shape:
        student, teacher: (..., D), equal.

    Raises:
        ValueError: For unequal shapes.

    Example:
        >>> import torch
        >>> cosine(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])).item()
        0.5
    """
    check_same_shape(student, teacher, "vectors")
    return (1 - (directions(student) * directions(teacher.detach())).sum(-1)).mean()


class Cosine(FeatureLoss):
    """Point where the teacher's vector points, through a learnt linear projector to its width; see :func:`cosine`.

    The projector is part of the loss: what is served is the student's own vector, whose neighbours it keeps close to
    the teacher's. Without it the student's vectors take the place of the teacher's, in an index of its vectors, say.

    Args:
        student_layer: Name of a layer; the networks' outputs, such as embeddings, unless given. Maps and tokens are
            averaged.
        teacher_layer: The teacher's; the student's name unless given.
        projected: Whether there is a projector. Without, both need vectors of one width.
        weight: Factor of the term; DistilBERT's is 1, without a projector.

    Raises:
        ValueError: In training, for vectors of another width without a projector.
    """

    projector: nn.Module

    def __init__(
        self,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
        projected: bool = True,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        self.projected = projected
        self.projector = nn.Identity()

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        if self.projected:
            s, t = map(embedding, self.features(student, teacher))
            self.projector = nn.Linear(s.shape[-1], t.shape[-1])

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        s, t = map(embedding, self.features(student, teacher))
        return cosine(project(self.projector, s), t)
