"""A class for each token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics import MetricCollection

from kd_lightning.headline import Headline
from kd_lightning.outputs import AnyOutputs, TopK
from kd_lightning.tasks.base import Task
from kd_lightning.tasks.batch import IGNORE_INDEX
from kd_lightning.tasks.classification import Classification
from kd_lightning.tasks.metric import HeadlineMetric
from kd_lightning.tasks.of_counts import macro_f1

_CLASSES_OF_BYTES = 256


class TokenClassification(Classification):
    """A class for each token: logits (B, S, C), targets (B, S), -100 for padding and for tokens without label.

    Losses on logits read a token as they read a sample, and leave out those with -100. Units are whole sentences or
    passages: what a network gets wrong in one word it gets wrong in the next.

    The headline is macro-F1, the mean over classes of F1 = 2·TP / (2·TP + FP + FN), of the counts of all tokens. In
    most tagging most tokens are of one class (72 % of the words of ``data=shakespeare_punctuation`` have neither a
    capital nor a mark), so that a network which finds nothing else still has a high accuracy; the mean over classes
    counts each class the same, however rare. A class that no token has and no answer gives is left out. The accuracy,
    over tokens, is logged beside it.

    Args:
        class_dim: Which dimension of the outputs is that of the classes: 1 for (B, C, S); the last unless given. Needed
            where labels do not tell the two apart.
        units: What is tagged as one, plural, as sentences say it.
    """

    parts = Task.parts  # a class has no passages of its own

    def __init__(self, class_dim: int | None = None, units: str = "passages") -> None:
        super().__init__(class_dim=class_dim, units=units)
        self.headline = Headline(name="macro-F1", key="f1", units=units, of_mean=macro_f1)

    def answers(self, outputs: AnyOutputs) -> Tensor:
        """Return the most likely class of each token: (n, S)."""
        return outputs.best().to(torch.int16 if _classes(outputs) < 2**15 else torch.int32)

    def without_padding(self, answers: Tensor, target: Tensor | None) -> Tensor:
        """Mark the answers to tokens that have no label with -100."""
        labels = self.labels(target) if isinstance(target, Tensor) else None
        if labels is None or labels.shape != answers.shape:  # a module may have targets of its own
            return answers
        return answers.masked_fill(labels == IGNORE_INDEX, IGNORE_INDEX)

    def joined(self, answers: Sequence[Tensor]) -> Tensor:
        """Concatenate the answers of several batches, padded with -100 to the longest passage."""
        longest = max(batch.shape[1] for batch in answers)
        return torch.cat([pad(batch, (0, longest - batch.shape[1]), value=IGNORE_INDEX) for batch in answers])

    def scores(self, outputs: AnyOutputs, target: Tensor) -> Tensor:
        """Count for each passage with a label and each class what F1 is made of: (n, C, 2).

        First the tokens whose class is found, then how often it is given by target and answer together.
        """
        classes, labels, labelled = _classes(outputs), self.labels(target), self.has_label(target)
        labels, answers = labels[labelled], self.answers(outputs)[labelled].long()
        known = labels != IGNORE_INDEX
        first = classes * torch.arange(len(labels), device=labels.device)[:, None]  # of a passage's classes

        def count(of: Tensor, where: Tensor) -> Tensor:
            return (first + of)[where].bincount(minlength=len(labels) * classes).view(-1, classes)

        given = count(labels, known) + count(answers, known)
        return torch.stack([count(labels, known & (labels == answers)), given], -1).float()

    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the share of each passage's tokens, padding apart, to which both give the same class: (n,)."""
        counts = (student != IGNORE_INDEX) & (teacher != IGNORE_INDEX)
        same = (torch.eq(student, teacher) & counts).sum(1)
        return torch.where(counts.any(1), same / counts.sum(1).clamp_min(1), 1.0)

    def metrics(self) -> MetricCollection:
        metrics = super().metrics()
        metrics.add_metrics({"acc": HeadlineMetric(Classification())})
        return metrics

    def knows_nothing(self, target: Tensor, width: int | None = None) -> float | None:
        """Return the macro-F1 of the most frequent class for each token; None for one class alone."""
        labels = self.labels(target)
        counts = [count for count in labels[labels != IGNORE_INDEX].bincount().tolist() if count]
        return 2 * max(counts) / (max(counts) + sum(counts)) / len(counts) if len(counts) > 1 else None

    def one_answer(self) -> str:
        return "gives every token the same class"

    def learned_nothing(self, answers: Tensor, scores: Tensor, target: Tensor | None) -> str | None:
        given = answers[answers != IGNORE_INDEX]
        one = given[:1].expand(len(answers)) if bool((given == given[:1]).all()) else torch.arange(len(answers))
        return super().learned_nothing(one, scores, target)

    def check(self, target: Any, logits: Tensor) -> None:
        if logits.ndim != 3:
            raise ValueError(
                f"the logits are of shape {tuple(logits.shape)}, expected a class for each token, (N, S, C): one class "
                "for each sample is task=Classification(), one for each pixel task=Segmentation()"
            )
        super().check(target, logits)


def _classes(outputs: AnyOutputs) -> int:
    """Return how many classes there are, or may be where only the best are known: the same number in each batch."""
    if isinstance(outputs, TopK):
        return max(_CLASSES_OF_BYTES, int(outputs.indices.max()) + 1)
    return outputs.logits.shape[-1]
