"""The teacher's values in the place of the labels, for regression."""

from torch import Tensor

from kd_lightning.losses.base import DistillationLoss
from kd_lightning.losses.value_error import Form, check_form, value_error
from kd_lightning.outputs import Outputs


def teacher_regression(student: Tensor, teacher: Tensor, *, form: Form = "mse", delta: float = 1.0) -> Tensor:
    """Squared, absolute or Huber difference between the student's and the teacher's values; mean over all values.

    The squared one is :func:`~kd_lightning.losses.logits_mse`.

    Shape:
        student, teacher: (B, D), or of any other shape, the same for both.

    Raises:
        ValueError: For unequal shapes, another form, or δ ≤ 0.

    Example:
        >>> import torch
        >>> teacher_regression(torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 5.0]]), form="l1").item()
        1.0
    """
    return value_error(student, teacher.detach(), form, delta).mean()


class TeacherRegression(DistillationLoss):
    """The difference to the teacher's values, labelled or not; see :func:`teacher_regression`.

    Args:
        form: ``mse`` (squared), ``l1`` (absolute) or ``huber``.
        delta: Of the Huber error: where its square ends, in the target's units.
        weight: Factor of the term.
    """

    over_classes, of_values = False, True

    def __init__(self, form: Form = "mse", delta: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        check_form(form, delta)
        self.form: Form = form
        self.delta = delta

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        return teacher_regression(student.logits, teacher.logits, form=self.form, delta=self.delta)
