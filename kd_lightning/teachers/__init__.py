"""Where teacher outputs come from."""

from kd_lightning.teachers.base import TeacherSource
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.from_batch import FromBatch
from kd_lightning.teachers.live import Teacher

__all__ = ["Ensemble", "FromBatch", "Teacher", "TeacherSource"]
