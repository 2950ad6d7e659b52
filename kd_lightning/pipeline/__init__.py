"""From data to a verdict: teacher, student alone, control, distilled student."""

from kd_lightning.pipeline.pipeline import Pipeline
from kd_lightning.pipeline.recipe import Recipe
from kd_lightning.pipeline.results import Verdict

__all__ = ["Pipeline", "Recipe", "Verdict"]
