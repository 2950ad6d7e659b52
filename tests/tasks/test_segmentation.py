import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule, Outputs
from kd_lightning.losses import CWD, DIST, KD, DeiTHard, HardLabel
from kd_lightning.outputs import TopK
from kd_lightning.tasks import Segmentation
from tests.tiny import sgd, trainer

TASK = Segmentation()


def random(images: int = 6, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, 5, 7, generator=generator)
    target = torch.randint(classes - 1, (images, 5, 7), generator=generator)  # the last class is in no target
    target[torch.rand(target.shape, generator=generator) < 0.2] = -100
    return logits, target


def miou_by_loops(logits: Tensor, target: Tensor) -> float:
    answers, values = logits.argmax(1), []
    for c in range(logits.shape[1]):
        intersection = union = 0
        for a, y in zip(answers.flatten().tolist(), target.flatten().tolist(), strict=True):
            if y != -100:
                intersection, union = intersection + (a == c == y), union + (c in (a, y))
        if union:
            values.append(intersection / union)
    return sum(values) / len(values)


def headline(logits: Tensor, target: Tensor) -> float:
    return TASK.headline.value(TASK.scores(Outputs(logits), target).numpy())


@pytest.mark.parametrize("seed", range(3))
def test_the_headline_is_the_mean_of_the_classes_intersection_over_union(seed: int) -> None:
    logits, target = random(seed=seed)
    assert headline(logits, target) == pytest.approx(miou_by_loops(logits, target), rel=1e-6)
    metric = TASK.metrics()
    for part in (slice(0, 4), slice(4, 6)):
        metric.update(Outputs(logits[part]), target[part])
    assert metric.compute()["miou"].item() == pytest.approx(miou_by_loops(logits, target), rel=1e-6)


def test_counts_are_those_of_each_image() -> None:
    logits, target = random()
    scores = TASK.scores(Outputs(logits), target)
    assert scores.shape == (6, 4, 2)
    for i in range(6):
        assert torch.equal(scores[i], TASK.scores(Outputs(logits[i : i + 1]), target[i : i + 1])[0])


def test_images_without_a_labelled_pixel_are_not_scored() -> None:
    logits, target = random()
    target[1] = -100
    assert TASK.has_label(target).tolist() == [True, False, True, True, True, True]
    scored = TASK.scores(Outputs(logits), target)
    assert torch.equal(scored, TASK.scores(Outputs(logits[target.ne(-100).flatten(1).any(1)]), target[[0, 2, 3, 4, 5]]))


def test_a_class_that_is_neither_there_nor_answered_is_left_out() -> None:
    logits, target = torch.zeros(1, 4, 5, 7), torch.zeros(1, 5, 7, dtype=torch.long)
    logits[:, 0] = 1
    assert headline(logits, target) == 1
    logits[:, 3, 0, 0] = 2  # one of 35 pixels is said to be of a class that is not there
    assert headline(logits, target) == pytest.approx(34 / 35 / 2)


@pytest.mark.parametrize("ignored", [255, -1, 0])
def test_pixels_with_the_ignore_index_have_no_label(ignored: int) -> None:
    _, target = random()
    if ignored == 0:
        target += 1
        target[target < 0] = -100
    marked = target.masked_fill(target == -100, ignored)
    stored = marked.to(torch.uint8) if ignored >= 0 else marked
    assert torch.equal(Segmentation(ignore_index=ignored).target_of(stored), target)


def test_the_ignore_index_that_nobody_named_is_refused_with_its_name() -> None:
    logits, target = random()
    with pytest.raises(ValueError, match=r"label 255 is out of range, .* ignore_index=-100 says which pixels"):
        TASK.check(target.masked_fill(target == -100, 255), logits)


def test_answers_are_maps_of_bytes_and_agreement_is_the_share_of_an_images_pixels() -> None:
    logits, _ = random()
    answers = TASK.answers(Outputs(logits))
    assert answers.dtype == torch.uint8
    assert torch.equal(answers.long(), logits.argmax(1))
    assert TASK.answers(Outputs(torch.zeros(1, 300, 2, 2).index_fill_(1, torch.tensor(299), 1.0))).max() == 299
    other = answers.clone()
    other[0, 0, 0] = 9
    other[1] += 1
    assert TASK.agreement(answers, other).tolist() == pytest.approx([34 / 35, 0, 1, 1, 1, 1])


