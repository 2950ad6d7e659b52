"""What a text is cut into: characters, bytes, or the tokens of a Hugging Face tokenizer."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
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

    def spellings(self) -> Sequence[bytes | None]:
        """Return the bytes that each token stands for, by number; None where they are not known."""

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

    def spellings(self) -> list[bytes]:
        return [symbol.encode() for symbol in self.symbols]

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

    def spellings(self) -> list[bytes]:
        return [bytes([byte]) for byte in range(256)]

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

    def spellings(self) -> list[bytes | None]:
        """Return the bytes that each token stands for, by number; None where they are not known.

        Decoding one token alone does not tell: it drops a leading space, or shows a part of a character as U+FFFD.
        """
        kinds = _decoders(json.loads(self._library.to_str())["decoder"])
        special = {i: token.content for i, token in self._library.get_added_tokens_decoder().items()}
        found: list[bytes | None] = [None] * self.size
        for token, i in self._library.get_vocab(with_added_tokens=True).items():
            if i < len(found):
                found[i] = special[i].encode() if i in special else _spelling(token, kinds)
        return found

    def lengths(self, per: str) -> NDArray[np.int64]:
        texts = [self.decode([i]) for i in range(self.size)]
        return np.array(
            [len(text.encode()) if per == "byte" else len(text) if per == "character" else 1 for text in texts]
        )


def _decoders(decoder: Any) -> dict[str, Any]:
    """Return what a tokenizer's file says of its decoders, by type."""
    if decoder is None:
        return {}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return {step["type"]: step for step in steps}


def _spelling(token: str, decoders: Mapping[str, Any]) -> bytes | None:
    if "ByteLevel" in decoders:
        return bytes(_BYTES[symbol] for symbol in token) if all(symbol in _BYTES for symbol in token) else None
    if "ByteFallback" in decoders and re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    if "WordPiece" in decoders:
        return None  # whether a space stands before it depends on its neighbours
    return token.replace("\u2581", " ").encode() if {"Metaspace", "Replace"} & set(decoders) else token.encode()


def _byte_symbols() -> dict[str, int]:
    """Return the byte that each symbol of a byte-level vocabulary stands for: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_symbols()


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
