import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule, Outputs
from kd_lightning.losses import KD, DeiTHard, HardLabel, LabelRegression, LogitsMSE, TeacherBounded, TeacherRegression
from kd_lightning.outputs import EnsembleOutputs, TopK
from kd_lightning.tasks import Regression
from tests.tiny import sgd, trainer

TASK = Regression()
NAN = math.nan
VALUES = torch.tensor([[1.0, 2.0], [0.0, 4.0], [5.0, 5.0], [-1.0, 0.0]])
TARGET = torch.tensor([[2.0, 2.0], [0.5, NAN], [NAN, NAN], [-1.0, 3.0]])


def headline(task: Regression, values: Tensor, target: Tensor) -> float:
    return task.headline.value(task.scores(Outputs(values), target).numpy())


def test_the_headline_is_the_mean_absolute_error_of_what_is_known() -> None:
    assert TASK.has_label(TARGET).tolist() == [True, True, False, True]
    assert TASK.scores(Outputs(VALUES), TARGET).tolist() == [0.5, 0.5, 1.5]
    assert headline(TASK, VALUES, TARGET) == pytest.approx(2.5 / 3)
    metric = TASK.metrics()
    for part in (slice(0, 3), slice(3, 4)):
        metric.update(Outputs(VALUES[part]), TARGET[part])
    assert metric.compute()["mae"].item() == pytest.approx(2.5 / 3)
    assert TASK.headline.better(0.1, 0.2)


def test_it_is_in_the_units_that_the_task_is_told() -> None:
    millimetres = Regression(symbol="mm", scale=20.0)
    assert headline(millimetres, VALUES, TARGET) == pytest.approx(20 * 2.5 / 3)
    assert millimetres.headline.write(headline(millimetres, VALUES, TARGET)) == "16.67 mm"
    assert Regression(scale=[2.0, 10.0]).scores(Outputs(VALUES), TARGET).tolist() == [1.0, 1.0, 15.0]
    with pytest.raises(ValueError, match="expected one scale, or one for each of 2 values, got 3"):
        Regression(scale=[1.0, 2.0, 3.0]).check_arguments(2)
    for wrong in ({"scale": 0.0}, {"scale": [1.0, -1.0]}, {"tolerance": 0.0}):
        with pytest.raises(ValueError, match="expected scale and tolerance above 0"):
            Regression(**wrong)


def test_agreement_is_the_share_of_values_that_differ_by_no_more_than_the_tolerance() -> None:
    teacher = VALUES + torch.tensor([[0.05, 0.3], [0.0, 0.0], [-0.05, 0.09], [2.0, -2.0]])
    answers = TASK.answers(Outputs(VALUES))
    assert TASK.agreement(answers, teacher).tolist() == [0.5, 1.0, 1.0, 0.0]
    assert Regression(tolerance=0.5).agreement(answers, teacher).tolist() == [1.0, 1.0, 1.0, 0.0]
    assert TASK.answers(Outputs(VALUES.bfloat16())).dtype == torch.float32


def test_outputs_of_other_values_or_classes_are_not_compared() -> None:
    assert TASK.comparable(Outputs(VALUES), Outputs(VALUES))
    assert not TASK.comparable(Outputs(VALUES), Outputs(VALUES[:, :1]))
    assert not TASK.comparable(Outputs(VALUES), TopK.of(torch.zeros(4, 1), torch.zeros(4, 1)))


