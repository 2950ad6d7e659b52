"""Losses that compare samples, on the samples of two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import kd_lightning.losses as losses
from kd_lightning import DistillationModule
from kd_lightning.losses.gather import all_gather, gather_outputs  # noqa: F401  # the script below has it from here
from kd_lightning.outputs import Outputs, TopK  # noqa: F401
from tests.test_scale_out import plain
from tests.tiny import good_teacher, samples, sgd, trainer, weights

ROOT = Path(__file__).parents[2]
COMPARING = {
    "sp": lambda: losses.SP("head", gather=True),
    "rkd": lambda: losses.RKD("head", gather=True),
    "pkt": lambda: losses.PKT("head", weight=100.0, gather=True),
    "cc": lambda: losses.CC("head", weight=0.02, gather=True),
    "dist": lambda: losses.DIST(gather=True),
    "mlkd": lambda: losses.MLKD(gather=True),
    "supcon": lambda: losses.SupCon(gather=True),
    "pkt_outputs": lambda: losses.PKT(weight=100.0, gather=True),
}


class AsTwoProcesses(DistributedSampler):
    """The samplers that Lightning gives two processes, one after the other."""

    def __iter__(self):
        for rank in (0, 1):
            part = DistributedSampler(self.dataset, 2, rank, seed=0)
            part.set_epoch(self.epoch)
            yield from part

    def __len__(self) -> int:
        return len(self.dataset)


def fitted(name: str, batch_size: int, **options: object) -> DistillationModule:
    torch.manual_seed(5)  # of embeddings that a loss makes
    module = DistillationModule(plain(), good_teacher(), {name: COMPARING[name]()}, sgd)
    dataset = TensorDataset(*samples(24))
    # CC goes from each sample to the next: one process takes them in the order in which two, one after the other, do.
    sampler = None if options else AsTwoProcesses(dataset, 2, 0)
    data = DataLoader(dataset, batch_size=batch_size, sampler=sampler)
    trainer(max_epochs=3, **options).fit(module, data)
    return module


def learnt(module: DistillationModule) -> dict[str, torch.Tensor]:
    return {**weights(module.student), **weights(module.objective)}


SCRIPT = """
import sys, torch
import torch.distributed as dist
import tests.losses.test_gather as t

folder = sys.argv[1]
learnt = {name: t.learnt(t.fitted(name, 12, devices=2, strategy="ddp")) for name in t.COMPARING}
rank = dist.get_rank()
torch.save(learnt, f"{folder}/rank{rank}.pt")

# Batches of different lengths: 2 and 3.
x = torch.arange(2 + rank, dtype=torch.float64).add(10 * rank).requires_grad_()
whole = t.all_gather(x)
(whole * torch.tensor([1.0, 2, 3, 4, 5]) * (rank + 1)).sum().backward()
torch.save((whole.detach(), x.grad, t.all_gather(torch.tensor([rank]))), f"{folder}/gathered{rank}.pt")

best = t.TopK.of(torch.tensor([[rank, 2]]), torch.tensor([[0.5, 0.25]]).log(), {"f": torch.tensor([[rank]])})
best = t.gather_outputs(best, ["f"])
torch.save((best.indices, best.log_probs, best.features["f"]), f"{folder}/best{rank}.pt")
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gather")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # Of another test's seed_everything: Lightning's samplers would take another order from it than AsTwoProcesses.
    environment.pop("PL_GLOBAL_SEED", None)
    subprocess.run([sys.executable, script, folder], check=True, timeout=240, env=environment, cwd=folder)
    return folder


@pytest.mark.integration
@pytest.mark.parametrize("name", COMPARING)
def test_two_processes_learn_what_one_learns_from_the_whole_batch(name: str, two_processes: Path) -> None:
    ranks = [torch.load(two_processes / f"rank{rank}.pt", weights_only=True)[name] for rank in (0, 1)]
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
    whole = learnt(fitted(name, 24))
    start = weights(plain())
    moved = max((whole[key] - start[key]).abs().max() for key in start)
    assert moved > 1e-3
    # Sums in another order round otherwise.
    torch.testing.assert_close(ranks[0], whole, rtol=1e-4, atol=1e-4 * moved.item())


@pytest.mark.integration
def test_without_gathering_each_process_compares_its_own(two_processes: Path) -> None:
    """What the test above could not tell apart if half a batch gave the same."""
    whole, half = (learnt(fitted("pkt", size)) for size in (24, 12))
    assert not torch.allclose(whole["stem.weight"], half["stem.weight"], rtol=1e-3, atol=1e-3)


@pytest.mark.integration
def test_batches_of_different_lengths_are_joined_and_the_gradients_of_all_processes_summed(two_processes: Path) -> None:
    for rank in (0, 1):
        whole, gradient, numbers = torch.load(two_processes / f"gathered{rank}.pt", weights_only=True)
        assert whole.tolist() == [0, 1, 10, 11, 12]
        assert gradient.tolist() == [[3.0, 6.0], [9.0, 12.0, 15.0]][rank]
        assert numbers.tolist() == [0, 1]


@pytest.mark.integration
def test_a_teachers_best_classes_are_gathered_with_its_features(two_processes: Path) -> None:
    for rank in (0, 1):
        indices, log_probs, feature = torch.load(two_processes / f"best{rank}.pt", weights_only=True)
        assert indices.tolist() == [[0, 2], [1, 2]]
        assert log_probs.exp().tolist() == [[0.5, 0.25]] * 2
        assert feature.tolist() == [[0], [1]]


def test_one_process_gathers_itself() -> None:
    assert not dist.is_initialized()
    x = torch.zeros(3)
    assert all_gather(x) is x


def test_every_loss_that_compares_samples_is_here_and_can_gather() -> None:
    made = [getattr(losses, name) for name in losses.__all__]
    comparing = {c.__name__ for c in made if isinstance(c, type) and c.compares_samples}
    assert comparing == {type(make()).__name__ for make in COMPARING.values()}
