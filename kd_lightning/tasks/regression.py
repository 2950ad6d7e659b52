"""One or several values for each input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_lightning.headline import Headline
from kd_lightning.outputs import AnyOutputs, Outputs, TopK
from kd_lightning.tasks.base import Task


class Regression(Task):
    """Values: a network has one output for each, (B, D), or (B,) for a single one.

    Targets are (B, D), or (B,) for a single value; NaN for a value that is not known. A target of another shape than
    the outputs is refused, never broadcast.

    The headline is the mean absolute error: it has the target's unit, and, as a mean over units, an exact interval; a
    few large errors do not make it up, as they do a root mean square.

    Args:
        symbol: Unit of the error, such as ``mm``; empty for none.
        scale: What 1 of the networks' values is in that unit, where the data module standardises the target: its
            standard deviation there; one number, or one for each output.
        tolerance: Values of two networks that differ by no more agree: in the networks' units, so that the default is a
            tenth of a standard deviation where the target is standardised.
        units: What has values, plural, as sentences say it.
        digits: Decimals with which the error is written.

    Raises:
        ValueError: For a scale or a tolerance that is not positive.
    """

    over_classes = False
    gives_logits = False
    shown = ("units", "symbol", "digits")
    losses_to_take = "label_regression, teacher_regression, teacher_bounded or logits_mse"

    def __init__(
        self,
        symbol: str = "",
        scale: float | Sequence[float] = 1.0,
        tolerance: float = 0.1,
        units: str = "samples",
        digits: int = 2,
    ) -> None:
        scales = [scale] if isinstance(scale, int | float) else list(scale)
        if not scales or min(scales) <= 0 or tolerance <= 0:
            raise ValueError(f"expected scale and tolerance above 0, got {scale} and {tolerance}")
        self.scale, self.tolerance = tuple(scales), tolerance
        self.headline = Headline(
            name="mean absolute error",
            key="mae",
            units=units,
            higher_is_better=False,
            percent=False,
            symbol=symbol,
            digits=digits,
        )

    def target_of(self, target: Any) -> Any:
        """Return values of any number type as (B, D) of a floating-point type; anything else as it is."""
        if not isinstance(target, Tensor) or target.is_complex():
            return target
        values = target if target.is_floating_point() else target.float()
        return values[:, None] if values.ndim == 1 else values

    def arrange(self, logits: Tensor) -> Tensor:
        """Return a single value of each sample, (B,), as (B, 1)."""
        return logits[:, None] if logits.ndim == 1 else logits

    def average(self, members: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
        """Return the average of the members' values."""
        return torch.stack([w * z for z, w in zip(members, weights, strict=True)]).sum(0)

    def has_label(self, target: Tensor) -> Tensor:
        return (~target.isnan()).flatten(1).any(1)

    def answers(self, outputs: AnyOutputs) -> Tensor:
        """Return the values, in the networks' units: float32 (n, D)."""
        return outputs.logits.float()

    def scores(self, outputs: AnyOutputs, target: Tensor) -> Tensor:
        """Return the absolute error of each labelled sample, a mean over its known values, in the headline's unit."""
        self._check_shape(target, outputs.logits)
        labelled = self.has_label(target)
        values, expected = self.answers(outputs)[labelled], target[labelled].float()
        return ((values - expected).abs() * self._scale(values)).nanmean(1)

    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the share of a sample's values that differ by no more than :attr:`tolerance`: (n,)."""
        return ((student - teacher).abs() <= self.tolerance).float().mean(1)

    def comparable(self, student: Outputs, teacher: AnyOutputs) -> bool:
        return not isinstance(teacher, TopK) and student.logits.shape == teacher.logits.shape

    def knows_nothing(self, target: Tensor, width: int | None = None) -> float | None:
        """Return the error of the median of each value: the best that one answer to everything can do."""
        target = target[self.has_label(target)].float()
        return float(self.scores(Outputs(target.nanmedian(0).values.expand_as(target)), target).mean())

    def one_answer(self) -> str:
        return "gives one value for everything"

    def check(self, target: Any, logits: Tensor) -> None:
        if not isinstance(target, Tensor) or target.is_complex():
            kind = type(target).__name__ if not isinstance(target, Tensor) else "complex tensor"
            raise ValueError(f"the target is a {kind}, expected a tensor of numbers, one for each of a sample's values")
        self._check_shape(target, logits)
        if bool(target.isinf().any()):
            raise ValueError(
                "the target holds infinite values, expected numbers, or NaN for a value that is not known: look for a "
                "logarithm of zero, or a division by a standard deviation of zero"
            )

    def check_arguments(self, width: int) -> None:
        if len(self.scale) not in (1, width):
            raise ValueError(f"expected one scale, or one for each of {width} values, got {len(self.scale)}")

    def _check_shape(self, target: Tensor, logits: Tensor) -> None:
        if logits.ndim != 2 or target.shape[1:] != logits.shape[1:]:
            got, expected = (f"({', '.join(['N', *map(str, x.shape[1:])])})" for x in (target, logits))
            raise ValueError(
                f"the target is of shape {got} and the outputs are {expected}, expected both as (N, D), a number for "
                "each value of a sample: give the network as many outputs, or reshape the target in the data set"
            )

    def _scale(self, values: Tensor) -> Tensor:
        return torch.tensor(self.scale, device=values.device, dtype=values.dtype)
