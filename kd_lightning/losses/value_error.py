"""What the losses of regression share: how far two values are apart."""

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import is_finite_number

Form = Literal["mse", "l1", "huber"]


def value_error(values: Tensor, expected: Tensor, form: Form, delta: float) -> Tensor:
    """Return the error of each value: d² (mse), abs(d) (l1), or d²/2 up to δ and δ·(abs(d) − δ/2) beyond (huber).

    Raises:
        ValueError: For another form, δ ≤ 0, or unequal shapes.
    """
    check_form(form, delta)
    check_values(values, expected)
    if form == "mse":
        return F.mse_loss(values, expected, reduction="none")
    if form == "l1":
        return F.l1_loss(values, expected, reduction="none")
    return F.huber_loss(values, expected, reduction="none", delta=delta)


def check_form(form: str, delta: float) -> None:
    """Raise ValueError for an error that has no formula here, or a δ that is not positive."""
    if form not in get_args(Form):
        raise ValueError(f"expected form to be one of {', '.join(get_args(Form))}, got {form!r}")
    if not is_finite_number(delta) or delta <= 0:
        raise ValueError(f"expected delta > 0, got {delta!r}: beyond it, the Huber error grows linearly")


def check_values(values: Tensor, expected: Tensor) -> None:
    """Raise ValueError for other shapes: (B,) against (B, 1) would be compared as B × B pairs."""
    if values.shape != expected.shape:
        raise ValueError(
            f"expected values of one shape, got {tuple(values.shape)} and {tuple(expected.shape)}: one number for each "
            "output of each sample; for a single output, target[:, None] or student(x).squeeze(1)"
        )
