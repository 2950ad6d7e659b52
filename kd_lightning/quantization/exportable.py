"""A prepared network as standard operators of ONNX, which runtimes compute with integers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from kd_lightning.quantization.layers import QuantizedConv1D, QuantizedLayer, is_transposed, output_dim
from kd_lightning.quantization.prepare import check_ranges, placement_of, quantizers, spec_of
from kd_lightning.quantization.quantizers import ActivationQuantizer

_SMALLEST = 1e-12


class _QuantizeDequantize(nn.Module):
    """An activation, per tensor."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        scale, zero_point = quantizer.scale_and_zero_point()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        codes = symbolic("QuantizeLinear", (x, self.scale, self.zero_point), dtype=torch.uint8, shape=x.shape)
        return _dequantized(codes, self.scale, self.zero_point)


class _Dequantize(nn.Module):
    """A weight that is stored in integers."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros_like(scale, dtype=torch.int8))

    def forward(self, weight: Tensor) -> Tensor:
        return _dequantized(self.codes, self.scale, self.zero_point, axis=self.axis)


class _Product(nn.Module):
    """A linear layer that gives floats: runtimes have that for MatMul in integers, and not for Gemm."""

    input_quantizer: nn.Module | None
    weight_quantizer: _Dequantize
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        stored = self.weight_quantizer
        weight = _dequantized(self._codes().contiguous(), stored.scale, stored.zero_point, axis=1)
        product = torch.matmul(x, weight)
        # Subtracted, since ONNX Runtime makes one Gemm of a product and an addition, and computes that in float.
        return product if self.bias is None else product - (-self.bias)

    def _codes(self) -> Tensor:
        """Return (in, out)."""
        return self.weight_quantizer.codes


class _ProductOfLinear(_Product, nn.Linear):  # type: ignore[misc]
    def _codes(self) -> Tensor:
        return self.weight_quantizer.codes.T


@torch.no_grad()
def exportable(network: nn.Module) -> nn.Module:
    """Return a copy in eval mode that ``torch.onnx.export(..., dynamo=True)`` writes in integers.

    Weights are stored as they are rounded, activations go through QuantizeLinear and DequantizeLinear, batch norm is
    folded into scales and bias, exactly. The network stays as it is. To be followed by :func:`tidy` on the graph.

    Raises:
        ValueError: For a network that is not prepared, whose ranges are not known, or with activations of other than
            8 bits, for which no runtime has operators.
    """
    found = quantizers(network)
    bits = spec_of(network).activation_bits
    if bits not in (8, None):
        raise ValueError(
            f"expected activations of 8 bits in a file, got {bits}: no runtime has operators for others; "
            "activation_bits=None leaves them in float"
        )
    unseen = [name for name, quantizer in found.items() if not quantizer.observed]
    if unseen:
        raise ValueError(
            f"{len(unseen)} ranges have seen no data ({', '.join(unseen[:3])}), expected all to be known: "
            "calibrate(network, loader), or train it"
        )
    check_ranges(network)
    placement = placement_of(network)
    result = copy.deepcopy(network).eval().requires_grad_(False)
    modules = dict(result.named_modules())
    for name, module in list(modules.items()):
        if isinstance(module, QuantizedLayer):
            _store(module, modules.get(placement.folds.get(name, "")))
            if name in placement.products and bits is not None:
                module.__class__ = _Product if isinstance(module, QuantizedConv1D) else _ProductOfLinear  # type: ignore[assignment]
    for module in modules.values():
        for part in ("input_quantizer", "output_quantizer"):
            quantizer = getattr(module, part, None)
            if isinstance(quantizer, ActivationQuantizer):
                setattr(module, part, _QuantizeDequantize(quantizer))
    return result


def _store(layer: Any, norm: nn.Module | None) -> None:
    """Replace the weight quantiser by the codes, with the batch norm that follows in scales and bias."""
    quantizer, weight = layer.weight_quantizer, layer.weight
    axis = quantizer.axis
    channels_dim = output_dim(layer)
    codes, scale = quantizer.codes(weight), quantizer.scales(weight)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None and not _grouped(layer):
        gamma = norm.weight if norm.weight is not None else torch.ones_like(norm.running_var)
        beta = norm.bias if norm.bias is not None else torch.zeros_like(norm.running_var)
        factor = gamma * (norm.running_var + norm.eps).rsqrt()
        axis = channels_dim
        signs = torch.where(factor < 0, -1, 1).to(torch.int8)
        codes = codes * signs.reshape([-1 if dim == axis else 1 for dim in range(codes.dim())])
        scale = (scale * factor.abs()).clamp(min=_SMALLEST)  # (channels,), also from one scale for all
        before = torch.zeros_like(beta) if layer.bias is None else layer.bias * factor
        assert norm.running_mean is not None
        layer.bias = nn.Parameter(beta - norm.running_mean * factor + before, requires_grad=False)
        _leave_out(norm)
    elif axis is None:
        axis, scale = channels_dim, scale.expand(codes.shape[channels_dim]).contiguous()
    # What is stored stands for the weight: the float tensor is not written.
    layer.weight_quantizer = _Dequantize(codes, scale, axis)


def _grouped(layer: Any) -> bool:
    return is_transposed(layer) and bool(layer.groups != 1)


def _leave_out(norm: nn.Module) -> None:
    """Make a batch norm pass its input on; hooks stay."""
    norm.forward = _same


def _same(x: Tensor) -> Tensor:
    return x


def _dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor, **attributes: Any) -> Tensor:
    inputs = (codes, scale, zero_point)
    return symbolic("DequantizeLinear", inputs, attrs=attributes, dtype=torch.float32, shape=codes.shape)
