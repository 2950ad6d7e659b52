"""Residual networks for 32×32 images (He et al., CVPR 2016, section 4.2), https://arxiv.org/abs/1512.03385.

With the widths and layer names under which distillation papers publish CIFAR-100 results.
"""

import torch
from torch import Tensor, nn


class CIFARResNet(nn.Module):
    """Three stages of basic blocks after one convolution.

    Args:
        depth: 6n + 2, where n is the number of blocks of a stage.
        widths: Channels of the first convolution and of the three stages.
        num_classes: Of the logits.

    Shape: (B, 3, 32, 32) to (B, num_classes). Layers to tap: ``layer1`` (B, widths[1], 32, 32), ``layer2``
        (B, widths[2], 16, 16), ``layer3`` (B, widths[3], 8, 8), ``avgpool`` (B, widths[3], 1, 1).

    Raises:
        ValueError: For a depth that is not 6n + 2.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int = 100) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"expected a depth of 6n + 2 (8, 14, 20, 32, 56, 110), got {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks, stride=2)
        self.avgpool = nn.AvgPool2d(8)
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.avgpool(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = (
            nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
            if stride != 1 or in_channels != out_channels
            else nn.Identity()
        )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        activated: Tensor = self.relu2(out + self.downsample(x))
        return activated


def resnet32x4(num_classes: int = 100) -> CIFARResNet:
    """Make the teacher of the published pair: depth 32, four times the width; 7,433,860 parameters for 100 classes."""
    return CIFARResNet(32, (32, 64, 128, 256), num_classes)


def resnet8x4(num_classes: int = 100) -> CIFARResNet:
    """Make the student of the published pair: depth 8, four times the width; 1,233,540 parameters for 100 classes."""
    return CIFARResNet(8, (32, 64, 128, 256), num_classes)


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))
