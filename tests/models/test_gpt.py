from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.export import export, integer_operators
from kd_lightning.export.sessions import in_onnxruntime
from kd_lightning.models import GPT
from kd_lightning.outputs import run
from kd_lightning.quantization import QuantizationSpec, calibrate, prepare, quantized_layers


def tokens(count: int = 4, length: int = 12) -> Tensor:
    return torch.randint(20, (count, length), generator=torch.Generator().manual_seed(0))


def small() -> GPT:
    torch.manual_seed(0)
    return GPT(vocabulary=20, context=12, layers=2, heads=2, width=16).eval()


def test_the_two_sizes_are_as_large_as_the_readme_says() -> None:
    teacher = GPT(layers=3, width=128)
    assert [sum(p.numel() for p in network.parameters()) for network in (teacher, GPT())] == [621_568, 113_344]


def test_no_token_sees_one_that_comes_after_it() -> None:
    network, other = small(), tokens()
    other[:, 7:] = (other[:, 7:] + 1) % 20
    before, after = network(tokens()), network(other)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any()


def test_a_cache_gives_what_the_whole_text_gives() -> None:
    """Token by token, and several at a time."""
    network, whole = small(), small()(tokens())
    for lengths in ([5, *[1] * 7], [3, 4, 5], [12]):
        cache: list[tuple[Tensor, Tensor]] = []
        parts = [network(part, cache) for part in tokens().split(lengths, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        assert cache[0][0].shape == (4, 2, 12, 8)


def test_the_head_is_the_table_of_embeddings() -> None:
    network = small()
    hidden = run(network, (tokens(),), {}, ("norm",)).features["norm"]
    torch.testing.assert_close(network(tokens()), F.linear(hidden, network.embedding.weight))
    assert "head.weight" not in dict(network.named_parameters())


def test_more_tokens_than_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 12 tokens at most, got 13"):
        small()(tokens(length=13))
    cache: list[tuple[Tensor, Tensor]] = []
    small()(tokens(), cache)
    with pytest.raises(ValueError, match="expected 12 tokens at most, got 13"):
        small()(tokens(length=1), cache)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a width that 3 heads divide, got 64: such as 63"):
        GPT(heads=3)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("int8", None)])
def test_the_file_gives_what_the_network_gives(precision: str, tolerance: float | None, tmp_path: Path) -> None:
    network = small()
    if precision == "int8":
        prepare(network, QuantizationSpec())
        calibrate(network, [tokens()])
        assert {layer.name for layer in quantized_layers(network) if layer.weight_bits == 8} >= {
            "head",
            "blocks.0.attention",
        }
    export(network, (tokens(),), tmp_path / "gpt.onnx", precision=precision)
    found = in_onnxruntime(str(tmp_path / "gpt.onnx"), threads=1).run(None, {"input": tokens().numpy()})[0]
    if tolerance is not None:
        np.testing.assert_allclose(found, network(tokens()).detach(), atol=tolerance)
    else:
        assert sum(integer_operators(tmp_path / "gpt.onnx").integer.values()) >= 9
        assert np.abs(found - network(tokens()).detach().numpy()).max() < 0.05 * np.abs(found).max()
