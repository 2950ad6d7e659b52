"""Grey images of discs, squares, triangles and crosses, drawn when they are needed."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

KINDS = ("disc", "square", "triangle", "cross")
RADII = 0.17, 0.34
"""The smallest and the largest circle around a shape, as shares of the image's edge."""
NOTHING = 0
"""Of a map: a pixel without shape. A shape's pixels are 1 and its kind's place in :data:`KINDS`."""

Floats = NDArray[np.floating]
_STRIPES = 5  # numbers in [0, 1) that make a surface: its grey; of its stripes direction, width, phase and depth


class Scenes(NamedTuple):
    """Images, and what is where.

    Attributes:
        images: Bytes (N, pixels, pixels).
        maps: Likewise; :data:`NOTHING`, or the shape that is seen.
        circles: The circles around the shapes (N, K, 3): centre to the right, centre downwards, and radius, in pixels.
    """

    images: NDArray[np.uint8]
    maps: NDArray[np.uint8]
    circles: NDArray[np.float32]


def draw_scenes(kinds: NDArray[np.int64], pixels: int, noise: float, random: np.random.Generator) -> Scenes:
    """Draw shapes at random places, the later over the earlier ones.

    Each has a size, an angle, a grey and stripes of its own, as the background has; noise lies over all. From a
    generator in the same state, more scenes begin with the fewer ones.

    Args:
        kinds: What is drawn: (N, K), :data:`NOTHING` or 1 and the place in :data:`KINDS`.
        pixels: Edge of the images.
        noise: Standard deviation of the noise, of greys from 0 to 1.
        random: Source of all that is drawn.
    """
    surfaces, places, grain = random.spawn(3)
    count, most = kinds.shape
    surface = surfaces.random((count, 1 + most, _STRIPES), np.float32)
    # A shape differs from the background by a third to two thirds of the range of greys.
    surface[:, 1:, 0] = (surface[:, :1, 0] + (1 + surface[:, 1:, 0]) / 3) % 1
    place = places.random((count, most, 4), np.float32)
    radius = RADII[0] + (RADII[1] - RADII[0]) * place[..., 2]
    circles = pixels * np.stack([0.1 + 0.8 * place[..., 0], 0.1 + 0.8 * place[..., 1], radius], -1)
    row, column = np.mgrid[:pixels, :pixels].astype(np.float32)
    images = _striped(row, column, surface[:, 0])
    maps = np.full(images.shape, NOTHING, np.uint8)
    for shape in range(most):
        for kind, name in enumerate(KINDS, 1):
            some = np.flatnonzero(kinds[:, shape] == kind)
            x, y, size = circles[some, shape].T[:, :, None, None]
            angle = 2 * np.pi * place[some, shape, 3, None, None]
            right, down = column - x, row - y
            turned = np.cos(angle) * right + np.sin(angle) * down, np.cos(angle) * down - np.sin(angle) * right
            shown = inside(name, *turned, size)
            images[some] = np.where(shown, _striped(row, column, surface[some, 1 + shape]), images[some])
            maps[some] = np.where(shown, kind, maps[some])
    images += noise * grain.standard_normal(images.shape, np.float32)
    return Scenes((255 * images.clip(0, 1)).round().astype(np.uint8), maps, circles.astype(np.float32))


def inside(kind: str, x: Floats, y: Floats, radius: Floats) -> NDArray[np.bool_]:
    """Tell of points, to the right of the centre and downwards, whether a shape within that radius covers them."""
    covered: NDArray[np.bool_]
    if kind == "disc":
        covered = np.hypot(x, y) < radius
    elif kind == "square":
        covered = np.maximum(abs(x), abs(y)) < radius / np.sqrt(2)
    elif kind == "triangle":
        covered = np.maximum(y, abs(x) * np.sqrt(3) / 2 - y / 2) < radius / 2
    else:  # a cross, whose arms are a third as wide as long
        arm = radius / 3
        covered = (np.minimum(abs(x), abs(y)) < arm) & (np.maximum(abs(x), abs(y)) < np.sqrt(8) * arm)
    return covered


def _striped(row: Floats, column: Floats, surface: Floats) -> Floats:
    """Return surfaces of a grey with stripes of 3 to 12 pixels: (N, pixels, pixels)."""
    grey, angle, width, phase, depth = surface.T[:, :, None, None]
    along = np.cos(2 * np.pi * angle) * column + np.sin(2 * np.pi * angle) * row
    striped: Floats = grey + 0.1 * depth * np.sin(2 * np.pi * (along / (3 + 9 * width) + phase))
    return striped
