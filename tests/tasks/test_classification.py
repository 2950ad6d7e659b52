import pytest
import torch

from kd_lightning.tasks import Classification

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


@pytest.mark.parametrize(("batch", "got"), [((X, Y, X), "tuple of 3"), (3, "int"), ((), "tuple of 0")])
def test_other_batches_are_refused(batch, got: str) -> None:
    with pytest.raises(TypeError, match=rf"expected a batch \(input, target\).*got a {got}: pass task="):
        Classification().read(batch)


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
