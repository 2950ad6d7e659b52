import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule, Outputs
from kd_lightning.losses import BCE, KD, DeiTHard, HardLabel, LogitsMSE, SigmoidHard, SigmoidKD
from kd_lightning.outputs import EnsembleOutputs, TopK
from kd_lightning.tasks import MultiLabel
from tests.tiny import sgd, trainer

TASK = MultiLabel()
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [-3.0, -1.0, 4.0], [1.0, 1.0, -2.0], [-1.0, -1.0, -1.0]])
TARGET = torch.tensor([[1, 0, 0], [1, -100, 1], [-100, -100, -100], [0, 0, 0]])


def f1_by_loops(logits: Tensor, target: Tensor) -> float:
    values = []
    for label in range(logits.shape[1]):
        tp = fp = fn = 0
        for z, y in zip(logits[:, label].tolist(), target[:, label].tolist(), strict=True):
            if y != -100:
                tp, fp, fn = tp + (z > 0 and y == 1), fp + (z > 0 and y == 0), fn + (z <= 0 and y == 1)
        if tp + fp + fn:
            values.append(2 * tp / (2 * tp + fp + fn))
    return sum(values) / len(values)


def headline(logits: Tensor, target: Tensor) -> float:
    return TASK.headline.value(TASK.scores(Outputs(logits), target).numpy())


def random(samples: int = 60, labels: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, labels, generator=generator)
    target = (torch.rand(samples, labels, generator=generator) < 0.3).long()
    target[torch.rand(samples, labels, generator=generator) < 0.2] = -100
    return logits, target


@pytest.mark.parametrize("seed", range(3))
def test_the_headline_is_the_mean_of_the_labels_f1(seed: int) -> None:
    logits, target = random(seed=seed)
    assert headline(logits, target) == pytest.approx(f1_by_loops(logits, target), rel=1e-6)
    assert headline(logits, target.float()) == headline(logits, target)
    metric = TASK.metrics()
    for part in (slice(0, 7), slice(7, 60)):
        metric.update(Outputs(logits[part]), target[part])
    assert metric.compute()["f1"].item() == pytest.approx(f1_by_loops(logits, target), rel=1e-6)


def test_it_is_scikit_learns_macro_average() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    logits, target = random()
    target[target == -100] = 0
    expected = metrics.f1_score(target.numpy(), (logits > 0).numpy(), average="macro")
    assert headline(logits, target) == pytest.approx(expected, rel=1e-6)


def test_only_samples_and_labels_that_are_known_are_scored() -> None:
    assert TASK.has_label(TARGET).tolist() == [True, True, False, True]
    assert TASK.scores(Outputs(LOGITS), TARGET).shape == (3, 3, 2)
    assert headline(LOGITS, TARGET) == pytest.approx((2 / 3 + 2 / 3) / 2)  # the second label is neither known nor set


def test_a_label_that_is_never_found_counts_as_zero() -> None:
    target = torch.eye(4, dtype=torch.long)
    assert headline(torch.full((4, 4), -1.0), target) == 0
    found = torch.where(target.bool(), 1.0, -1.0)
    found[:, 3] = -1
    assert headline(found, target) == pytest.approx(3 / 4)


def test_answers_are_the_labels_that_are_set_and_agreement_is_their_overlap() -> None:
    answers = TASK.answers(Outputs(LOGITS))
    assert answers.dtype == torch.bool
    assert answers.tolist() == [[True, False, True], [False, False, True], [True, True, False], [False] * 3]
    other = torch.tensor([[True, False, False], [True, False, False], [True, True, False], [False] * 3])
    assert TASK.agreement(answers, other).tolist() == [0.5, 0.0, 1.0, 1.0]
    assert TASK.agreement(answers, answers).tolist() == [1.0] * 4


def test_outputs_of_other_labels_or_of_the_best_alone_are_not_compared() -> None:
    assert TASK.comparable(Outputs(LOGITS), Outputs(LOGITS))
    assert not TASK.comparable(Outputs(LOGITS), Outputs(LOGITS[:, :2]))
    assert not TASK.comparable(Outputs(LOGITS), TopK.of(torch.zeros(4, 1), torch.zeros(4, 1)))


