"""What of a state dict is quantisers': it tells a prepared network's from one in float."""

from collections.abc import Iterable, Mapping

from torch import Tensor

PARTS = ("input_quantizer", "weight_quantizer", "output_quantizer")
"""Names of the quantisers in a layer, or in the module whose output is rounded."""
_SWITCHES = "._extra_state"  # whether it rounds: each quantiser saves that, under torch's name


def quantizers_in(names: Iterable[str]) -> tuple[str, ...]:
    """Return the quantisers whose state is among the names in a state dict.

    Example:
        >>> quantizers_in(["stem.weight", "stem.input_quantizer.low", "stem.input_quantizer._extra_state"])
        ('stem.input_quantizer',)
    """
    found = (name.removesuffix(_SWITCHES) for name in names if name.endswith(_SWITCHES))
    return tuple(name for name in found if name.rpartition(".")[2] in PARTS)


def float_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a prepared network's state dict without its quantisers, for the network in float.

    The weights are those that training moves, before they are rounded: the float network predicts with them what the
    prepared one does while fake quantisation is off. Of a network in float, the state dict as it is.

    Example::

        CNN8().load_state_dict(float_weights(prepared.state_dict()))
    """
    own = tuple(f"{name}." for name in quantizers_in(state))
    return {name: value for name, value in state.items() if not name.startswith(own)}


def preparation_mismatch(expected: Iterable[str], found: Iterable[str]) -> str:
    """Say so where one of two state dicts is of a network prepared for quantisation, and the other is not."""
    wanted, got = bool(quantizers_in(expected)), bool(quantizers_in(found))
    if wanted == got:
        return ""
    if got:
        return (
            "it is of a network prepared for quantisation, expected one in float: call "
            "kd_lightning.quantization.prepare(network, spec) first, or give the Trainer QuantizationAwareTraining("
            "spec), with the spec of the training that wrote it; or take its weights in float, load_student(path)"
        )
    return (
        "it is of a network in float, expected one prepared for quantisation: load it before prepare(network), and "
        "begin a new training with QuantizationAwareTraining, without ckpt_path="
    )
