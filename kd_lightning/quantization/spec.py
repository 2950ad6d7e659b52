"""What a quantised network is to be."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Observer = Literal["min_max", "percentile", "mse"]
Target = Literal["vnni", "avx2", "arm"]


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
        target: The processor that will serve it. ``avx2`` has no dot product of 8 bits that cannot overflow: its 8-bit
            weights use 7 bits.
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
    target: Target = "vnni"
    learned_scales: bool = False

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
        bits = 7 if self.weight_bits == 8 and self.target == "avx2" else self.weight_bits
        return int(2 ** (bits - 1)) - 1
