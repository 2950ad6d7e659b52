from itertools import combinations

import numpy as np
import pytest
import torch

from kd_lightning.data import FashionItems
from kd_lightning.data.fashion_items import compose
from kd_lightning.data.fashion_mnist_files import read_packaged

ITEMS = np.stack([np.full((28, 28), 10 * (i + 1), np.uint8) for i in range(10)])
"""An item of each kind, of one grey each."""


def test_the_target_says_which_items_are_there():
    images, target = compose(ITEMS, np.arange(10), 500, np.random.default_rng(0))
    assert set(target.sum(1).tolist()) <= {1, 2, 3, 4}
    for image, labels in zip(images, target, strict=True):
        seen = {int(grey) // 10 - 1 for grey in np.unique(image) if grey}
        assert seen <= set(np.flatnonzero(labels))  # a dark item may lie behind brighter ones, by two pixels
        assert len(seen) == labels.sum()


def test_every_number_of_items_and_every_kind_is_there_about_as_often():
    distinct = np.arange(1000)
    items = np.repeat(np.full((1, 28, 28), 200, np.uint8), 1000, 0)
    images, _ = compose(items, distinct % 10, 4000, np.random.default_rng(0))
    quarters = (images.reshape(-1, 2, 14, 2, 14).transpose(0, 1, 3, 2, 4)[..., 6:8, 6:8] > 0).all((3, 4)).sum((1, 2))
    assert np.bincount(quarters, minlength=5)[1:].tolist() == pytest.approx([1000] * 4, rel=0.1)
    _, target = compose(ITEMS, np.arange(10), 4000, np.random.default_rng(0))
    assert target.mean(0) == pytest.approx(np.full(10, target.mean()), rel=0.1)


def test_an_item_leaves_its_quarter_by_two_pixels_at_most_and_stays_within_the_image():
    white = np.full((1, 28, 28), 255, np.uint8)
    images, _ = compose(white, np.zeros(1, int), 500, np.random.default_rng(1))
    alone = images[(images > 0).sum((1, 2)) == 14 * 14]  # nothing of it is cut off
    corners = {(int(np.argmax(i.any(1))), int(np.argmax(i.any(0)))) for i in alone}
    assert {row for row, _ in corners} == {0, 1, 2, 12, 13, 14}
    assert {column for _, column in corners} == {0, 1, 2, 12, 13, 14}


def test_no_item_is_in_two_subsets():
    """Found by the items of images with a single one."""
    arrays = read_packaged()
    pools = {
        "teacher": arrays["train_images"][:6000],
        "labelled": arrays["train_images"][6000:],
        "unlabelled": arrays["train_images"][6000:],
        "validation": arrays["val_images"],
        "test": arrays["test_images"],
    }
    small = {name: pool.reshape(-1, 14, 2, 14, 2).mean((2, 4)).round().astype(np.uint8) for name, pool in pools.items()}
    known = {name: {item.tobytes() for item in items} for name, items in small.items()}
    assert all(len(known[a] & known[b]) < 10 for a, b in combinations(["teacher", "labelled", "validation", "test"], 2))
    data = FashionItems(teacher_images=300, labelled=300, unlabelled=300)
    for name in data.counts:
        images = data.subset(name).images[:, 0].numpy()
        found = {
            image[top : top + 14, left : left + 14].tobytes()
            for image in images
            for top in (0, 1, 2, 12, 13, 14)
            for left in (0, 1, 2, 12, 13, 14)
        }
        own = len(found & known[name])
        assert own > 50
        others = {other for other in known if {other, name} != {"labelled", "unlabelled"}} - {name}
        assert all(len(found & known[other]) < own / 20 for other in others)


def test_more_images_begin_with_the_fewer_and_unlabelled_ones_have_no_target():
    few, many = (FashionItems(labelled=count, unlabelled=7) for count in (20, 50))
    assert torch.equal(few.subset("labelled").images, many.subset("labelled").images[:20])
    assert torch.equal(few.subset("labelled").target, many.subset("labelled").target[:20])
    assert few.subset("unlabelled").target.unique().tolist() == [-100]
    assert len(FashionItems(labelled=20, unlabelled=7, role="student").training_set()) == 20
    assert len(FashionItems(labelled=20, unlabelled=7, role="control").training_set()) == 27


def test_another_split_seed_makes_other_images_and_mean_and_deviation_are_those_of_the_images():
    data = FashionItems(role="teacher")
    assert not torch.equal(data.subset("test").images, FashionItems(split_seed=1).subset("test").images)
    images = torch.cat([images for images, _ in data.train_dataloader()])
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02
    with pytest.raises(ValueError, match="expected labelled of 0 or more, got -1"):
        FashionItems(labelled=-1)
