"""Texts that a network writes: the same with and without a cache, drawn as the network has them."""

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.models import GPT
from kd_lightning.writing import remembers, write


class WithoutCache(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        return self.network(tokens)


def gpt(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(vocabulary=9, context=16, layers=2, heads=2, width=16, dropout=dropout)


def prompt(count: int = 3, length: int = 4) -> Tensor:
    return torch.randint(9, (count, length), generator=torch.Generator().manual_seed(0))


def uniform(count: int = 3, length: int = 12) -> Tensor:
    return torch.rand(count, length, generator=torch.Generator().manual_seed(1))


def test_a_cache_changes_no_text() -> None:
    network = gpt()
    assert (remembers(network), remembers(WithoutCache(network))) == (True, False)
    text = write(network, prompt(), uniform())
    assert text.shape == (3, 16)
    assert torch.equal(text[:, :4], prompt())
    assert torch.equal(text, write(WithoutCache(network), prompt(), uniform()))


def test_models_of_transformers_write_with_their_own_cache() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=9, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    network = transformers.GPT2LMHeadModel(config)
    assert remembers(network)

    class Plain(WithoutCache):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.network(input_ids=tokens).logits

    assert torch.equal(write(network, prompt(), uniform()), write(Plain(network), prompt(), uniform()))


def test_tokens_are_drawn_as_the_network_has_them_at_the_temperature() -> None:
    class Constant(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.tensor([0.2, 0.8]).log().expand(*tokens.shape, 2)

    many = torch.rand(200, 100, generator=torch.Generator().manual_seed(2))
    for temperature, share in ((1.0, 0.8), (2.0, 2 / 3)):
        text = write(Constant(), torch.zeros(200, 1).long(), many, temperature)[:, 1:]
        assert text.double().mean() == pytest.approx(share, abs=0.012)  # four standard errors
    assert bool((write(Constant(), torch.zeros(2, 1).long(), many[:2], 0.0)[:, 1:] == 1).all())


def test_the_network_is_left_as_it_was() -> None:
    """In training mode, with dropout that does not disturb the text, and without a gradient."""
    network = gpt(dropout=0.5).train()
    network.blocks[0].eval()
    expected = [module.training for module in network.modules()]
    text = write(network, prompt(), uniform())
    assert [module.training for module in network.modules()] == expected
    assert torch.equal(text, write(network.eval(), prompt(), uniform()))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_prompts_and_numbers_that_do_not_fit_are_refused() -> None:
    for wrong in ((prompt()[0], uniform()), (prompt(2), uniform(3)), (prompt(length=0), uniform())):
        with pytest.raises(ValueError, match=r"expected prompts \(B, P\) and numbers \(B, n\)"):
            write(gpt(), *wrong)
    with pytest.raises(ValueError, match="expected temperature >= 0, got -1"):
        write(gpt(), prompt(), uniform(), -1.0)
