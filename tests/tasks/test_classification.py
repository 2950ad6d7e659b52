import pytest
import torch
from torch import Tensor

from kd_lightning.outputs import Outputs, TopK
from kd_lightning.tasks import Classification, Identified, Taught

X, Y, MASK = torch.randn(3, 4), torch.tensor([2, -100, 0]), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("batch", "args", "kwargs", "target"),
    [
        ((X, Y), (X,), {}, Y),
        ([X, Y], (X,), {}, Y),
        ((X,), (X,), {}, None),
        (X, (X,), {}, None),
        ({"x": X, "mask": MASK, "labels": Y}, (), {"x": X, "mask": MASK}, Y),
        ({"x": X, "label": Y}, (), {"x": X}, Y),
        ({"x": X, "target": Y}, (), {"x": X}, Y),
        ({"x": X}, (), {"x": X}, None),
        (({"x": X, "mask": MASK}, Y), (), {"x": X, "mask": MASK}, Y),
    ],
)
def test_what_the_networks_get_and_the_target(batch, args, kwargs, target) -> None:
    read = Classification().read(batch)
    assert all(a is b for a, b in zip(read.args, args, strict=True))
    assert read.kwargs.keys() == kwargs.keys()
    assert all(read.kwargs[name] is value for name, value in kwargs.items())
    assert read.target is target


@pytest.mark.parametrize(
    ("batch", "got"), [((X, Y, Y), "tuple of 3"), ((X, Y, Y.float()), "tuple of 3"), (3, "int"), ((), "tuple of 0")]
)
def test_other_batches_are_refused(batch, got: str) -> None:
    with pytest.raises(TypeError, match=rf"expected a batch \(input, target\).*got a {got}: pass task="):
        Classification().read(batch)


TOP = {"indices": torch.tensor([[0, 1]] * 3), "log_probs": torch.tensor([[0.5, 0.25]] * 3).log()}


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        ((X, Y, MASK), (X,), {}),
        ([X, Y, {"logits": MASK, "features.a": X}], (X,), {}),
        ({"x": X, "labels": Y, "teacher_logits": MASK, "teacher_features.a": X}, (), {"x": X}),
        (Taught((X, Y), {"logits": MASK, "features.a": X}), (X,), {}),
        (Identified(({"x": X}, Y, {"logits": MASK}), torch.arange(3), torch.tensor([9] * 3)), (), {"x": X}),
        ((X, Y, TOP), (X,), {}),
        ({"x": X, "labels": Y, "teacher_indices": TOP["indices"], "teacher_log_probs": TOP["log_probs"]}, (), {"x": X}),
    ],
)
def test_a_teachers_outputs_come_along_and_the_networks_do_not_get_them(batch, args, kwargs) -> None:
    read = Classification().read(batch)
    assert len(read.args) == len(args)
    assert all(a is b for a, b in zip(read.args, args, strict=True))
    assert {name: id(value) for name, value in read.kwargs.items()} == {name: id(x) for name, x in kwargs.items()}
    assert read.target is Y
    if isinstance(read.teacher, TopK):
        assert torch.equal(read.teacher.indices, TOP["indices"])
        assert read.teacher.log_probs is TOP["log_probs"]
    else:
        assert read.teacher.logits is MASK
        assert all(feature is X for feature in read.teacher.features.values())
    assert (read.samples is not None) == isinstance(batch, Identified)


def test_half_of_the_best_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"by 'indices' and 'log_probs', got \['indices'\]"):
        Classification().read((X, Y, {"indices": TOP["indices"]}))


def scores(logits: Tensor, target: Tensor) -> list[float]:
    return Classification().scores(Outputs(logits), target).tolist()


def test_only_labelled_samples_are_scored() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [9.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert scores(logits, Y) == [1, 0]
    assert scores(logits, torch.full((3,), -100)) == []
    assert Classification().has_label(Y).tolist() == [True, False, True]


def test_mixed_labels_count_as_their_largest_share() -> None:
    target = torch.tensor([[0.2, 0.8, 0.0], [0.6, 0.4, 0.0]])
    assert Classification().labels(target).tolist() == [1, 0]
    assert scores(torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), target) == [1, 0]
    assert Classification().has_label(target).tolist() == [True, True]


def test_every_token_is_scored() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1], [2, 2]]), 3).float()
    target = torch.tensor([[0, 2], [-100, 2]])
    assert scores(logits, target) == [1, 0, 1]
    assert Classification().has_label(torch.tensor([[0, -100], [-100, -100]])).tolist() == [True, False]


def test_classes_in_the_second_dimension_are_put_last_where_that_is_named() -> None:
    logits, target = torch.randn(2, 5, 3), torch.tensor([[0, 4, 1], [2, 2, 3]])
    task = Classification(class_dim=1)
    assert torch.equal(task.arrange(logits), logits.mT)
    assert task.arrange(logits[:, :, 0]).shape == (2, 5)
    expected = (logits.argmax(1) == target).flatten().float().tolist()
    assert task.scores(task.arranged(Outputs(logits)), target).tolist() == expected
    task.check(target, task.arrange(logits))


def test_classes_whose_dimension_labels_do_not_tell_are_refused() -> None:
    with pytest.raises(ValueError, match=r"where the classes are the second dimension.*Classification\(class_dim=1\)"):
        Classification().check(torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 5, 3))
    square, target = torch.randn(2, 3, 3), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"have labels \(N, 3\), which do not tell the dimension of the classes"):
        Classification().check(target, square)
    Classification(class_dim=2).check(target, square)
    with pytest.raises(ValueError, match="have no labels, which do not tell the dimension"):
        Classification().check_dimensions(torch.randn(2, 5, 3), None)
    with pytest.raises(ValueError, match=r"pass task=Classification\(class_dim=2\)"):
        Classification().check_dimensions(torch.randn(2, 5, 3), torch.zeros(2, 3, dtype=torch.long))
    Classification().check_dimensions(torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="expected class_dim to be 1"):
        Classification(class_dim=0)


def test_what_makes_a_comparison_an_empty_one() -> None:
    task, target = Classification(), torch.arange(200) % 4
    right = torch.ones(200)
    assert task.learned_nothing(target, right, target) is None
    assert task.learned_nothing(torch.zeros_like(target), (target == 0).float(), target) == "predicts a single class"
    wrong = target.roll(1) * (torch.arange(200) % 3 > 0)
    assert task.learned_nothing(wrong, (wrong == target).float(), target) == "is at chance"
    few = slice(0, 99)
    assert task.learned_nothing(wrong[few], (wrong == target)[few].float(), target[few]) is None
    one = torch.ones_like(target)
    assert task.learned_nothing(one, right, one) is None  # one answer is the right one


def test_the_recall_of_a_class_is_a_part() -> None:
    target = torch.tensor([1, 2, -100, 1])
    found = Classification(recall_classes=[1]).parts(target, ["shirt", "boot", "bag"])
    assert {name: mask.tolist() for name, mask in found.items()} == {"recall on 'boot'": [True, False, True]}
    with pytest.raises(ValueError, match="no test sample has class 0"):
        Classification(recall_classes=[0]).parts(target)


def test_the_metric_is_the_headline_of_all_batches() -> None:
    logits, target = torch.randn(9, 3), torch.tensor([0, 1, 2, -100, 0, 1, 2, 0, -100])
    metric = Classification().metrics()
    for part in (slice(0, 4), slice(4, 9)):
        metric.update(Outputs(logits[part]), target[part])
    right = (logits.argmax(1) == target)[target != -100].float().mean()
    assert metric.compute()["acc"].item() == pytest.approx(right.item())
