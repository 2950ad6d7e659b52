"""When something happens in a training."""

from kd_lightning.callbacks.distillation import Distillation
from kd_lightning.callbacks.hyperparameter_schedule import HyperparameterSchedule, TemperatureSchedule

__all__ = ["Distillation", "HyperparameterSchedule", "TemperatureSchedule"]
