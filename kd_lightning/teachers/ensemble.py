"""Several teachers that speak as one."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kd_lightning.outputs import AnyOutputs, EnsembleOutputs, Outputs
from kd_lightning.tasks.batch import Batch
from kd_lightning.teachers.base import TeacherSource
from kd_lightning.teachers.live import Teacher


class Ensemble(TeacherSource):
    """The average of several teachers' probabilities, at each loss's temperature (Hinton et al., 2015, section 2).

    A loss of temperature T gets T·log Σ_k w_k·softmax(z_k / T) as the teacher's logits: those whose softmax at T is the
    average. For a loss without a temperature, and for accuracy and agreement, T is 1. Each member's accuracy is logged
    once, as ``val/teacher_acc/<i>``. Where T is learnt, its gradient takes these logits as given.

    Layers, and the network that a loss looks into, are the first member's: features of several networks have no
    average.

    Args:
        teachers: Networks, or sources, of the same classes in the same order.
        weights: One for each, ≥ 0, as parts of their sum; equal unless given.

    Raises:
        ValueError: For no teacher, weights that do not fit; before training, for teachers of unequal classes, and for
            those of which only the best classes are known: their average is not.

    Example:
        >>> pair = Ensemble([nn.Linear(4, 3), nn.Linear(4, 3)], weights=[2, 1])
        >>> pair(Batch((torch.zeros(5, 4),), {}, None)).logits.shape
        torch.Size([5, 3])
    """

    def __init__(self, teachers: Sequence[TeacherSource | nn.Module], weights: Sequence[float] | None = None) -> None:
        if not teachers:
            raise ValueError("expected at least one teacher, got none: pass for instance Ensemble([one, other])")
        weights = [1.0] * len(teachers) if weights is None else list(weights)
        if len(weights) != len(teachers) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise ValueError(
                f"expected a weight >= 0 for each of {len(teachers)} teachers, one above 0, got {weights}: leave them "
                "out for equal ones"
            )
        self.teachers = [Teacher(teacher) if isinstance(teacher, nn.Module) else teacher for teacher in teachers]
        if any(teacher.learns for teacher in self.teachers):
            raise ValueError("expected teachers that stay as they are, got one that learns with the student")
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self.network = self.teachers[0].network
        self.in_batch = any(teacher.in_batch for teacher in self.teachers)

    def __call__(self, batch: Batch, layers: Iterable[str] = ()) -> EnsembleOutputs:
        return self._mixed(self.teachers, batch, layers)

    def dry(self, batch: Batch, layers: Iterable[str] = ()) -> EnsembleOutputs:
        return self._mixed([teacher.dry for teacher in self.teachers], batch, layers)

    def can_teach(self, batch: Batch) -> bool:
        return all(teacher.can_teach(batch) for teacher in self.teachers)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        for teacher in self.teachers:
            teacher.to(device, dtype)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{i}.{key}": x for i, member in enumerate(self.teachers) for key, x in member.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for i, member in enumerate(self.teachers):
            own = f"{i}."
            member.load_state_dict({key.removeprefix(own): x for key, x in state.items() if key.startswith(own)})

    def _mixed(
        self, teachers: Sequence[Callable[[Batch, Iterable[str]], AnyOutputs]], batch: Batch, layers: Iterable[str]
    ) -> EnsembleOutputs:
        outputs: list[Outputs] = []
        for i, teacher in enumerate(teachers):
            one = teacher(batch, () if outputs else layers)
            if not isinstance(one, Outputs):
                what = "an ensemble of its own" if one.members else "its best classes"
                raise ValueError(
                    f"teacher {i} of the ensemble gives {what}, expected logits of all classes: probabilities are "
                    "averaged at the loss's temperature; leave it out, or put an inner ensemble's members here"
                )
            if outputs and one.logits.shape != outputs[0].logits.shape:
                raise ValueError(
                    f"teacher {i} of the ensemble gives logits {tuple(one.logits.shape)} and teacher 0 "
                    f"{tuple(outputs[0].logits.shape)}, expected the same classes in the same order: slice or reorder "
                    "its logits in a module around it"
                )
            outputs.append(one)
        return EnsembleOutputs.of((one.logits for one in outputs), self.weights, outputs[0].features)
