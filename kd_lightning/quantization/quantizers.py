"""Fake quantisation: values are rounded to those that fewer bits can hold, and stay float tensors.

The gradient passes through the rounding as if it were not there, and is zero for what lies outside the range (the
straight-through estimator).
"""

from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.quantization.spec import Observer, QuantizationSpec

_SMALLEST = 1e-8  # a scale
_MOMENTUM = 0.05  # of a new batch, once there were 20
_AT_MOST = 2**16  # values of a batch that percentile and mse look at
_OUTSIDE = 1e-3
_SHRINK = 20  # ranges that mse tries


class Quantizer(nn.Module):
    """Whether it fake-quantises is part of its state, so that a checkpoint is what was trained.

    Attributes:
        enabled: Whether values are rounded.
        observing: Whether ranges follow the data, in training mode.
        observed: Whether there was any data; without, nothing is rounded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled, self.observing, self.observed = False, True, False

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.enabled, self.observing, self.observed], dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        self.enabled, self.observing, self.observed = (bool(value) for value in state)


class WeightQuantizer(Quantizer):
    """Symmetric, its scale follows the weight, or is learnt.

    Shape: (…) to the same; ``axis`` is the dimension of the output channels, None for one scale for all.
    """

    scale: nn.Parameter | None

    def __init__(self, spec: QuantizationSpec, axis: int | None, weight: Tensor) -> None:
        super().__init__()
        self.largest, self.axis, self.observer = spec.weight_max, axis, spec.observer
        self.observed = True
        self.scale = None
        if spec.learned_scales:
            start = 2 * self._apart(weight.detach()).abs().mean(1) / self.largest**0.5  # LSQ, section 2.1
            self.scale = nn.Parameter(start.clamp(min=_SMALLEST))

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        if self.scale is not None:
            return self._learned(weight, self.scale)
        scale = self.scales(weight)
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(
                weight, scale, torch.zeros_like(scale, dtype=torch.int32), -self.largest, self.largest
            )
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, self.axis, -self.largest, self.largest)

    @torch.no_grad()
    def scales(self, weight: Tensor) -> Tensor:
        """Return (channels,), or one, in float32."""
        if self.scale is not None:
            return self.scale.detach().abs().clamp(min=_SMALLEST)
        rows = self._apart(weight.detach().float())
        scale = rows.abs().amax(1) / self.largest
        if self.observer == "mse":
            scale = self._least_error(rows, scale)
        return scale.clamp(min=_SMALLEST)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """Return the weight in int8."""
        scale = self.along(self.scales(weight), weight)
        return (weight / scale).round().clamp(-self.largest, self.largest).to(torch.int8)

    def along(self, values: Tensor, weight: Tensor) -> Tensor:
        """Shape (channels,) so that it broadcasts over the weight."""
        if self.axis is None:
            return values.reshape([1] * weight.dim())
        return values.reshape([-1 if dim == self.axis else 1 for dim in range(weight.dim())])

    def _apart(self, weight: Tensor) -> Tensor:
        return weight.reshape(1, -1) if self.axis is None else weight.movedim(self.axis, 0).flatten(1)

    def _least_error(self, rows: Tensor, scale: Tensor) -> Tensor:
        best, least = scale, torch.full_like(scale, torch.inf)
        for share in torch.linspace(0.2, 1.0, _SHRINK).tolist():
            tried = (scale * share).clamp(min=_SMALLEST)
            codes = (rows / tried[:, None]).round().clamp(-self.largest, self.largest)
            error = (codes * tried[:, None] - rows).square().sum(1)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
        return best

    def _learned(self, weight: Tensor, scale: Tensor) -> Tensor:
        # LSQ, eq. 3 for the gradient of the scale, section 2.2 for its factor: the value stays, the gradient shrinks.
        factor = (weight.numel() / scale.numel() * self.largest) ** -0.5
        scale = (scale - scale * factor).detach() + scale * factor
        scale = self.along(scale.abs().clamp(min=_SMALLEST), weight)
        inside = (weight / scale).clamp(-self.largest, self.largest)
        return ((inside.round() - inside).detach() + inside) * scale


class ActivationQuantizer(Quantizer):
    """One range for a whole tensor.

    Shape: any to the same. Buffers: ``low`` and ``high``, the range, which holds zero; ``count``, batches seen.

    Attributes:
        lower: Values below are what a following activation cuts off: 0 for ReLU; None for none.
        upper: Likewise: 6 for ReLU6.
    """

    low: Tensor
    high: Tensor
    count: Tensor

    def __init__(self, spec: QuantizationSpec, lower: float | None = None, upper: float | None = None) -> None:
        super().__init__()
        assert spec.activation_bits is not None
        self.bits, self.symmetric = spec.activation_bits, spec.symmetric and lower is None
        self.observer: Observer = spec.observer
        self.lower, self.upper = lower, upper
        self.calibrating = False
        for name in ("low", "high", "count"):
            self.register_buffer(name, torch.tensor(0.0))

    @property
    def largest(self) -> int:
        """Return the largest code; the smallest is 0."""
        return int(2**self.bits) - 1

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        if self.calibrating or (self.observing and self.training):
            self._observe(x.detach().float())
        if not (self.enabled and self.observed):
            return x
        scale, zero_point = self.scale_and_zero_point()
        # In float32, since bfloat16 cannot hold 256 levels.
        return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero_point, 0, self.largest).to(x.dtype)

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return two scalars, float32 and int32."""
        low, high = self.low.float(), self.high.float()
        if self.symmetric:
            scale = (torch.maximum(-low, high) / (self.largest // 2)).clamp(min=_SMALLEST)
            return scale, torch.full_like(scale, self.largest // 2 + 1, dtype=torch.int32)
        scale = ((high - low) / self.largest).clamp(min=_SMALLEST)
        return scale, (-low / scale).round().clamp(0, self.largest).to(torch.int32)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        low, high = x.aminmax()
        if self._cut():
            low, high = low.clamp(self.lower, self.upper), high.clamp(self.lower, self.upper)
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.observer != "min_max":
            values = x.flatten()
            values = values[:: -(-values.numel() // _AT_MOST)]
            if self._cut():
                values = values.clamp(self.lower, self.upper)
            low, high = _percentile(values) if self.observer == "percentile" else self._least_error(values, low, high)
        # The mean of the first batches, then a moving average.
        self.count += 1
        weight = (1 / self.count).clamp(min=_MOMENTUM)
        self.low.lerp_(low.to(self.low.dtype), weight.to(self.low.dtype))
        self.high.lerp_(high.to(self.high.dtype), weight.to(self.high.dtype))
        self.observed = True

    def _cut(self) -> bool:
        return self.lower is not None or self.upper is not None

    def _least_error(self, values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        best, least = (low, high), torch.full_like(low, torch.inf)
        for share in torch.linspace(1.0, 0.2, _SHRINK).tolist():
            a, b = low * share, high * share
            scale = ((b - a) / self.largest).clamp(min=_SMALLEST)
            zero = (-a / scale).round()
            codes = ((values / scale).round() + zero).clamp(0, self.largest)
            error = ((codes - zero) * scale - values).square().sum()
            better = error < least
            best = torch.where(better, a, best[0]), torch.where(better, b, best[1])
            least = torch.minimum(error, least)
        return best


def _percentile(values: Tensor) -> tuple[Tensor, Tensor]:
    ends = torch.quantile(values, torch.tensor([_OUTSIDE, 1 - _OUTSIDE], device=values.device))
    return ends[0].clamp(max=0), ends[1].clamp(min=0)
