"""Where teacher outputs come from."""

from kd_lightning.teachers.base import TeacherSource
from kd_lightning.teachers.live import Teacher

__all__ = ["Teacher", "TeacherSource"]
