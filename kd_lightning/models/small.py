"""Networks for 28×28 images that train in seconds on a CPU."""

from torch import Tensor, nn


class CNN64(nn.Module):
    """The default teacher: four 3×3 convolutions of 16, 32, 32 and 64 channels, and a hidden layer; 108 k parameters.

    Args:
        num_classes: Of the logits.
        in_channels: Of the images.
        dropout: Before and after the hidden layer; with 6,000 images it brought 0.5 to 0.9 points, in single runs.

    Shape: (B, in_channels, 28, 28) to (B, num_classes). Layers to tap: ``block1`` (B, 16, 28, 28), ``block2`` and
        ``block3`` (B, 32, 14, 14), ``block4`` (B, 64, 7, 7), ``hidden`` (B, 128).
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        self.block1 = _block(in_channels, 16)
        self.block2 = nn.Sequential(nn.MaxPool2d(2), *_block(16, 32))
        self.block3 = _block(32, 32)
        self.block4 = nn.Sequential(nn.MaxPool2d(2), *_block(32, 64))
        self.hidden = nn.Sequential(
            nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(64 * 3 * 3, 128), nn.ReLU()
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block4(self.block3(self.block2(self.block1(x))))
        logits: Tensor = self.head(self.dropout(self.hidden(x)))
        return logits


class CNN8(nn.Module):
    """The default student: three 3×3 convolutions of stride 2 with 8, 16 and 16 channels; 6,218 parameters.

    Args:
        num_classes: Of the logits.
        in_channels: Of the images.
        width: Of the first convolution; the others have twice as many channels. An assistant may have more than 8.

    Shape: (B, in_channels, 28, 28) to (B, num_classes). Layers to tap: ``block1`` (B, 8, 14, 14), ``block2``
        (B, 16, 7, 7), ``block3`` (B, 16, 4, 4).
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 8) -> None:
        super().__init__()
        self.block1 = _block(in_channels, width, stride=2)
        self.block2 = _block(width, 2 * width, stride=2)
        self.block3 = _block(2 * width, 2 * width, stride=2)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(2 * width * 4 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.flatten(self.block3(self.block2(self.block1(x)))))
        return logits


class MLP32(nn.Module):
    """A student without convolutions: one hidden layer of 32 units; 25,450 parameters for 784 inputs and 10 classes.

    Shape: (B, ...) with ``in_features`` values a sample, to (B, num_classes). Layer to tap: ``hidden`` (B, 32).
    """

    def __init__(self, num_classes: int = 10, in_features: int = 28 * 28) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(in_features, 32), nn.ReLU())
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(x))
        return logits


def _block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    # The bias of a convolution before batch norm is without effect; kept, as in the nets that were measured.
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()
    )
