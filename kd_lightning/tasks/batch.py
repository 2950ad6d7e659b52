"""What a batch holds beside inputs and targets."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from kd_lightning.outputs import Outputs, Samples


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
    teacher: Outputs | None = None


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

    def outputs(self) -> Outputs:
        prefix = "features."
        features = {n.removeprefix(prefix): x for n, x in self.teacher.items() if n.startswith(prefix)}
        if "logits" in self.teacher:
            return Outputs(self.teacher["logits"], features)
        if not {"indices", "log_probs"} <= self.teacher.keys():
            raise ValueError(
                f"expected a teacher's outputs by 'logits', or by 'indices' and 'log_probs', got {list(self.teacher)}"
            )
        return Outputs.of_top_k(self.teacher["indices"], self.teacher["log_probs"], features)


class Unwrapped(NamedTuple):
    """A batch as the data set gives it, and what was put around it."""

    batch: Any
    samples: Samples | None = None
    teacher: Outputs | None = None


def unwrapped(batch: Any) -> Unwrapped:
    """Take off what :class:`Identified` and :class:`Taught` put around a batch, in whatever order."""
    if isinstance(batch, Identified):
        return unwrapped(batch.batch)._replace(samples=Samples(batch.ids, int(batch.total.flatten()[0])))
    if isinstance(batch, Taught):
        return unwrapped(batch.batch)._replace(teacher=batch.outputs())
    return Unwrapped(batch)
