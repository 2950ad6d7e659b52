"""What this machine's processor can do."""

from collections.abc import Collection
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")
# Linux' names, where they are not those of torch.cpu.get_capabilities.
_LINUX = {"avx512f": "avx512_f", "asimd": "neon", "asimddp": "dot"}
# Those that decide how fast integers are, and whether their sums are exact.
_NAMES = {
    "avx2": "AVX2",
    "avx512_f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "amx_int8": "AMX",
    "neon": "NEON",
    "dot": "dot product",
    "i8mm": "I8MM",
}
_EXACT = {"avx512_vnni", "avx_vnni", "amx_int8", "neon"}


def instructions() -> frozenset[str]:
    """Return the instruction sets, by the names of ``torch.cpu.get_capabilities``; none where they cannot be told."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return instructions_in(_CPUINFO)
    return frozenset(name for name, value in torch.cpu.get_capabilities().items() if value is True)


def instructions_in(cpuinfo: Path) -> frozenset[str]:
    """Return what Linux' list has."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:  # not Linux
        return frozenset()
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return frozenset(_LINUX.get(flag, flag) for flag in flags)


def describe(found: Collection[str] | None = None) -> str:
    """Name what matters for integers: ``AVX2, AVX-512, AVX-512 VNNI``; ``unknown instructions`` where none is known.

    Args:
        found: Instruction sets; this machine's unless given.
    """
    found = instructions() if found is None else found
    names = [title for name, title in _NAMES.items() if name in found]
    return ", ".join(names) or "unknown instructions"


def adds_8_bit_products_exactly(found: Collection[str] | None = None) -> bool:
    """Tell whether sums of products of 8 bits are known to be exact; x86 without VNNI adds pairs of them in 16 bits."""
    return not _EXACT.isdisjoint(instructions() if found is None else found)
