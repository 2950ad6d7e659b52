import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_lightning.schedules import constant, cosine, exponential, join, linear, step, warmup

VALUES = st.floats(-100, 100)
POSITIVE = st.floats(0.01, 100)
PROGRESS = st.floats(0, 1)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (constant(3.0), [3, 3, 3, 3, 3]),
        (linear(8.0, 1.0), [8, 6.25, 4.5, 2.75, 1]),
        (cosine(8.0, 2.0), [8, 5 + 3 * math.sqrt(0.5), 5, 5 - 3 * math.sqrt(0.5), 2]),
        (exponential(16.0, 1.0), [16, 8, 4, 2, 1]),
        (exponential(1.0, 16.0), [1, 2, 4, 8, 16]),
        (step([8.0, 4.0, 1.0], [0.25, 0.6]), [8, 4, 4, 1, 1]),
        (warmup(2.0, duration=0.5), [0, 1, 2, 2, 2]),
        (warmup(2.0, duration=1.0, start=1.0), [1, 1.25, 1.5, 1.75, 2]),
        (join([constant(8.0), linear(8.0, 1.0)], [0.5]), [8, 8, 8, 4.5, 1]),
        (join([linear(0.0, 4.0), constant(4.0), linear(4.0, 0.0)], [0.25, 0.75]), [0, 4, 4, 4, 0]),
    ],
)
def test_values_at_each_quarter(schedule, values: list[float]) -> None:
    assert [schedule(i / 4) for i in range(5)] == pytest.approx(values, rel=1e-12)


@given(start=VALUES, end=VALUES)
def test_start_and_end_are_reached(start: float, end: float) -> None:
    for schedule in (linear(start, end), cosine(start, end), join([linear(start, 0), linear(0, end)], [0.3])):
        # cos π is -1 exactly; the sum of start and a difference rounds.
        assert schedule(0.0) == pytest.approx(start, rel=1e-12, abs=1e-12)
        assert schedule(1.0) == pytest.approx(end, rel=1e-12, abs=1e-12)


@given(start=POSITIVE, end=POSITIVE)
def test_equal_factors_reach_start_and_end(start: float, end: float) -> None:
    assert exponential(start, end)(0.0) == start
    assert exponential(start, end)(1.0) == pytest.approx(end, rel=1e-12)


@given(start=POSITIVE, end=POSITIVE, one=PROGRESS, other=PROGRESS)
def test_they_go_one_way_and_stay_between_start_and_end(start: float, end: float, one: float, other: float) -> None:
    early, late = sorted((one, other))
    for make in (linear, cosine, exponential):
        schedule = make(start, end)
        slack = 1e-9 * max(start, end)  # rounding
        assert (schedule(late) - schedule(early)) * (1 if end >= start else -1) >= -slack
        assert min(start, end) - slack <= schedule(one) <= max(start, end) + slack


@given(duration=st.floats(0.01, 1), progress=PROGRESS)
def test_a_warm_up_is_over_after_its_duration(duration: float, progress: float) -> None:
    value = warmup(2.0, duration, start=0.5)(progress)
    assert value == 2.0 if progress >= duration else value == pytest.approx(0.5 + 1.5 * progress / duration)


def test_a_value_holds_until_just_before_its_boundary() -> None:
    schedule = step([8.0, 1.0], [0.5])
    assert [schedule(p) for p in (math.nextafter(0.5, 0), 0.5)] == [8.0, 1.0]


@pytest.mark.parametrize(
    "schedule",
    [constant(1.0), linear(8, 1), cosine(8, 1), exponential(8, 1), step([2, 1], [0.5]), warmup(1, 0.1)],
)
def test_they_pickle(schedule) -> None:
    both = join([schedule, constant(1.0)], [0.4])
    for original in (schedule, both):
        copy = pickle.loads(pickle.dumps(original))
        assert [copy(i / 7) for i in range(8)] == [original(i / 7) for i in range(8)]


def test_they_print_with_their_arguments() -> None:
    assert repr(linear(8.0, 1.5)).endswith(" 8.0, 1.5)")


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_equal_factors_from_or_to_zero_are_refused(start: float, end: float) -> None:
    with pytest.raises(ValueError, match=rf"expected positive start and end, got {start} and {end}: use linear"):
        exponential(start, end)


@pytest.mark.parametrize("duration", [0.0, 1.5, -0.1])
def test_a_warm_up_longer_than_the_training_is_refused(duration: float) -> None:
    with pytest.raises(ValueError, match=rf"expected duration in \(0, 1\], the share of the training, got {duration}"):
        warmup(1.0, duration)


@pytest.mark.parametrize("make", [lambda b: step([1.0, 2.0, 3.0], b), lambda b: join([constant(1.0)] * 3, b)])
@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([0.5], r"expected one boundary fewer than .*, got boundaries \[0.5\] for 3"),
        ([0.5, 0.5], r"rise strictly between 0 and 1, got \[0\.5, 0\.5\]"),
        ([0.5, 0.4], "rise strictly"),
        ([0.0, 0.5], "rise strictly"),
        ([0.5, 1.0], "rise strictly"),
        ([0.5, math.nan], "rise strictly"),
        ([10, 20], "rise strictly"),
    ],
)
def test_bad_boundaries_are_refused(make, boundaries: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(boundaries)
