"""What a batch holds beside inputs and targets."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kd_lightning.outputs import AnyOutputs, Outputs, Samples, TopK

IGNORE_INDEX = -100
"""The target of a sample without label, as in ``torch.nn.functional.cross_entropy``."""


class Batch(NamedTuple):
    """What the networks are called with, and the target: None where the batch has none.

    Attributes:
        samples: Which samples of the data set these are, where the batch says so (:class:`Identified`).
        teacher: A teacher's outputs, where they come with the batch (:class:`Taught`).
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Tensor | None
    samples: Samples | None = None
    teacher: AnyOutputs | None = None


def check_numbers(batch: Batch, what: str) -> None:
    """Raise ValueError for NaN in what the networks are called with; an attention mask may well be infinite."""
    for x in (*batch.args, *batch.kwargs.values()):
        if isinstance(x, Tensor) and bool(x.isnan().any()):
            bad = x.isnan().flatten(1).any(1) if x.ndim > 1 else x.isnan()
            raise ValueError(
                f"expected numbers in {what}, got NaN in {int(bad.sum())} of {bad.numel()} samples: look at the data, "
                "and at how it is normalised"
            )


class Identified(NamedTuple):
    """A batch as it was without :class:`~kd_lightning.data.WithIds`, and which samples it holds."""

    batch: Any
    ids: Tensor
    total: Tensor


class Taught(NamedTuple):
    """A batch, and what a teacher gave for it.

    Attributes:
        batch: As it was without.
        teacher: ``logits``, or ``indices`` and ``log_probs`` of the best classes (:class:`~kd_lightning.outputs.TopK`);
            features by ``features.<layer>``.
    """

    batch: Any
    teacher: Mapping[str, Tensor]

    def outputs(self) -> Outputs | TopK:
        prefix = "features."
        features = {n.removeprefix(prefix): x for n, x in self.teacher.items() if n.startswith(prefix)}
        if "logits" in self.teacher:
            return Outputs(self.teacher["logits"], features)
        if not {"indices", "log_probs"} <= self.teacher.keys():
            raise ValueError(
                f"expected a teacher's outputs by 'logits', or by 'indices' and 'log_probs', got {list(self.teacher)}"
            )
        return TopK.of(self.teacher["indices"], self.teacher["log_probs"], features)


def taught(batch: Any) -> Any:
    """Return a bare batch that holds a teacher's outputs as :class:`Taught`, any other as it is.

    These are the third part of (input, target, teacher's logits), or of (input, target, mapping by the names of
    :class:`Taught`), and the values of a mapping under these names after ``teacher_``: ``teacher_logits``, or
    ``teacher_indices`` and ``teacher_log_probs``; ``teacher_features.<layer>``.
    """
    if isinstance(batch, Mapping):
        own = {name: _in_mapping(name) for name in batch if _in_mapping(name)}
        rest = {name: value for name, value in batch.items() if name not in own}
        return Taught(rest, {own[name]: batch[name] for name in own}) if own else batch
    if isinstance(batch, Taught | Identified) or not isinstance(batch, Sequence) or len(batch) != 3:
        return batch
    third = batch[2]
    if isinstance(third, Mapping) and ("logits" in third or "indices" in third):
        return Taught(batch[:2], third)
    if isinstance(third, Tensor) and third.is_floating_point() and third.ndim > 1:
        return Taught(batch[:2], {"logits": third})
    return batch


def _in_mapping(name: Any) -> str:
    own = name.removeprefix("teacher_") if isinstance(name, str) and name.startswith("teacher_") else ""
    return own if own in ("logits", "indices", "log_probs") or own.startswith("features.") else ""


class Unwrapped(NamedTuple):
    """A batch as the data set gives it, and what was put around it."""

    batch: Any
    samples: Samples | None = None
    teacher: AnyOutputs | None = None


def unwrapped(batch: Any, bare: bool = False) -> Unwrapped:
    """Take off what :class:`Identified` and :class:`Taught` put around a batch, in whatever order.

    Args:
        batch: As the loader gives it.
        bare: Take also out of a bare tuple or mapping what :func:`taught` finds there.
    """
    batch = taught(batch) if bare else batch
    if isinstance(batch, Identified):
        return unwrapped(batch.batch, bare)._replace(samples=Samples(batch.ids, int(batch.total.flatten()[0])))
    if isinstance(batch, Taught):
        return unwrapped(batch.batch)._replace(teacher=batch.outputs())
    return Unwrapped(batch)
