"""Networks and inputs to export."""

import torch
from torch import Tensor, nn

from kd_lightning.models import CNN8, CIFARResNet
from kd_lightning.quantization import QuantizationSpec, calibrate, prepare


def images(count: int = 32, channels: int = 1, size: int = 28) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def seeded(make: type[nn.Module] = CNN8, *args: object, **kwargs: object) -> nn.Module:
    """A network with batch statistics that are not 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make(*args, **kwargs)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, -1.0, 1.5)
    return network


def resnet() -> nn.Module:
    return seeded(CIFARResNet, 8, (8, 8, 16, 16), 10)


def quantized(network: nn.Module, inputs: Tensor, **spec: object) -> nn.Module:
    return calibrate(prepare(network, QuantizationSpec(**spec)), [inputs])
