"""A teacher that runs beside the student."""

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn

from kd_lightning.checkpoint import load_weights
from kd_lightning.outputs import Outputs, run


class Teacher:
    """A frozen network, in eval mode, that gives outputs and is otherwise nobody's child.

    It is no ``nn.Module`` on purpose: so it is in no checkpoint, optimizer, DDP wrap or moving average of the module
    that holds it.

    Args:
        network: Returns logits, or an object with ``.logits``. Its parameters are frozen, for good.
        checkpoint: Weights to load: a state dict, or a Lightning checkpoint that holds the network under any prefix.

    Raises:
        ValueError: When the checkpoint does not fit the network.
    """

    def __init__(self, network: nn.Module, checkpoint: str | PathLike[str] | None = None) -> None:
        self.network = network
        if checkpoint is not None:
            load_weights(network, checkpoint)
        network.eval().requires_grad_(False)

    @torch.no_grad()  # not inference_mode: losses save features for their backward pass
    def __call__(self, args: Iterable[Any], kwargs: Mapping[str, Any], layers: Iterable[str] = ()) -> Outputs:
        self.network.eval()
        return run(self.network, args, kwargs, layers)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Move the network; ``dtype`` concerns floating-point weights only."""
        self.network.to(device, dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self  # a moving average copies its module; a frozen teacher is shared
