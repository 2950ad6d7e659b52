import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses import fused_linear_top_k_kl, top_k_kl
from tests.losses.test_fused_linear_kl import TARGET, D, N, V, inputs

K = 4


def best(n: int = N) -> tuple[Tensor, Tensor]:
    hidden, head, bias = inputs(n)[1]
    found = F.log_softmax(hidden @ head.T + bias, -1).topk(K, -1)
    return found.indices, found.values


def fused(student: list[Tensor], indices: Tensor, log_probs: Tensor, target: Tensor | None = None, **options) -> Tensor:
    return fused_linear_top_k_kl(*student[:2], indices, log_probs, target, student_bias=student[2], **options)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("target", [None, TARGET], ids=["all", "some"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_value_and_gradients_are_those_of_the_whole_logits(
    chunk_size: int, temperature: float, target: Tensor | None, tail: bool
) -> None:
    mine, others = inputs()[0], inputs()[0]
    value = fused(mine, *best(), target, tail=tail, temperature=temperature, chunk_size=chunk_size)
    logits = others[0] @ others[1].T + others[2]
    expected = top_k_kl(logits, *best(), target, tail=tail, temperature=temperature)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    found, wanted = torch.autograd.grad(value, mine), torch.autograd.grad(expected, others)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_sequences_are_their_tokens() -> None:
    student, (indices, log_probs) = inputs(6)[0], best(6)
    sequences = [student[0].reshape(2, 3, D), *student[1:]]
    value = fused(sequences, indices.reshape(2, 3, K), log_probs.reshape(2, 3, K), TARGET[:6].reshape(2, 3))
    assert value.item() == pytest.approx(fused(student, indices, log_probs, TARGET[:6]).item(), rel=1e-12)


def test_one_best_class_of_probability_one_is_cross_entropy_also_of_labels_that_are_ignored() -> None:
    student = inputs()[0]
    value = fused(student, TARGET[:, None], torch.zeros(N, 1), TARGET, chunk_size=2)
    expected = F.cross_entropy(student[0] @ student[1].T + student[2], TARGET)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for x, y in zip(torch.autograd.grad(value, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_half_precision_students_take_float32_probabilities() -> None:
    student = inputs(dtype=torch.bfloat16)[0]
    indices, log_probs = best()
    value = fused(student, indices, log_probs.float(), TARGET)
    value.backward()
    exact = [x.detach().double() for x in student]
    logits = exact[0] @ exact[1].T + exact[2]
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(top_k_kl(logits, indices, log_probs, TARGET).item(), rel=0.02)
    assert all(x.grad.dtype == torch.bfloat16 and x.grad.any() for x in student)


def test_shapes_that_do_not_fit_are_refused() -> None:
    student, (indices, log_probs) = inputs()[0], best()
    with pytest.raises(ValueError, match=r"expected indices and log_probs \(7, k\) with k from 1 .*, got \(6, 4\)"):
        fused(student, indices[:6], log_probs[:6])
    with pytest.raises(ValueError, match=r"got \(7, 4\) and \(7, 3\)"):
        fused(student, indices, log_probs[:, :3])
    with pytest.raises(ValueError, match=r"expected k up to the 11 classes of student_head, got 12"):
        fused(student, torch.zeros(N, V + 1, dtype=torch.int64), torch.zeros(N, V + 1))
    with pytest.raises(ValueError, match=r"student_hidden \(7, 3\) and target \(6,\) differ in their tokens"):
        fused(student, indices, log_probs, TARGET[:6])
    with pytest.raises(ValueError, match=r"student_hidden \(7, 3\) and student_head \(3, 11\) do not fit"):
        fused([student[0], student[1].T, student[2]], indices, log_probs)
    with pytest.raises(ValueError, match=r"expected temperature > 0, got -1"):
        fused(student, indices, log_probs, temperature=-1)
