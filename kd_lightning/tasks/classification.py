"""One label for each input."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd_lightning.outputs import Outputs, classes_last
from kd_lightning.tasks.batch import Batch, unwrapped

IGNORE_INDEX = -100
"""The target of a sample without label, as in ``torch.nn.functional.cross_entropy``."""


def as_indices(target: Any) -> Any:
    """Return class indices of any integer type, or bools, as int64; anything else as it is."""
    if isinstance(target, Tensor) and target.dtype != torch.int64 and not target.is_floating_point():
        return target if target.is_complex() else target.long()
    return target


class Classification:
    """Batches of (input, target), of inputs alone, or mappings with ``labels`` as Hugging Face data sets give them.

    A teacher's outputs may come along: around the batch (:class:`~kd_lightning.tasks.Taught`), as the third part of a
    tuple, or in a mapping by names such as ``teacher_logits``; see :class:`~kd_lightning.teachers.FromBatch`.

    Targets are class indices of any integer type (or bools, for classes 0 and 1), -100 for a sample (a pixel, a token)
    without label, or probabilities of the logits' shape (mixup).
    """

    label_keys = ("labels", "label", "target")

    def read(self, batch: Any) -> Batch:
        """Split a batch into the networks' arguments and the target.

        Raises:
            TypeError: For a batch of another kind.
        """
        batch, samples, teacher = unwrapped(batch, bare=True)
        read = self._read(batch)
        return read._replace(target=as_indices(read.target), samples=samples, teacher=teacher)

    def _read(self, batch: Any) -> Batch:
        if isinstance(batch, Mapping):
            target = next((batch[key] for key in self.label_keys if key in batch), None)
            return Batch((), {key: value for key, value in batch.items() if key not in self.label_keys}, target)
        if isinstance(batch, Tensor):
            return Batch((batch,), {}, None)
        if isinstance(batch, Sequence) and len(batch) in (1, 2):
            inputs, target = batch[0], (batch[1] if len(batch) == 2 else None)
            return Batch((), inputs, target) if isinstance(inputs, Mapping) else Batch((inputs,), {}, target)
        got = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, Sequence) else type(batch).__name__
        raise TypeError(
            f"expected a batch (input, target), an input, or a mapping with 'labels', got a {got}: "
            "pass task= with a read() of your own"
        )

    def labels(self, target: Tensor) -> Tensor:
        """Return class indices (B,), (B, S) or (B, H, W), -100 where there is no label."""
        return classes_last(target).argmax(-1) if target.is_floating_point() else target

    def correct(self, logits: Tensor, target: Tensor) -> Tensor:
        """Tell for each labelled sample, token or pixel whether the highest logit is its label's: bool (labelled,)."""
        return self.hits(classes_last(logits).argmax(-1), target)

    def hits(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Tell for each labelled sample, token or pixel whether the predicted class is its label: bool (labelled,)."""
        labels = self.labels(target)
        labelled = labels != IGNORE_INDEX
        return torch.eq(predicted[labelled], labels[labelled])

    def correct_outputs(self, outputs: Outputs, target: Tensor) -> Tensor:
        """Tell the same of outputs, whose best class may be all that is known."""
        known = outputs.top_k is None
        return self.correct(outputs.logits, target) if known else self.hits(outputs.best(), target)
