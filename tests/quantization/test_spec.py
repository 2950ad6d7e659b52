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
        ({"target": "avx2"}, "expected target to be one of any, vnni, arm, got 'avx2'"),
        ({"skip": "head"}, r"expected skip to be a list of layer names, got 'head': pass skip=\('head',\)"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationSpec(**arguments)


@pytest.mark.parametrize(
    ("bits", "activation_bits", "target", "largest"),
    [(8, 8, "any", 63), (8, 8, "vnni", 127), (8, 8, "arm", 127), (4, 8, "any", 7), (8, None, "any", 127)],
)
def test_codes_are_symmetric_and_leave_a_bit_where_sums_may_overflow(bits, activation_bits, target, largest):
    assert QuantizationSpec(bits, activation_bits, target=target).weight_max == largest
    if activation_bits is not None and target == "any":
        assert 2 * 255 * largest < 2**15  # two products, added in 16 bits


def test_it_says_where_it_is_exact_and_where_not():
    assert QuantizationSpec() == QuantizationSpec(target="any")
    assert QuantizationSpec().processors == "any processor"
    vnni = QuantizationSpec(target="vnni")
    assert vnni.processors == "x86 with VNNI or AMX"
    assert vnni.mismatch({"avx2"}) == (
        "target='vnni' is exact on x86 with VNNI or AMX, and this processor has AVX2, where sums of 8-bit products may "
        "overflow: take target='any'"
    )
    assert "has unknown instructions, where" in vnni.mismatch(set())
    assert not vnni.mismatch({"avx2", "avx512_vnni"})
    assert not QuantizationSpec().mismatch({"avx2"})
    assert not QuantizationSpec(activation_bits=None, target="vnni").mismatch({"avx2"})  # sums of floats
