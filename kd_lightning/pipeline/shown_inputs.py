"""Inputs of a few test units as a page can show them: pictures, texts, rows; nothing where none of these is known."""

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.tasks import Batch

Shown = dict[str, Any]
"""By ``kind``: ``image`` with ``png`` (base64), ``width`` and ``height``; ``text`` with ``before``, ``at`` and
``after``; ``words`` with ``words`` and ``at``; ``row`` with ``names`` and ``values``."""

_LARGEST = 96  # pixels of a side
_BEFORE, _AFTER = 90, 12  # characters around the place that is looked at
_MOST_VALUES = 12
_WORDS = 9
_PALETTE = (
    *((238, 238, 238), (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233)),
    *((213, 94, 0), (240, 228, 66), (120, 120, 120), (60, 40, 120)),
)
"""Colours of classes in masks: Okabe & Ito's, which differ for the colour-blind."""


class Shows:
    """Shows inputs, by what they are and what the data says of them.

    Args:
        data: A data module: ``mean`` and ``std`` of images, ``tokenizer`` of tokens, ``feature_names`` of rows,
            ``words_of(inputs)`` of anything that it can write as words, are used where they are there.
    """

    def __init__(self, data: Any) -> None:
        self._data = data
        self._tokenizer = getattr(data, "tokenizer", None)

    def __call__(self, batch: Batch, unit: int, place: int | None = None) -> Shown | None:
        """Return a unit of a batch, with the place in it that is looked at."""
        tensors = [*batch.args, *batch.kwargs.values()]
        tokens = batch.kwargs.get("input_ids", tensors[0])
        if not isinstance(tokens, Tensor):
            return None
        words = getattr(self._data, "words_of", None)
        if callable(words):
            return _words(list(words(tokens[unit])), place)
        if not tokens.is_floating_point():
            return self._text(tokens[unit].tolist(), place) if tokens.ndim == 2 else None
        inputs = tokens[unit].float().numpy()
        if inputs.ndim == 3 and inputs.shape[0] in (1, 3):
            return image(self._pixels(inputs))
        return self._row(inputs) if inputs.ndim == 1 else None

    def spelling(self, token: int) -> str:
        """Return how a class that is a token is written: with ␣ and ⏎ for what is not seen."""
        decode = getattr(self._tokenizer, "decode", None)
        return visible(decode([token])) if callable(decode) else str(token)

    @property
    def spells(self) -> bool:
        """Whether tokens can be written as text."""
        return callable(getattr(self._tokenizer, "decode", None))

    def _text(self, tokens: Sequence[int], place: int | None) -> Shown | None:
        decode = getattr(self._tokenizer, "decode", None)
        if not callable(decode):
            return None
        end = len(tokens) if place is None else place + 1  # what was read when the next one is to be said
        after = decode(tokens[end : end + 1 + _AFTER])
        return {"kind": "text", "before": decode(tokens[:end])[-_BEFORE:], "after": after[:_AFTER]}

    def _pixels(self, inputs: NDArray[Any]) -> NDArray[np.uint8]:
        channels = len(inputs)
        mean, std = (
            np.resize(np.atleast_1d(getattr(self._data, name, None) or default), channels)[:, None, None]
            for name, default in (("mean", 0.0), ("std", 1.0))
        )
        pixels = inputs * std + mean
        if not getattr(self._data, "mean", None):  # of an unknown range: that of the image
            low, high = pixels.min(), pixels.max()
            pixels = (pixels - low) / max(high - low, 1e-12)
        shown: NDArray[np.uint8] = (255 * pixels).round().clip(0, 255).astype(np.uint8)
        return shown

    def _row(self, values: NDArray[Any]) -> Shown:
        names = getattr(self._data, "feature_names", None) or [f"x{i + 1}" for i in range(len(values))]
        return {
            "kind": "row",
            "names": [str(name) for name in names[:_MOST_VALUES]],
            "values": [float(x) for x in values[:_MOST_VALUES]],
            "more": max(0, len(values) - _MOST_VALUES),
        }


def image(pixels: NDArray[np.uint8]) -> Shown:
    """Return an image as PNG; one of more than 96 pixels a side by every n-th of them. Shape: (1 or 3, H, W)."""
    every = -(-max(pixels.shape[1:]) // _LARGEST)
    pixels = pixels[:, ::every, ::every]
    channels, height, width = pixels.shape
    rows = np.moveaxis(pixels, 0, -1).reshape(height, width * channels)
    content = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1).tobytes()  # filter 0 of each row

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content, 9)) + chunk(b"IEND", b"")
    )
    return {"kind": "image", "png": base64.b64encode(png).decode(), "width": width, "height": height}


def mask(classes: NDArray[Any]) -> Shown:
    """Return a map of classes as a picture in the colours of :func:`colour`. Shape: (H, W)."""
    palette = np.array([colour(i) for i in range(int(classes.max(initial=0)) + 1)], np.uint8)
    return image(np.moveaxis(palette[np.maximum(classes, 0)], -1, 0))


def colour(number: int) -> tuple[int, int, int]:
    """Return the colour of a class in masks: red, green, blue."""
    return _PALETTE[number % len(_PALETTE)]


def visible(text: str) -> str:
    """Write blanks and line ends as signs."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _words(words: list[str], place: int | None) -> Shown:
    begin = 0 if place is None else max(0, place - _WORDS)
    end = len(words) if place is None else place + _WORDS
    return {"kind": "words", "words": words[begin:end], "at": None if place is None else place - begin}


def unit_of(batches: Sequence[Batch], number: int) -> tuple[Batch, int]:
    """Return the batch that holds a unit, and where."""
    for batch in batches:
        first: Any = next(iter((*batch.args, *batch.kwargs.values())))
        if number < len(first):
            return batch, number
        number -= len(first)
    raise IndexError(f"there are {number} units fewer")


def as_classes(target: NDArray[Any]) -> NDArray[np.int64]:
    """Return class indices where targets are probabilities (the last dimension's largest), else the targets."""
    given = torch.as_tensor(target)
    labels: NDArray[np.int64] = (given.argmax(-1) if given.is_floating_point() else given).long().numpy()
    return labels


def top(p: Mapping[str, NDArray[Any]], label: int, most: int = 4) -> list[int]:
    """Return the classes that are worth showing, the teacher's (the first model's) most likely first.

    They are its best three, the label, and what the others find most likely.
    """
    first = next(iter(p.values()))
    wanted = [*np.argsort(-first, kind="stable")[:3].tolist(), label, *(int(q.argmax()) for q in p.values())]
    kept = list(dict.fromkeys(int(i) for i in wanted if i >= 0))[: most + 1]
    return sorted(kept, key=lambda i: -float(first[i]))
