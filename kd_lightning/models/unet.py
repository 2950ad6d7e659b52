"""U-Net (Ronneberger et al., MICCAI 2015), https://arxiv.org/abs/1505.04597, of any width and depth."""

import torch
from torch import Tensor, nn


class UNet(nn.Module):
    """Down to smaller maps and up again, with what was seen on the way down.

    As in the paper but for padded convolutions with batch norm, one a step in place of two, and nearest neighbours in
    place of transposed convolutions.

    Args:
        num_classes: Number of classes of each pixel.
        in_channels: Channels of the images.
        width: Channels of the whole image; twice as many after each step down.
        depth: Number of steps down, each to half the height and width.

    Shape: (B, in_channels, H, W), H and W divisible by 2^depth, to (B, num_classes, H, W). Layers to tap: ``down.0`` to
        ``down.<depth>`` (B, width·2^i, H / 2^i, W / 2^i), ``up.0`` to ``up.<depth − 1>``, of which the last is
        (B, width, H, W).

    Raises:
        ValueError: For a width or a depth below 1.
    """

    def __init__(self, num_classes: int = 5, in_channels: int = 1, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise ValueError(f"expected width and depth of 1 or more, got {width} and {depth}")
        widths = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip([in_channels, *widths], widths, strict=False))
        self.pool = nn.ModuleList(nn.MaxPool2d(2) for _ in range(depth))
        self.scale = nn.ModuleList(nn.Upsample(scale_factor=2) for _ in range(depth))
        self.up = nn.ModuleList(_block(3 * b, b) for b in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down[0](x)
        seen = []
        for pool, down in zip(self.pool, self.down[1:], strict=True):
            seen.append(x)
            x = down(pool(x))
        for scale, up in zip(self.scale, self.up, strict=True):
            x = up(torch.cat([scale(x), seen.pop()], 1))
        logits: Tensor = self.head(x)
        return logits


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )
