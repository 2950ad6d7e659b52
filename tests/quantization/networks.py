"""Networks of the shapes that quantisation has to find its way in."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FunctionalResidual(nn.Module):
    """A functional ReLU before a skip, a shared ReLU module, a concatenation, pooling, other activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.mix = nn.Conv2d(32, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x = self.relu(y + x)
        x = F.relu6(self.mix(torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1)))
        x = F.silu(self.depthwise(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class PreActivation(nn.Module):
    """Batch norm without a convolution before it, and a convolution whose output two others read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU6()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.conv(self.relu(self.bn(x))) + self.side(x)
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Untraceable(nn.Module):
    """A forward that asks a tensor for a decision."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            x = F.gelu(self.body(x))
        logits: Tensor = self.head(x)
        return logits


class Transformer(nn.Module):
    """A block of torch's own, which in eval mode computes without calling its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.embed(x)).mean(1))
        return logits


def settled(network: nn.Module) -> nn.Module:
    """With batch norms as after a training: negative factors, statistics of their own."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, mean, sd in ((module.weight, 1.0, 0.7), (module.bias, 0.0, 0.5), (module.running_mean, 0, 0.3)):
                assert tensor is not None
                tensor.data.copy_(mean + sd * torch.randn(tensor.shape, generator=generator))
            assert module.running_var is not None
            module.running_var.copy_(0.5 + 1.5 * torch.rand(module.running_var.shape, generator=generator))
    return network.eval()
