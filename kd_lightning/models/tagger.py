"""A tagger of words in context: dilated convolutions (Strubell et al., EMNLP 2017), https://arxiv.org/abs/1702.02098."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Tagger(nn.Module):
    """Reads each word by its letters, then its neighbours with dilated convolutions; gives a class for each word.

    Without recurrence and attention it runs in integers where it is served. It sees as many words to each side as its
    dilations add up to.

    Args:
        num_classes: Number of classes.
        width: Channels of a word.
        spelling: Channels in which the letters of a word are put together.
        dilations: Distance of the neighbours that each layer reads beside the word itself.
        dropout: Before the last layer.
        letters: Letters of a word.
        symbols: Number of different letters; 0 is padding.

    Shape: int64 (B, S, letters) to (B, S, num_classes). Layer to tap: ``hidden`` (B, S, width).

    Raises:
        ValueError: For no dilation.
    """

    def __init__(
        self,
        num_classes: int = 8,
        width: int = 24,
        spelling: int = 48,
        dilations: Sequence[int] = (1, 2),
        dropout: float = 0.0,
        letters: int = 12,
        symbols: int = 29,
    ) -> None:
        super().__init__()
        if not dilations:
            raise ValueError("expected one dilation at least, got none: [1, 2] reads three words to each side")
        channels = 8
        self.embedding = nn.Embedding(symbols, channels, padding_idx=0)
        self.spelled = nn.Sequential(
            nn.Conv1d(letters * channels, spelling, 1),
            nn.BatchNorm1d(spelling),
            nn.ReLU(),
            nn.Conv1d(spelling, width, 1),
        )
        self.context = nn.Sequential(*(_Neighbours(width, dilation) for dilation in dilations))
        self.hidden = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)

    def forward(self, words: Tensor) -> Tensor:
        letters = self.embedding(words).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.hidden(self.context(self.spelled(letters)).transpose(1, 2)))
        return logits


class _Neighbours(nn.Module):
    """A convolution over three words beside a shortcut."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.norm = nn.BatchNorm1d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.relu(self.norm(self.conv(x))))
