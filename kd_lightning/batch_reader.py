"""Read batches of somebody else's loader."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kd_lightning.outputs import AnyOutputs, Outputs, TopK
from kd_lightning.preflight.batches import size_of
from kd_lightning.selection import Selector, check_selector, describe, has_part, select
from kd_lightning.several_calls import repeated
from kd_lightning.tasks import Batch, Task, unwrapped
from kd_lightning.tasks.batch import Unwrapped

_USUAL_NAMES = ("targets", "y", "Y")
"""What targets are called beside the names that a task knows."""
_ENDS = ("start_positions", "end_positions")
"""The same in question answering, (B,) each: (B, 2) together."""


class BatchReader:
    """Reads batches as the task does, or as it was told to.

    Args:
        task: Says what a batch means.
        teacher_inputs: The teacher's arguments in a batch; what the student was called with unless given.
        target: The target in a batch; the task finds it unless given.
        labels_needed: Whether a loss reads the targets. Where none does, targets that are none of the outputs' are
            left out.
        bare: Whether a teacher's outputs are taken out of bare batches, too; see
            :func:`~kd_lightning.tasks.batch.unwrapped`.

    Attributes:
        task: May be set to another.

    Raises:
        TypeError: For a selector that is none.
    """

    def __init__(
        self,
        task: Task,
        teacher_inputs: Selector | None,
        target: Selector | None,
        labels_needed: bool,
        bare: bool = False,
    ) -> None:
        check_selector("teacher_inputs", teacher_inputs)
        check_selector("target", target)
        self.task, self._bare = task, bare
        self._teacher_inputs, self._target, self._labels_needed = teacher_inputs, target, labels_needed
        self._fits, self._in_column = True, False
        self._without_target: Any = None

    def unwrap(self, batch: Any) -> Unwrapped:
        """Take off what was put around a batch."""
        return unwrapped(batch, bare=self._bare)

    def read(self, batch: Any) -> Batch:
        batch, samples, teacher = self.unwrap(batch)
        target = self.target(batch)
        if target is None and self._target is None:
            self._without_target = batch
        if self._teacher_inputs is not None:
            return Batch(*self.arguments(batch), target, samples, teacher)
        try:
            return self.task.read(batch)._replace(target=target, samples=samples, teacher=teacher)
        except TypeError:
            return Batch((), {}, target, samples, teacher)  # the module knows how to read it

    def target(self, batch: Any) -> Tensor | None:
        """Return the target; None where the batch has none, or one that no loss reads and that fits no output."""
        target = self.task.target_of(self._find_target(batch))
        if not isinstance(target, Tensor):
            return target if self._labels_needed else None
        if self._in_column and target.shape[1:] == (1,):
            target = target.squeeze(1)
        return target if self._labels_needed or self._fits else None

    def _find_target(self, batch: Any) -> Any:
        if self._target is not None:
            return select(batch, self._target, "target")
        target, problem = None, ""
        try:
            target = self.task.read(batch).target
        except TypeError as error:
            problem, _, _ = str(error).partition(": pass")
        target = _by_usual_name(batch) if target is None else target
        if target is None and problem and self._labels_needed:
            raise TypeError(f"{problem}: {_name_it(batch)}")
        # pytorch-forecasting's (target, weight), which has no weight
        alone = type(target) in (tuple, list) and len(target) == 2 and target[1] is None
        return target[0] if alone else target

    def begin(self) -> None:
        """Forget what was noted of another loader."""
        self._fits, self._in_column, self._without_target = True, False, None

    def target_or_none(self, batch: Any) -> Tensor | None:
        try:
            return self.target(batch)
        except TypeError:
            return None

    def target_for(self, batch: Any, outputs: Outputs, calls: int = 1) -> Tensor | None:
        """Return the target of a batch for which these are the outputs of so many calls, as losses read it.

        Raises:
            ValueError: For another number of targets, where a loss reads them.
        """
        target = repeated(self.target(batch), calls, len(outputs.logits))
        if self._labels_needed and isinstance(target, Tensor):
            with self.suggest_target(batch):
                check_count(target, outputs.logits)
        return target

    def checking_counts(self, read: Callable[[Any], Batch]) -> Callable[[Any], Batch]:
        """Return what reads a batch likewise: as unlabelled where its targets are of another number than its inputs.

        Where a loss reads targets, those are refused.
        """

        def reading(raw: Any) -> Batch:
            batch = read(raw)
            size, target = size_of(batch), batch.target
            if size is None or not isinstance(target, Tensor) or not target.ndim or len(target) == size:
                return batch
            if self._labels_needed:
                with self.suggest_target(raw):
                    raise _other_count(target, f"the student's inputs ({size} samples)")
            return batch._replace(target=None)

        return reading

    def fits(self, target: Tensor, outputs: AnyOutputs) -> bool:
        """Tell whether a target is that of such outputs: the module may read its own from a batch."""
        if isinstance(outputs, TopK):
            return target.shape == outputs.best().shape
        try:
            self.task.check(target, outputs.logits)
            check_count(target, outputs.logits)
        except ValueError:
            return False
        return True

    def note_fit(self, target: Tensor | None, outputs: AnyOutputs) -> None:
        """Leave targets out from now on that are none of such outputs, where no loss reads them; say so.

        Args:
            target: Of a batch that was read before.
            outputs: For the same batch.
        """
        self._fits = target is None or self.fits(target, outputs)
        if target is not None and not self._fits and not self._labels_needed:
            rank_zero_info(
                f"targets {tuple(target.shape)} are none of outputs {tuple(outputs.logits.shape)}: no loss reads them, "
                "and the teacher is not scored; pass target= to have it scored"
            )

    def note_column(self, target: Any, outputs: Outputs) -> None:
        """Read class indices (B, 1) as (B,) from now on, where a loss reads them and outputs have one class a sample.

        Otherwise they may well be of something else than of the outputs.

        Args:
            target: Of a batch that was read before.
            outputs: For the same batch.
        """
        if self._labels_needed and isinstance(target, Tensor) and not target.is_floating_point():
            one_class = self.task.over_classes and outputs.logits.ndim == 2 and outputs.logits.shape[1] > 1
            self._in_column |= one_class and target.shape[1:] == (1,)

    @contextmanager
    def suggest_target(self, batch: Any) -> Iterator[None]:
        """Add to errors about a target how to name another one."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{error}; or {_name_it(batch)}") from error

    @contextmanager
    def say_what_else_there_is(self) -> Iterator[None]:
        """Add to errors about missing targets what the batches hold."""
        try:
            yield
        except ValueError as error:
            if self._without_target is None or not self._labels_needed:
                raise
            raise ValueError(f"{error}; or {_name_it(self._without_target)}") from error

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        assert self._teacher_inputs is not None
        inputs = select(batch, self._teacher_inputs, "teacher_inputs")
        if inputs is None:
            raise ValueError(
                f"teacher_inputs= gives None, expected a tensor, a tuple or a mapping: return a part of "
                f"{describe(batch)}"
            )
        if isinstance(inputs, Mapping):
            return (), inputs
        return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _by_usual_name(batch: Any) -> Any:
    """Return the tensor that a batch calls by a usual name of targets, or beside an image ``mask``; None of several."""
    names = [name for name in _USUAL_NAMES if has_part(batch, name)]
    if has_part(batch, "image") and has_part(batch, "mask"):
        names.append("mask")
    found = [part for name in names if isinstance(part := select(batch, name, "target"), Tensor)]
    ends = [select(batch, name, "target") for name in _ENDS if has_part(batch, name)]
    if len(ends) == 2 and all(isinstance(end, Tensor) for end in ends):
        found.append(torch.stack(ends, 1))
    return found[0] if len(found) == 1 else None


