import importlib.util
from pathlib import Path

import pytest
import torch

from kd_lightning.data import ImageFolder

WITHOUT = importlib.util.find_spec("torchvision") is None
needs_torchvision = pytest.mark.skipif(WITHOUT, reason="torchvision is missing: ImageFolder is tested where it is")


@pytest.mark.skipif(not WITHOUT, reason="torchvision is there")
def test_without_torchvision_it_says_what_to_install(tmp_path: Path):
    with pytest.raises(ImportError, match=r"ImageFolder needs torchvision .*: pip install 'kd-lightning\[vision\]'"):
        ImageFolder(tmp_path)


def write(folder: Path, splits: dict[str, int]) -> Path:
    """Write images of one colour each, that tells the class: red for ant, green for bee."""
    from PIL import Image

    for split, count in splits.items():
        for label, channel in (("ant", 0), ("bee", 1)):
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                colour = [0, 0, 0]
                colour[channel] = 200 + i
                image = Image.new("RGB", (50, 40), tuple(colour))
                image.putpixel((0, 0), (255, 255, 255))
                image.save(folder / split / label / f"{i}.png")
    return folder


def make(folder: Path, **options: object) -> ImageFolder:
    small = {"crop": 16, "resize": 20, "batch_size": 4, "num_workers": 0}
    return ImageFolder(folder, **{**small, **options})


@needs_torchvision
@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_come_with_the_class_of_their_folder(tmp_path: Path, num_workers: int):
    data = make(write(tmp_path, {"train": 5, "val": 2, "test": 3}), num_workers=num_workers, mean=[0] * 3, std=[1] * 3)
    assert data.counts == {"train": 10, "validation": 4, "test": 6}
    assert (data.class_names, data.num_classes, data.input_shape) == (("ant", "bee"), 2, (3, 16, 16))
    for loader, count in ((data.train_dataloader(), 10), (data.val_dataloader(), 4), (data.test_dataloader(), 6)):
        batches = list(loader)
        images, target = (torch.cat(part) for part in zip(*batches, strict=True))
        assert images.shape == (count, 3, 16, 16)
        assert target.dtype == torch.int64
        assert images.mean((2, 3)).argmax(1).tolist() == target.tolist()
        assert 0.7 < images[:, :2].amax() <= 1


@needs_torchvision
def test_without_a_val_folder_some_of_train_are_drawn_by_the_split_seed(tmp_path: Path):
    folder = write(tmp_path, {"train": 20, "test": 3})
    drawn = [
        make(folder, validation=0.2, **seeds).subset("validation").files
        for seeds in ({}, {"seed": 1}, {"split_seed": 1})
    ]
    data = make(folder, validation=0.2)
    assert data.counts == {"train": 32, "validation": 8, "test": 6}
    assert set(data.subset("train").files).isdisjoint(drawn[0])
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


@needs_torchvision
def test_the_augmentation_is_that_of_seed_epoch_and_sample(tmp_path: Path):
    from PIL import Image

    folder = write(tmp_path, {"train": 5, "test": 3})
    for file in (folder / "train").rglob("*.png"):  # otherwise all of its crops are alike
        Image.effect_noise((50, 40), 50).save(file)

    def epoch(number: int, seed: int = 0, batch_size: int = 4, num_workers: int = 0) -> dict:
        data = make(folder, validation=0, seed=seed, batch_size=batch_size, num_workers=num_workers)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        order = [view.sample for view in loader.sampler]
        images = torch.cat([images for images, _ in loader])
        return dict(zip(order, images, strict=True))

    def same(one: dict, other: dict) -> bool:
        return all(torch.equal(one[sample], other[sample]) for sample in range(10))

    before = torch.get_rng_state()
    first = epoch(1)
    assert torch.equal(before, torch.get_rng_state())
    assert same(first, epoch(1, batch_size=3, num_workers=2))
    assert not same(first, epoch(2))
    assert not same(first, epoch(1, seed=1))


@needs_torchvision
def test_evaluation_is_the_centre_of_the_resized_image(tmp_path: Path):
    data = make(write(tmp_path, {"train": 5, "test": 3}))
    one, other = (torch.cat([images for images, _ in data.test_dataloader()]) for _ in range(2))
    assert torch.equal(one, other)
    plain = (torch.tensor([200 / 255, 0, 0]) - torch.tensor(data.mean)) / torch.tensor(data.std)
    torch.testing.assert_close(one[0], plain[:, None, None].expand(3, 16, 16))


@needs_torchvision
def test_what_cannot_be_is_refused_with_the_folder_or_file(tmp_path: Path):
    with pytest.raises(ValueError, match=r"train is missing: expected a folder for each class"):
        make(tmp_path)
    folder = write(tmp_path / "a", {"train": 3})
    with pytest.raises(ValueError, match=r"a lacks test: .*rename it to test"):
        make(folder)
    write(folder, {"test": 2})
    (folder / "test" / "wasp").mkdir()
    with pytest.raises(ValueError, match=r"test has other classes than train: wasp"):
        make(folder)
    (folder / "test" / "wasp").rmdir()
    torn = folder / "test" / "ant" / "0.png"
    torn.write_bytes(torn.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"ant.0\.png is torn or no image"):
        list(make(folder).test_dataloader())
    with pytest.raises(ValueError, match=r"expected up to 6 images, .*: choose a validation share between 0 and 1"):
        make(folder, validation=1.5).setup()


@needs_torchvision
def test_the_fingerprint_changes_with_files_and_transforms(tmp_path: Path):
    folder = write(tmp_path, {"train": 5, "test": 3})
    assert make(folder).sources() == [folder]
    before = make(folder).fingerprint()
    assert before == make(folder, seed=1, batch_size=2, role="teacher").fingerprint()
    assert before != make(folder, crop=12).fingerprint()
    assert before != make(folder, split_seed=1).fingerprint()
    (folder / "test" / "ant" / "0.png").unlink()
    assert before != make(folder).fingerprint()
