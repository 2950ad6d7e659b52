"""Tiny models of ``transformers`` with random weights, and a text of which each token tells the next."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

VOCABULARY, LENGTH = 11, 12
CAUSAL = ("GPT2", "Llama", "Qwen2")


def transformers() -> Any:
    """Skip where the package is not installed."""
    return pytest.importorskip("transformers", exc_type=ImportError)


def network(kind: str = "GPT2", head: str = "LMHeadModel", seed: int = 0, width: int = 16, **options: Any) -> Any:
    """Return a model of a kind: GPT2, Llama, Qwen2, Bert or T5."""
    package = transformers()
    size: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "GPT2":
        size |= {"n_positions": 32, "n_embd": width, "n_layer": 2, "n_head": 2}
        size |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    elif kind == "T5":
        size |= {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
        size |= {"decoder_start_token_id": 0}
    else:
        size |= {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        size |= {"max_position_embeddings": 32}
        if kind == "Bert":
            size |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        else:
            size |= {"num_key_value_heads": 1}
    if head == "LMHeadModel" and kind in ("Llama", "Qwen2"):
        head = "ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(package, kind + head)(getattr(package, f"{kind}Config")(**size | options)).eval()


def counting(count: int = 8, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Texts in which each token is the one before it plus one, from 1 to the last of the vocabulary, and again."""
    first = torch.randint(VOCABULARY - 1, (count, 1), generator=torch.Generator().manual_seed(seed))
    return 1 + (first + torch.arange(length)) % (VOCABULARY - 1)


@functools.cache
def _perfect_weights(kind: str) -> dict[str, Tensor]:
    teacher, texts = network(kind).train(), counting(32)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        teacher(input_ids=texts, labels=texts).loss.backward()
        optimizer.step()
    return teacher.state_dict()


def perfect(kind: str = "GPT2") -> Any:
    """A causal model that gives the next token of :func:`counting` the highest logit everywhere."""
    teacher = network(kind)
    teacher.load_state_dict(_perfect_weights(kind))
    return teacher.eval()
