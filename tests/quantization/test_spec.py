import pytest

from kd_lightning.quantization import QuantizationSpec


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 1}, "expected weight_bits from 2 to 8, got 1"),
        ({"weight_bits": 8.0}, "expected weight_bits from 2 to 8, got 8.0"),
        ({"weight_bits": None}, "expected weight_bits from 2 to 8, got None"),
        (
            {"activation_bits": 16},
            "expected activation_bits from 2 to 8, or None to leave activations in float, got 16",
        ),
        ({"observer": "entropy"}, "expected observer to be one of min_max, percentile, mse, got 'entropy'"),
        ({"target": "gpu"}, "expected target to be one of vnni, avx2, arm, got 'gpu'"),
        ({"skip": "head"}, r"expected skip to be a list of layer names, got 'head': pass skip=\('head',\)"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationSpec(**arguments)


@pytest.mark.parametrize(
    ("bits", "target", "largest"), [(8, "vnni", 127), (8, "avx2", 63), (4, "avx2", 7), (4, "arm", 7), (2, "vnni", 1)]
)
def test_codes_are_symmetric_and_leave_a_bit_for_processors_that_overflow(bits, target, largest):
    assert QuantizationSpec(weight_bits=bits, target=target).weight_max == largest
