"""When something happens in a training."""

from kd_lightning.callbacks.hyperparameter_schedule import HyperparameterSchedule, TemperatureSchedule

__all__ = ["HyperparameterSchedule", "TemperatureSchedule"]
