"""A teacher that runs beside the student."""

from collections.abc import Iterable
from os import PathLike

import torch
from torch import nn

from kd_lightning.checkpoint import load_weights
from kd_lightning.dry_forward import dry_forward
from kd_lightning.outputs import Outputs, run
from kd_lightning.tasks.batch import Batch
from kd_lightning.teachers.base import TeacherSource


class Teacher(TeacherSource):
    """A frozen network, in eval mode, that gives outputs and is otherwise nobody's child.

    Args:
        network: Returns logits, or an object with ``.logits``. Its parameters are frozen, for good.
        checkpoint: Weights to load: a state dict, or a Lightning checkpoint that holds the network under any prefix.

    Raises:
        ValueError: When the checkpoint does not fit the network.
    """

    network: nn.Module

    def __init__(self, network: nn.Module, checkpoint: str | PathLike[str] | None = None) -> None:
        self.network = network
        if checkpoint is not None:
            load_weights(network, checkpoint)
        network.eval().requires_grad_(False)

    @torch.no_grad()  # not inference_mode: losses save features for their backward pass
    def __call__(self, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        self.network.eval()
        return run(self.network, batch.args, batch.kwargs, layers)

    def dry(self, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        return dry_forward("teacher", self.network, batch.args, batch.kwargs, layers)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.network.to(device, dtype)
