import numpy as np
import pytest

from kd_lightning.headline import Headline

ERROR = Headline(name="error", key="err", units="days", higher_is_better=False, percent=False, symbol="mm", digits=2)
RATIO = Headline(name="ratio", key="ratio", units="texts", of_mean=lambda mean: mean[0] / mean[1])


def test_a_function_of_the_mean_is_none_of_the_units_values() -> None:
    scores = np.array([[1.0, 1.0], [1.0, 9.0]])
    assert RATIO.value(scores) == 0.2  # and not the mean of 1 and 1/9
    assert ERROR.value([1.0, 2.0]) == 1.5


@pytest.mark.parametrize(
    ("value", "text", "difference"), [(1.234, "1.23 mm", "1.23 mm"), (-0.0001, "0.00 mm", "0.00 mm")]
)
def test_figures_have_their_unit(value: float, text: str, difference: str) -> None:
    assert ERROR.write(value) == text
    assert ERROR.write_difference(value) == difference
    assert ERROR.write(None) == ERROR.write(float("nan")) == "–"


def test_which_is_better() -> None:
    assert ERROR.better(1, 2)
    assert RATIO.better(2, 1)
    assert not RATIO.better(1, 1)
