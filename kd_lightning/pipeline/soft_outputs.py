"""What the models say of the same test units as outputs, and not as answers alone: for the report's pictures.

One pass over a part of the test split, once everything is trained and chosen. Nothing is chosen on it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kd_lightning.evaluation import as_array
from kd_lightning.export.batches import part, tensors
from kd_lightning.outputs import run
from kd_lightning.tasks import Batch, Task

MOST_OUTPUTS = 20_000
"""The most outputs of a model that are kept: images, rows, tokens or pixels."""
_MOST_NUMBERS = 20_000_000  # of a model's outputs: 80 MB
_MOST_BYTES = 200_000_000  # of inputs


class SoftOutputs(NamedTuple):
    """What the models say of some test units.

    Attributes:
        batches: The units, as the networks take them, with targets; on the CPU.
        logits: By the model's key, for each of its seeds: (n, ...) of all these units, arranged as the task says,
            float32.
        units: How many there are of the units in the whole split.
        total: How many the split has.
    """

    batches: Sequence[Batch]
    logits: Mapping[str, Sequence[NDArray[np.float32]]]
    units: int
    total: int

    @property
    def target(self) -> NDArray[Any] | None:
        """Of all units: (n, ...)."""
        found = [as_array(batch.target) for batch in self.batches if batch.target is not None]
        return _padded(found, -100) if found else None


@torch.inference_mode()
def soft_outputs(
    task: Task, networks: Mapping[str, Sequence[nn.Module]], loader: Any, total: int
) -> SoftOutputs | None:
    """Let networks answer test units that lie evenly over the split; all of a small one.

    Args:
        task: Says what a batch means.
        networks: By the model's key, one a seed; on the CPU, in eval mode.
        loader: Of the test split.
        total: How many units the split has.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    every = [network.to(device) for several in networks.values() for network in several]
    batches: list[Batch] = []
    logits: dict[str, list[list[NDArray[np.float32]]]] = {key: [[] for _ in some] for key, some in networks.items()}
    try:
        for batch in _some(task, loader, every[0], device, total):
            there = _moved(batch, device)
            for key, several in networks.items():
                for found, network in zip(logits[key], several, strict=True):
                    outputs = task.arranged(run(network, there.args, there.kwargs))
                    found.append(outputs.logits.float().cpu().numpy())
            batches.append(batch)
    finally:
        for network in every:
            network.cpu()
    if not batches:
        return None
    joined = {key: [_padded(found, 0) for found in several] for key, several in logits.items()}
    return SoftOutputs(batches, joined, sum(map(_size, batches)), total)


def _some(task: Task, loader: Any, network: nn.Module, device: torch.device, total: int) -> Iterator[Batch]:
    """Yield batches, or their beginnings, that are together as many outputs as are kept."""
    wanted, every, each = total, 1, total
    for number, loaded in enumerate(loader):
        batch = task.read(loaded)
        if number == 0:
            one = _moved(part(batch, slice(1)), device)
            outputs = task.arranged(run(network, one.args, one.kwargs)).logits
            places = math.prod(outputs.shape[1:]) // max(_classes(task, outputs), 1)
            bytes_of_one = sum(x.nbytes for x in tensors(one) if isinstance(x, Tensor))
            wanted = max(
                1,
                min(
                    total,
                    MOST_OUTPUTS // max(places, 1),
                    _MOST_NUMBERS // max(outputs.numel(), 1),
                    _MOST_BYTES // max(bytes_of_one, 1),
                ),
            )
            length = len(loader) if hasattr(loader, "__len__") else math.ceil(total / _size(batch))
            taken = min(length, wanted)
            every = max(1, length // taken)
            each = wanted if wanted == total else math.ceil(wanted / max(1, length // every))
        if number % every or wanted <= 0:
            continue
        size = min(_size(batch), each, wanted)
        wanted -= size
        target = batch.target[:size] if isinstance(batch.target, Tensor) else None
        yield part(batch, slice(size))._replace(target=target)


def _classes(task: Task, outputs: Tensor) -> int:
    if not task.over_classes:
        return math.prod(outputs.shape[1:])
    return int(outputs.shape[1] if outputs.ndim == 4 else outputs.shape[-1])


def _moved(batch: Batch, device: torch.device) -> Batch:
    def move(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    return Batch(tuple(map(move, batch.args)), {name: move(x) for name, x in batch.kwargs.items()}, None)


def _size(batch: Batch) -> int:
    return len(tensors(batch)[0])


def _padded(arrays: Sequence[NDArray[Any]], value: float) -> NDArray[Any]:
    """Concatenate batches; texts that each batch pads to another length are padded to the longest."""
    longest = [max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays), strict=True)]
    widths = ([(0, 0), *((0, most - size) for most, size in zip(longest, x.shape[1:], strict=True))] for x in arrays)
    return np.concatenate([np.pad(x, w, constant_values=value) for x, w in zip(arrays, widths, strict=True)])