def test_the_most_frequent_class_is_what_a_model_that_knows_nothing_gives() -> None:
    _, target = random(60)
    constant = []
    for c in range(3):
        logits = torch.zeros(60, 4, 5, 7)
        logits[:, c] = 1
        constant.append(headline(logits, target))
    assert TASK.knows_nothing(target) == pytest.approx(max(constant))
    assert TASK.knows_nothing(torch.zeros(4, 5, 7, dtype=torch.long)) is None


def test_what_makes_a_comparison_an_empty_one() -> None:
    logits, target = random(120)

    def learned_nothing(logits: Tensor) -> str | None:
        return TASK.learned_nothing(TASK.answers(Outputs(logits)), TASK.scores(Outputs(logits), target), target)

    right = nn.functional.one_hot(target.clamp_min(0), 4).movedim(-1, 1).float()
    assert learned_nothing(right) is None
    background = torch.zeros_like(logits)
    background[:, 0] = 1
    assert learned_nothing(background) == "predicts a single class"
    assert learned_nothing(right.roll(1, dims=1)) == "is at chance"


def test_the_best_classes_alone_are_scored_like_logits() -> None:
    logits, target = random()
    best = logits.movedim(1, -1).log_softmax(-1).topk(2)
    known = TopK.of(best.indices, best.values)
    assert torch.equal(TASK.answers(known), TASK.answers(Outputs(logits)))
    assert TASK.headline.value(TASK.scores(known, target)) == pytest.approx(headline(logits, target))


@pytest.mark.parametrize(
    ("target", "logits", "message"),
    [
        ((6, 1, 5, 7), (6, 4, 5, 7), r"expected a class for each pixel of logits .*call target\.squeeze\(1\)"),
        ((6, 20, 28), (6, 4, 5, 7), r"expected a class for each pixel .*\(N, 5, 7\): give maps of the logits' size"),
        ((6,), (6, 4), r"the logits are of shape \(6, 4\), expected .*\(N, C, H, W\): one class for each image"),
    ],
)
def test_maps_of_another_size_are_refused(target: tuple, logits: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASK.check(torch.zeros(target, dtype=torch.long), torch.zeros(logits))


# In a training


def data(count: int = 64, ignored: int = -100) -> DataLoader:
    """Pixels whose class is that of the largest channel; the first row of each map has no label."""
    images = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    target = images.argmax(1)
    target[:, 0] = ignored
    return DataLoader(TensorDataset(images, target), batch_size=8)


def teacher() -> nn.Conv2d:
    network = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        network.weight.copy_(4 * torch.eye(3)[:, :, None, None])
        network.bias.zero_()
    return network


def module(losses, task: Segmentation = TASK) -> DistillationModule:
    return DistillationModule(nn.Conv2d(3, 3, 1), teacher(), losses, sgd, task=task)


@pytest.mark.parametrize("make", [KD, DeiTHard, DIST, CWD])
def test_a_student_learns_the_maps_with_losses_on_dense_logits(make) -> None:
    torch.manual_seed(0)
    fit = trainer(max_epochs=10)
    fit.fit(module({"hard_label": HardLabel(), "loss": make()}), data(), data(16))
    assert fit.logged_metrics["val/miou"] > 0.9
    assert fit.logged_metrics["val/teacher_miou"] == 1
    assert fit.logged_metrics["val/agreement"] > 0.9


def test_ignored_pixels_are_no_class() -> None:
    torch.manual_seed(0)
    fit = trainer(max_epochs=10)
    fit.fit(module({"hard_label": HardLabel()}, Segmentation(ignore_index=255)), data(ignored=255), data(16, 255))
    assert fit.logged_metrics["val/miou"] > 0.9
    with pytest.raises(ValueError, match="label 255 is out of range"):
        trainer().fit(module({"hard_label": HardLabel()}), data(ignored=255))


def test_the_class_is_read_over_channels_and_not_over_the_width() -> None:
    """As it was when predictions were the argmax of the last dimension, here as large as there are classes."""
    images = torch.randn(8, 3, 6, 3, generator=torch.Generator().manual_seed(0))
    outputs = Outputs(teacher()(images).detach())
    assert TASK.answers(outputs).shape == (8, 6, 3)
    assert np.array_equal(TASK.answers(outputs).numpy(), images.argmax(1).numpy())
