import pytest
import torch
from torch import Tensor, nn

from kd_lightning.losses import forward_kl, fused_linear_kl, fused_linear_top_k_kl
from tests.losses.test_fused_linear_kl import allocations

N, V, D = 2048, 64, 3


def sides(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n, D, dtype=dtype, requires_grad=True) for n in (N, V, N, V)]


def rows_held(call) -> int:
    with allocations() as shapes:
        call()
    return max({x[0] for x in shapes if x[1:] == (V,)} - {D})  # D: the head's gradient, transposed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_memory_bounds_the_logits_of_both_sides(dtype: torch.dtype) -> None:
    rows = rows_held(lambda: fused_linear_kl(*sides(dtype), memory=0.25))
    assert 2 * rows * V * dtype.itemsize == 2**18


def test_a_teacher_without_logits_leaves_memory_to_the_student() -> None:
    hidden, head = sides()[:2]
    best, log_probs = torch.zeros(N, 1, dtype=torch.int64), torch.zeros(N, 1)
    assert rows_held(lambda: fused_linear_top_k_kl(hidden, head, best, log_probs, memory=0.25)) == 1024


def test_autocast_holds_twice_the_tokens_in_the_same_memory() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert rows_held(lambda: fused_linear_kl(*sides(), memory=0.25)) == 1024


def test_memory_for_less_than_one_token_holds_one() -> None:
    small = [x[:5] if len(x) == N else x for x in sides()]
    assert rows_held(lambda: fused_linear_kl(*small, memory=1e-6)) == 1


def test_any_memory_gives_the_same() -> None:
    inputs = [x.detach().requires_grad_() for x in sides(torch.float64)]
    expected = forward_kl(inputs[0] @ inputs[1].T, inputs[2].detach() @ inputs[3].detach().T)
    wanted = torch.autograd.grad(expected, inputs[:2])
    for memory in (None, 0.1, 1000):
        value = fused_linear_kl(*inputs, memory=memory)
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)
        for x, y in zip(torch.autograd.grad(value, inputs[:2]), wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_wrong_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match="expected memory > 0, got 0: the megabytes for the logits"):
        fused_linear_kl(*sides(), memory=0)
    with pytest.raises(ValueError, match="got chunk_size=4 and memory=8: pass one"):
        fused_linear_kl(*sides(), chunk_size=4, memory=8)


class Model(nn.Module):
    """A causal language model whose head is its table of embeddings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(V, width)
        self.body = nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embeddings(ids)))


def step(student: Model, teacher: Model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = teacher(ids[:, :-1])
    heads = student.embeddings.weight, teacher.embeddings.weight
    return 0.5 * fused_linear_kl(student(ids[:, :-1]), heads[0], hidden, heads[1], ids[:, 1:], chunk_size=8)


def test_a_compiled_step_of_tied_weights_learns_what_the_plain_one_does() -> None:
    torch.manual_seed(0)
    student, teacher = Model(4).double(), Model(6).double()
    compiled = torch.compile(step, backend="aot_eager")
    for length in (9, 5, 12):  # the number of tokens that count differs, too
        ids = torch.randint(V, (3, length))
        ids[0, 2:4] = torch.tensor([1, 2])
        targets = ids.masked_fill(ids == 1, 0)
        found = compiled(student, teacher, targets)
        expected = step(student, teacher, targets)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        weights = list(student.parameters())
        gradients = torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights)
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
        assert gradients[0][0].any()
