import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import HardLabel, hard_label
from tests.losses.reference import numerical_gradient, softmax, wave

LOGITS = wave((8, 10), 0.7, 0.1)
LABELS = torch.tensor([0, 3, -100, 7, 9, -100, 2, 2])


def by_loops(logits: Tensor, target: list[int] | list[list[float]], smoothing: float = 0.0) -> float:
    """Mean over the labelled samples of -sum_c q_c log p_c, q the label smoothed towards the uniform distribution."""
    values = []
    for z, y in zip(logits.tolist(), target, strict=True):
        if y == -100:
            continue
        wanted = y if isinstance(y, list) else [float(c == y) for c in range(len(z))]
        smooth = [(1 - smoothing) * q + smoothing / len(z) for q in wanted]
        values.append(-sum(q * math.log(p) for p, q in zip(softmax(z), smooth, strict=True)))
    return sum(values) / len(values)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradient_equal_the_formula(smoothing: float) -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = hard_label(logits, LABELS, label_smoothing=smoothing)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(LOGITS, LABELS.tolist(), smoothing), rel=1e-12)
    expected = numerical_gradient(lambda z: by_loops(z, LABELS.tolist(), smoothing), LOGITS)
    # Central differences are right to some 1e-9.
    torch.testing.assert_close(logits.grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities_as_target(smoothing: float) -> None:
    mixed = 0.3 * F.one_hot(torch.arange(8), 10) + 0.7 * F.one_hot(torch.arange(2, 10), 10)
    loss = hard_label(LOGITS, mixed.float(), label_smoothing=smoothing)
    # The target comes in float32: 0.3 and 0.7 are right to some 1e-8.
    assert loss.item() == pytest.approx(by_loops(LOGITS, mixed.tolist(), smoothing), rel=1e-7)


def test_probabilities_of_a_label_are_the_label() -> None:
    labels = torch.arange(8)
    torch.testing.assert_close(hard_label(LOGITS, F.one_hot(labels, 10).double()), hard_label(LOGITS, labels))


@pytest.mark.parametrize("target", [torch.full((8,), -100), None])
def test_without_any_label_zero_with_a_gradient_of_zero(target: Tensor | None) -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = HardLabel()(Outputs(logits), Outputs(logits), target)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(LOGITS))


def test_unlabelled_tokens_do_not_thin_out_the_others() -> None:
    logits, labels = LOGITS.reshape(2, 4, 10), LABELS.reshape(2, 4)
    assert hard_label(logits, labels).item() == pytest.approx(by_loops(LOGITS, LABELS.tolist()), rel=1e-12)


def test_dense_targets() -> None:
    logits = wave((2, 5, 3, 4), 0.37, 0.2)
    labels = torch.arange(24).reshape(2, 3, 4) % 5
    labels[0, 1] = -100
    pixels = logits.movedim(1, -1).reshape(-1, 5)
    assert hard_label(logits, labels).item() == pytest.approx(by_loops(pixels, labels.flatten().tolist()), rel=1e-12)


def test_as_many_tokens_as_classes_are_still_tokens() -> None:
    """(B, S, V) with S = V fits both readings of the shape."""
    logits, labels = wave((2, 4, 4), 0.7, 0.1), torch.tensor([[0, 1, 2, 3], [3, 3, -100, 0]])
    expected = by_loops(logits.reshape(-1, 4), labels.flatten().tolist())
    assert hard_label(logits, labels).item() == pytest.approx(expected, rel=1e-12)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4]], requires_grad=True)
    loss = hard_label(logits, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert logits.grad.tolist() == [[0.0, 0.0], [0.5, -0.5]]


def test_gradient_is_right() -> None:
    assert torch.autograd.gradcheck(lambda z: hard_label(z, LABELS), LOGITS.clone().requires_grad_())


def test_one_sample_is_its_own_mean() -> None:
    assert hard_label(LOGITS[:1], LABELS[:1]).item() == pytest.approx(by_loops(LOGITS[:1], [0]), rel=1e-12)


@given(
    shift=st.lists(st.floats(-20, 20), min_size=8, max_size=8),
    samples=st.permutations(range(8)),
    classes=st.permutations(range(10)),
)
def test_neither_shift_nor_order_changes_anything(shift: list[float], samples: list[int], classes: list[int]) -> None:
    moved = (LOGITS + torch.tensor(shift, dtype=torch.float64)[:, None])[samples][:, classes]
    renamed = torch.tensor([classes.index(y) if y >= 0 else y for y in LABELS[samples].tolist()])
    assert hard_label(moved, renamed).item() == pytest.approx(hard_label(LOGITS, LABELS).item(), rel=1e-9)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_label_smoothing_out_of_range_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"expected label_smoothing in \[0, 1\), got {smoothing}"):
        HardLabel(label_smoothing=smoothing)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="expected weight >= 0, got -1"):
        HardLabel(weight=-1)
