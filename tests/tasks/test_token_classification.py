"""Tagging: figures against scikit-learn, padding, and a training of a tagger with batches as they are padded."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule
from kd_lightning.losses import KD, DeiTHard, HardLabel
from kd_lightning.outputs import Outputs, TopK
from kd_lightning.tasks import TokenClassification
from kd_lightning.tasks.token_classification import macro_f1
from tests.tiny import sgd, trainer

CLASSES, LENGTH = 4, 6


def passages(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Words around a centre of their class, of which most are of class 0; passages of 1 to 6 words."""
    random = torch.Generator().manual_seed(seed)
    target = (torch.rand(count, LENGTH, generator=random) ** 3 * CLASSES).long()
    words = 1.5 * torch.eye(5)[target] + torch.randn(count, LENGTH, 5, generator=random)
    lengths = 1 + torch.arange(count) % LENGTH
    padding = torch.arange(LENGTH) >= lengths[:, None]
    return words.masked_fill(padding[..., None], 0.0), target.masked_fill(padding, -100)


def logits(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, LENGTH, CLASSES, generator=torch.Generator().manual_seed(seed))


def loader(count: int = 48, seed: int = 0) -> DataLoader:
    return DataLoader(TensorDataset(*passages(count, seed)), batch_size=12)


def tagger(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(5, CLASSES)


class ChannelsSecond(nn.Module):
    """Gives (B, C, S), as a convolution over the words does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tagger()

    def forward(self, words: Tensor) -> Tensor:
        return self.net(words).transpose(1, 2)


def test_the_headline_is_scikit_learns_macro_f1_of_all_tokens_with_a_label() -> None:
    task, (_, target), given = TokenClassification(), passages(40), logits(40)
    scores = task.scores(Outputs(given), target)
    assert scores.shape == (40, CLASSES, 2)
    known = target != -100
    expected = f1_score(target[known], given.argmax(-1)[known], average="macro")
    assert task.headline.value(scores.numpy()) == pytest.approx(expected, rel=1e-6)


def test_each_passage_counts_its_own_tokens() -> None:
    task, (_, target), given = TokenClassification(), passages(40), logits(40)
    whole = task.scores(Outputs(given), target)
    for i in range(40):
        (alone,) = task.scores(Outputs(given[i : i + 1]), target[i : i + 1])
        assert torch.equal(alone, whole[i])
        labels, answers = target[i][target[i] != -100].tolist(), given[i].argmax(-1)[target[i] != -100].tolist()
        for c in range(CLASSES):
            hits = sum(a == b == c for a, b in zip(labels, answers, strict=True))
            assert alone[c].tolist() == [hits, labels.count(c) + answers.count(c)]


def test_passages_without_any_label_are_no_units_and_classes_that_nobody_gives_do_not_count() -> None:
    task, (_, target), given = TokenClassification(), passages(6), logits(6)
    target[2] = -100
    assert task.has_label(target).tolist() == [True, True, False, True, True, True]
    assert len(task.scores(Outputs(given), target)) == 5
    assert macro_f1(np.array([[1.0, 2.0], [0.0, 0.0], [0.0, 1.0]])) == 0.5
    assert np.isnan(macro_f1(np.zeros((3, 2))))


def test_a_teacher_of_which_the_best_are_known_is_scored_as_by_its_logits() -> None:
    task, (_, target), given = TokenClassification(), passages(12), logits(12)
    best = given.log_softmax(-1).topk(2)
    known = task.scores(TopK.of(best.indices, best.values), target)
    whole = task.scores(Outputs(given), target)
    assert torch.equal(known[:, :CLASSES], whole)
    assert not known[:, CLASSES:].any()


def test_agreement_is_the_share_of_a_passages_tokens_and_padding_is_none() -> None:
    task, target = TokenClassification(), torch.tensor([[0, 1, -100, -100], [2, -100, 1, 0], [-100] * 4])
    one = torch.tensor([[0, 1, 2, 3], [1, 1, 1, 1], [0, 0, 0, 0]])
    other = torch.tensor([[0, 2, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
    marked = [task.without_padding(answers, target) for answers in (one, other)]
    assert torch.equal(marked[0] == -100, target == -100)
    assert task.agreement(*marked).tolist() == pytest.approx([1 / 2, 2 / 3, 1.0])
    assert task.agreement(one, other).tolist() == [0.25, 0.5, 0.0]  # where nothing says which are padding
    assert task.without_padding(one, None) is one


def test_one_class_for_everything_and_chance_are_told() -> None:
    task, (_, target) = TokenClassification(), passages(120)
    zeros = torch.zeros(120, LENGTH, CLASSES)
    zeros[..., 0] = 1
    outputs = Outputs(zeros)
    answers = task.without_padding(task.answers(outputs), target)
    scores = task.scores(outputs, target)
    known = target != -100
    expected = f1_score(target[known], torch.zeros_like(target)[known], average="macro")
    assert task.knows_nothing(target) == pytest.approx(expected, rel=1e-6)
    assert task.learned_nothing(answers, scores, target) == "gives every token the same class"
    assert task.learned_nothing(answers[:50], scores[:50], target[:50]) is None  # too few to say so
    good = Outputs(nn.functional.one_hot(target.clamp_min(0), CLASSES).float())
    found = task.learned_nothing(task.without_padding(task.answers(good), target), task.scores(good, target), target)
    assert found is None


@pytest.mark.parametrize(
    ("shape", "target", "message"),
    [
        ((2, 4), (2,), "expected a class for each token, .* task=Classification"),
        ((2, 4, 3, 3), (2, 3, 3), r"task=Segmentation"),
        ((2, 4, 6), (2, 6), r"\(B, C, L\), pass task=TokenClassification\(class_dim=1\)"),
        ((2, 4, 4), (2, 4), r"do not tell the dimension of the classes.*task=TokenClassification\(class_dim=2\)"),
        ((2, 6, 4), (2, 5), "expected class indices"),
    ],
)
def test_targets_that_are_not_those_of_such_logits_are_refused(
    shape: tuple[int, ...], target: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenClassification().check(torch.zeros(target).long(), torch.zeros(shape))


def test_a_tagger_learns_from_one_that_knows_more_and_what_is_logged_is_over_the_whole_split() -> None:
    teacher = tagger(1)
    with torch.no_grad():
        teacher.weight.copy_(3 * torch.eye(5)[:CLASSES])
    module = DistillationModule(
        tagger(),
        teacher,
        {"hard_label": HardLabel(weight=0.1), "kd": KD(temperature=1.0, weight=0.9)},
        sgd,
        task=TokenClassification(),
    )
    fit = trainer(max_epochs=20)
    fit.fit(module, loader(), loader(36, seed=3))
    words, target = passages(36, seed=3)
    known = target != -100
    with torch.no_grad():
        own, its = module.student(words).argmax(-1), teacher(words).argmax(-1)
    logged = {name: float(value) for name, value in fit.callback_metrics.items()}
    assert logged["val/f1"] == pytest.approx(f1_score(target[known], own[known], average="macro"), abs=1e-6)
    assert logged["val/acc"] == pytest.approx(float((own == target)[known].float().mean()), abs=1e-6)
    assert logged["val/teacher_f1"] == pytest.approx(f1_score(target[known], its[known], average="macro"), abs=1e-6)
    each = [float((own[i] == its[i])[known[i]].float().mean()) for i in range(36)]
    assert logged["val/agreement"] == pytest.approx(sum(each) / 36, abs=1e-6)
    assert logged["val/agreement"] > 0.9
    untrained = TokenClassification().headline.value(
        TokenClassification().scores(Outputs(tagger()(words).detach()), target).numpy()
    )
    assert logged["val/f1"] > untrained + 0.2


@pytest.mark.parametrize("loss", [KD(temperature=2.0), DeiTHard()])
def test_outputs_with_the_classes_second_are_learnt_alike_where_class_dim_names_them(loss: nn.Module) -> None:
    trained = []
    for student, class_dim in ((ChannelsSecond(), 1), (tagger(), None)):
        module = DistillationModule(
            student, tagger(1), {"loss": loss}, sgd, task=TokenClassification(class_dim=class_dim), check_teacher=False
        )
        if class_dim:  # the teacher's are arranged too
            module = DistillationModule(
                student, _second(tagger(1)), {"loss": loss}, sgd, task=TokenClassification(1), check_teacher=False
            )
        trainer(max_epochs=2).fit(module, loader())
        trained.append(dict(module.student.named_parameters()))
    torch.testing.assert_close(trained[0]["net.weight"], trained[1]["weight"])


def _second(network: nn.Module) -> nn.Module:
    made = ChannelsSecond()
    made.net = network
    return made


def test_a_teacher_that_gives_every_word_one_class_is_refused() -> None:
    teacher = tagger()
    with torch.no_grad():
        teacher.weight.zero_()
        teacher.bias.copy_(torch.tensor([5.0, -1, 0, 0]))
    module = DistillationModule(tagger(), teacher, {"kd": KD()}, sgd, task=TokenClassification())
    with pytest.raises(ValueError, match=r"the teacher is at chance on this loader: macro-F1 .* passages"):
        trainer().fit(module, loader(count=120))
