from functools import partial

import pytest
import torch
from torch import Tensor

from kd_lightning.losses import FusedDivergence, FusedHardLabel, FusedKL, fused_linear_hard_label, jensen_shannon
from tests.losses.reference import wave
from tests.losses.test_fused_linear_kl import allocations

N, V, D = 7, 11, 3
TARGET = torch.tensor([4, -100, 0, 10, -100, 2, 2])


def inputs() -> list[Tensor]:
    """Hidden states, head and bias."""
    made = wave((N, D), 0.7, 0.1), wave((V, D), 1.3, 0.5), wave((V,), 0.9, 0.2)
    return [x.double().requires_grad_() for x in made]


def formula(hidden: Tensor, head: Tensor, bias: Tensor, smoothing: float) -> Tensor:
    """−Σ_v q_v log p_v with q = (1 − ε)·one-hot + ε / V, token by token."""
    total, count = hidden.new_zeros(()), 0
    for token, label in zip(hidden, TARGET.tolist(), strict=True):
        if label == -100:
            continue
        p = torch.softmax(head @ token + bias, -1)
        q = torch.full((V,), smoothing / V, dtype=p.dtype)
        q[label] += 1 - smoothing
        total, count = total - (q * p.log()).sum(), count + 1
    return total / count


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_value_and_gradients_are_those_of_the_formula(smoothing: float, chunk_size: int) -> None:
    ours, expected = inputs(), inputs()
    fused = fused_linear_hard_label(
        *ours[:2], TARGET, student_bias=ours[2], label_smoothing=smoothing, chunk_size=chunk_size
    )
    naive = formula(*expected, smoothing)
    (3 * fused).backward()
    (3 * naive).backward()
    torch.testing.assert_close(fused, naive)
    torch.testing.assert_close([x.grad for x in ours], [x.grad for x in expected])


def test_tokens_of_a_batch_are_those_of_one_row() -> None:
    hidden, head, _ = inputs()
    padded = torch.cat([hidden, hidden[:1]]).reshape(2, 4, D)
    target = torch.cat([TARGET, torch.tensor([-100])]).reshape(2, 4)
    expected = fused_linear_hard_label(hidden, head, TARGET)
    torch.testing.assert_close(fused_linear_hard_label(padded, head, target), expected)


def test_no_label_gives_zero_and_gradients_of_zero() -> None:
    hidden, head, _ = inputs()
    fused = fused_linear_hard_label(hidden, head, torch.full((N,), -100))
    fused.backward()
    assert fused == 0
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_the_logits_of_all_tokens_are_never_there() -> None:
    hidden, head, _ = inputs()
    with allocations() as shapes:
        fused_linear_hard_label(hidden, head, TARGET, chunk_size=2).backward()
    assert (2, V) in shapes
    assert not {(N, V), (5, V)} & set(shapes)


def test_targets_of_another_kind_are_refused() -> None:
    hidden, head, _ = inputs()
    with pytest.raises(ValueError, match=r"expected class indices as target, got probabilities .* take hard_label"):
        fused_linear_hard_label(hidden, head, torch.rand(N, V))
    with pytest.raises(ValueError, match=r"target \(6,\) differ in their tokens"):
        fused_linear_hard_label(hidden, head, TARGET[1:])


# The arguments of the classes


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="expected memory > 0, got 0"):
        FusedHardLabel("norm", "head", memory=0)
    with pytest.raises(ValueError, match=r"expected label_smoothing in \[0, 1\), got 1"):
        FusedHardLabel("norm", "head", label_smoothing=1)
    with pytest.raises(ValueError, match="expected teacher_layer and teacher_head, got 'norm' and None: name both"):
        FusedKL("norm", "head", "norm")
    with pytest.raises(ValueError, match=r"expected divergence to be one of forward_kl, .*, got 'kl'"):
        FusedDivergence("kl", "norm", "head", "norm", "head")


def test_a_divergence_gets_the_temperature_of_the_loss() -> None:
    for function, what in (
        (partial(jensen_shannon, temperature=2.0), "that has it bound"),
        (lambda s, t: s, "without"),
    ):
        with pytest.raises(ValueError, match=f"takes temperature=, got one {what}"):
            FusedDivergence(function, "norm", "head", "norm", "head")
