import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import SupCon, supervised_contrastive
from tests.losses.reference import numerical_gradient, wave

VECTORS = wave((7, 4), 0.41, 0.3)
TARGET = torch.tensor([0, 1, 0, 2, 1, 0, -100])  # 2 is alone of its class, the last has no label


def by_loops(vectors: Tensor, target: Tensor, tau: float) -> float:
    """Equation 2, L_out, one anchor after the other."""
    rows = [(z, y) for z, y in zip(vectors.tolist(), target.tolist(), strict=True) if y != -100]
    points = [([v / math.hypot(*z) for v in z], y) for z, y in rows]
    losses = []
    for i, (z_i, y_i) in enumerate(points):
        powers = {
            a: math.exp(sum(p * q for p, q in zip(z_i, z_a, strict=True)) / tau)
            for a, (z_a, _) in enumerate(points)
            if a != i
        }
        positives = [a for a in powers if points[a][1] == y_i]
        if positives:
            losses.append(-sum(math.log(powers[p] / sum(powers.values())) for p in positives) / len(positives))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("tau", [0.07, 0.1, 1.0])
def test_value_and_gradient_equal_the_formula(tau: float) -> None:
    vectors = VECTORS.clone().requires_grad_()
    loss = supervised_contrastive(vectors, TARGET, tau=tau)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(VECTORS, TARGET, tau), rel=1e-12)
    expected = numerical_gradient(lambda v: by_loops(v, TARGET, tau), VECTORS)
    torch.testing.assert_close(vectors.grad, expected, rtol=1e-6, atol=1e-8)
    assert not vectors.grad[6].any()


def test_gradient_is_right() -> None:
    assert torch.autograd.gradcheck(lambda v: supervised_contrastive(v, TARGET), VECTORS.clone().requires_grad_())


def test_with_two_samples_of_each_of_two_classes_as_worked_out_by_hand() -> None:
    """Orthogonal classes, coinciding samples: each anchor has its positive at cosine 1, two others at 0."""
    vectors = torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1]]
    value = supervised_contrastive(vectors, torch.tensor([0, 0, 1, 1]), tau=0.5)
    assert value.item() == pytest.approx(math.log(1 + 2 * math.exp(-2)), rel=1e-12)


@given(
    scales=st.lists(st.floats(0.1, 10), min_size=7, max_size=7),
    order=st.permutations(range(7)),
    names=st.permutations(range(3)),
)
def test_lengths_order_and_the_classes_numbers_change_nothing(
    scales: list[float], order: list[int], names: list[int]
) -> None:
    stretched = VECTORS * torch.tensor(scales, dtype=torch.float64)[:, None]
    renamed = torch.where(TARGET >= 0, torch.tensor(names)[TARGET.clamp_min(0)], TARGET)
    value = supervised_contrastive(stretched[order], renamed[order])
    assert value.item() == pytest.approx(supervised_contrastive(VECTORS, TARGET).item(), rel=1e-12)


@pytest.mark.parametrize("target", [[0, 1, 2, 3, 4, 5, 6], [-100] * 7, [3, *[-100] * 6]])
def test_zero_with_a_gradient_of_zero_where_no_sample_has_another_of_its_class(target: list[int]) -> None:
    vectors = VECTORS.clone().requires_grad_()
    loss = supervised_contrastive(vectors, torch.tensor(target))
    loss.backward()
    assert loss == 0
    assert vectors.grad.shape == VECTORS.shape
    assert not vectors.grad.any()


@pytest.mark.parametrize("name", ["zero", "one zero", "identical", "opposite", "extreme"])
def test_edges_stay_finite(name: str) -> None:
    vectors = {
        "zero": torch.zeros(7, 4),
        "one zero": VECTORS.float() * torch.tensor([0.0, 1, 1, 1, 1, 1, 1])[:, None],
        "identical": torch.ones(7, 4),
        "opposite": torch.ones(7, 4) * torch.tensor([1.0, -1, -1, 1, -1, 1, 1])[:, None],
        "extreme": (VECTORS.sign() * 1e4).float(),
    }[name].requires_grad_()
    loss = supervised_contrastive(vectors, TARGET, tau=0.01)
    loss.backward()
    assert loss.isfinite()
    assert vectors.grad.isfinite().all()


def test_the_module_is_the_function() -> None:
    value = SupCon(tau=0.3)(Outputs(VECTORS), Outputs(VECTORS), TARGET)
    assert value.item() == pytest.approx(by_loops(VECTORS, TARGET, 0.3), rel=1e-12)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_a_tau_that_is_not_positive_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=rf"expected tau > 0, got {tau}"):
        SupCon(tau=tau)


def test_what_is_no_vector_and_a_batch_of_one_are_refused() -> None:
    maps = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"expected vectors \(B, D\), got outputs \(2, 3, 4, 4\)"):
        SupCon()(Outputs(maps), Outputs(maps), torch.zeros(2, 4, 4).long())
    with pytest.raises(ValueError, match="needs a batch of at least 2, got 1"):
        supervised_contrastive(VECTORS[:1], TARGET[:1])
