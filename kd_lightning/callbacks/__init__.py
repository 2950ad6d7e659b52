"""When something happens in a training."""

from kd_lightning.callbacks.distillation import Distillation
from kd_lightning.callbacks.hyperparameter_schedule import HyperparameterSchedule, TemperatureSchedule
from kd_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from kd_lightning.callbacks.written_texts import OnPolicy, SequenceLevel

__all__ = [
    "Distillation",
    "HyperparameterSchedule",
    "OnPolicy",
    "QuantizationAwareTraining",
    "SequenceLevel",
    "TemperatureSchedule",
]
