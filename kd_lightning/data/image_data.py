"""What the data modules of images have in common."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.role_data import RoleData


class ImageData(RoleData):
    """Subsets of images.

    Attributes:
        num_classes: Number of classes of the targets.
        class_names: Names by target.
        input_shape: Shape of one image: (C, H, W).
        mean: Mean of each channel, with pixels in [0, 1]; subtracted.
        std: Standard deviation of each channel; divided by.
    """

    num_classes: int
    class_names: Sequence[str]
    input_shape: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]


def draw(
    pool: NDArray[np.int64], sizes: Sequence[int], seed: int, remedy: str, of: str = "images"
) -> list[NDArray[np.int64]]:
    """Draw disjoint subsets at random; under the same seed, a larger first one holds the smaller one.

    Raises:
        ValueError: When the pool is too small, and for a negative seed.
    """
    if seed < 0:
        raise ValueError(f"expected split_seed of 0 or more, got {seed}")
    if min(sizes) < 0 or sum(sizes) > len(pool):
        raise ValueError(f"expected up to {len(pool)} {of}, got {' + '.join(map(str, sizes))}: {remedy}")
    order = np.random.default_rng(seed).permutation(pool)
    return np.split(order, np.cumsum(sizes))[: len(sizes)]
