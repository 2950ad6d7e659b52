import pytest
import torch
from torch import nn

from kd_lightning.quantization import QuantizationSpec
from kd_lightning.quantization.quantizers import ActivationQuantizer, WeightQuantizer


def rounded(value: float, scale: float, largest: int) -> float:
    return max(-largest, min(largest, round(value / scale))) * scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_rounded_channel_by_channel(bits):
    weight = torch.randn(5, 7)
    quantizer = WeightQuantizer(QuantizationSpec(weight_bits=bits, activation_bits=None), 0, weight)
    assert torch.equal(quantizer(weight), weight)  # off
    quantizer.enabled = True
    largest = 2 ** (bits - 1) - 1
    expected = [[rounded(w, max(map(abs, row)) / largest, largest) for w in row] for row in weight.tolist()]
    torch.testing.assert_close(quantizer(weight), torch.tensor(expected))
    codes, scales = quantizer.codes(weight), quantizer.scales(weight)
    torch.testing.assert_close(codes * scales[:, None], quantizer(weight))


def test_the_gradient_passes_through_the_rounding():
    weight = torch.randn(4, 6, requires_grad=True)
    quantizer = WeightQuantizer(QuantizationSpec(weight_bits=3), 0, weight)
    quantizer.enabled = True
    upstream = torch.randn(4, 6)
    quantizer(weight).backward(upstream)
    assert torch.equal(weight.grad, upstream)  # nothing lies outside the range


@pytest.mark.parametrize("axis", [0, 1, None])
def test_learned_scales_have_the_gradient_of_the_paper(axis):
    """LSQ, eq. 3: round(v / s) - v / s inside, the end of the range outside; divided by sqrt(N Q)."""
    torch.manual_seed(0)
    weight = torch.randn(3, 40)
    quantizer = WeightQuantizer(QuantizationSpec(weight_bits=3, learned_scales=True), axis, weight)
    quantizer.enabled = True
    upstream = torch.randn(3, 40)
    quantizer(weight).backward(upstream)
    scale, largest = quantizer.scale.detach(), 3
    expected = torch.zeros_like(scale)
    outside = 0
    for i in range(3):
        for j in range(40):
            channel = {0: i, 1: j, None: 0}[axis]
            v = float(weight[i, j] / scale[channel])
            if abs(v) < largest:
                slope = round(v) - v
            else:
                slope, outside = largest if v > 0 else -largest, outside + 1
            expected[channel] += slope * upstream[i, j] / (weight.numel() / len(scale) * largest) ** 0.5
    assert outside or axis == 1
    torch.testing.assert_close(quantizer.scale.grad, expected, rtol=1e-4, atol=1e-5)


def test_activations_have_256_levels_that_hold_zero():
    quantizer = ActivationQuantizer(QuantizationSpec())
    x = torch.rand(1000) * 3 - 0.5
    assert torch.equal(quantizer(x), x)
    quantizer.enabled = True
    y = quantizer(x)
    scale, zero_point = quantizer.scale_and_zero_point()
    codes = y / scale + zero_point
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert codes.min().round() >= 0
    assert codes.max().round() <= 255
    assert len(codes.round().unique()) > 200
    assert (y - x).abs().max() <= scale  # the ends of the range move with the rounded zero
    assert quantizer(torch.zeros(1)) == 0


def test_ranges_are_the_mean_of_the_first_batches_and_stay_once_frozen():
    quantizer = ActivationQuantizer(QuantizationSpec())
    for largest in (1.0, 3.0, 5.0):
        quantizer(torch.tensor([0.0, largest]))
    torch.testing.assert_close(quantizer.high, torch.tensor(3.0))
    quantizer.observing = False
    quantizer(torch.tensor([0.0, 100.0]))
    torch.testing.assert_close(quantizer.high, torch.tensor(3.0))
    quantizer.observing = True
    quantizer.eval()(torch.tensor([0.0, 100.0]))
    torch.testing.assert_close(quantizer.high, torch.tensor(3.0))


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_outliers_do_not_cost_the_others_their_precision(observer):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(20_000), torch.tensor([60.0])])
    errors = {}
    for name in ("min_max", observer):
        quantizer = ActivationQuantizer(QuantizationSpec(activation_bits=4, observer=name))
        quantizer.enabled = True
        errors[name] = float((quantizer(x)[:-1] - x[:-1]).square().mean())
    assert errors[observer] < 0.3 * errors["min_max"]


def test_mse_finds_weight_scales_with_less_error():
    torch.manual_seed(0)
    weight = torch.randn(8, 400)
    errors = {}
    for observer in ("min_max", "mse"):
        quantizer = WeightQuantizer(QuantizationSpec(weight_bits=2, observer=observer), 0, weight)
        quantizer.enabled = True
        errors[observer] = float((quantizer(weight) - weight).square().mean())
    assert errors["mse"] < 0.5 * errors["min_max"]


def test_symmetric_ranges_put_zero_in_the_middle():
    quantizer = ActivationQuantizer(QuantizationSpec(symmetric=True))
    quantizer(torch.tensor([-1.0, 3.0]))
    scale, zero_point = quantizer.scale_and_zero_point()
    assert int(zero_point) == 128
    torch.testing.assert_close(scale, torch.tensor(3 / 127))


def test_what_an_activation_cuts_off_is_no_part_of_the_range():
    quantizer = ActivationQuantizer(QuantizationSpec(), lower=0.0, upper=6.0)
    quantizer.enabled = True
    y = quantizer(torch.tensor([-9.0, 2.0, 50.0]))
    torch.testing.assert_close(y, torch.tensor([0.0, 2.0, 6.0]), atol=6 / 255, rtol=0)


def test_bfloat16_stays_bfloat16_and_integers_pass():
    quantizer = ActivationQuantizer(QuantizationSpec())
    quantizer.enabled = True
    assert quantizer(torch.randn(9).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(quantizer(torch.arange(3)), torch.arange(3))


def test_the_state_says_whether_values_are_rounded():
    quantizer = ActivationQuantizer(QuantizationSpec())
    quantizer.enabled = True
    x = torch.randn(50)
    y = quantizer(x)
    quantizer.observing = False
    other = ActivationQuantizer(QuantizationSpec())
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), y)
    assert (other.enabled, other.observing, other.observed) == (True, False, True)


def test_scales_are_parameters_only_where_they_are_learnt():
    layer = nn.Linear(3, 2)
    assert not list(WeightQuantizer(QuantizationSpec(), 0, layer.weight).parameters())
    (scale,) = WeightQuantizer(QuantizationSpec(learned_scales=True), 0, layer.weight).parameters()
    assert scale.shape == (2,)
