"""Several labels for each input, none of which excludes another."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kd_lightning.headline import Headline
from kd_lightning.outputs import AnyOutputs, Outputs, TopK
from kd_lightning.tasks.base import Task
from kd_lightning.tasks.batch import IGNORE_INDEX
from kd_lightning.tasks.of_counts import macro_f1


class MultiLabel(Task):
    """Labels that are set or not, each for itself: a network has one output a label, which is set above 0.

    Targets are (B, L): 1 for a label that is set, 0 for one that is not (of any type, or a probability between), -100
    for one that is not known. Two classes with a single output are one label.

    The headline is macro-F1, the mean over labels of F1 = 2·TP / (2·TP + FP + FN), of the counts of all units: each
    label counts the same however rare it is, and a label that is never found counts as 0, where the share of right
    answers would be high for a network that sets no label at all. A label that no unit has and no answer sets is left
    out.

    Args:
        units: What has labels, plural, as sentences say it.
    """

    over_classes = False
    losses_to_take = "bce, sigmoid_kd, sigmoid_hard or logits_mse"

    def __init__(self, units: str = "images") -> None:
        self.headline = Headline(name="macro-F1", key="f1", units=units, of_mean=macro_f1)

    def target_of(self, target: Any) -> Any:
        """Return labels of any integer type, or bools, as int64; anything else as it is."""
        whole = isinstance(target, Tensor) and not target.is_floating_point() and not target.is_complex()
        return target.long() if whole else target

    def has_label(self, target: Tensor) -> Tensor:
        known = target != IGNORE_INDEX
        return known.flatten(1).any(1) if known.ndim > 1 else known  # what is no multi-hot target is refused later

    def average(self, members: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
        """Return the logits whose sigmoid at T is the average of the members' probabilities at T."""
        scaled = [z.float() / temperature if z.dtype != torch.float64 else z / temperature for z in members]
        logs = [w.log() for w in torch.tensor(weights, dtype=scaled[0].dtype, device=scaled[0].device)]
        yes, no = (
            torch.stack([logsigmoid(sign * z) + w for z, w in zip(scaled, logs, strict=True)]).logsumexp(0)
            for sign in (1, -1)
        )
        return temperature * (yes - no)

    def answers(self, outputs: AnyOutputs) -> Tensor:
        """Return which labels are set: bool (n, L)."""
        return outputs.logits > 0

    def scores(self, outputs: AnyOutputs, target: Tensor) -> Tensor:
        """Count for each sample and label what F1 is made of: (n, L, 2).

        First whether the label is rightly set, then how often it is set by target and answer together: 0 to 2. A label
        that is not known counts as 0 in both; a probability of more than a half is a label that is set.
        """
        target = target[labelled := self.has_label(target)]
        known, set_by_target = target != IGNORE_INDEX, target > 0.5
        found = self.answers(outputs)[labelled] & known
        return torch.stack([(found & set_by_target).float(), found.float() + set_by_target.float()], -1)

    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the share of the labels set by either that both set, 1 where neither sets any: (n,).

        Labels that both leave out do not count: they are most of them.
        """
        both, either = (student & teacher).sum(1), (student | teacher).sum(1)
        return torch.where(either == 0, 1.0, both / either.clamp_min(1))

    def comparable(self, student: Outputs, teacher: AnyOutputs) -> bool:
        return not isinstance(teacher, TopK) and student.logits.shape == teacher.logits.shape

    def entropy(self, logits: Tensor, temperature: float = 1.0) -> Tensor | None:
        """Return the entropy of σ(z / T) as a share of log 2, averaged over labels."""
        z = logits.float() / temperature
        each = torch.sigmoid(z) * logsigmoid(z) + torch.sigmoid(-z) * logsigmoid(-z)
        return -each.mean() / math.log(2)

    def knows_nothing(self, target: Tensor, width: int | None = None) -> float | None:
        """Return the macro-F1 of setting every label: the best that one answer to everything can do."""
        everything = torch.ones_like(target, dtype=torch.float32)
        scores = self.scores(Outputs(everything), target)
        there = (target[self.has_label(target)] > 0.5).any(0)
        return self.headline.value(scores[:, there].cpu().numpy()) if bool(there.any()) else None

    def one_answer(self) -> str:
        return "sets the same labels for everything"

    def check(self, target: Any, logits: Tensor) -> None:
        if not isinstance(target, Tensor):
            raise ValueError(
                f"the target is a {type(target).__name__}, expected a tensor with a 0 or 1 for each label: collate the "
                "labels of a sample as one tensor"
            )
        if logits.ndim != 2:
            raise ValueError(
                f"the logits are {_each(logits.shape)}, expected one for each label, (N, L): pool what has a place, or "
                "pass a task of your own"
            )
        if target.shape[1:] != logits.shape[1:]:
            remedy = "slice or reorder the labels, or set num_classes"
            if target.ndim == 1:
                remedy = "one class a sample is task=Classification(); a single label is target[:, None]"
            raise ValueError(
                f"the target is of shape {_each(target.shape)}, expected a 0 or 1 for each label, "
                f"{_each(logits.shape)}: {remedy}"
            )
        known = target[target != IGNORE_INDEX]
        wrong = known[~((known >= 0) & (known <= 1))]
        if wrong.numel():
            raise ValueError(
                f"the target holds {wrong[0].item():g}, expected 0 or 1 for each label, a probability between, or -100 "
                "for a label that is not known"
            )


def _each(shape: Sequence[int]) -> str:
    return f"({', '.join(['N', *map(str, shape[1:])])}{',' if len(shape) == 1 else ''})"