def test_setting_every_label_is_what_a_model_that_knows_nothing_scores() -> None:
    _, target = random(2000)
    nothing = TASK.knows_nothing(target)
    shares = [(target[:, i] == 1).sum() / (target[:, i] != -100).sum() for i in range(5)]
    assert nothing == pytest.approx(np.mean([2 * p / (1 + p) for p in shares]), rel=1e-6)
    constant = [headline(z.expand(2000, 5), target) for z in torch.tensor([[1.0] * 5, [-1.0] * 5, [1, -1, 1, -1, 1]])]
    assert max(constant) == pytest.approx(nothing)  # no other answer to everything is better
    assert TASK.knows_nothing(torch.zeros(4, 3)) is None


def test_what_makes_a_comparison_an_empty_one() -> None:
    _, target = random(200)

    def learned_nothing(logits: Tensor) -> str | None:
        outputs = Outputs(logits)
        return TASK.learned_nothing(TASK.answers(outputs), TASK.scores(outputs, target), target)

    assert learned_nothing(target.float() - 0.5) is None
    assert learned_nothing(torch.full((200, 5), -1.0)) == "sets the same labels for everything"
    assert learned_nothing(0.5 - target.float()) == "is at chance"


@pytest.mark.parametrize("target", [TARGET, TARGET.float(), TARGET.to(torch.int8), TARGET == 1, torch.rand(4, 3)])
def test_labels_of_any_type_and_probabilities_are_targets(target: Tensor) -> None:
    target = TASK.target_of(target)
    TASK.check(target, LOGITS)
    assert target.dtype in (torch.int64, torch.float32)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0, 2, 1, 1]), r"of shape \(N,\), expected a 0 or 1 for each label, \(N, 3\): .*Classification"),
        (torch.zeros(4, 2), r"of shape \(N, 2\), expected a 0 or 1 for each label, \(N, 3\): slice or reorder"),
        (torch.full((4, 3), 2), "the target holds 2, expected 0 or 1"),
        (torch.full((4, 3), -0.5), "the target holds -0.5, expected 0 or 1"),
        (torch.full((4, 3), float("nan")), "the target holds nan, expected 0 or 1"),
        ([["shirt"], ["boot"]], "the target is a list, expected a tensor with a 0 or 1 for each label"),
    ],
)
def test_a_target_that_cannot_be_labels_is_refused(target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASK.check(TASK.target_of(target), LOGITS)


def test_logits_with_places_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the logits are \(N, 3, 8, 8\), expected one for each label, \(N, L\)"):
        TASK.check(torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8))


def test_entropy_is_that_of_each_label_as_a_share_of_one_bit() -> None:
    assert TASK.entropy(torch.zeros(2, 3)).item() == pytest.approx(1)
    assert TASK.entropy(torch.full((2, 3), 1e4)).item() == 0
    p = 1 / (1 + np.exp(-1.5))
    expected = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    assert TASK.entropy(torch.full((1, 2), 3.0), temperature=2.0).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_an_ensemble_has_the_average_of_its_members_probabilities(temperature: float) -> None:
    members, weights = [LOGITS, -0.5 * LOGITS.roll(1)], [0.75, 0.25]
    ensemble = TASK.arranged(EnsembleOutputs.of(members, weights)).softened(temperature)
    expected = sum(w * torch.sigmoid(z / temperature) for z, w in zip(members, weights, strict=True))
    torch.testing.assert_close(torch.sigmoid(ensemble.logits / temperature), expected)
    certain = TASK.average([torch.tensor([[1e4, -1e4]]), torch.tensor([[1e4, -1e4]])], [1.0, 0.0], 1.0)
    torch.testing.assert_close(certain, torch.tensor([[1e4, -1e4]]))


# In a training


def data(count: int = 128, labels: int = 3, labelled: bool = True) -> DataLoader:
    """Each input's sign is a label."""
    inputs = torch.randn(count, labels, generator=torch.Generator().manual_seed(0))
    target = (inputs > 0).long() if labelled else torch.full((count, labels), -100)
    return DataLoader(TensorDataset(inputs, target), batch_size=16)