@pytest.mark.parametrize("values", [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[1.0], [2.0], [4.0]])])
@pytest.mark.parametrize("target", [torch.tensor([1, 4, 4]), torch.tensor([[1.0], [4.0], [4.0]])])
def test_a_single_value_is_one_with_or_without_a_dimension_of_its_own(values: Tensor, target: Tensor) -> None:
    """Three errors, and not the nine that broadcasting would make."""
    values, target = TASK.arrange(values), TASK.target_of(target)
    assert values.shape == target.shape == (3, 1)
    TASK.check(target, values)
    assert TASK.scores(Outputs(values), target).tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("target", "values", "message"),
    [
        (torch.zeros(4), VALUES, r"the target is of shape \(N, 1\) and the outputs are \(N, 2\), expected both as"),
        (torch.zeros(4, 2), VALUES[:, 0], r"the target is of shape \(N, 2\) and the outputs are \(N, 1\)"),
        (torch.zeros(4, 2, 1), VALUES, r"the target is of shape \(N, 2, 1\) and the outputs are \(N, 2\)"),
        (torch.full((4, 2), math.inf), VALUES, "the target holds infinite values, expected numbers, or NaN"),
        ([0.0, 1.0], VALUES, "the target is a list, expected a tensor of numbers"),
        (torch.zeros(4, 2, dtype=torch.complex64), VALUES, "the target is a complex tensor, expected a tensor of"),
    ],
)
def test_a_target_that_cannot_be_values_is_refused(target: Tensor, values: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASK.check(TASK.target_of(target), TASK.arrange(values))


def test_what_is_never_broadcast_is_not_scored_either() -> None:
    with pytest.raises(ValueError, match="expected both as"):
        TASK.scores(Outputs(VALUES), torch.zeros(4, 1))


def test_the_median_is_what_a_model_that_knows_nothing_gives() -> None:
    target = torch.randn(501, 2, generator=torch.Generator().manual_seed(0)).exp()
    target[:50, 1] = NAN
    nothing = TASK.knows_nothing(target)
    assert nothing == pytest.approx(headline(TASK, target.nanmedian(0).values.expand(501, 2), target))
    assert nothing < headline(TASK, target.nanmean(0).expand(501, 2), target)  # the mean is no better
    assert Regression(scale=3.0).knows_nothing(target) == pytest.approx(3 * nothing, rel=1e-6)


def test_what_makes_a_comparison_an_empty_one() -> None:
    target = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))

    def learned_nothing(values: Tensor) -> str | None:
        return TASK.learned_nothing(values, TASK.scores(Outputs(values), target), target)

    assert learned_nothing(0.5 * target) is None
    assert learned_nothing(torch.zeros(500, 1)) == "gives one value for everything"
    assert learned_nothing(target.roll(1)) == "is at chance"


def test_an_ensemble_has_the_average_of_its_members_values() -> None:
    ensemble = TASK.arranged(EnsembleOutputs.of([VALUES, 3 * VALUES], [0.75, 0.25]))
    torch.testing.assert_close(ensemble.logits, 1.5 * VALUES)
    torch.testing.assert_close(ensemble.softened(4.0).logits, 1.5 * VALUES)


# In a training


def data(count: int = 128, flat: bool = False, labelled: bool = True) -> DataLoader:
    """A sum and a difference, of which a network without the second input sees half; or one of them."""
    inputs = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    target = inputs @ torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    target = target[:, 0] if flat else target
    return DataLoader(TensorDataset(inputs, target if labelled else torch.full_like(target, NAN)), batch_size=16)


