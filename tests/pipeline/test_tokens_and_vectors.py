"""Stages of tasks whose units are passages of several lengths, or have no labels."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from kd_lightning.losses import KD, Cosine, HardLabel, SupCon
from kd_lightning.pipeline.compare import against_teacher, compare
from kd_lightning.tasks import Embedding, TokenClassification
from tests.pipeline.tiny_training import TinyData, make_trainer, run, training
from tests.tiny import FEATURES, loader, samples

CLASSES = 4


def passages(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Of 1 to 9 words, the longest in the first batch."""
    random = torch.Generator().manual_seed(seed)
    lengths = [9, *(1 + torch.randint(6, (count - 1,), generator=random)).tolist()]
    targets = [(torch.rand(length, generator=random) ** 3 * CLASSES).long() for length in lengths]
    return [(2 * torch.eye(5)[target] + torch.randn(len(target), 5, generator=random), target) for target in targets]


def collate(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    words, targets = zip(*batch, strict=True)
    return pad_sequence(words, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=-100)


class RaggedPassages(TinyData):
    """Each batch is as long as its longest passage."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(passages(48, 0), batch_size=8, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(passages(24, 1), batch_size=5, collate_fn=collate)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(passages(60, 2), batch_size=7, collate_fn=collate)


def tokens(role: str, **changes: Any) -> Any:
    losses: Callable[[], dict] = lambda: {"hard_label": HardLabel()}  # noqa: E731
    if role == "distilled":
        losses = lambda: {"kd": KD(temperature=1.0)}  # noqa: E731
    given = {"task": TokenClassification(), "network": partial(nn.Linear, 5, CLASSES), "data": RaggedPassages}
    return training(role, losses=losses, trainer=partial(make_trainer, max_epochs=4), **given, **changes)


def test_passages_of_any_length_are_judged_whole_and_their_padding_never(tmp_path: Path) -> None:
    teacher = run(tmp_path, tokens("teacher"))
    student = run(tmp_path, tokens("distilled", seed=1), teacher)
    network, given = student.network().eval(), passages(60, 2)
    with torch.no_grad():
        answers, own = ([net(words).argmax(-1) for words, _ in given] for net in (network, teacher.network().eval()))
    result = student.result
    assert result.answers.shape == (60, 9)
    for i, answer in enumerate(answers):
        assert result.answers[i].tolist() == [*answer.tolist(), *[-100] * (9 - len(answer))]
    expected = f1_score(torch.cat([target for _, target in given]), torch.cat(answers), average="macro")
    assert TokenClassification().headline.value(result.scores) == pytest.approx(expected)
    same = [float((a == b).float().mean()) for a, b in zip(answers, own, strict=True)]
    against = against_teacher(result, teacher.result, TokenClassification())
    assert against["agreement"] == pytest.approx(sum(same) / 60)


class Labelled(TinyData):
    class_names = ("a", "b", "c", "d")  # of the labels, not of the vectors' numbers

    def test_dataloader(self) -> DataLoader:
        return loader(130, seed=2)


def vectors(role: str, **changes: Any) -> Any:
    losses: Callable[[], dict] = lambda: {"supcon": SupCon()}  # noqa: E731
    if role == "distilled":
        losses = lambda: {"cosine": Cosine()}  # noqa: E731
    width = 7 if role == "teacher" else 3
    given = {"task": Embedding(), "network": partial(nn.Linear, FEATURES, width), "data": Labelled}
    return training(role, losses=losses, trainer=partial(make_trainer, max_epochs=10), **given, **changes)


def test_without_labels_models_are_judged_by_the_teachers_neighbours_on_the_whole_split(tmp_path: Path) -> None:
    teacher = run(tmp_path, vectors("teacher"))
    results = [teacher.result]
    for role, seed in ((role, seed) for role in ("student", "distilled") for seed in (0, 1)):
        taught_by = teacher if role == "distilled" else None
        stage = run(tmp_path, vectors(role, seed=seed), taught_by, judge=teacher)
        with torch.no_grad():
            own, its = (of.network().eval()(samples(130, seed=2)[0]) for of in (stage, teacher))
        torch.testing.assert_close(torch.from_numpy(stage.result.answers), own)
        expected = Embedding().agreement(own, its)
        assert stage.result.scores.tolist() == pytest.approx(expected.tolist())
        results.append(stage.result)
    assert teacher.result.scores.tolist() == [1.0] * 130
    verdict = compare(results, Embedding())
    assert verdict.models["teacher"].value == 1
    assert verdict.models["distilled"].agreement == pytest.approx(verdict.models["distilled"].value)
    assert verdict.models["distilled"].value > 10 / 129
