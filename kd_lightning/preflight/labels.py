"""The labels: their type, shape and range, and the classes that they are of."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from kd_lightning.outputs import class_dim, classes_last
from kd_lightning.tasks import Classification
from kd_lightning.tasks.classification import IGNORE_INDEX


def check_labels(target: Any, logits: Tensor, task: Classification) -> None:
    """Raise ValueError for a target that cannot be that of such logits.

    Args:
        target: Class indices, -100 where there is none, or probabilities of the logits' shape.
        logits: Of any number of samples.
        task: Says what a target's classes are; one with ``labels`` of its own has targets of its own shape.
    """
    if not isinstance(target, Tensor):
        kind = type(target).__name__
        inner = f" of {type(target[0]).__name__}" if isinstance(target, Sequence) and target else ""
        raise ValueError(
            f"the target is a {kind}{inner}, expected a tensor of class indices: map each label to the index of its "
            "class in the data set"
        )
    classes = logits.shape[class_dim(logits)]
    if type(task).labels is Classification.labels:
        _check_probabilities(target, logits) if target.is_floating_point() else _check_shape(target, logits)
    labels = task.labels(target)
    wrong = labels[((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= classes)]
    if wrong.numel():
        raise ValueError(
            f"label {int(wrong[0])} is out of range, expected 0 to {classes - 1}, or -100 for an unlabelled sample: "
            "set num_classes to that of the data set, or map the labels"
        )


def _check_probabilities(target: Tensor, logits: Tensor) -> None:
    got = f"the target is {_dtype(target)} of shape {tuple(target.shape)}"
    if target.ndim != logits.ndim:
        raise ValueError(
            f"{got}, expected class indices as int64, or probabilities of the logits' shape {_each(logits.shape)}: "
            "call target.long() on class indices; regression has no classes, and no loss here that reads labels"
        )
    classes, expected = target.shape[class_dim(target)], logits.shape[class_dim(logits)]
    if classes != expected:
        raise ValueError(f"the targets are probabilities over {classes} classes, expected {expected}: {got}")
    if target.shape[1:] != logits.shape[1:]:
        raise ValueError(f"{got}, expected probabilities of the logits' shape {_each(logits.shape)}")
    rows = classes_last(target)
    if not bool((rows >= 0).all()):
        raise ValueError("the targets hold negative or NaN values, expected class indices, or probabilities of classes")
    sums = rows.sum(-1).flatten()
    wrong = sums[(sums - 1).abs() > 1e-2]
    if wrong.numel():
        raise ValueError(
            f"the targets have a row that sums to {wrong[0]:.3g}, expected class indices, or probabilities that sum to "
            "1 (mixup): several labels a sample (multi-hot) are no distribution, and no loss here reads them"
        )


def _check_shape(target: Tensor, logits: Tensor) -> None:
    expected = classes_last(logits).shape[1:-1]
    if target.shape[1:] == expected:
        return
    remedy = "pass one class index for each"
    if target.shape[1:] == logits.shape[1:]:
        remedy = f"one-hot labels become indices by target.argmax({class_dim(logits) % logits.ndim})"
    elif target.ndim == 2 and target.shape[1] == 1:
        remedy = "call target.squeeze(1)"
    raise ValueError(
        f"the target is {_dtype(target)} of shape {tuple(target.shape)}, expected class indices "
        f"{_each((0, *expected))} for logits {_each(logits.shape)}: {remedy}"
    )


def check_class_names(names: Sequence[str] | None, logits: Tensor) -> None:
    """Raise ValueError where a data module names another number of classes than the student has outputs."""
    classes = logits.shape[class_dim(logits)]
    if names is not None and len(names) != classes:
        raise ValueError(
            f"the student has {classes} outputs and the data {len(names)} classes ({', '.join(map(str, names[:3]))}"
            f"{', …' if len(names) > 3 else ''}), expected as many: set num_classes"
        )


def warn_of_missing_classes(loader: Any, classes: int, names: Sequence[str] | None = None) -> None:
    """Warn of classes that no sample of a training set has; not where its labels are not at hand.

    At hand are those of a ``TensorDataset``, of a data set with ``target``, ``targets`` or ``labels``, and of what is
    around one as its ``dataset``, such as a ``Subset``: no sample is loaded for it.
    """
    labels = _labels(getattr(loader, "dataset", None))
    if labels is None:
        return
    missing = [c for c in range(classes) if c not in set(labels[labels != IGNORE_INDEX].tolist())]
    if not missing:
        return
    named = [f"{c} ({names[c]!r})" if names is not None else str(c) for c in missing[:5]]
    rank_zero_warn(
        f"no training sample is labelled with {len(missing)} of the student's {classes} classes: "
        f"{', '.join(named)}{', …' if len(missing) > 5 else ''}"
    )


def _labels(dataset: Any) -> Tensor | None:
    if isinstance(dataset, Subset):
        of_all = _labels(dataset.dataset)
        return None if of_all is None else of_all[torch.as_tensor(list(dataset.indices), dtype=torch.long)]
    if isinstance(dataset, TensorDataset):
        found: Any = dataset.tensors[1] if len(dataset.tensors) == 2 else None
    else:
        named = (getattr(dataset, name, None) for name in ("target", "targets", "labels"))
        found = next((labels for labels in named if labels is not None), None)
        if found is None and hasattr(dataset, "dataset"):
            return _labels(dataset.dataset)
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels if labels.ndim == 1 and not labels.is_floating_point() else None


def _each(shape: Sequence[int]) -> str:
    """Say a shape for any number of samples: ``(N, 10)``."""
    return f"({', '.join(['N', *map(str, shape[1:])])}{',' if len(shape) == 1 else ''})"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
