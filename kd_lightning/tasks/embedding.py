"""Vectors whose neighbours matter: a student learns a teacher's, which may be of another width."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from kd_lightning.headline import Headline
from kd_lightning.outputs import AnyOutputs, Outputs, TopK
from kd_lightning.tasks.base import Task
from kd_lightning.tasks.batch import IGNORE_INDEX

_ROWS = 1024  # of the matrix of similarities that are there at one time


class Embedding(Task):
    """A vector for each input: outputs (B, D), of which the cosines to other inputs' vectors are what is used.

    Test units need no labels, as the teacher is what is right: the headline is the share of each unit's nearest test
    units by the teacher's vectors that are among as many nearest by the student's. It is 1 for the teacher itself, and
    does not depend on the vectors' widths, lengths and rotation. Targets may be there for losses that learn embeddings
    from labels (``supcon``): class indices, -100 for a sample without.

    Args:
        neighbours: How many nearest units are compared.
        units: What has a vector, plural, as sentences say it.

    Raises:
        ValueError: For fewer than one neighbour.
    """

    labelled = False
    over_classes = False
    gives_logits = False
    losses_to_take = "cosine, hint, rkd or pkt, and to learn from labels supcon"

    def __init__(self, neighbours: int = 10, units: str = "images") -> None:
        if neighbours < 1:
            raise ValueError(f"expected neighbours of 1 or more, got {neighbours}: 10 are usual")
        self.neighbours = neighbours
        self.headline = Headline(name=f"neighbour recall@{neighbours}", key=f"recall_at_{neighbours}", units=units)

    def target_of(self, target: Any) -> Any:
        """Return class indices of any integer type as int64; anything else as it is."""
        whole = isinstance(target, Tensor) and not target.is_floating_point() and not target.is_complex()
        return target.long() if whole else target

    def has_label(self, target: Tensor) -> Tensor:
        return target != IGNORE_INDEX if target.ndim == 1 else super().has_label(target)

    def answers(self, outputs: AnyOutputs) -> Tensor:
        """Return the vectors: (n, D)."""
        return outputs.logits.float()

    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the share of each unit's nearest others by the teacher that are so by the student: (n,).

        Of these very units, so that it is a figure of a whole data set and not of its batches.
        """
        count = min(self.neighbours, len(teacher) - 1)
        if count < 1:
            return torch.ones(len(teacher), device=teacher.device)
        found, expected = nearest(student, count), nearest(teacher, count)
        return (expected[:, :, None] == found[:, None]).any(2).float().mean(1)

    def comparable(self, student: Outputs, teacher: AnyOutputs) -> bool:
        return not isinstance(teacher, TopK) and len(student.logits) == len(teacher.logits)

    def metrics(self) -> MetricCollection:
        return MetricCollection({self.headline.key: NeighbourRecall(self)}, compute_groups=False)

    def knows_nothing(self, target: Tensor, width: int | None = None) -> float | None:
        """Return what units drawn at random find: k / (N − 1)."""
        others = len(target) - 1
        return self.neighbours / others if others > self.neighbours else None

    def one_answer(self) -> str:
        return "gives one vector to everything"

    def learned_nothing(self, answers: Tensor, scores: Tensor, target: Tensor | None) -> str | None:
        return super().learned_nothing(answers, scores, answers)  # of which only the number counts

    def check(self, target: Any, logits: Tensor) -> None:
        """Raise ValueError for class indices that are not one for each sample; any other target is a loss's own."""
        if isinstance(target, Tensor) and not target.is_floating_point() and target.shape[1:]:
            raise ValueError(
                f"the target is of shape {tuple(target.shape)}, expected one class index for each vector, or no "
                "target: leave it out of the batch where no loss reads it"
            )

    def check_dimensions(self, logits: Tensor, target: Tensor | None) -> None:
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"the outputs are of shape {tuple(logits.shape)}, expected a vector of two numbers or more for each "
                "sample, (N, D): average over tokens or pixels in the network"
            )


class NeighbourRecall(Metric):
    """The recall of a teacher's neighbours over all batches and processes: vectors are kept until the end."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    student: list[Tensor]
    teacher: list[Tensor]

    def __init__(self, task: Embedding) -> None:
        super().__init__()
        self._task = task
        self.add_state("student", [], dist_reduce_fx="cat")
        self.add_state("teacher", [], dist_reduce_fx="cat")

    def update(self, outputs: Outputs, teacher: AnyOutputs) -> None:
        if self._task.comparable(outputs, teacher):
            self.student.append(self._task.answers(outputs).detach())
            self.teacher.append(self._task.answers(teacher).detach())

    def compute(self) -> Tensor:
        if not len(self.student):
            return torch.tensor(float("nan"), device=self.device)
        student, teacher = (torch.cat(list(x)) if isinstance(x, list) else x for x in (self.student, self.teacher))
        return self._task.agreement(student, teacher).mean()


def nearest(vectors: Tensor, count: int) -> Tensor:
    """Return for each vector the others with the highest cosines, the nearest first: int64 (n, count).

    Shape: vectors (n, D); n > count.
    """
    directions = torch.nn.functional.normalize(vectors)
    found = []
    for start in range(0, len(vectors), _ROWS):
        cosines = directions[start : start + _ROWS] @ directions.T
        cosines.diagonal(start).fill_(-torch.inf)
        found.append(cosines.topk(count).indices)
    return torch.cat(found)
