"""What text models are made of: transformers' Conv1D, embeddings, recurrent layers; and what of it is quantised."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import load_student
from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.quantization import (
    QuantizationSpec,
    calibrate,
    prepare,
    quantized_layers,
    quantized_share,
    set_fake_quantization,
)
from tests.quantization.test_exportable import FLOAT, INTEGER, serve, write
from tests.tiny import trainer, weights

transformers = pytest.importorskip("transformers")
Conv1D = transformers.pytorch_utils.Conv1D
TOKENS = torch.randint(50, (32, 12), generator=torch.Generator().manual_seed(0))


def gpt2(seed: int = 0) -> nn.Module:
    seed_everything(seed, verbose=False)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, attn_pdrop=0.0, resid_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.recurrent, self.head = nn.Embedding(50, 8), nn.LSTM(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.recurrent(self.words(x))[0])


def rounded(weight: torch.Tensor, dim: int, largest: int = 63) -> torch.Tensor:
    scale = weight.abs().amax(1 - dim, keepdim=True) / largest
    return (weight / scale).round().clamp(-largest, largest) * scale


def test_a_conv1d_is_the_linear_layer_of_its_transposed_weight() -> None:
    seed_everything(0, verbose=False)
    conv, linear, x = Conv1D(6, 4), nn.Linear(4, 6), torch.randn(16, 3, 4)
    linear.load_state_dict({"weight": conv.weight.T, "bias": conv.bias})
    expected = conv(x)
    networks = [prepare(nn.Sequential(layer)) for layer in (conv, linear)]
    assert torch.equal(networks[0](x), expected)  # nothing is rounded yet
    for network in networks:
        calibrate(network, DataLoader(x, batch_size=4))
    torch.testing.assert_close(networks[0](x), networks[1](x))
    quantizer = networks[0][0].weight_quantizer
    torch.testing.assert_close(quantizer(networks[0][0].weight), rounded(conv.weight, 1))
    assert quantized_layers(networks[0])[0][1:] == ("Conv1D", 8, 8, "")
    again = pickle.loads(pickle.dumps(copy.deepcopy(networks[0])))
    assert torch.equal(again(x), networks[0](x))
    assert list(conv.state_dict())[:2] == ["weight", "bias"]


def test_an_embedding_is_rounded_row_by_row_where_that_is_asked() -> None:
    network = prepare(Tagger(), QuantizationSpec(embeddings=True))
    set_fake_quantization(network, True)
    x = TOKENS[:4]
    torch.testing.assert_close(network.words(x), F.embedding(x, rounded(network.words.weight, 0)))
    network.words(x).sum().backward()
    assert network.words.weight.grad.abs().sum(1).count_nonzero() == len(x.unique())
    assert [layer.kind for layer in quantized_layers(prepare(Tagger()))] == ["Linear"]
    first = prepare(Tagger(), QuantizationSpec(embeddings=True, skip=("first",)))
    assert type(first.words) is nn.Embedding
    for options in ({"max_norm": 1.0}, {"sparse": True}):  # whose forward, or gradient, is of the weight itself
        network = prepare(
            nn.Sequential(nn.Embedding(5, 4, **options), nn.Linear(4, 4)), QuantizationSpec(embeddings=True)
        )
        assert type(network[0]) is nn.Embedding


def test_the_share_of_parameters_tells_what_stays_in_float() -> None:
    share = quantized_share(prepare(Tagger()))
    assert (share.quantized, share.total) == (32, 32 + 4 + 400 + 576)
    assert list(share.in_float.items()) == [("LSTM", 576), ("Embedding", 400), ("bias", 4)]
    assert quantized_share(Tagger()).quantized == 0
    network = gpt2()
    own = sum(p.numel() for p in network.parameters())
    share = quantized_share(prepare(network, QuantizationSpec(learned_scales=True)))
    assert (share.total, share.quantized) == (own, own - sum(share.in_float.values()))
    assert share.in_float == {"bias": 288, "Embedding": 256, "LayerNorm": 160}  # of positions; the words are the head's
    assert quantized_share(prepare(gpt2(), QuantizationSpec(embeddings=True))).in_float == {
        "bias": 288,
        "LayerNorm": 160,
    }


class LanguageModel(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = gpt2()

    def training_step(self, batch, batch_idx):
        return self.net(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_gpt2_is_rounded_while_it_is_trained_and_its_float_weights_come_back(tmp_path, caplog) -> None:
    module = LanguageModel()
    names = list(module.state_dict())
    callback = QuantizationAwareTraining(QuantizationSpec(embeddings=True), student="net")
    it = trainer(callbacks=[callback])
    with caplog.at_level("INFO"):
        it.fit(module, DataLoader(TOKENS, batch_size=8))
    assert (
        "11 of 11 convolutions, linear layers and embeddings are quantised; transformer.wte, transformer.wpe "
        "(activations stay in float); these are 7,200 of 7,648 parameters (94.1%); in float stay: bias 288, "
        "LayerNorm 160"
    ) in caplog.text
    it.save_checkpoint(tmp_path / "last.ckpt")
    plain = LanguageModel()
    plain.load_state_dict(load_student(tmp_path / "last.ckpt"))
    assert list(plain.state_dict()) == names
    set_fake_quantization(module.net, False)
    assert torch.equal(plain.eval().net(TOKENS).logits, module.eval().net(TOKENS).logits)
    again = LanguageModel()
    trainer(callbacks=[QuantizationAwareTraining(QuantizationSpec(embeddings=True), student="net")], max_epochs=2).fit(
        again, DataLoader(TOKENS, batch_size=8), ckpt_path=tmp_path / "last.ckpt"
    )
    assert not torch.equal(weights(again)["net.lm_head.weight"], weights(plain)["net.lm_head.weight"])


def test_the_callback_says_which_share_a_recurrent_layer_keeps_in_float(caplog) -> None:
    class Tagging(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Tagger()

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with caplog.at_level("INFO"):
        trainer(callbacks=[QuantizationAwareTraining(student="net")]).fit(Tagging(), DataLoader(TOKENS, batch_size=8))
    assert "these are 32 of 1,012 parameters (3.2%); in float stay: LSTM 576, Embedding 400, bias 4" in caplog.text


def test_what_cannot_be_traced_says_why() -> None:
    class Looping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 1)

        def forward(self, x):
            for row in x:
                x = x + self.conv(row)
            return x

    note = quantized_layers(prepare(Looping()))[0].note
    why = "TraceError: Proxy object cannot be iterated"
    assert note == f"the network cannot be traced ({why}), so its output stays in float"


def test_the_file_holds_integers_of_conv1d_and_embedding(tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    seed_everything(0, verbose=False)
    network = nn.Sequential(nn.Embedding(50, 16), Conv1D(24, 16), nn.ReLU(), Conv1D(4, 24)).eval()
    calibrate(prepare(network, QuantizationSpec(embeddings=True)), DataLoader(TOKENS, batch_size=8))
    with torch.no_grad():
        expected = network(TOKENS)
    write(network, TOKENS, tmp_path / "model.onnx")
    found, operators = serve(tmp_path / "model.onnx", TOKENS, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert not operators.keys() & FLOAT
    assert sum(operators[name] for name in INTEGER) == 2
    stored = {x.name: x.data_type for x in onnx.load(tmp_path / "model.onnx").graph.initializer if len(x.dims) == 2}
    assert list(stored.values()) == [onnx.TensorProto.INT8] * 3
