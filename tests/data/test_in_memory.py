import torch
from torch.nn.functional import pad

from kd_lightning.data.in_memory import CropAndFlip, InMemory, crop_and_flip
from kd_lightning.data.loaders import View


def images(count: int = 200) -> torch.Tensor:
    return torch.randint(1, 256, (count, 3, 8, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_crop_and_flip_is_slicing_and_mirroring_one_by_one():
    given, random = images(), torch.Generator().manual_seed(1)
    corners, mirror = torch.randint(5, (200, 2), generator=random), torch.rand(200, generator=random) < 0.5
    expected = []
    for image, (row, column), mirrored in zip(given, corners.tolist(), mirror.tolist(), strict=True):
        cut = pad(image, (2, 2, 2, 2))[:, row : row + 8, column : column + 6]
        expected.append(cut.flip(-1) if mirrored else cut)
    assert torch.equal(crop_and_flip(given, 2, corners, mirror), torch.stack(expected))


def test_all_places_and_both_directions_are_drawn_equally_often():
    augment = CropAndFlip(20_000, seed=0, padding=1)
    augment(images(1), [0], 0)
    assert augment._drawn is not None
    _, corners, mirror = augment._drawn
    shares = torch.bincount(corners[:, 0] * 3 + corners[:, 1], minlength=9) / 20_000
    assert torch.allclose(shares, torch.full((9,), 1 / 9), atol=0.01)
    assert abs(mirror.float().mean() - 0.5) < 0.02


def test_an_epoch_and_a_seed_have_augmentations_of_their_own():
    def view(seed: int, epoch: int) -> torch.Tensor:
        return CropAndFlip(200, seed)(images(), range(200), epoch)

    assert torch.equal(view(0, 1), view(0, 1))
    for other in (view(0, 2), view(1, 1), view(1, 0)):
        assert (view(0, 1) != other).flatten(1).any(1).float().mean() > 0.9


def test_images_are_floats_of_mean_0_and_deviation_1():
    given = images()
    mean, std = ((given / 255.0).mean((0, 2, 3)).tolist(), (given / 255.0).std((0, 2, 3)).tolist())
    dataset = InMemory(given, torch.zeros(200, dtype=torch.uint8), mean, std)
    batch, target = dataset.__getitems__(list(range(200)))
    assert batch.dtype == torch.float32
    assert target.dtype == torch.int64
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
    assert torch.equal(dataset[7][0], batch[7])
    assert torch.equal(dataset[View(7, 3)][0], batch[7])


def test_whole_numbers_become_int64_and_values_stay_values():
    labels = InMemory(images(), torch.zeros(200, 3, dtype=torch.bool), (0.5,), (0.5,))
    values = InMemory(images(), torch.rand(200, 3, dtype=torch.float64), (0.5,), (0.5,))
    assert (labels.target.dtype, values.target.dtype) == (torch.int64, torch.float32)
    assert labels.without_labels().target.unique().tolist() == [-100]
    assert values.without_labels().target.isnan().all()
    assert not values.target.isnan().any()


def test_two_sets_together_have_the_samples_of_both_and_no_augmentation():
    one, other = (
        InMemory(images(count), torch.arange(count), (0.5,), (0.25,), CropAndFlip(count, 0)) for count in (5, 3)
    )
    both = one.joined(other)
    assert both.target.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert torch.equal(both[View(6, 2)][0], other[1][0])
    assert one.augment is not None