def teacher(labels: int = 3) -> nn.Linear:
    network = nn.Linear(labels, labels)
    with torch.no_grad():
        network.weight.copy_(5 * torch.eye(labels))
        network.bias.zero_()
    return network


def module(**options) -> DistillationModule:
    losses = options.pop("losses", {"bce": BCE(), "sigmoid_kd": SigmoidKD(temperature=2.0)})
    return DistillationModule(nn.Linear(3, 3), options.pop("teacher", teacher()), losses, sgd, task=TASK, **options)


def test_a_student_learns_the_labels_and_what_is_logged_is_the_tasks() -> None:
    fit = trainer(max_epochs=5)
    torch.manual_seed(0)
    fit.fit(module(), data(), data(64))
    logged = {name: float(value) for name, value in fit.logged_metrics.items()}
    assert logged["val/f1"] > 0.95
    assert logged["val/teacher_f1"] == 1
    assert logged["val/agreement"] > 0.9
    assert 0 < logged["val/f1"] <= 1


def test_unlabelled_samples_teach_what_the_teacher_knows() -> None:
    torch.manual_seed(0)
    student = module(losses={"sigmoid_kd": SigmoidKD()})
    fit = trainer(max_epochs=5)
    fit.fit(student, data(labelled=False), data(64))
    assert fit.logged_metrics["val/f1"] > 0.95


@pytest.mark.parametrize("make", [KD, HardLabel, DeiTHard])
def test_a_softmax_is_refused_before_the_first_step_and_what_to_take_is_named(make) -> None:
    with pytest.raises(ValueError, match=r"loss 'wrong' reads a softmax over classes, which MultiLabel does not have"):
        trainer().fit(module(losses={"bce": BCE(), "wrong": make()}), data())
    with pytest.raises(ValueError, match="take bce, sigmoid_kd, sigmoid_hard or logits_mse"):
        trainer().fit(module(losses={"wrong": make()}), data())


def test_standardised_logits_are_refused_as_they_compare_labels_with_each_other() -> None:
    with pytest.raises(ValueError, match="loss 'logits_mse' reads a softmax over classes"):
        trainer().fit(module(losses={"logits_mse": LogitsMSE(standardize=True)}), data())
    trainer(max_steps=1).fit(module(losses={"logits_mse": LogitsMSE()}), data())


def test_probabilities_in_the_place_of_logits_are_refused() -> None:
    ends_in_sigmoid = nn.Sequential(teacher(), nn.Sigmoid())
    with pytest.raises(ValueError, match=r"teacher is at chance .* or does it end in a sigmoid, as all outputs lie"):
        trainer().fit(module(teacher=ends_in_sigmoid), data())
    losses = {"bce": BCE(), "sigmoid_kd": SigmoidKD()}
    student = DistillationModule(nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()), teacher(), losses, sgd, task=TASK)
    with pytest.raises(ValueError, match=r"expected logits from the student, got probabilities \(it ends in a sigmoid"):
        trainer().fit(student, data())


def test_a_teacher_that_sets_every_label_is_at_chance() -> None:
    everything = teacher()
    torch.nn.init.constant_(everything.bias, 100.0)
    with pytest.raises(ValueError, match=r"the teacher is at chance on this loader: macro-F1 .* %"):
        trainer().fit(module(teacher=everything), data())


def test_one_output_is_two_classes() -> None:
    """On which a softmax would be constant."""
    inputs = torch.randn(256, 3, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(inputs, (inputs[:, :1] > 0).long()), batch_size=16)
    one = nn.Linear(3, 1)
    with torch.no_grad():
        one.weight.copy_(torch.tensor([[5.0, 0.0, 0.0]]))
        one.bias.zero_()
    losses = {"sigmoid_kd": SigmoidKD(), "sigmoid_hard": SigmoidHard(weight=0.1)}
    torch.manual_seed(0)
    student = DistillationModule(nn.Linear(3, 1), one, losses, sgd, task=TASK)
    fit = trainer(max_epochs=5)
    fit.fit(student, loader, loader)
    assert fit.logged_metrics["val/f1"] > 0.95
