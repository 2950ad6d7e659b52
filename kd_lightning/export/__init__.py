"""A student as a file that serves without this package."""

from kd_lightning.export.integer_operators import IntegerOperators, integer_operators
from kd_lightning.export.to_file import LEAST_AGREEMENT, ExportReport, export

__all__ = ["LEAST_AGREEMENT", "ExportReport", "IntegerOperators", "export", "integer_operators"]
