import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_lightning.tasks.base import relative_entropy
from tests.losses.reference import softmax, wave

LOGITS = wave((8, 10), 1.3, 0.5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_is_the_entropy_as_a_share_of_log_c(temperature: float) -> None:
    rows = [softmax(row, temperature) for row in LOGITS.tolist()]
    expected = sum(-p * math.log(p) for row in rows for p in row) / len(rows) / math.log(10)
    # Computed in float32.
    assert relative_entropy(LOGITS, temperature).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hard_label_has_none_and_the_uniform_distribution_all(dtype: torch.dtype) -> None:
    assert relative_entropy(torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)).item() == 0
    assert relative_entropy(torch.zeros(2, 3, dtype=dtype)).item() == pytest.approx(1, rel=1e-6)


@given(low=st.floats(0.5, 10), factor=st.floats(1, 10))
def test_it_rises_with_the_temperature(low: float, factor: float) -> None:
    assert relative_entropy(LOGITS, low * factor).item() >= relative_entropy(LOGITS, low).item() - 1e-6  # float32
