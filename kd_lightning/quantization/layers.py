"""Convolutions and linear layers that fake-quantise input and weight, and embeddings that do so with the weight.

A layer becomes one of these by its class alone: names, parameters, hooks, copies and pickles stay.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from kd_lightning.quantization.spec import QuantizationSpec


class QuantizedLayer(nn.Module):
    """The parts that all have; ``input_quantizer`` is None where the input is on the grid already."""

    weight: Tensor
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer | None

    def _input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def _weight(self) -> Tensor:
        weight: Tensor = self.weight_quantizer(self.weight)
        return weight


class _Conv(QuantizedLayer):
    def forward(self, x: Tensor) -> Tensor:
        me = _as_any(self)
        result: Tensor = me._conv_forward(self._input(x), self._weight(), me.bias)
        return result


class QuantizedConv1d(_Conv, nn.Conv1d):
    """Shape: as ``nn.Conv1d``."""


class QuantizedConv2d(_Conv, nn.Conv2d):
    """Shape: as ``nn.Conv2d``."""


class QuantizedConv3d(_Conv, nn.Conv3d):
    """Shape: as ``nn.Conv3d``."""


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """Shape: as ``nn.Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self._input(x), self._weight(), self.bias)


class QuantizedConv1D(QuantizedLayer):
    """Shape: as ``transformers.pytorch_utils.Conv1D``, a linear layer with the weight (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        me, x = _as_any(self), self._input(x)
        rows = torch.addmm(me.bias, x.reshape(-1, x.shape[-1]), self._weight())
        return rows.reshape(*x.shape[:-1], me.nf)


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """Shape: as ``nn.Embedding``; one scale a row."""

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self._weight(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class _ConvTranspose(QuantizedLayer):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        x, me = self._input(x), _as_any(self)
        dims = x.dim() - 2
        padding = me._output_padding(x, output_size, me.stride, me.padding, me.kernel_size, dims, me.dilation)
        call = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return call(x, self._weight(), me.bias, me.stride, me.padding, padding, me.groups, me.dilation)


class QuantizedConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """Shape: as ``nn.ConvTranspose1d``."""


class QuantizedConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """Shape: as ``nn.ConvTranspose2d``."""


class QuantizedConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """Shape: as ``nn.ConvTranspose3d``."""


QUANTIZED: Mapping[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.Linear: QuantizedLinear,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
}


_CONV1D = ("transformers.pytorch_utils", "Conv1D")  # by name, so that transformers is not imported for it


def kind_of(layer: nn.Module) -> type[nn.Module] | None:
    """Return the kind of convolution or linear layer that a layer is, also where it has a forward of its own."""
    kinds = (kind for kind in type(layer).__mro__ if kind in QUANTIZED or (kind.__module__, kind.__name__) == _CONV1D)
    return next(kinds, None)


def quantized_kind(layer: nn.Module) -> type[QuantizedLayer] | None:
    """Return what a layer becomes; None for one that cannot be, such as one with a forward of its own."""
    if type(layer) is nn.Embedding:
        return QuantizedEmbedding if layer.max_norm is None and not layer.sparse else None
    if kind_of(layer) is not type(layer):
        return None
    return QUANTIZED.get(type(layer), QuantizedConv1D)


def swap(layer: nn.Module, spec: QuantizationSpec, quantize_input: bool) -> None:
    """Make a layer quantised, in place."""
    kind = quantized_kind(layer)
    assert kind is not None
    axis: int | None = 1 if kind is QuantizedConv1D else 0
    if isinstance(layer, _TRANSPOSED):
        # (in, out / groups, …): with groups, a channel of the second dimension belongs to several outputs.
        axis = 1 if layer.groups == 1 else None
    weight: Tensor = _as_any(layer).weight
    layer.__class__ = kind
    weights = WeightQuantizer(spec, axis if spec.per_channel else None, weight)
    layer.weight_quantizer = weights.to(weight.device).train(layer.training)
    inputs = ActivationQuantizer(spec).to(weight.device).train(layer.training) if quantize_input else None
    layer.register_module("input_quantizer", inputs)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, _TRANSPOSED)


def output_dim(layer: nn.Module) -> int:
    """Return the dimension of a weight that is that of the output channels."""
    return 1 if isinstance(layer, (*_TRANSPOSED, QuantizedConv1D)) else 0


def gives_products(layer: nn.Module) -> bool:
    """Tell whether a layer is a matrix product, whose output may stay in float."""
    return isinstance(layer, nn.Linear | QuantizedConv1D) or quantized_kind(layer) is QuantizedConv1D


def _as_any(value: Any) -> Any:
    return value
