"""A stored row is a known number of bytes, and its softmax nearly the teacher's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_lightning.stored_outputs.formats import find_format, kl_errors

CLASSES = 1000


def logits(rows: int = 32, classes: int = CLASSES) -> torch.Tensor:
    """As a trained classifier's: spread of 2, and 8 more for one class."""
    random = torch.Generator().manual_seed(0)
    label = torch.nn.functional.one_hot(torch.randint(classes, (rows,), generator=random), classes)
    return 2 * torch.randn(rows, classes, generator=random) + 8 * label


@pytest.mark.parametrize(
    ("name", "size", "at_1", "at_4"),
    [("float16", 2000, 5e-6, 1e-6), ("uint8", 1008, 1e-4, 1e-4), ("top10", 44, 1.0, 1.0)],
)
def test_bytes_and_error(name: str, size: int, at_1: float, at_4: float) -> None:
    code, x = find_format(name), logits()
    rows = code.encode(x)
    assert rows[0].nbytes == size
    errors = kl_errors(x, code.dense(rows, CLASSES))
    assert errors[0].mean() < at_1
    assert errors[1].mean() < at_4


def test_the_error_is_the_kl_divergence() -> None:
    x, y = logits(4, 5), logits(4, 5).flip(0)
    for temperature, error in zip((1, 4), kl_errors(x, y), strict=True):
        p, q = (z.double().div(temperature).softmax(-1) for z in (x, y))
        torch.testing.assert_close(error, (p * (p / q).log()).sum(-1))


@given(st.integers(2, 40), st.floats(-1e4, 1e4), st.floats(0, 1e4), st.integers(0, 99))
def test_uint8_takes_the_nearest_of_its_levels(classes: int, centre: float, spread: float, seed: int) -> None:
    x = centre + spread * torch.randn(3, classes, generator=torch.Generator().manual_seed(seed))
    code = find_format("uint8")
    highest, lowest = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    levels = highest - (highest - lowest) * (torch.arange(256) / 255) ** 2
    nearest = (x[..., None] - levels[:, None]).abs().amin(-1)
    error = (code.dense(code.encode(x), classes) - x).abs()
    assert bool((error <= nearest + 1e-6 * x.abs().amax(-1, keepdim=True) + 1e-6).all())


def test_rows_of_equal_logits_stay_equal() -> None:
    code = find_format("uint8")
    assert torch.equal(code.dense(code.encode(torch.full((2, 7), 3.25)), 7), torch.full((2, 7), 3.25))


@pytest.mark.parametrize(("classes", "bits"), [(65_537, 17), (128_256, 17), (151_936, 18), (262_144, 18)])
def test_of_many_classes_an_index_takes_no_more_bits_than_it_needs(classes: int, bits: int) -> None:
    code = find_format("top20")
    x = torch.zeros(2, 3, classes)
    best = torch.randint(classes, (2, 3, 20), generator=torch.Generator().manual_seed(0))
    best[0, 0, :2] = torch.tensor([0, classes - 1])
    x.scatter_(-1, best, 10 + torch.arange(20).flip(0).expand_as(best).float())
    rows = code.encode(x)
    assert rows.shape == (2, 3, code.width(classes))
    assert code.width(classes) == math.ceil(20 * bits / 8) + 44 <= 100
    found = code.decode(rows, classes)["indices"]
    for drawn, indices in zip(best.flatten(0, 1).tolist(), found.flatten(0, 1).tolist(), strict=True):
        unique = list(dict.fromkeys(reversed(drawn)))[::-1]  # of those drawn twice the last was written
        assert set(indices[: len(unique)]) == set(unique)


@pytest.mark.parametrize("classes", [20, 70_000])
def test_a_single_row_is_read(classes: int) -> None:
    code, x = find_format("top3"), logits(2, classes)
    rows = code.encode(x)
    assert torch.equal(code.dense(rows[:1], classes), code.dense(rows, classes)[:1])


