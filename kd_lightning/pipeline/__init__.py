"""From data to a verdict: teacher, student alone, control, distilled student."""

from kd_lightning.pipeline.pipeline import Pipeline
from kd_lightning.pipeline.results import Verdict
from kd_lightning.pipeline.stage import Recipe

__all__ = ["Pipeline", "Recipe", "Verdict"]
