"""Embeddings: neighbours against scikit-learn, and trainings through both front doors."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule
from kd_lightning.callbacks import Distillation
from kd_lightning.losses import KD, RKD, Cosine, HardLabel, Hint, SupCon, supervised_contrastive
from kd_lightning.tasks import Embedding
from kd_lightning.tasks.embedding import nearest
from tests.tiny import FEATURES, samples, sgd, trainer


def vectors(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def network(width: int, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(FEATURES, width)


def by_scikit_learn(student: Tensor, teacher: Tensor, count: int) -> list[float]:
    def found(x: Tensor) -> list[set[int]]:
        # Each vector is its own nearest, which is left out.
        of = NearestNeighbors(n_neighbors=count + 1, metric="cosine").fit(x).kneighbors(x, return_distance=False)
        return [set(row.tolist()) - {i} for i, row in enumerate(of)]

    return [len(s & t) / count for s, t in zip(found(student), found(teacher), strict=True)]


def loader(count: int = 64, batch_size: int = 16, labels: bool = True) -> DataLoader:
    inputs, target = samples(count)
    return DataLoader(TensorDataset(inputs, target) if labels else TensorDataset(inputs), batch_size=batch_size)


@pytest.mark.parametrize("count", [1, 5, 10])
def test_agreement_is_the_share_of_the_neighbours_that_scikit_learn_finds(count: int) -> None:
    student, teacher = vectors(60, 4), vectors(60, 7, seed=1)
    student[:, :4] += teacher[:, :4]
    found = Embedding(neighbours=count).agreement(student, teacher)
    assert found.tolist() == pytest.approx(by_scikit_learn(student, teacher, count))
    assert 0 < found.mean() < 1


def test_neighbours_come_nearest_first_and_never_the_vector_itself_in_whatever_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = vectors(50, 3)
    whole = nearest(given, 6)
    cosines = nn.functional.cosine_similarity(given[:, None], given[None], -1)
    for i, row in enumerate(whole.tolist()):
        assert i not in row
        assert row == sorted(row, key=lambda j: -cosines[i, j])
        others = set(range(50)) - {i, *row}
        assert min(cosines[i, j] for j in row) >= max(cosines[i, j] for j in others)
    monkeypatch.setattr("kd_lightning.tasks.embedding._ROWS", 7)
    assert torch.equal(nearest(given, 6), whole)


def test_lengths_and_rotation_change_nothing_and_the_teachers_own_is_one() -> None:
    task, teacher = Embedding(), vectors(80, 6)
    rotation = torch.linalg.qr(vectors(6, 6, seed=2)).Q
    stretched = (1 + torch.arange(80.0))[:, None] * teacher @ rotation
    assert task.agreement(stretched, teacher).tolist() == [1.0] * 80
    assert task.agreement(teacher, teacher).tolist() == [1.0] * 80


def test_few_units_have_fewer_neighbours() -> None:
    task = Embedding(neighbours=10)
    assert task.agreement(vectors(4, 3), vectors(4, 5)).tolist() == [1.0] * 4  # all three others
    assert task.agreement(vectors(1, 3), vectors(1, 5)).tolist() == [1.0]
    with pytest.raises(ValueError, match="expected neighbours of 1 or more, got 0"):
        Embedding(neighbours=0)


def test_chance_is_what_units_drawn_at_random_find() -> None:
    task, count = Embedding(), 400
    nothing = task.knows_nothing(torch.zeros(count))
    assert nothing == pytest.approx(10 / 399)
    student, teacher = vectors(count, 8), vectors(count, 8, seed=1)
    found = task.agreement(student, teacher)
    assert found.mean() == pytest.approx(nothing, abs=0.01)
    assert task.learned_nothing(student, found, None) == "is at chance"
    same = torch.ones(count, 8)
    assert task.learned_nothing(same, task.agreement(same, teacher), None) == "gives one vector to everything"
    close = teacher + 0.3 * student
    assert task.learned_nothing(close, task.agreement(close, teacher), None) is None


def test_what_is_logged_is_the_recall_over_the_whole_split_and_not_over_its_batches() -> None:
    teacher, student = network(8, seed=1), network(3)
    module = DistillationModule(student, teacher, {"cosine": Cosine()}, sgd, task=Embedding())
    fit = trainer()
    (logged,) = fit.validate(module, loader())
    inputs, _ = samples(64)
    with torch.no_grad():
        expected = sum(by_scikit_learn(student(inputs), teacher(inputs), 10)) / 64
        of_batches = [Embedding().agreement(student(x), teacher(x)).mean() for x in inputs.split(16)]
    assert logged == {"val/recall_at_10": pytest.approx(expected, abs=1e-6)}
    assert abs(sum(of_batches) / 4 - expected) > 0.2


SCRIPT = """
import json, sys
import tests.tasks.test_embedding as t

