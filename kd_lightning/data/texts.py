"""Texts as blocks of tokens, of which each is to be followed by the next."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_lightning.data.loaders import Batched
from kd_lightning.data.role_data import ROLES, RoleData
from kd_lightning.tasks.batch import IGNORE_INDEX
from kd_lightning.tokens import Tokenizer, read_tokenizer

_ROLES = ("teacher", "student", "validation", "test")
_SHARES = {"teacher": 0.7, "student": 0.1, "validation": 0.1, "test": 0.1}


class Blocks(Batched):
    """Windows over documents: a batch is the tokens (B, S), and for each the token that comes after it (B, S).

    No window goes over the end of a document; what is missing has target -100.

    Args:
        documents: Tokens of each, (n,).
        length: S, in tokens.
        stride: From one window's first token to the next one's.
        most: Keep so many windows at most, evenly over the documents; all unless given.
    """

    def __init__(self, documents: Sequence[Any], length: int, stride: int, most: int | None = None) -> None:
        self.length, self.stride = length, stride
        smallest = np.min_scalar_type(max((int(document.max()) for document in documents if len(document)), default=0))
        joined = np.concatenate([np.zeros(0, smallest), *documents], dtype=smallest, casting="unsafe")
        self.tokens = torch.from_numpy(joined.astype(np.int32) if smallest.itemsize > 1 else joined)
        ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
        starts = [self._begins(end - len(document), end) for document, end in zip(documents, ends, strict=True)]
        self.starts = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *starts]))
        self.ends = torch.from_numpy(np.repeat(ends, [len(some) for some in starts]))
        if most is not None and len(self.starts) > most:
            kept = torch.arange(most) * len(self.starts) // most
            self.starts, self.ends = self.starts[kept], self.ends[kept]

    def _begins(self, begin: int, end: int) -> Any:
        starts = np.arange(begin, end - 1, self.stride)
        # A window shows nothing new where the one before it has seen the end.
        return starts[(starts == begin) | (starts - self.stride + self.length < end - 1)]

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, samples: Sequence[int], epoch: int | None) -> tuple[Tensor, Tensor]:
        places = self.starts[samples][:, None] + torch.arange(self.length + 1)
        inside = places < self.ends[samples][:, None]
        tokens = self.tokens[places.clamp_max(len(self.tokens) - 1)].long().masked_fill(~inside, 0)
        return tokens[:, :-1], tokens[:, 1:].masked_fill(~inside[:, 1:], IGNORE_INDEX)

    def content(self) -> bytes:
        """Return all that a fingerprint depends on."""
        parts = (self.tokens, self.starts, self.ends)
        return f"{self.length} ".encode() + b"".join(part.numpy().tobytes() for part in parts)


class TextData(RoleData):
    """Documents by role, cut into blocks; a subclass has the documents.

    Args:
        tokens: ``characters``, ``bytes``, or the path of a ``tokenizer.json`` of Hugging Face's library.
        context: Tokens of a block, and so of the longest context that a network sees.
        stride: From one block's first token to the next one's, in training; half of ``context`` unless given. Blocks
            for validation and test do not overlap: each token is judged once.
        eval_blocks: The most blocks for validation, and for test, evenly over the text; all unless given.
        cross_documents: Let blocks go over the ends of documents, which are then read as one.
        batch_size: Blocks of a training batch.
        eval_batch_size: Blocks of a batch for validation and test.
        num_workers: Processes that load.
        role: Whose training it is: ``teacher``, ``student``, ``control``, ``distilled``.
        seed: Of the order of the blocks, together with the epoch.

    Raises:
        ValueError: For a context below 2 or a stride below 1.
    """

    def __init__(
        self,
        tokens: str = "characters",
        context: int = 128,
        stride: int | None = None,
        cross_documents: bool = False,
        eval_blocks: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        role: str = "distilled",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, role, seed)
        stride = stride if stride is not None else max(1, context // 2)
        if context < 2 or not 1 <= stride <= context:
            raise ValueError(
                f"expected a context of 2 tokens or more and a stride from 1 to it, got {context} and {stride}: 128 "
                "and 64 are some three lines"
            )
        if eval_blocks is not None and eval_blocks < 1:
            raise ValueError(f"expected eval_blocks of 1 or more, got {eval_blocks}: null takes all")
        self.tokens, self.context, self.stride, self.cross_documents = tokens, context, stride, cross_documents
        self.eval_blocks = eval_blocks
        self._tokenizer: Tokenizer | None = None

    def files_read(self) -> list[Path]:
        return [] if self.tokens in ("characters", "bytes") else [Path(self.tokens)]

    def documents(self) -> Mapping[str, Sequence[str]]:
        """Return the documents by role: ``teacher``, ``student``, ``validation``, ``test``."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Tokenizer:
        """What cuts the texts into tokens."""
        self.setup()
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def token_counts(self) -> dict[str, int]:
        """Tokens of each role's documents."""
        self.setup()
        return {role: len(blocks.tokens) for role, blocks in self._subsets.items()}

    @property
    def test_groups(self) -> tuple[list[str], list[int]]:
        """The test's documents, and which of them each block is of."""
        ends = self.subset("test").ends
        documents, of_block = ends.unique(return_inverse=True)
        return [f"document {i + 1}" for i in range(len(documents))], of_block.tolist()

    @property
    def described(self) -> dict[str, str | int]:
        """Tokens by role, for the tracking."""
        return {f"tokens/{role}": count for role, count in self.token_counts.items()}

    def make_tokenizer(self, texts: Sequence[str]) -> Tokenizer:
        """Return what cuts texts into tokens; of characters those that the texts of all roles have."""
        return read_tokenizer(self.tokens, texts)

    def load_subsets(self) -> dict[str, Blocks]:
        documents = self.documents()
        every = [text for texts in documents.values() for text in texts]
        tokenizer = self._tokenizer = self.make_tokenizer(every)
        found = {}
        for role, texts in documents.items():
            ids = [tokenizer.encode(text) for text in texts]
            if self.cross_documents:
                ids = [np.concatenate(ids)] if ids else []
            if role in ROLES:
                found[role] = Blocks(ids, self.context, self.stride)
            else:
                found[role] = Blocks(ids, self.context, self.context, self.eval_blocks)
        return found

    def training_set(self) -> Blocks:
        if self.role == "teacher" and "teacher" not in self.counts:
            raise ValueError(
                "expected texts for a teacher that is trained, got none: give files for the role, or leave its stage "
                "out"
            )
        training: Blocks = self.subset("teacher" if self.role == "teacher" else "student")
        return training