class Flat(nn.Module):
    """A network whose single value has no dimension of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).squeeze(1)


def teacher(flat: bool = False) -> nn.Module:
    network = Flat() if flat else nn.Linear(2, 2)
    with torch.no_grad():
        linear = network.head if isinstance(network, Flat) else network
        linear.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]])[: len(linear.weight)])
        linear.bias.zero_()
    return network


def module(student: nn.Module | None = None, losses=None, **options) -> DistillationModule:
    losses = losses or {"label_regression": LabelRegression(), "teacher_bounded": TeacherBounded()}
    source = options.pop("teacher", None) or teacher()
    return DistillationModule(student or nn.Linear(2, 2), source, losses, sgd, task=TASK, **options)


def test_a_student_learns_the_values_and_what_is_logged_is_the_tasks() -> None:
    torch.manual_seed(0)
    fit = trainer(max_epochs=25)
    fit.fit(module(), data(), data(64))
    assert fit.logged_metrics["val/mae"] < 0.02
    assert fit.logged_metrics["val/teacher_mae"] < 1e-6
    assert fit.logged_metrics["val/agreement"] > 0.9


@pytest.mark.parametrize("form", ["mse", "l1", "huber"])
def test_unlabelled_samples_teach_what_the_teacher_knows(form: str) -> None:
    torch.manual_seed(0)
    fit = trainer(max_epochs=15)
    losses = {"teacher_regression": TeacherRegression(form)}
    fit.fit(module(losses=losses), data(labelled=False), data(64))
    assert fit.logged_metrics["val/mae"] < 0.3
    assert fit.logged_metrics["val/teacher_mae"] < 1e-6


@pytest.mark.parametrize("flat_student", [True, False])
@pytest.mark.parametrize("flat_teacher", [True, False])
def test_a_single_value_is_learnt_in_either_form(flat_student: bool, flat_teacher: bool) -> None:
    """Were (B,) and (B, 1) broadcast, the best would be the mean, and the error 1.1."""
    torch.manual_seed(0)
    student, source = Flat() if flat_student else nn.Linear(2, 1), teacher(flat=True)
    if not flat_teacher:
        source = source.head
    losses = {"label_regression": LabelRegression(weight=0.5), "teacher_regression": TeacherRegression(weight=0.5)}
    fit = trainer(max_epochs=25)
    fit.fit(module(student, losses, teacher=source), data(flat=True), data(64, flat=True))
    assert fit.logged_metrics["val/mae"] < 0.02
    assert fit.logged_metrics["val/agreement"] > 0.9


@pytest.mark.parametrize("make", [KD, HardLabel, DeiTHard])
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_softmax_is_refused_before_the_first_step_and_what_to_take_is_named(make, outputs: int) -> None:
    """On a single output KD is 0 for ever."""
    one = outputs == 1
    student = module(nn.Linear(2, outputs), {"wrong": make()}, teacher=teacher(flat=one))
    message = "loss 'wrong' reads a softmax over classes, which Regression does not have: take label_regression"
    with pytest.raises(ValueError, match=message):
        trainer().fit(student, data(flat=one))


def test_standardised_values_are_refused_as_they_compare_values_with_each_other() -> None:
    with pytest.raises(ValueError, match="loss 'logits_mse' reads a softmax over classes"):
        trainer().fit(module(losses={"logits_mse": LogitsMSE(standardize=True)}), data())
    trainer(max_steps=1).fit(module(losses={"logits_mse": LogitsMSE()}), data())


def test_another_number_of_values_is_refused_before_the_first_step() -> None:
    losses = {"label_regression": LabelRegression()}
    with pytest.raises(ValueError, match=r"the target is of shape \(N, 1\) and the outputs are \(N, 2\)"):
        trainer().fit(module(losses=losses), data(flat=True))
    with pytest.raises(ValueError, match=r"the target is of shape \(N, 1\) and the outputs are \(N, 2\)"):
        trainer().fit(module(losses={"teacher_regression": TeacherRegression()}), data(flat=True))


def test_a_teacher_that_is_no_better_than_the_median_is_at_chance() -> None:
    blind = teacher()
    torch.nn.init.zeros_(blind.weight)
    with pytest.raises(ValueError, match=r"the teacher is at chance .* mean absolute error .* expected well below"):
        trainer().fit(module(teacher=blind), data())


def test_values_between_0_and_1_are_no_probabilities() -> None:
    """Which a network with a sigmoid at its end gives for shares."""
    inputs = torch.randn(128, 2, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(inputs, torch.sigmoid(inputs)), batch_size=16)
    shares = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
    with torch.no_grad():
        shares[0].weight.copy_(torch.eye(2))
        shares[0].bias.zero_()
    student = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
    losses = {"label_regression": LabelRegression(), "teacher_regression": TeacherRegression()}
    fit = trainer(max_epochs=25)
    fit.fit(module(student, losses, teacher=shares), loader, loader)
    assert fit.logged_metrics["val/mae"] < 0.02
