"""What the processor can do, as its own words say it, as torch says it, and where nobody does."""

import platform

import pytest
import torch

from kd_lightning.processor import adds_8_bit_products_exactly, describe, instructions, instructions_in


@pytest.mark.parametrize(
    ("text", "said", "exact"),
    [
        ("flags\t\t: fpu sse4_2 avx avx2 f16c\n", "AVX2", False),
        ("flags\t\t: avx2 avx_vnni\n", "AVX2, AVX-VNNI", True),
        ("flags\t\t: avx2 avx512f avx512_vnni amx_int8\n", "AVX2, AVX-512, AVX-512 VNNI, AMX", True),
        ("flags\t\t: avx2 avx512f avx512bw\n", "AVX2, AVX-512", False),
        ("Features\t: fp asimd asimddp i8mm\n", "NEON, dot product, I8MM", True),
        ("isa\t\t: rv64imafdc\n", "unknown instructions", False),
    ],
)
def test_linux_list(tmp_path, text: str, said: str, exact: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{text}")
    found = instructions_in(tmp_path / "cpuinfo")
    assert describe(found) == said
    assert adds_8_bit_products_exactly(found) == exact


def test_a_machine_that_does_not_tell(tmp_path, monkeypatch) -> None:
    assert instructions_in(tmp_path / "missing") == frozenset()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "riscv64", "sve_max_length": 1})
    assert instructions() == frozenset()
    assert describe() == "unknown instructions"
    assert not adds_8_bit_products_exactly()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64", "arm64"), reason="no names for this processor")
def test_this_machine() -> None:
    assert describe() != "unknown instructions" or not {"avx2", "neon"} & instructions()
    assert instructions() & {"sse2", "neon"}
