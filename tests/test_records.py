"""What a Hydra sweeper gets: the validation headline of the distilled model that the verdict is about."""

import numpy as np
import pytest

from kd_lightning.pipeline.compare import compare
from tests.pipeline.finished_runs import TASK, Judged, runs, scored, sweep


def test_of_several_distilled_models_it_is_the_best_ones() -> None:
    assert compare(sweep(), TASK).objective == pytest.approx(0.78)


def test_an_error_is_given_as_it_is_to_be_minimised() -> None:
    task = Judged(name="mean absolute error", key="mae", units="rods", higher_is_better=False, percent=False)
    errors = [scored(role, np.ones(200), val=val) for role, val in (("teacher", 0.2), ("student", 0.9))]
    variants = [scored("distilled", np.ones(200), label=f"T={val}", val=val) for val in (0.5, 0.4, 0.7)]
    assert compare([*errors, *variants], task).objective == pytest.approx(0.4)


def test_without_a_distilled_model_there_is_none() -> None:
    assert compare(runs(teacher=0.9, student=0.7), TASK).objective is None
