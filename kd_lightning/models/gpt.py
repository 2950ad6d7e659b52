"""A plain decoder of text: Language Models are Unsupervised Multitask Learners (Radford et al., 2019).

https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
"""

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache: TypeAlias = list[tuple[Tensor, Tensor]]
"""Keys and values of each block, (B, heads, P, width / heads), for the P tokens that were seen."""


class GPT(nn.Module):
    """Blocks of causal attention and a perceptron, each after a layer norm and beside a shortcut.

    The head's weight is the table of embeddings (Press & Wolf, EACL 2017, https://arxiv.org/abs/1608.05859).

    Args:
        vocabulary: Different tokens; ``data=shakespeare`` has 79.
        context: The most tokens that it takes.
        layers: Blocks.
        heads: Of each attention.
        width: Of a token's state.
        dropout: On embeddings and on what each block adds.

    Shape: int64 (B, S), S ≤ context, to (B, S, vocabulary). Layers to tap: ``blocks.<i>`` and ``norm``, (B, S, width).

    Raises:
        ValueError: For a width that the heads do not divide.
    """

    def __init__(
        self,
        vocabulary: int = 79,
        context: int = 128,
        layers: int = 2,
        heads: int = 4,
        width: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"expected a width that {heads} heads divide, got {width}: such as {heads * (width // heads)}"
            )
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # what each block adds is scaled, so that their sum does not grow with their number
                added = name.endswith(("projection.weight", "contraction.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if added else 0.02)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the logits of the token after each.

        Args:
            tokens: (B, S); with a cache, those after the P tokens that it has seen.
            cache: Is extended by these tokens; an empty list at first.
        """
        seen = cache[0][0].shape[2] if cache else 0
        if not torch.compiler.is_compiling() and seen + tokens.shape[1] > self.context:
            raise ValueError(
                f"expected {self.context} tokens at most, got {seen + tokens.shape[1]}: cut the text, or make the "
                "network with a larger context"
            )
        places = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)
        x = self.dropout(self.embedding(tokens) + self.positions(places))
        for place, block in enumerate(self.blocks):
            x = block(x, cache, place)
        logits: Tensor = self.head(self.norm(x))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.perceptron_norm = nn.LayerNorm(width)
        self.expansion = nn.Linear(width, 4 * width)
        self.activation = nn.GELU()
        self.contraction = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: Cache | None = None, place: int = 0) -> Tensor:
        three = self.attention(self.attention_norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in three)
        mask = None
        if cache is not None:
            if place < len(cache):
                k, v = torch.cat([cache[place][0], k], 2), torch.cat([cache[place][1], v], 2)
                seen = k.shape[2] - q.shape[2]
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(seen)
            cache[place : place + 1] = [(k, v)]
        attended = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        x = x + self.dropout(self.projection(attended.transpose(1, 2).flatten(2)))
        added: Tensor = self.contraction(self.activation(self.expansion(self.perceptron_norm(x))))
        return torch.add(x, self.dropout(added))
