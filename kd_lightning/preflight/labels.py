"""The classes that labels are of: their names, and those that no training sample has."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from kd_lightning.outputs import class_dim
from kd_lightning.tasks.batch import IGNORE_INDEX


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