@pytest.mark.parametrize("classes", [20, 70_000])
def test_the_best_classes_and_what_they_leave(classes: int) -> None:
    x = logits(3, classes)
    x[0] += 12 * torch.nn.functional.one_hot(torch.tensor(7), classes)  # nearly no tail
    code = find_format("top5")
    found = code.decode(code.encode(x), classes)
    log_probs, indices = x.log_softmax(-1).topk(5)
    assert torch.equal(found["indices"], indices)
    torch.testing.assert_close(found["log_probs"], log_probs, rtol=1e-3, atol=1e-3)
    exact_tail = x.double().softmax(-1).scatter(-1, indices, 0.0).sum(-1)
    torch.testing.assert_close(1 - found["log_probs"].double().exp().sum(-1), exact_tail, rtol=1e-3, atol=1e-6)
    dense = code.dense(code.encode(x), classes)
    torch.testing.assert_close(dense.exp().sum(-1), torch.ones(3))
    assert torch.equal(dense.topk(5).indices, indices)


@pytest.mark.parametrize("name", ["float16", "uint8", "top3"])
def test_tokens_and_pixels(name: str) -> None:
    code, x = find_format(name), logits(24, 9)
    whole = code.dense(code.encode(x.reshape(2, 3, 4, 9)), 9)
    torch.testing.assert_close(whole.reshape(24, 9), code.dense(code.encode(x), 9))


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("spread", [1, 2, 3, 5])
@pytest.mark.parametrize("label", [0, 15])
def test_the_error_of_uint8_is_small_whatever_the_spread(classes: int, spread: float, label: float) -> None:
    random = torch.Generator().manual_seed(0)
    x = spread * torch.randn(512, classes, generator=random)
    x += label * torch.nn.functional.one_hot(torch.randint(classes, (512,), generator=random), classes)
    code = find_format("uint8")
    at_1, at_4 = kl_errors(x, code.dense(code.encode(x), classes))
    assert at_1.mean() < 1e-4
    assert at_4.mean() < 1e-4


def test_the_error_of_uint8_is_the_documented_one() -> None:
    x = 3 * torch.randn(256, CLASSES, generator=torch.Generator().manual_seed(0))
    code = find_format("uint8")
    spread, p = x.amax(-1) - x.amin(-1), x.softmax(-1)
    estimate = spread * (p * (x.amax(-1, keepdim=True) - x)).sum(-1) / (6 * 255**2)
    entropy = -(p * p.log()).sum(-1)
    error = kl_errors(x, code.dense(code.encode(x), CLASSES))[0].mean().float()
    torch.testing.assert_close(error, estimate.mean(), rtol=0.05, atol=0)
    assert error < (spread * entropy / 390_150).mean()


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected format float16, uint8 or top<k> such as top10, got 'int4'"):
        find_format("int4")


def test_more_best_classes_than_classes() -> None:
    with pytest.raises(ValueError, match="expected top1 to top3 for 4 classes, got top4"):
        find_format("top4").width(4)


def test_float16_says_when_logits_are_too_large() -> None:
    with pytest.raises(ValueError, match=r"up to 65,504, got a teacher's 70000: take format='uint8'"):
        find_format("float16").encode(torch.tensor([[7e4, 0.0]]))


@pytest.mark.parametrize("classes", [8, 9])
def test_the_bytes_are_those_of_the_documented_layout(classes: int) -> None:
    x = logits(4, classes)
    rows = find_format("uint8").encode(x)
    numbers = {8: 8, 9: 12}[classes]
    highest, scale = (rows[:, numbers + i :][:, :4].copy().view("<f4").astype(float) for i in (0, 4))
    codes = rows[:, :classes].astype(int)
    assert rows.shape[1] == numbers + 8
    assert np.allclose(highest - (scale * codes) ** 2, x, atol=255.5 * scale.max() ** 2)
    assert (codes.min(-1) == 0).all()
    assert (codes.max(-1) == 255).all()
