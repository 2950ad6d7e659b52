import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

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


def test_a_compiled_step_that_is_to_be_one_graph_is_refused() -> None:
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"torch\.compiler\.disable") as refusal:
        compiled(Model(4), Model(6), torch.randint(V, (3, 9)))
    assert "_fused_linear" in str(refusal.value)


class Distilled(LightningModule):
    """A user's own module: of the logits, or without them."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher, self.fused = Model(4), [Model(6).double()], fused

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        teacher = self.teacher[0]
        if self.fused:
            return step(self.student, teacher, ids)
        heads = self.student.embeddings.weight, teacher.embeddings.weight.detach()
        hidden = self.student(ids[:, :-1]), teacher(ids[:, :-1]).detach()
        return 0.5 * forward_kl(hidden[0] @ heads[0].T, hidden[1] @ heads[1].T, ids[:, 1:])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.9)


def test_a_fit_with_accumulation_and_clipping_ends_at_the_weights_of_whole_logits(tmp_path) -> None:
    torch.manual_seed(1)
    batches = DataLoader(torch.randint(V, (12, 9)), batch_size=3)
    ended = []
    for fused in (True, False):
        module = Distilled(fused)
        started = [x.detach().clone() for x in module.parameters()]
        trainer = Trainer(
            accelerator="cpu",
            precision="64-true",
            max_epochs=2,
            accumulate_grad_batches=2,
            gradient_clip_val=0.05,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, batches)
        ended.append(list(module.parameters()))
    for x, y, z in zip(*ended, started, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(x, z.double(), atol=1e-4)


def test_a_gradient_that_would_be_differentiated_again_is_refused() -> None:
    student, teacher = sides()[:2], [x.detach() for x in sides()[2:]]
    with pytest.raises(RuntimeError, match="expected backward without create_graph: the gradients of a fused loss"):
        torch.autograd.grad(fused_linear_kl(*student, *teacher), student, create_graph=True)
