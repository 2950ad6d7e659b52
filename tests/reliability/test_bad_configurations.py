"""A sample of the bad configurations, and of the valid ones that they differ from, as whole commands."""

import random
from pathlib import Path

import pytest

from tests.reliability.bad_configurations import AS_WANTED, BEGAN, answers, bad_configurations, judged, valid

pytestmark = pytest.mark.integration


def test_there_are_hundreds_each_with_a_reason() -> None:
    every = bad_configurations()
    assert len(every) > 1000
    assert len({bad.arguments for bad in every}) == len(every)
    assert all(bad.why and bad.paths for bad in every)


def test_a_bad_configuration_is_answered_in_one_line_that_names_the_path(tmp_path: Path) -> None:
    cases = random.Random(0).sample(bad_configurations(), 40)
    found = zip(cases, answers([bad.arguments for bad in cases], tmp_path), strict=True)
    other = [(" ".join(bad.arguments), judged(bad, answer), answer.printed) for bad, answer in found]
    assert not [case for case in other if case[1] != AS_WANTED]


def test_what_they_differ_from_is_accepted(tmp_path: Path) -> None:
    cases = random.Random(0).sample([arguments for arguments, _ in valid()], 5)
    assert [answer.outcome for answer in answers(cases, tmp_path)] == [BEGAN] * 5
