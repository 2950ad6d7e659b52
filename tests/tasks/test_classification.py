import pytest
import torch

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
    if read.teacher.top_k is None:
        assert read.teacher.logits is MASK
        assert all(feature is X for feature in read.teacher.features.values())
    else:
        assert torch.equal(read.teacher.top_k.indices, TOP["indices"])
        assert read.teacher.top_k.log_probs is TOP["log_probs"]
    assert (read.samples is not None) == isinstance(batch, Identified)


def test_half_of_the_best_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"by 'indices' and 'log_probs', got \['indices'\]"):
        Classification().read((X, Y, {"indices": TOP["indices"]}))


def test_only_labelled_samples_are_scored() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [9.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert Classification().correct(logits, Y).tolist() == [True, False]
    assert Classification().correct(logits, torch.full((3,), -100)).tolist() == []


def test_mixed_labels_count_as_their_largest_share() -> None:
    target = torch.tensor([[0.2, 0.8, 0.0], [0.6, 0.4, 0.0]])
    assert Classification().labels(target).tolist() == [1, 0]
    assert Classification().correct(torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), target).tolist() == [True, False]


def test_every_token_is_scored() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1], [2, 2]]), 3).float()
    assert Classification().correct(logits, torch.tensor([[0, 2], [-100, 2]])).tolist() == [True, False, True]
