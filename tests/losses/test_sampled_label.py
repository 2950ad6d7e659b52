"""Labels drawn from the teacher: their distribution, and that each place keeps its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.draws import hashed_uniform
from kd_lightning.losses import SampledLabel, kd, sampled_label
from kd_lightning.outputs import Outputs, Samples, TopK

TEACHER = torch.tensor([0.1, 0.2, 0.7]).log()


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


def test_labels_are_drawn_as_the_teacher_has_them() -> None:
    """100,000 draws: the standard error of a share is at most 0.0015."""
    uniform = hashed_uniform(0, torch.arange(1000), 100)
    student = torch.zeros(100_000, 3, requires_grad=True)
    gradient = gradient_of(sampled_label(student, TEACHER.expand(100_000, 3), uniform), student)
    shares = 1 / 3 - gradient.sum(0)  # softmax minus the share of each label
    torch.testing.assert_close(shares, TEACHER.exp(), atol=0.006, rtol=0)


def test_over_many_draws_its_gradient_is_that_of_kd() -> None:
    student = torch.randn(1, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    many = student.expand(200_000, 3)
    uniform = hashed_uniform(3, torch.arange(200_000), 1)
    sampled = gradient_of(sampled_label(many, TEACHER.expand(200_000, 3), uniform), student)
    torch.testing.assert_close(
        sampled, gradient_of(kd(student, TEACHER[None], temperature=1.0), student), atol=5e-3, rtol=0
    )


def test_numbers_are_uniform_and_neighbours_have_nothing_to_do_with_each_other() -> None:
    x = hashed_uniform(0, torch.arange(1000), 128).double()
    assert x.min() >= 0
    assert x.max() < 1
    assert (torch.histc(x, 20) / x.numel() - 0.05).abs().max() < 0.003
    for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x, hashed_uniform(1, torch.arange(1000), 128).double())):
        assert ((a - 0.5) * (b - 0.5)).mean().abs() < 12 * 0.003 / 12


def test_a_place_keeps_its_label_in_whatever_batch_it_comes() -> None:
    """Of 60 samples in one batch, or in another order in several: the same sum of losses."""
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(60, 7, 5, generator=random) for _ in range(2))

    def total(ids: Tensor) -> Tensor:
        loss = SampledLabel()(Outputs(student[ids], samples=Samples(ids, 60)), Outputs(teacher[ids]), None)
        return loss * len(ids)

    whole = total(torch.arange(60))
    parts = torch.randperm(60, generator=random).split(17)
    torch.testing.assert_close(sum(map(total, parts)), whole)
    other = SampledLabel(seed=1)(Outputs(student, samples=Samples(torch.arange(60), 60)), Outputs(teacher), None) * 60
    assert abs(other - whole) > 0.1


def test_places_that_do_not_count_have_no_label() -> None:
    logits, target = torch.randn(2, 3, 4), torch.tensor([[0, -100, 1], [-100, -100, -100]])
    uniform = torch.tensor([[0.0, 0.5, 0.0], [0.5, 0.5, 0.5]])  # the first class of what counts
    found = sampled_label(logits, torch.zeros(2, 3, 4), uniform, target)
    torch.testing.assert_close(found, F.cross_entropy(logits[0, [0, 2]], torch.tensor([0, 0])))
    none = sampled_label(logits.requires_grad_(), torch.zeros(2, 3, 4), uniform, torch.full((2, 3), -100))
    assert none == 0
    assert gradient_of(none, logits).abs().sum() == 0


def test_of_the_best_classes_alone_one_is_drawn_by_its_probability() -> None:
    """As from logits in which all others have none."""
    student, places = torch.randn(64, 5, 6, generator=torch.Generator().manual_seed(0)), 5
    samples = Samples(torch.arange(64), 64)
    logits = torch.randn(64, places, 6, generator=torch.Generator().manual_seed(1))
    log_probs, indices = logits.log_softmax(-1).topk(3)
    known = torch.full_like(logits, -1e4).scatter(-1, indices, logits.gather(-1, indices))
    target = torch.zeros(64, places, dtype=torch.long).masked_fill(torch.arange(places) == 2, -100)
    loss = SampledLabel()
    order = indices.argsort(-1)
    best = TopK.of(indices.gather(-1, order), log_probs.gather(-1, order))
    found = loss(Outputs(student, samples=samples), best, target)
    torch.testing.assert_close(found, loss(Outputs(student, samples=samples), Outputs(known), target))
