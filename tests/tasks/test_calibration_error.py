import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from kd_lightning.outputs import Outputs, TopK
from kd_lightning.tasks import Classification, LanguageModelling, Regression, Segmentation, TokenClassification
from kd_lightning.tasks.calibration_error import CalibrationError

GENERATOR = torch.Generator().manual_seed(3)
LOGITS = 3 * torch.randn(200, 7, generator=GENERATOR)
LABELS = torch.randint(7, (200,), generator=GENERATOR)


def error(task: Classification, *batches: tuple[Tensor, Tensor]) -> float:
    metric = CalibrationError(task)
    for logits, target in batches:
        metric.update(Outputs(logits), target)
    return float(metric.compute())


def test_it_is_torchmetrics_over_all_batches_and_labelled_samples_alone() -> None:
    expected = multiclass_calibration_error(LOGITS, LABELS, num_classes=7, n_bins=15).item()
    without = torch.full((5,), -100)
    found = error(Classification(), (LOGITS[:150], LABELS[:150]), (LOGITS[:5], without), (LOGITS[150:], LABELS[150:]))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found > 0.3  # labels are at random


@pytest.mark.parametrize(
    ("task", "shape"), [(Segmentation(), (5, 7, 4, 10)), (TokenClassification(), (10, 20, 7))], ids=["pixels", "tokens"]
)
def test_each_pixel_and_token_counts(task: Classification, shape: tuple[int, ...]) -> None:
    pixels = len(shape) == 4
    logits = LOGITS.view(5, 4, 10, 7).movedim(-1, 1) if pixels else LOGITS.view(shape)
    labels = LABELS.view(5, 4, 10) if pixels else LABELS.view(10, 20)
    assert error(task, (logits, labels)) == pytest.approx(error(Classification(), (LOGITS, LABELS)), rel=1e-5)


def test_of_the_best_classes_alone_it_is_the_same() -> None:
    log_probs, indices = LOGITS.log_softmax(-1).topk(2)
    metric = CalibrationError(Classification())
    metric.update(TopK(indices, log_probs, {}), LABELS)
    assert float(metric.compute()) == pytest.approx(error(Classification(), (LOGITS, LABELS)), rel=1e-5)


def test_who_is_sure_and_right_has_none_and_answers_without_probabilities_have_no_such_figure() -> None:
    assert error(Classification(), (1e4 * torch.eye(7), torch.arange(7))) == 0
    assert "ece" in Classification().metrics()
    assert "ece" not in Regression().metrics()


def test_the_divergence_from_the_teacher() -> None:
    other = Outputs(torch.randn(200, 7, generator=GENERATOR))
    p, q = other.logits.double().softmax(-1), LOGITS.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).float()
    found = Classification().divergence(Outputs(LOGITS), other, LABELS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    target = LABELS.view(10, 20).clone()
    target[:, 15:] = -100
    of_tokens = [Outputs(x.logits.view(10, 20, 7)) for x in (Outputs(LOGITS), other)]
    found = TokenClassification().divergence(*of_tokens, target)
    torch.testing.assert_close(found, expected.view(10, 20)[:, :15].flatten(), rtol=1e-4, atol=1e-6)
    in_bits = LanguageModelling().divergence(*of_tokens, target)
    torch.testing.assert_close(in_bits, found / torch.tensor(2.0).log(), rtol=1e-4, atol=1e-6)
    assert Classification().divergence(Outputs(LOGITS), Outputs(LOGITS[:, :3]), LABELS) is None
    assert Regression().divergence(Outputs(LOGITS), other, LABELS) is None
