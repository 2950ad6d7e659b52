from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_lightning.export import export, integer_operators
from kd_lightning.export.sessions import in_onnxruntime
from kd_lightning.models import Tagger
from kd_lightning.outputs import run
from kd_lightning.quantization import QuantizationSpec, calibrate, prepare


def words(count: int = 6, length: int = 20) -> Tensor:
    return torch.randint(29, (count, length, 12), generator=torch.Generator().manual_seed(0))


def trained() -> Tagger:
    """With batch statistics of the words above."""
    torch.manual_seed(0)
    network = Tagger()
    for _ in range(30):
        network(words())
    return network.eval()


def test_the_two_sizes_are_as_large_as_the_readme_says() -> None:
    teacher = Tagger(width=64, spelling=256, dilations=(1, 2, 4, 1))
    assert [sum(p.numel() for p in network.parameters()) for network in (teacher, Tagger())] == [92_464, 9_960]


def test_each_word_gets_a_class_whatever_the_length() -> None:
    network = Tagger(num_classes=5).eval()
    for length in (1, 7, 20):
        assert network(words(3, length)).shape == (3, length, 5)


def test_a_word_sees_the_neighbours_that_the_dilations_reach_and_no_others() -> None:
    network, plain = trained(), words(1)
    before = network(plain)
    for place in (3, 10):
        changed = plain.clone()
        changed[0, place] = (changed[0, place] + 1) % 29
        moved = (network(changed) - before).abs().amax(-1)[0] > 1e-6
        reached = torch.zeros(20, dtype=torch.bool)
        reached[place - 3 : place + 4] = True  # 1 + 2 words to each side
        assert torch.equal(moved, reached)


def test_the_layer_that_the_docstring_names_gives_one_vector_a_word() -> None:
    assert run(Tagger(), (words(),), {}, layers=("hidden",)).features["hidden"].shape == (6, 20, 24)


def test_no_dilation_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one dilation at least, got none"):
        Tagger(dilations=())


def test_it_is_served_in_integers(tmp_path: Path) -> None:
    network, example = trained(), words(64)
    expected = network(example).argmax(-1)
    export(network, example, tmp_path / "float.onnx")
    quantized = calibrate(prepare(network, QuantizationSpec()), [example])
    export(quantized, example, tmp_path / "int8.onnx", precision="int8", least_agreement=0.9)
    found = integer_operators(tmp_path / "int8.onnx")
    assert sum(found.integer.values()) == 5
    assert not found.floating
    for name in ("float", "int8"):
        (logits,) = in_onnxruntime(str(tmp_path / f"{name}.onnx"), 1).run(None, {"input": example.numpy()})
        same = np.mean(logits.argmax(-1) == expected.numpy())
        assert same == 1 if name == "float" else same > 0.9
