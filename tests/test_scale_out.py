"""Two processes, accumulated gradients, half precision and a compiled student give what one plain process gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning.losses import KD, HardLabel, Hint
from tests.tiny import CLASSES, FEATURES, assert_equal, distillation, good_teacher, network, samples, trainer, weights

ROOT = Path(__file__).parents[1]


class Plain(nn.Module):
    """Without batch statistics, which are a process's own and depend on how a batch is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.head = nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.stem(x)))


def plain() -> Plain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Plain()


def module(**options):
    losses = {"hard_label": HardLabel(0.3), "kd": KD(2.0, weight=0.7), "hint": Hint("stem", weight=0.1)}
    return distillation(plain(), losses=losses, **options)


def fit(fitted, *loaders, **options):
    seed_everything(1)  # the projector is made when training begins
    fit = trainer(**{"max_epochs": 2, **options})
    fit.fit(fitted, *loaders)
    return fit


def data(batch_size: int) -> DataLoader:
    return DataLoader(TensorDataset(*samples(64)), batch_size=batch_size)


def learnt(fitted) -> dict[str, torch.Tensor]:
    return {**weights(fitted.student), **weights(fitted.objective)}


SCRIPT = """
import sys, torch, tests.test_scale_out as t

module = t.module()
fit = t.fit(module, t.data(32), t.data(8), devices=2, strategy="ddp", max_epochs=4)
folder = sys.argv[1]
torch.save({"weights": t.learnt(module), "metrics": dict(fit.callback_metrics)}, f"{folder}/rank{fit.global_rank}.pt")
fit.save_checkpoint(f"{folder}/last.ckpt")
"""


def test_two_processes_learn_what_one_learns_from_the_whole_batch(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=180, env=environment, cwd=tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_equal(ranks[0]["weights"], ranks[1]["weights"])

    # All 64 samples are in each step, 32 on each rank, so it does not matter which rank gets which.
    whole = module()
    one = fit(whole, data(64), data(8), max_epochs=4)
    # The mean of two means rounds otherwise than one mean.
    torch.testing.assert_close(ranks[0]["weights"], learnt(whole), rtol=1e-4, atol=1e-6)
    for name in ("val/acc", "val/agreement", "val/teacher_acc"):
        assert ranks[0]["metrics"][name] == pytest.approx(one.callback_metrics[name].item(), abs=1e-6)
        assert ranks[0]["metrics"][name] == ranks[1]["metrics"][name]
    student = plain()
    student.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])


@pytest.mark.parametrize("every", [2, 4])
def test_accumulated_gradients_are_the_larger_batchs(every: int) -> None:
    small, large = module(), module()
    fit(small, data(32 // every), accumulate_grad_batches=every)
    fit(large, data(32))
    # The mean of several means rounds otherwise than one mean.
    torch.testing.assert_close(learnt(small), learnt(large), rtol=1e-4, atol=1e-6)


def test_mixed_precision_learns_nearly_the_same_with_losses_in_float32() -> None:
    mixed, full, seen = module(), module(), []

    class Look(Callback):
        def on_before_backward(self, trainer, pl_module, loss) -> None:
            seen.append(loss.dtype)

    fit(mixed, data(16), data(16), precision="bf16-mixed", callbacks=[Look()])
    fit(full, data(16), data(16))
    assert set(seen) == {torch.float32}
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    # bfloat16 has 8 bits: products are off by some 0.4 %, over 8 steps.
    torch.testing.assert_close(learnt(mixed), learnt(full), rtol=0.05, atol=0.02)
    assert not torch.equal(mixed.student.head.weight, plain().head.weight)


def test_the_gradients_of_projectors_are_clipped_with_the_students() -> None:
    norms = []

    class Norm(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            gradients = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
            if gradients:  # of the step before
                norms.append(torch.stack(gradients).norm().item())

    fitted = module()
    fit(fitted, data(16), gradient_clip_val=0.01, callbacks=[Norm()])
    assert fitted.losses.hint.projector.weight.grad.any()
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)  # clip_grad_norm_ divides by the norm + 1e-6


def test_a_compiled_student_learns_what_an_eager_one_learns() -> None:
    """Takes some 5 s. The features of taps inside a compiled network are right, and so is validation without taps."""
    results = []
    for compiled in (False, True):
        fitted = distillation(network(), losses={"kd": KD(), "hint": Hint("stem")}, teacher=good_teacher())
        if compiled:
            fitted.student.compile(backend="aot_eager")
            fitted.teacher.network.compile(backend="aot_eager")
        done = fit(fitted, data(16), data(16))
        results.append((learnt(fitted), {name: value.item() for name, value in done.callback_metrics.items()}))
        assert set(weights(fitted.student)) == set(weights(network()))
    # The compiler may fuse operations, and so round otherwise.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)


def test_a_compiled_student_is_compiled_for_its_batches_and_not_for_the_few_samples_looked_at_before() -> None:
    sizes: list[object] = []

    def backend(graph, inputs):
        sizes.extend(x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.shape[1:] == (FEATURES,))
        return graph.forward

    fitted = distillation(network(), losses={"kd": KD()}, check_teacher=False)
    fitted.student.compile(backend=backend)
    fit(fitted, data(16))
    assert 16 in sizes
    assert 2 not in sizes
    assert all(isinstance(size, int) for size in sizes)  # a graph for any size would be slower
