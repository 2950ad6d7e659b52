"""What every distillation loss has in common."""

from collections.abc import Sequence

from torch import Tensor, nn

from kd_lightning.outputs import Outputs


class DistillationLoss(nn.Module):
    """One term of the objective: computes an unweighted scalar from student, teacher and target.

    Projectors and learnable temperatures are parameters of their loss. Those whose shapes depend on the networks are
    created in :meth:`build`, which is called with the outputs of a dry forward pass before the optimizer exists.

    Args:
        weight: Factor of the term in the total, ≥ 0; a plain number, so that it can be scheduled.
        student_layers: Names of the student's layers that the loss reads.
        teacher_layers: Names of the teacher's layers that the loss reads.

    Raises:
        ValueError: For a negative weight.
    """

    needs_labels = False
    """Whether the loss is meaningless on a data set without any label."""
    needs_teacher = True
    min_batch_size = 1

    def __init__(
        self, weight: float = 1.0, student_layers: Sequence[str] = (), teacher_layers: Sequence[str] = ()
    ) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"expected weight >= 0, got {weight}: leave the loss out, or pass 0 to only log it")
        self.weight = weight
        self.student_layers = tuple(student_layers)
        self.teacher_layers = tuple(teacher_layers)

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Create the parameters whose shapes follow from the networks' outputs. Called once; nothing by default."""

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        """Return the unweighted scalar.

        ``teacher`` is given whenever ``needs_teacher``; ``target`` is None for a batch without labels.
        """
        raise NotImplementedError


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"expected temperature > 0, got {temperature}: 1 leaves the logits as they are, 2 to 8 soften")


def check_same_shape(student: Tensor, teacher: Tensor, what: str = "logits") -> None:
    """Raise ValueError unless both have the same shape."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {what} {tuple(student.shape)} and teacher {what} {tuple(teacher.shape)} differ, expected the "
            "same shape: give both the same classes in the same order, or slice the teacher's outputs"
        )
