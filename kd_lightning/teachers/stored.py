"""A teacher whose outputs were written to disk."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd_lightning.outputs import AnyOutputs
from kd_lightning.tasks import Task
from kd_lightning.tasks.batch import Batch, unwrapped
from kd_lightning.teachers.base import BatchSource

GLIMPSE = "stored_outputs.glimpse"
"""Name among a batch's features of a few of its inputs' numbers, as the teacher saw them."""
_NUMBERS = 8
_CALLS = 20  # on an accelerator, where each look waits for it


class Stored(BatchSource):
    """Outputs that come with each training batch, from :class:`~kd_lightning.stored_outputs.StoredOutputs`.

    There are none for validation batches, unless their data set is wrapped as well: agreement and the teacher's
    accuracy are then not logged.

    Args:
        check_inputs: Refuse batches that were changed after their outputs were read, by MixUp or CutMix for instance.

    Raises:
        ValueError: Before the training, for batches without outputs and layers that were not stored.

    Example::

        store_outputs(network, dataset, "outputs", views=10)
        stored = StoredOutputs(dataset, "outputs")
        module = DistillationModule(student, Stored(), losses, optimizer)
        trainer.fit(module, DataLoader(stored, batch_size=64, sampler=Views(stored)))
    """

    def __init__(self, check_inputs: bool = True) -> None:
        self.check_inputs, self._calls = check_inputs, 0

    def __call__(self, batch: Batch, layers: Iterable[str] = ()) -> AnyOutputs:
        if batch.teacher is None:
            raise ValueError(
                "expected batches that bring the teacher's stored outputs along, got one without: wrap the training "
                "set, StoredOutputs(dataset, path)"
            )
        features = dict(batch.teacher.features)
        seen = features.pop(GLIMPSE, None)
        missing = [name for name in layers if name not in features]
        if missing:
            raise ValueError(
                f"the teacher's layers {missing} were not stored, got {list(features) or 'none'}: call store_outputs "
                "with layers=, into another folder"
            )
        if self.check_inputs and seen is not None:
            self._check_inputs(batch, seen)
        # Half precision is how they are stored, not how precise they are meant to be.
        return batch.teacher._replace(features={name: features[name] for name in layers}).in_full_precision()

    def _check_inputs(self, batch: Batch, seen: Tensor) -> None:
        inputs = next((x for x in (*batch.args, *batch.kwargs.values()) if isinstance(x, Tensor)), None)
        self._calls += 1
        if inputs is None or len(inputs) != len(seen) or (inputs.device.type != "cpu" and self._calls > _CALLS):
            return
        now = glimpse(inputs)
        if now is None or now.shape != seen.shape or bool((now[:, 0] != seen[:, 0]).any()):
            return  # padded or cropped: not to be compared
        allowed = 0.02 * seen[:, 1:].abs().amax() + 1e-6  # half precision rounds
        changed = ((now - seen).abs().amax(1) > allowed).nonzero().flatten().tolist()
        if changed:
            raise ValueError(
                f"the student's inputs are not those that the teacher saw, for samples {changed[:5]} of the batch: "
                "outputs are stored for single samples, so that MixUp, CutMix or a transform of the whole batch makes "
                "them wrong; expected augmentation in the data set: move it there, or pass a teacher that runs "
                "(Stored(check_inputs=False) where the change is no matter to the teacher)"
            )


def inputs_of(batch: Any) -> Tensor | None:
    """Return the first tensor that a network is called with, of a batch or a sample; None where that is not plain."""
    batch = unwrapped(batch).batch
    if isinstance(batch, Mapping):
        values = (value for key, value in batch.items() if key not in Task.label_keys)
        return next((value for value in values if isinstance(value, Tensor)), None)
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor | Mapping):
        return inputs_of(batch[0])
    return batch if isinstance(batch, Tensor) else None


def glimpse(samples: Tensor | Sequence[Tensor | None]) -> Tensor | None:
    """Return a few numbers of each sample, behind how many it has; None for samples of different sizes.

    Shape: a batch (B, ...), or B samples; to (B, 1 + up to 8) of float32.
    """
    if isinstance(samples, Tensor):
        size = samples[0].numel()
        some = samples.reshape(len(samples), -1)[:, :: max(size // _NUMBERS, 1)][:, :_NUMBERS]
    else:
        tensors = [x for x in samples if x is not None]
        size = tensors[0].numel() if tensors else 0
        if len(tensors) < len(samples) or any(x.numel() != size for x in tensors):
            return None
        some = torch.stack([x.reshape(-1)[:: max(size // _NUMBERS, 1)][:_NUMBERS] for x in tensors])
    some = some.float()
    return torch.cat([some.new_full((len(some), 1), size), some], 1)
