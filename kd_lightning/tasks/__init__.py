"""How a batch is read and scored."""

from kd_lightning.tasks.batch import Batch, Identified, Taught, unwrapped
from kd_lightning.tasks.classification import Classification

__all__ = ["Batch", "Classification", "Identified", "Taught", "unwrapped"]
