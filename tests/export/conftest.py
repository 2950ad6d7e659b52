import pytest

from tests.shortcuts import read_operators_once


@pytest.fixture(autouse=True, scope="session")
def _operators_read_once() -> None:
    read_operators_once()
