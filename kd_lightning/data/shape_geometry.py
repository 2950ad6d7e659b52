"""Find a disc among other shapes: three values of an image that is drawn from a seed."""

import numpy as np

from kd_lightning.data.in_memory import InMemory
from kd_lightning.data.shapes import KINDS, NOTHING, RADII, draw_scenes
from kd_lightning.data.split_data import SplitData, check_counts

OTHERS = 3  # at most


class ShapeGeometry(SplitData):
    """28×28 grey images of a disc, before up to three other shapes; the target is where it is, and how large.

    The three values are how far its centre is to the right of the image's centre, how far below, and its radius less
    the mean radius: in units of :attr:`pixels_per_unit`, so that networks learn values of about the size of 1.

    Args:
        teacher_images: How many images the teacher trains on.
        labelled: How many images the student gets with their values.
        unlabelled: How many further ones the control and the distilled student get without (targets NaN).
        noise: Standard deviation of the noise, of greys from 0 to 1.
        batch_size: Size of the training's batches.
        eval_batch_size: Size of the batches of validation and test.
        num_workers: Processes that load; 0 is the fastest for images in memory.
        split_seed: Seed by which the images are drawn; the same for all seeds of the training.
        role: See :class:`~kd_lightning.data.FashionMNIST`.
        seed: Seed of the order of the training images, together with the epoch.

    Shape: target (N, 3), float32.

    >>> ShapeGeometry(teacher_images=10, labelled=5).counts
    {'teacher': 10, 'labelled': 5, 'unlabelled': 0, 'validation': 1000, 'test': 2000}
    """

    pixels_per_unit = 6.0
    value_names = ("right of the centre", "below the centre", "radius")
    input_shape = (1, 28, 28)
    mean, std = (0.5,), (0.295,)

    def __init__(
        self,
        teacher_images: int = 6000,
        labelled: int = 300,
        unlabelled: int = 0,
        noise: float = 0.1,
        batch_size: int = 64,
        eval_batch_size: int = 500,
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
            "validation": self._drawn(1000, 3),
            "test": self._drawn(2000, 4),
        }

    def _drawn(self, count: int, part: int) -> InMemory:
        random = np.random.default_rng((self.split_seed, part))
        drawn = random.spawn(1)[0].random((count, OTHERS))
        others = np.floor(len(KINDS) * drawn).astype(np.int64)  # 0, or a kind that is no disc
        kinds = np.concatenate([np.where(others > 0, others + 1, NOTHING), np.ones((count, 1), np.int64)], 1)
        pixels = self.input_shape[-1]
        images, _, circles = draw_scenes(kinds, pixels, self.noise, random)
        middle = pixels * np.array([0.5, 0.5, sum(RADII) / 2], np.float32)
        return InMemory(images[:, None], (circles[:, -1] - middle) / self.pixels_per_unit, self.mean, self.std)
