"""The regression task's own loss: the error against the labels."""

from torch import Tensor

from kd_lightning.losses.base import DistillationLoss, nothing
from kd_lightning.losses.value_error import Form, check_form, check_values, value_error
from kd_lightning.outputs import Outputs


def label_regression(student: Tensor, target: Tensor, *, form: Form = "mse", delta: float = 1.0) -> Tensor:
    """Squared, absolute or Huber error of the student, averaged over the values that are known.

    Zero, with a gradient of zero, where none is.

    Shape:
        student: (B, D), or of any other shape.
        target: Of the same shape; NaN where it is not known.

    Raises:
        ValueError: For unequal shapes, another form, or δ ≤ 0.

    Example:
        >>> import torch
        >>> label_regression(torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, float("nan")]])).item()
        4.0
    """
    check_values(student, target)
    known = ~target.isnan()
    errors = value_error(student[known], target[known].to(student.dtype), form, delta)
    return errors.sum() / max(errors.numel(), 1)


class LabelRegression(DistillationLoss):
    """The error against the labels; values that are not known (NaN) add nothing; see :func:`label_regression`.

    Args:
        form: ``mse`` (squared), ``l1`` (absolute) or ``huber``.
        delta: Of the Huber error: where its square ends, in the target's units.
        weight: Factor of the term.
    """

    over_classes, of_values = False, True
    needs_labels = True
    needs_teacher = False

    def __init__(self, form: Form = "mse", delta: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        check_form(form, delta)
        self.form: Form = form
        self.delta = delta

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        if target is None:
            return nothing(student)
        return label_regression(student.logits, target, form=self.form, delta=self.delta)
