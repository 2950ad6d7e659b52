"""A teacher's outputs, written once and read with each batch, for the very augmented views that it saw."""

from kd_lightning.data.loaders import Views
from kd_lightning.stored_outputs.reader import StoredOutputs, verify
from kd_lightning.stored_outputs.writer import store_outputs

__all__ = ["StoredOutputs", "Views", "store_outputs", "verify"]
