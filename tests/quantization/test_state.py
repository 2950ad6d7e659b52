"""What a state dict says of quantisation."""

from pathlib import Path

import pytest
import torch
from torch import nn

from kd_lightning.checkpoint import load_weights
from kd_lightning.quantization import prepare
from kd_lightning.quantization.prepare import quantizers
from kd_lightning.quantization.state import quantizers_in
from tests.tiny import network


class VectorQuantized(nn.Module):
    """Somebody's network, with a module that is called a quantiser and is none of these."""

    def __init__(self, codes: int = 4) -> None:
        super().__init__()
        self.vector_quantizer = nn.Embedding(codes, 3)
        self.head = nn.Linear(3, 2)


def test_all_quantisers_of_a_prepared_network_are_found_by_name() -> None:
    prepared = prepare(network())
    assert set(quantizers_in(prepared.state_dict())) == set(quantizers(prepared))
    alone = prepare(nn.Linear(3, 2))  # whose names have no dot
    assert set(quantizers_in(alone.state_dict())) == set(quantizers(alone)) == {"weight_quantizer"}
    assert quantizers_in(network().state_dict()) == ()


def test_what_a_network_calls_a_quantiser_is_not_taken_for_one(tmp_path: Path) -> None:
    torch.save(VectorQuantized(codes=5).state_dict(), tmp_path / "five.pt")
    with pytest.raises(ValueError, match=r"of another shape vector_quantizer.weight: \(5, 3\) in the file, \(4, 3\)"):
        load_weights(VectorQuantized(), tmp_path / "five.pt")
    torch.save(VectorQuantized().state_dict(), tmp_path / "four.pt")
    with pytest.raises(ValueError, match=r"missing stem.weight.*unexpected vector_quantizer.weight"):
        load_weights(network(), tmp_path / "four.pt")
