"""Knowledge distillation for Lightning: train a small student on a large teacher's outputs."""

import lightning.pytorch  # noqa: F401  # from here: it takes 5 % longer from the depth of the imports below

from kd_lightning.callbacks import Distillation
from kd_lightning.checkpoint import load_student
from kd_lightning.module import DistillationModule
from kd_lightning.mutual_learning import MutualLearning
from kd_lightning.outputs import Outputs
from kd_lightning.teachers import Teacher

__all__ = ["Distillation", "DistillationModule", "MutualLearning", "Outputs", "Teacher", "load_student"]
