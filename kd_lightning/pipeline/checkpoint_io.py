"""Checkpoints of a training that are whole or not there."""

import io
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from kd_lightning.durable_files import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file; :func:`~kd_lightning.durable_files.remove_leftovers` finds what a killed process leaves.

    Lightning writes to the system's temporary folder and then moves the file: a killed process leaves it there, and
    from another disk a move is a copy, which can be torn.
    """

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | PathLike[str], storage_options: Any = None
    ) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(Path(path), content.getvalue())
