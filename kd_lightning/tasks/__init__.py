"""How a batch is read and scored."""

from kd_lightning.tasks.classification import Batch, Classification, Identified, unwrapped

__all__ = ["Batch", "Classification", "Identified", "unwrapped"]
