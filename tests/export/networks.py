"""Networks and inputs to export."""

from pathlib import Path

import torch
from torch import Tensor, nn

from kd_lightning.export.sessions import openvino_core
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


def outputs(path: Path, inputs: Tensor) -> Tensor:
    """What the runtime gives that the file is for."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["logits"], {"input": inputs.numpy()})[0])
    if path.suffix == ".xml":
        # Where the processor has 16-bit floats, it would take these.
        compiled = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return torch.from_numpy(compiled({"input": inputs.numpy()})["logits"])
    return torch.export.load(path).module()(inputs)[0]
