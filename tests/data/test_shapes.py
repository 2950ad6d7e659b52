import numpy as np
import pytest
import torch

from kd_lightning.data import ShapeGeometry, ShapeMasks
from kd_lightning.data.shapes import KINDS, NOTHING, RADII, draw_scenes, inside


@pytest.mark.parametrize(
    ("kind", "area"),
    [("disc", np.pi), ("square", 2.0), ("triangle", 3 * np.sqrt(3) / 4), ("cross", 4 / 9 * (2 * np.sqrt(8) - 1))],
)
def test_shapes_touch_their_circle_and_have_their_area(kind: str, area: float) -> None:
    y, x = np.mgrid[-1.2:1.2:0.005, -1.2:1.2:0.005]
    covered = inside(kind, x, y, np.ones(()))
    assert covered.sum() * 0.005**2 == pytest.approx(area, rel=0.01)
    assert np.hypot(x, y)[covered].max() == pytest.approx(1, abs=0.01)


def scenes(kinds: list[list[int]], noise: float = 0.0):
    return draw_scenes(np.array(kinds), 32, noise, np.random.default_rng(0))


def test_the_map_is_of_what_was_drawn_within_its_circle() -> None:
    drawn = scenes([[kind] for kind in (1, 2, 3, 4)] * 25)
    row, column = np.mgrid[:32, :32]
    for i, (x, y, radius) in enumerate(drawn.circles[:, 0]):
        kind = i % 4 + 1
        assert set(np.unique(drawn.maps[i])) <= {NOTHING, kind}
        far = np.hypot(column - x, row - y) > radius
        assert (drawn.maps[i][far] == NOTHING).all()
        if kind == 1:
            assert (drawn.maps[i][~far] == 1).all()


def test_the_later_shape_lies_over_the_earlier_one() -> None:
    drawn = scenes([[1, 2]] * 200)
    row, column = np.mgrid[:32, :32]
    hidden = 0
    for i, (x, y, radius) in enumerate(drawn.circles[:, 0]):
        disc = np.hypot(column - x, row - y) < radius
        assert set(np.unique(drawn.maps[i][disc])) <= {1, 2}
        hidden += (drawn.maps[i][disc] == 2).any()
    assert hidden > 20


def test_what_is_drawn_differs_from_the_background_in_grey() -> None:
    drawn = scenes([[1]] * 100)
    for image, map_ in zip(drawn.images, drawn.maps, strict=True):
        assert abs(image[map_ == 1].mean() - image[map_ == 0].mean()) > 0.15 * 255


def test_more_scenes_begin_with_the_fewer_and_noise_lies_over_all() -> None:
    few, many, noisy = scenes([[1]] * 5), scenes([[1]] * 9), scenes([[1]] * 5, noise=0.1)
    for one, other in zip(few, many, strict=True):
        assert np.array_equal(one, other[:5])
    assert np.array_equal(few.maps, noisy.maps)
    middling = (few.images > 80) & (few.images < 175)  # not cut off at black and white
    difference = noisy.images[middling].astype(float) - few.images[middling]
    assert difference.std() == pytest.approx(25.5, rel=0.1)


def test_masks_hold_every_class_and_unlabelled_images_none() -> None:
    data = ShapeMasks(teacher_images=400, labelled=30, unlabelled=20)
    target = data.subset("teacher").target
    assert target.shape == (400, 24, 24)
    shares = [(target == c).any((1, 2)).float().mean().item() for c in range(len(data.class_names))]
    assert data.class_names == ("background", *KINDS)
    assert shares == pytest.approx([1, 0.34, 0.34, 0.34, 0.34], abs=0.1)
    assert data.subset("unlabelled").target.unique().tolist() == [-100]
    images, masks = next(iter(ShapeMasks(role="teacher").train_dataloader()))
    assert (images.shape, masks.shape, masks.dtype) == ((16, 1, 24, 24), (16, 24, 24), torch.int64)


def test_the_values_are_where_the_disc_is() -> None:
    """Measured on its pixels, where nothing cuts it off."""
    data = ShapeGeometry(teacher_images=300, labelled=5, unlabelled=5, noise=0.0)
    clean = data.subset("teacher")
    measured = 0
    for image, value in zip(clean.images[:, 0].float(), clean.target, strict=True):
        x, y, radius = (value * data.pixels_per_unit + torch.tensor([14, 14, sum(RADII) / 2 * 28])).tolist()
        row, column = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
        distance = torch.hypot(column - x, row - y)
        if min(x, y, 27 - x, 27 - y) < radius + 2:
            continue
        measured += 1
        edge = image[(distance > radius - 1) & (distance < radius)].mean()
        disc = image[distance < radius - 1].mean()
        assert abs(disc - edge) < 40  # one surface, up to its stripes
    assert measured > 50
    assert data.subset("unlabelled").target.isnan().all()
    assert clean.target.dtype == torch.float32


def test_values_are_about_0_and_as_large_as_1() -> None:
    target = ShapeGeometry().subset("teacher").target
    assert target.mean(0).abs().max() < 0.1
    assert target.std(0).min() > 0.1
    assert target.abs().max() < 2.5
