"""What a text is cut into: characters, bytes, or the tokens of a Hugging Face tokenizer."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer[Any]]


class Tokenizer(Protocol):
    """Cuts a text into tokens, by number.

    Attributes:
        size: How many different tokens there are.
    """

    @property
    def size(self) -> int: ...

    def encode(self, text: str) -> Ids:
        """Return the tokens of a text: (S,)."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""

    def token(self, text: str) -> int | None:
        """Return the token that stands for a text; None where one alone does not."""

    def lengths(self, per: str) -> NDArray[np.int64]:
        """Return the number of characters, bytes or tokens (``per``) that each token stands for: (size,)."""


class Characters:
    """One token for each character.

    Args:
        symbols: All characters, by number.

    Raises:
        ValueError: For a character that is there twice, or none at all.

    Example:
        >>> Characters.of(["to be"]).encode("be").tolist()
        [1, 2]
    """

    def __init__(self, symbols: str) -> None:
        if not symbols or len(set(symbols)) < len(symbols):
            raise ValueError(f"expected different characters, one at least, got {symbols!r}")
        self.symbols = symbols
        self._ids = {symbol: i for i, symbol in enumerate(symbols)}

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Characters":
        """Return those of some texts, in the order of Unicode."""
        return cls("".join(sorted(set().union(*map(set, texts)))))

    @property
    def size(self) -> int:
        return len(self.symbols)

    def encode(self, text: str) -> Ids:
        """Return the tokens of a text: (S,).

        Raises:
            ValueError: For a character that is none of the symbols, with its place.
        """
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        table = np.full(max(map(ord, self.symbols)) + 2, -1, np.int32)
        for symbol, i in self._ids.items():
            table[ord(symbol)] = i
        ids = table[np.minimum(points, len(table) - 1)]
        if (ids < 0).any():
            place = int((ids < 0).argmax())
            raise ValueError(
                f"the character {text[place]!r} (at {place}, after {text[max(0, place - 20) : place]!r}) is none of "
                f"the {self.size} symbols: leave it out of the text, or give symbols that have it"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.symbols[i] for i in ids)

    def token(self, text: str) -> int | None:
        return self._ids.get(text)

    def lengths(self, per: str) -> NDArray[np.int64]:
        return np.array([len(symbol.encode()) if per == "byte" else 1 for symbol in self.symbols])


class Bytes:
    """One token for each byte of UTF-8: 256, whatever the text.

    >>> Bytes().encode("hé").tolist()
    [104, 195, 169]
    """

    size = 256

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def token(self, text: str) -> int | None:
        encoded = text.encode()
        return encoded[0] if len(encoded) == 1 else None

    def lengths(self, per: str) -> NDArray[np.int64]:
        # A character's bytes after its first are 10xxxxxx.
        return np.array([per != "character" or not 0x80 <= byte < 0xC0 for byte in range(256)], np.int64)


class HuggingFace:
    """A tokenizer of Hugging Face's ``tokenizers`` library, read from its file.

    Args:
        file: ``tokenizer.json``.

    Raises:
        ImportError: Without the library.
        ValueError: For a file that is none.
    """

    def __init__(self, file: str | Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise ImportError(
                "a tokenizer's file is read by the tokenizers library, which is not installed: pip install tokenizers"
            ) from error
        if not Path(file).is_file():
            raise ValueError(f"there is no tokenizer's file {file}: expected 'characters', 'bytes' or tokenizer.json")
        try:
            self._library: Any = Library.from_file(str(file))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(
                f"{file} is no file of the tokenizers library ({error}): expected a tokenizer.json"
            ) from error

    @property
    def size(self) -> int:
        return int(self._library.get_vocab_size())

    def encode(self, text: str) -> Ids:
        return np.array(self._library.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids), skip_special_tokens=False))

    def token(self, text: str) -> int | None:
        ids = self.encode(text)
        return int(ids[0]) if len(ids) == 1 and self.decode([int(ids[0])]) == text else None

    def lengths(self, per: str) -> NDArray[np.int64]:
        texts = [self.decode([i]) for i in range(self.size)]
        return np.array(
            [len(text.encode()) if per == "byte" else len(text) if per == "character" else 1 for text in texts]
        )


def read_tokenizer(name: str, texts: Iterable[str] = ()) -> Tokenizer:
    """Return a tokenizer by name.

    Args:
        name: ``characters``, ``bytes``, or the path of a ``tokenizer.json``.
        texts: Whose characters these are.

    Raises:
        ValueError: For a path without a file, and characters of no text.
    """
    if name == "bytes":
        return Bytes()
    return Characters.of(texts) if name == "characters" else HuggingFace(name)
