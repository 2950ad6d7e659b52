"""What a run leaves in MLflow."""

from kd_lightning.tracking.logger import MLFlowLogger

__all__ = ["MLFlowLogger"]
