"""What a quantised network is to be."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from kd_lightning.processor import adds_8_bit_products_exactly, describe

Observer = Literal["min_max", "percentile", "mse"]
Target = Literal["any", "vnni", "arm"]
_PROCESSORS = {"any": "any processor", "vnni": "x86 with VNNI or AMX", "arm": "ARM"}


@dataclass(frozen=True)
class QuantizationSpec:
    """How many bits, and where.

    Attributes:
        weight_bits: 2 (the values -1, 0, 1 times a scale) to 8.
        activation_bits: 2 to 8; None leaves activations in float.
        per_channel: One weight scale for each output channel; one for the whole tensor otherwise.
        symmetric: Whether the range of activations is the same on both sides of zero.
        observer: How ranges are found: ``min_max``, averaged over batches; ``percentile``, which leaves out 0.1 % of
            the values at each end of a batch; ``mse``, the range with the least squared error, for weights too.
        skip: Layers that stay in float: names, which take along what is below them, and ``first`` and ``last``.
        target: Processors that will serve it, whichever trains it. ``any``: beside 8-bit activations, 8-bit weights use
            7 bits (``reduce_range`` in PyTorch and ONNX Runtime), since x86 without VNNI adds pairs of products in 16
            bits, which overflow otherwise. ``vnni``, x86 with VNNI or AMX, and ``arm`` use all 8.
        embeddings: Whether embeddings are quantised, too: their weights, one scale a row (per channel) or for all. Not
            those with ``max_norm`` or ``sparse``.
        learned_scales: Weight scales are parameters (LSQ: Esser et al., ICLR 2020).

    Raises:
        ValueError: For anything else.
    """

    weight_bits: int = 8
    activation_bits: int | None = 8
    per_channel: bool = True
    symmetric: bool = False
    observer: Observer = "min_max"
    skip: tuple[str, ...] = ()
    target: Target = "any"
    learned_scales: bool = False
    embeddings: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.skip, str) or not isinstance(self.skip, Iterable):
            raise ValueError(
                f"expected skip to be a list of layer names, got {self.skip!r}: pass skip=({self.skip!r},)"
            )
        object.__setattr__(self, "skip", tuple(self.skip))  # a list from a yaml
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if bits is None and name == "activation_bits":
                continue
            if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
                more = ", or None to leave activations in float" if name == "activation_bits" else ""
                raise ValueError(f"expected {name} from 2 to 8{more}, got {bits!r}")
        for name, known in (("observer", get_args(Observer)), ("target", get_args(Target))):
            if getattr(self, name) not in known:
                raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def weight_max(self) -> int:
        """Return the largest code of a weight; the smallest is its negative."""
        bits = 7 if self.target == "any" and self._may_overflow else self.weight_bits
        return int(2 ** (bits - 1)) - 1

    @property
    def processors(self) -> str:
        """Return the processors on which a file gives what the fake-quantised network gives, in words."""
        return _PROCESSORS[self.target if self._may_overflow else "any"]

    def mismatch(self, found: Collection[str] | None = None) -> str:
        """Say why a file may give something else on a processor, and the remedy; empty where there is no reason.

        ``found`` are the processor's instruction sets, this machine's unless given.
        """
        if self.target == "any" or not self._may_overflow or adds_8_bit_products_exactly(found):
            return ""
        return (
            f"target={self.target!r} is exact on {self.processors}, and this processor has {describe(found)}, where "
            "sums of 8-bit products may overflow: take target='any'"
        )

    @property
    def _may_overflow(self) -> bool:
        return self.weight_bits == self.activation_bits == 8
