"""One class for each input, token or pixel."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.headline import Headline
from kd_lightning.outputs import AnyOutputs, Outputs, TopK, class_dim, classes_last
from kd_lightning.tasks.base import Task
from kd_lightning.tasks.batch import IGNORE_INDEX


class Classification(Task):
    """One class for each input; for each token of (B, S, C) or pixel of (B, C, H, W), where these are its outputs.

    Targets are class indices of any integer type (or bools, for classes 0 and 1), -100 for a sample (a pixel, a token)
    without label, or probabilities of the logits' shape (mixup).

    Args:
        recall_classes: Classes whose recall is compared on its own, such as one that the student never sees.
        class_dim: Which dimension of three-dimensional outputs is that of the classes: 1 for (B, C, L), 2 for
            (B, S, C). Needed where labels do not tell the two apart.
        units: What is classified, plural, as sentences say it.

    Raises:
        ValueError: For another ``class_dim``, and a class below 0.
    """

    shown = ("recall_classes", "units")

    def __init__(self, recall_classes: Sequence[int] = (), class_dim: int | None = None, units: str = "images") -> None:
        if class_dim not in (None, 1, 2, -1):
            raise ValueError(f"expected class_dim to be 1 for (B, C, L), or 2 for (B, S, C), got {class_dim}")
        if any(number < 0 for number in recall_classes):
            raise ValueError(f"expected recall_classes from 0, got {list(recall_classes)}")
        self.recall_classes, self.class_dim = tuple(recall_classes), class_dim
        self.headline = Headline(name="accuracy", key="acc", units=units)

    def target_of(self, target: Any) -> Any:
        """Return class indices of any integer type, or bools, as int64; anything else as it is."""
        if isinstance(target, Tensor) and target.dtype != torch.int64 and not target.is_floating_point():
            return target if target.is_complex() else target.long()
        return target

    def labels(self, target: Tensor) -> Tensor:
        """Return class indices (B,), (B, S) or (B, H, W), -100 where there is no label."""
        return classes_last(target).argmax(-1) if target.is_floating_point() else target

    def has_label(self, target: Tensor) -> Tensor:
        labelled = self.labels(target) != IGNORE_INDEX
        return labelled.flatten(1).any(1) if labelled.ndim > 1 else labelled

    def answers(self, outputs: AnyOutputs) -> Tensor:
        """Return the most likely class: (B,), (B, S) or (B, H, W)."""
        return outputs.best()

    def scores(self, outputs: AnyOutputs, target: Tensor) -> Tensor:
        """Tell for each labelled sample, token or pixel whether the most likely class is its label: 0 or 1, (n,)."""
        labels, answers = self.labels(target), self.answers(outputs)
        labelled = labels != IGNORE_INDEX
        return torch.eq(answers[labelled], labels[labelled]).float()

    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Tell for each sample, token or pixel whether both find the same class most likely: 0 or 1, (n,)."""
        return torch.eq(student, teacher).float().flatten()

    def confidence(self, outputs: AnyOutputs, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probability of the most likely class at T = 1, and whether that is the label: (n,) each.

        Of each labelled sample, token or pixel.
        """
        labels, answers = self.labels(target), outputs.best()
        if isinstance(outputs, TopK):
            highest = outputs.log_probs.float().amax(-1).exp()
        else:
            highest = torch.softmax(classes_last(outputs.logits).float(), -1).amax(-1)
        labelled = labels != IGNORE_INDEX
        return highest[labelled], torch.eq(answers[labelled], labels[labelled]).float()

    def divergence(self, student: Outputs, teacher: AnyOutputs, target: Tensor | None) -> Tensor | None:
        """Return KL(teacher ‖ student) in nats at T = 1 for each sample, pixel or labelled token: (n,)."""
        if isinstance(teacher, TopK) or not self.comparable(student, teacher):
            return None
        log_t, log_s = (torch.log_softmax(classes_last(x.logits).float(), -1) for x in (teacher, student))
        divergences = (log_t.exp() * (log_t - log_s)).sum(-1)
        counts = self.without_padding(torch.zeros(divergences.shape, dtype=torch.long, device=log_t.device), target)
        return divergences[counts != IGNORE_INDEX]

    def knows_nothing(self, target: Tensor, width: int | None = None) -> float | None:
        """Return 1/C, with the classes that outputs, or else labels, tell apart; None for one alone."""
        labels = self.labels(target)
        classes = width or len(set(labels[labels != IGNORE_INDEX].tolist()))
        return 1 / classes if classes > 1 else None

    def one_answer(self) -> str:
        return "predicts a single class"

    def learned_nothing(self, answers: Tensor, scores: Tensor, target: Tensor | None) -> str | None:
        one_class = target is not None and self.knows_nothing(target) is None  # where one answer is the right one
        return None if one_class else super().learned_nothing(answers, scores, target)

    @property
    def has_parts(self) -> bool:
        return bool(self.recall_classes)

    def parts(self, target: Tensor, names: Sequence[str] | None = None) -> dict[str, NDArray[np.bool_]]:
        """Return the units of each of :attr:`recall_classes`: ``recall on 'ankle boot'``.

        Raises:
            ValueError: For a class that no unit has.
        """
        labels = self.labels(target)
        labels = labels[labels != IGNORE_INDEX]
        found = {}
        for number in self.recall_classes:
            name = names[number] if names and number < len(names) else str(number)
            of_class = (labels == number).cpu().numpy()
            if not of_class.any():
                raise ValueError(f"no test sample has class {number} ({name!r}), so it has no recall: leave it out")
            found[f"recall on {name!r}"] = of_class
        return found

    def check_arguments(self, width: int) -> None:
        wrong = [number for number in self.recall_classes if number >= width]
        if wrong:
            raise ValueError(f"expected recall_classes from 0 to {width - 1}, got {wrong[0]}")

    def check(self, target: Any, logits: Tensor) -> None:
        """Raise ValueError for a target that cannot be that of such logits.

        A subclass with ``labels`` of its own has targets of its own shape.

        Args:
            target: Class indices, -100 where there is none, or probabilities of the logits' shape.
            logits: Of any number of samples.
        """
        if not isinstance(target, Tensor):
            kind = type(target).__name__
            inner = f" of {type(target[0]).__name__}" if isinstance(target, Sequence) and target else ""
            raise ValueError(
                f"the target is a {kind}{inner}, expected a tensor of class indices: map each label to the index of "
                "its class in the data set"
            )
        classes = logits.shape[class_dim(logits)]
        if classes == 1 and target.is_floating_point():
            raise ValueError(
                f"the outputs {_each(logits.shape)} are one number each and the targets {_dtype(target)}, expected "
                "classes: pass task=Regression() for a quantity, or task=MultiLabel() for the logit of one label"
            )
        if type(self).labels is Classification.labels:
            if target.is_floating_point():
                _check_probabilities(target, logits)
            else:
                self._check_shape(target, logits)
        labels = self.labels(target)
        wrong = labels[((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= classes)]
        if wrong.numel():
            raise ValueError(
                f"label {int(wrong[0])} is out of range, expected 0 to {classes - 1}, or -100 for an unlabelled "
                "sample: set num_classes to that of the data set, or map the labels"
            )

    def check_dimensions(self, logits: Tensor, target: Tensor | None) -> None:
        """Raise ValueError for logits that may be (B, C, L) or (B, S, C), where labels (B, S) do not tell."""
        if logits.ndim != 3 or self.class_dim is not None:
            return
        if target is not None and target.is_floating_point() and target.shape[1:] == logits.shape[1:]:
            return  # probabilities
        if target is not None and target.shape[1:] == logits.shape[1:2] != logits.shape[2:]:
            return
        given = "no labels" if target is None else f"labels {_each(target.shape)}"
        raise ValueError(
            f"the logits {_each(logits.shape)} have {given}, which do not tell the dimension of the classes, expected "
            f"it to be named: pass task={type(self).__name__}(class_dim=2) for (B, S, C), or class_dim=1 for "
            "(B, C, L); or task=Regression() for values that are no classes"
        )

    def check_unread(self, target: Tensor, logits: Tensor) -> None:
        of_each_class = target.shape[1:] == logits.shape[1:]
        if of_each_class and _marks(target):
            target = target.float()  # one-hot, or several labels a sample
        super().check_unread(target, logits)
        quantity = target.is_floating_point() and target.ndim > 0 and target.numel() == len(target)
        if quantity and not of_each_class and not bool((target == target.round()).all()):
            raise ValueError(
                f"the target is {_dtype(target)} of shape {tuple(target.shape)}, one quantity a sample, expected "
                f"classes for a softmax over outputs {_each(logits.shape)}: pass task=Regression() with losses on "
                "values, such as TeacherRegression or LogitsMSE; where it is no target, name another with target="
            )

    def _check_shape(self, target: Tensor, logits: Tensor) -> None:
        expected = classes_last(logits).shape[1:-1]
        if target.shape[1:] == expected:
            self.check_dimensions(logits, target)
            return
        remedy = "pass one class index for each"
        if logits.ndim == 3 and target.shape[1:] == logits.shape[2:]:
            name = type(self).__name__
            remedy = f"where the classes are the second dimension, (B, C, L), pass task={name}(class_dim=1)"
        elif target.shape[1:] == logits.shape[1:]:
            if _marks(target):
                _check_probabilities(target.float(), logits)  # several labels a sample are told of there
            remedy = f"one-hot labels become indices by target.argmax({class_dim(logits) % logits.ndim})"
        elif target.ndim == 2 and target.shape[1] == 1:
            remedy = "call target.squeeze(1)"
        elif logits.ndim > 3 and target.ndim == logits.ndim - 1:
            remedy = "bring both to one size: labels by taking every n-th, such as target[:, ::4, ::4], or the logits"
        raise ValueError(
            f"the target is {_dtype(target)} of shape {tuple(target.shape)}, expected class indices "
            f"{_each((0, *expected))} for logits {_each(logits.shape)}: {remedy}"
        )


def _marks(target: Tensor) -> bool:
    """Tell whether a target is 0 or 1 for each class, as integers: one-hot, or several labels a sample."""
    return not target.is_floating_point() and bool(((target == 0) | (target == 1)).all())


def _check_probabilities(target: Tensor, logits: Tensor) -> None:
    got = f"the target is {_dtype(target)} of shape {tuple(target.shape)}"
    if target.ndim != logits.ndim:
        raise ValueError(
            f"{got}, expected class indices as int64, or probabilities of the logits' shape {_each(logits.shape)}: "
            "call target.long() on class indices; regression has no classes: pass task=Regression()"
        )
    classes, expected = target.shape[class_dim(target)], logits.shape[class_dim(logits)]
    if classes != expected:
        raise ValueError(f"the targets are probabilities over {classes} classes, expected {expected}: {got}")
    if target.shape[1:] != logits.shape[1:]:
        raise ValueError(f"{got}, expected probabilities of the logits' shape {_each(logits.shape)}")
    rows = classes_last(target)
    if not bool((rows >= 0).all()):
        raise ValueError(
            "the targets hold negative or NaN values, expected class indices, or probabilities of "
            "classes: pass task=Regression() for quantities"
        )
    sums = rows.sum(-1).flatten()
    wrong = sums[(sums - 1).abs() > 1e-2]
    if wrong.numel():
        raise ValueError(
            f"the targets have a row that sums to {wrong[0]:.3g}, expected class indices, or probabilities that sum to "
            "1 (mixup): several labels a sample (multi-hot) are no distribution: pass task=MultiLabel()"
        )


def _each(shape: Sequence[int]) -> str:
    """Say a shape for any number of samples: ``(N, 10)``."""
    return f"({', '.join(['N', *map(str, shape[1:])])}{',' if len(shape) == 1 else ''})"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