class TextFiles(TextData):
    """Text files of one's own, in UTF-8.

    A file is a document; with ``separator``, so is what stands between two lines of that text. Where no roles are
    given, the documents are divided in their order by ``shares`` of their characters, and one that lies on a border is
    cut there: no character is in two roles.

    Args:
        files: Paths; or lists of paths by role: ``teacher``, ``student``, ``validation``, ``test``. The teacher's may
            be missing where none is trained, as with :class:`~kd_lightning.data.Completions`.
        shares: Of the characters, by role, where ``files`` names none.
        separator: A line between two documents, such as ``<|endoftext|>``.
        share_texts: Let the student train on the teacher's texts, too.
        options: Of :class:`TextData`.

    Raises:
        ValueError: For a file that is not there, is not UTF-8 or is empty, for a role without text, one file in two
            roles, and shares that do not sum to 1.
    """

    def __init__(
        self,
        files: Sequence[str] | Mapping[str, Sequence[str]],
        shares: Mapping[str, float] | None = None,
        separator: str | None = None,
        share_texts: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.files, self.separator, self.share_texts = files, separator, share_texts
        self.shares = dict(_SHARES if shares is None else shares)
        if isinstance(files, Mapping):
            _check_roles(files, share_texts)
        elif (
            set(self.shares) != set(_ROLES)
            or abs(sum(self.shares.values()) - 1) > 1e-6
            or min(self.shares.values()) <= 0
        ):
            raise ValueError(
                f"expected shares > 0 of {', '.join(_ROLES)} that sum to 1, got {self.shares}: such as {_SHARES}"
            )
        every = [file for some in (files.values() if isinstance(files, Mapping) else [files]) for file in some]
        if not every:
            raise ValueError("expected text files, got none: data.files=[a.txt,b.txt]")
        for file in every:
            if not Path(file).is_file():
                raise ValueError(
                    f"there is no text file {file}: data.files=[a.txt,b.txt] names files, relative to here"
                )

    def files_read(self) -> list[Path]:
        by_role = self.files.values() if isinstance(self.files, Mapping) else [self.files]
        return [*super().files_read(), *(Path(file) for files in by_role for file in files)]

    def documents(self) -> dict[str, list[str]]:
        if isinstance(self.files, Mapping):
            found = {role: [text for file in files for text in self._read(file)] for role, files in self.files.items()}
        else:
            found = divided([text for file in self.files for text in self._read(file)], self.shares)
        if self.share_texts:
            found["student"] = [*found["teacher"], *found["student"]]
        found = {role: found[role] for role in _ROLES if role in found}
        for role, texts in found.items():
            if sum(map(len, texts)) < 2:
                raise ValueError(f"expected text for the role {role}, got none: give more files, or a larger share")
        return found

    def _read(self, file: str) -> list[str]:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error}): convert it, iconv -f LATIN1 -t UTF-8") from error
        if not text:
            raise ValueError(f"{file} is empty, expected a text: leave it out")
        if self.separator is None:
            return [text]
        documents = [part.strip("\n") for part in f"\n{text}\n".split(f"\n{self.separator}\n")]
        return [part for part in documents if part]


def divided(documents: Sequence[str], shares: Mapping[str, float]) -> dict[str, list[str]]:
    """Divide documents by shares of their characters, in their order.

    >>> divided(["abcdef", "gh"], {"teacher": 0.5, "student": 0.5})
    {'teacher': ['abcd'], 'student': ['ef', 'gh']}
    """
    total, done, found = sum(map(len, documents)), 0, dict[str, list[str]]()
    borders = np.cumsum(list(shares.values())) * total
    for role, share, border in zip(shares, shares.values(), borders, strict=True):
        begin, end, found[role] = round(border - share * total), round(border), []
        done = 0
        for document in documents:
            part = document[max(0, begin - done) : max(0, end - done)]
            done += len(document)
            if part:
                found[role].append(part)
    return found


def _check_roles(files: Mapping[str, Sequence[str]], share_texts: bool) -> None:
    if {*files, *([] if share_texts else ["teacher"])} != set(_ROLES):
        raise ValueError(
            f"expected files by role, {', '.join(_ROLES)}, got {', '.join(files)}: the teacher's alone may be missing, "
            "where none is trained"
        )
    seen: dict[str, str] = {}
    for role, some in files.items():
        for file in some:
            content = hashlib.sha256(Path(file).read_bytes()).hexdigest() if Path(file).is_file() else file
            if seen.setdefault(content, role) != role:
                raise ValueError(
                    f"{file} is a text of {seen[content]} and of {role}, expected each text in one role: "
                    "share_texts=true lets the student have the teacher's"
                )
