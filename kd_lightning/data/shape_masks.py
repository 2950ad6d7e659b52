"""Segment shapes: a class at each pixel, in images that are drawn from a seed."""

import numpy as np

from kd_lightning.data.image_data import ImageData
from kd_lightning.data.in_memory import InMemory
from kd_lightning.data.shapes import KINDS, NOTHING, draw_scenes
from kd_lightning.data.split_data import SplitData, check_counts

MOST_SHAPES = 2


class ShapeMasks(SplitData, ImageData):
    """24×24 grey images of one or two shapes on stripes and in noise; the target is a class at each pixel.

    Args:
        teacher_images: How many images the teacher trains on.
        labelled: How many images the student gets with their maps.
        unlabelled: How many further ones the control and the distilled student get without (target -100).
        noise: Standard deviation of the noise, of greys from 0 to 1.
        batch_size: Size of the training's batches.
        eval_batch_size: Size of the batches of validation and test.
        num_workers: Processes that load; 0 is the fastest for images in memory.
        split_seed: Seed by which the images are drawn; the same for all seeds of the training.
        role: See :class:`~kd_lightning.data.FashionMNIST`.
        seed: Seed of the order of the training images, together with the epoch.

    Shape: target (N, 24, 24) in 0 to 4.

    >>> ShapeMasks(teacher_images=10, labelled=5).counts
    {'teacher': 10, 'labelled': 5, 'unlabelled': 0, 'validation': 500, 'test': 1000}
    """

    class_names = ("background", *KINDS)
    num_classes = len(class_names)
    input_shape = (1, 24, 24)
    mean, std = (0.5,), (0.295,)

    def __init__(
        self,
        teacher_images: int = 4000,
        labelled: int = 100,
        unlabelled: int = 0,
        noise: float = 0.05,
        batch_size: int = 16,
        eval_batch_size: int = 250,
        num_workers: int = 0,
        split_seed: int = 0,
        role: str = "distilled",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, role, seed)
        check_counts(teacher_images=teacher_images, labelled=labelled, unlabelled=unlabelled, split_seed=split_seed)
        self.teacher_images, self.labelled, self.unlabelled = teacher_images, labelled, unlabelled
        self.noise, self.split_seed = noise, split_seed

    def load_subsets(self) -> dict[str, InMemory]:
        return {
            "teacher": self._drawn(self.teacher_images, 0),
            "labelled": self._drawn(self.labelled, 1),
            "unlabelled": self._drawn(self.unlabelled, 2).without_labels(),
            "validation": self._drawn(500, 3),
            "test": self._drawn(1000, 4),
        }

    def _drawn(self, count: int, part: int) -> InMemory:
        random = np.random.default_rng((self.split_seed, part))
        drawn = random.spawn(1)[0].random((count, 1 + MOST_SHAPES))
        there = np.arange(MOST_SHAPES) <= np.floor(MOST_SHAPES * drawn[:, :1])
        kinds = np.where(there, 1 + np.floor(len(KINDS) * drawn[:, 1:]).astype(np.int64), NOTHING)
        images, maps, _ = draw_scenes(kinds, self.input_shape[-1], self.noise, random)
        return InMemory(images[:, None], maps, self.mean, self.std)