fit = t.trainer(devices=2, strategy="ddp")
(logged,) = fit.validate(t.untaught(), t.loader())
json.dump(logged, open(f"{sys.argv[1]}/rank{fit.global_rank}.json", "w"))
"""


def untaught() -> DistillationModule:
    return DistillationModule(network(3), network(8, seed=1), {"cosine": Cosine()}, sgd, task=Embedding())


@pytest.mark.integration
def test_two_processes_log_the_recall_over_both_their_halves(tmp_path: Path) -> None:
    script = tmp_path / "validate.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=180, env=environment, cwd=tmp_path)
    (one,) = trainer().validate(untaught(), loader())
    for rank in (0, 1):
        logged = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert logged["val/recall_at_10"] == pytest.approx(one["val/recall_at_10"], abs=1e-6)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    "losses", [{"cosine": Cosine()}, {"hint": Hint(weight=10.0)}, {"rkd": RKD()}], ids=lambda losses: next(iter(losses))
)
def test_a_student_of_another_width_learns_the_teachers_neighbours(losses: dict[str, nn.Module], labels: bool) -> None:
    teacher, student = network(8, seed=1), network(5)
    before = Embedding().agreement(student(samples(64)[0]).detach(), teacher(samples(64)[0]).detach()).mean()
    adam = lambda parameters: torch.optim.Adam(parameters, lr=0.03)  # noqa: E731
    module = DistillationModule(student, teacher, copy.deepcopy(losses), adam, task=Embedding())
    fit = trainer(max_epochs=30)
    fit.fit(module, loader(labels=labels), loader(labels=labels))
    assert fit.callback_metrics["val/recall_at_10"] > before + 0.1


def test_a_student_alone_learns_from_labels_and_has_no_headline_without_a_teacher() -> None:
    module = DistillationModule(network(3), None, {"supcon": SupCon()}, sgd, task=Embedding())
    inputs, target = samples(64)
    before = supervised_contrastive(module(inputs), target)
    fit = trainer(max_epochs=10)
    fit.fit(module, loader(), loader())
    assert supervised_contrastive(module(inputs), target) < before - 0.1
    assert not [name for name in fit.callback_metrics if name.startswith("val/")]


class Plain(LightningModule):
    """A module that learns nothing on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return 0.0 * self.net(batch[0]).sum()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_callback_logs_the_same_figure_for_a_module_that_nobody_edits() -> None:
    teacher, module = network(8, seed=1), Plain()
    callback = Distillation(teacher, {"cosine": Cosine()}, student="net", task=Embedding())
    fit = trainer(max_epochs=2, callbacks=[callback])
    fit.fit(module, loader(), loader())
    inputs, _ = samples(64)
    with torch.no_grad():
        expected = sum(by_scikit_learn(module.net(inputs), teacher(inputs), 10)) / 64
    assert float(fit.callback_metrics["val/recall_at_10"]) == pytest.approx(expected, abs=1e-6)
    assert "val/agreement" not in fit.callback_metrics


@pytest.mark.parametrize("name", ["kd", "hard_label"])
def test_losses_over_classes_are_refused_with_those_to_take(name: str) -> None:
    losses = {"kd": KD(), "hard_label": HardLabel()}
    module = DistillationModule(network(8), network(8, seed=1), {name: losses[name]}, sgd, task=Embedding())
    with pytest.raises(ValueError, match=f"loss '{name}' reads a softmax over classes.*Embedding.*take cosine, hint"):
        trainer().fit(module, loader())


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).view(-1, 3, 2, 2)


def test_outputs_that_are_no_vectors_are_refused_before_training() -> None:
    module = DistillationModule(Maps(), network(8), {"cosine": Cosine()}, sgd, task=Embedding())
    with pytest.raises(ValueError, match=r"outputs are of shape \(\d, 3, 2, 2\), expected a vector"):
        trainer().fit(module, loader())
    module = DistillationModule(network(1), network(8), {"cosine": Cosine()}, sgd, task=Embedding())
    with pytest.raises(ValueError, match="expected a vector of two numbers or more"):
        trainer().fit(module, loader())