def _name_it(batch: Any) -> str:
    """Say how a target is named, with one of the parts that may be it."""
    parts = dict(batch) if isinstance(batch, Mapping) else {}
    if isinstance(batch, tuple | list):
        parts = dict(enumerate(batch))
    pairs = [f"lambda batch: batch[{name!r}][0]" for name, part in parts.items() if isinstance(part, tuple | list)]
    tensors = {repr(name): part for name, part in parts.items() if isinstance(part, Tensor) and name != 0}
    whole = [name for name, part in tensors.items() if not part.is_floating_point()]  # as class indices are
    example = next(iter([*whole, *pairs, *tensors]), "...")
    return (
        f"name the target, such as Distillation(..., target={example}), by a key, an index or a function of the batch, "
        f"which is {describe(batch)}"
    )


def check_count(target: Any, logits: Tensor) -> None:
    """Raise ValueError for another number of targets than of outputs.

    Raises:
        ValueError: With both shapes.
    """
    if isinstance(target, Tensor) and (not target.ndim or len(target) != len(logits)):
        raise _other_count(target, f"the student's logits {tuple(logits.shape)}")


def _other_count(target: Tensor, others: str) -> ValueError:
    return ValueError(
        f"the targets {tuple(target.shape)} and {others} differ in the number of samples, expected one each: does the "
        "step call the student on another batch than it takes labels from?"
    )
