"""The next token: whose labels stand where, and figures against their definitions."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule
from kd_lightning.losses import KD, HardLabel
from kd_lightning.models import GPT
from kd_lightning.outputs import Outputs, TopK
from kd_lightning.tasks import Classification, LanguageModelling
from tests.test_tokens import library_file
from tests.tiny import sgd, trainer

VOCABULARY, LENGTH = 7, 5


def texts(count: int = 8, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def logits(count: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(count, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def next_tokens(count: int = 8) -> tuple[Tensor, Tensor]:
    longer = texts(count, LENGTH + 1)
    return longer[:, :-1], longer[:, 1:]


def test_a_tuple_holds_the_next_tokens_and_a_mapping_labels_at_their_own_places() -> None:
    tokens, target = next_tokens()
    assert torch.equal(LanguageModelling().read((tokens, target)).target, target)
    read = LanguageModelling().read({"input_ids": tokens, "labels": tokens})
    assert torch.equal(read.target[:, :-1], tokens[:, 1:])
    assert (read.target[:, -1] == -100).all()
    assert torch.equal(read.kwargs["input_ids"], tokens)
    assert "labels" not in read.kwargs


def test_shift_says_otherwise() -> None:
    tokens, _ = next_tokens()
    assert torch.equal(LanguageModelling(shift=False).read({"input_ids": tokens, "labels": tokens}).target, tokens)
    assert torch.equal(LanguageModelling(shift=True).read((tokens, tokens)).target[:, :-1], tokens[:, 1:])


def test_without_labels_a_text_is_its_own_and_padding_does_not_count() -> None:
    tokens, mask = texts(2), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    read = LanguageModelling().read({"input_ids": tokens, "attention_mask": mask})
    assert read.target.tolist() == [[*tokens[0, 1:3].tolist(), -100, -100, -100], [*tokens[1, 1:].tolist(), -100]]
    labelled = LanguageModelling().read({"input_ids": tokens, "attention_mask": mask, "labels": tokens.clone()})
    assert torch.equal(labelled.target, read.target)
    assert torch.equal(labelled.kwargs["attention_mask"], mask)


@pytest.mark.parametrize(
    ("task", "batch", "message"),
    [
        (LanguageModelling(), lambda t: (t, t), "the targets are the tokens themselves.*shift=True"),
        (
            LanguageModelling(),
            lambda t: {"input_ids": t[:, :-1], "labels": t[:, 1:]},
            "the targets are the tokens after the next ones.*leave the shift to it",
        ),
        (LanguageModelling(shift=True), lambda t: (t[:, :-1], t[:, 1:]), "the tokens after the next ones"),
    ],
)
def test_labels_at_another_place_are_an_error_before_the_first_step(task: Any, batch: Any, message: str) -> None:
    tokens = texts(16, 9)
    loader = DataLoader([0], collate_fn=lambda _: batch(tokens))
    module = DistillationModule(GPT(VOCABULARY, 16, 1, 1, 4), None, {"hard": HardLabel()}, sgd, task=task)
    with pytest.raises(ValueError, match=message):
        trainer(max_steps=1).fit(module, loader)


@pytest.mark.parametrize(
    "batch",
    [
        lambda t: (t[:, :-1], t[:, 1:]),
        lambda t: {"input_ids": t, "labels": t},
        lambda t: {"input_ids": torch.zeros_like(t), "labels": torch.zeros_like(t)},  # one token, wherever labels stand
        lambda t: {"input_ids": t, "labels": t.masked_fill(torch.arange(9) < 6, -100)},  # of an answer after its prompt
    ],
)
def test_labels_at_their_places_are_none(batch: Any) -> None:
    task = LanguageModelling()
    task.check_batch(task.read(batch(texts(16, 9))))


def test_masked_tokens_are_read_where_they_stand() -> None:
    task, tokens = LanguageModelling(shift=False), texts(16, 9)
    task.check_batch(task.read({"input_ids": tokens, "labels": tokens}))


def test_the_headline_is_the_mean_negative_log_likelihood_in_bits() -> None:
    target, given, task = next_tokens()[1].clone(), logits(), LanguageModelling()
    target[0, 2:] = -100
    target[3] = -100
    expected = F.cross_entropy(given.flatten(0, 1), target.flatten()) / math.log(2)
    scores = task.scores(Outputs(given), target)
    assert scores.shape == (7, 2)  # the passage without a target is none
    assert task.headline.value(scores.numpy()) == pytest.approx(float(expected), rel=1e-6)
    assert task.headline.write(float(expected)) == f"{expected:.3f} bits per token"


def test_perplexity_and_accuracy_are_logged_beside_it() -> None:
    target, given, task = next_tokens()[1].clone(), logits(), LanguageModelling()
    target[0, 2:] = -100
    metrics = task.metrics()
    for half in (slice(0, 3), slice(3, 8)):
        metrics.update(Outputs(given[half]), target[half])
    found = metrics.compute()
    cross_entropy = F.cross_entropy(given.flatten(0, 1), target.flatten())
    right = (given.argmax(-1) == target)[target != -100].float().mean()
    assert found["perplexity"] == pytest.approx(float(cross_entropy.exp()), rel=1e-5)
    assert found["acc"] == pytest.approx(float(right))
    assert found["bits_per_token"] == pytest.approx(float(cross_entropy) / math.log(2), rel=1e-5)


def test_bits_per_character_count_the_characters_of_tokens(tmp_path: Path) -> None:
    """A model that takes all tokens as equally likely needs log2 V bits for each, whatever their length."""
    file = library_file(tmp_path)
    task = LanguageModelling(per="character", tokenizer=str(file))
    from kd_lightning.tokens import HuggingFace

    ids = torch.from_numpy(HuggingFace(file).encode("To be, or not to be")).long()[None]
    uniform = torch.zeros(1, ids.shape[1], HuggingFace(file).size)
    expected = math.log2(uniform.shape[-1]) * ids.shape[1] / len("To be, or not to be")
    assert task.headline.value(task.scores(Outputs(uniform), ids).numpy()) == pytest.approx(expected)


def test_of_the_best_tokens_alone_the_bits_are_a_bound() -> None:
    task, log_p = LanguageModelling(), torch.tensor([[[0.5, 0.25]]]).log()
    best = TopK.of(torch.tensor([[[3, 1]]]), log_p)
    assert task.scores(best, torch.tensor([[1]]))[0].tolist() == pytest.approx([2.0, 1.0])
    assert task.scores(best, torch.tensor([[6]]))[0].tolist() == pytest.approx([2.0, 1.0])  # with the 0.25 that is left


def test_divergence_and_acceptance_are_as_defined() -> None:
    target, task = next_tokens()[1].clone(), LanguageModelling()
    target[0, 2:] = -100
    student, teacher = logits(), logits(seed=2)
    found = task.beside(Outputs(student), Outputs(teacher), target)
    p_s, p_t = student.softmax(-1)[target != -100], teacher.softmax(-1)[target != -100]
    torch.testing.assert_close(found["kl_teacher"], (p_t * (p_t / p_s).log2()).sum(-1))
    # Corollary 3.6 of Leviathan et al. (2023): 1 minus half the L1 distance.
    torch.testing.assert_close(found["acceptance"], 1 - 0.5 * (p_t - p_s).abs().sum(-1))
    assert task.beside(Outputs(student), TopK.of(target[..., None], torch.zeros(8, LENGTH, 1)), target) == {}


def test_agreement_is_the_share_of_tokens_that_both_find_most_likely() -> None:
    task, target = LanguageModelling(), next_tokens()[1].clone()
    target[0, 2:] = -100
    a, b = (task.without_padding(task.answers(Outputs(logits(seed=s))), target) for s in (1, 2))
    same = (logits(seed=1).argmax(-1) == logits(seed=2).argmax(-1)).float()
    assert task.agreement(a, b).tolist() == pytest.approx([float(same[0, :2].mean()), *same[1:].mean(1).tolist()])


def test_a_model_that_knows_frequencies_alone_needs_their_entropy() -> None:
    target = torch.tensor([[0, 0, 1, 2, -100]])
    assert LanguageModelling().knows_nothing(target) == pytest.approx(1.5)
    assert LanguageModelling().knows_nothing(torch.zeros(2, 3).long()) is None
    frequent = torch.tensor([0.5, 0.25, 0.25]).log().expand(200, 5, 3)
    task, many = LanguageModelling(), target.expand(200, 5)
    scores = task.scores(Outputs(frequent), many)
    assert task.learned_nothing(task.answers(Outputs(frequent)), scores, many) == "gives the same token everywhere"
    random = torch.randint(3, (200, 5))
    assert task.learned_nothing(random, scores, many) == "is at chance"
    assert task.learned_nothing(random, scores * torch.tensor([0.9, 1.0]), many) is None


def test_another_unit_of_text_is_refused() -> None:
    with pytest.raises(ValueError, match="expected per to be one of character, byte, token, got 'word'"):
        LanguageModelling(per="word")


def test_a_student_learns_a_teachers_next_tokens_and_its_figures_are_logged() -> None:
    """Texts in which each token follows from the one before it: 2.8 bits for who knows nothing, 0 for who does."""
    start = torch.randint(VOCABULARY, (96, 1), generator=torch.Generator().manual_seed(0))
    tokens = (start + torch.arange(LENGTH + 1)) % VOCABULARY
    loader = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=16)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Embedding(VOCABULARY, VOCABULARY))
    teacher[0].weight.data = 8 * torch.eye(VOCABULARY).roll(1, 1)
    student = GPT(VOCABULARY, LENGTH, 1, 2, 16)
    losses = {"hard_label": HardLabel(0.1), "kd": KD(1.0, 0.9)}

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-2)

    module = DistillationModule(student, teacher, losses, adam, task=LanguageModelling(per="character"))
    fit = trainer(max_epochs=15)
    fit.fit(module, loader, loader)
    found = {name: float(value) for name, value in fit.callback_metrics.items()}
    assert found["val/bits_per_character"] < 0.1
    assert found["val/agreement"] > 0.99
    assert found["val/acc"] > 0.99
    assert found["val/perplexity"] == pytest.approx(2 ** found["val/bits_per_character"], rel=1e-4)
    assert found["val/teacher_bits_per_character"] < 0.01


def test_one_class_a_sample_is_refused_with_the_task_that_it_is() -> None:
    with pytest.raises(ValueError, match=r"expected a class for each token, \(N, S, C\)"):
        LanguageModelling().check(torch.zeros(4).long(), torch.zeros(4, 3))
    assert np.isnan(Classification().metrics()["acc"].compute().item())
