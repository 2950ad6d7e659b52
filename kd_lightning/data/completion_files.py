"""Completions of a language model as its API gave them, a line of JSON each: the tokens, and the k best beside each."""

import gzip
import json
import lzma
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

SENTINEL = -9999.0
"""What OpenAI and vLLM write for a token that is very unlikely, and for one they know nothing of."""
_ROUNDING = 1e-2  # of a sum of probabilities, each rounded for the file
_ASK = "ask for logprobs=true and top_logprobs=20 (chat completions) or logprobs=5 (text completions)"

Spelling: TypeAlias = bytes | int | None
"""A token's bytes; its number, where a server writes ``token_id:17``; None where neither is told."""


class Token(NamedTuple):
    """A token that was written, and what the model thought of it.

    Attributes:
        spelling: Its bytes or number.
        text: As the file has it, for errors.
        best: The most likely tokens in this place and their log-probabilities, this one among them where its own is
            told. None for the first token of an echoed prompt, before which there is nothing.
    """

    spelling: Spelling
    text: str
    best: Mapping[Spelling, float] | None


class Message(NamedTuple):
    """A message of a chat."""

    role: str
    content: str


class Completion(NamedTuple):
    """What was written after a prompt.

    Attributes:
        where: File and line.
        prompt: The text, or the messages of the chat; None where the tokens begin with the prompt (``echo``).
        tokens: In their order, without the empty ones in which some servers spell the end.
    """

    where: str
    prompt: str | Sequence[Message] | None
    tokens: Sequence[Token]


def read_completions(file: Path) -> Iterator[Completion]:
    r"""Read a file of completions: ``.jsonl``, also with ``.gz`` or ``.xz`` behind it.

    A line is one response, with the prompt (``prompt``, a text, or ``messages``) in it:

    - the response itself with the prompt beside its ``choices``;
    - ``{"request": {...}, "response": {...}}``, or ``"body"`` in place of ``"request"``;
    - of the batch API, ``{"custom_id": ..., "response": {"body": {...}}}`` with the prompt beside it, as the request's
      own line has it in ``"body"``.

    Each of the ``choices`` is a completion. Its ``logprobs`` are ``{"content": [{"token", "logprob", "bytes",
    "top_logprobs": [...]}]}``, of chats, and of texts too by llama.cpp; or ``{"tokens": [...], "token_logprobs": [...],
    "top_logprobs": [{token: logprob}]}``. There, with ``echo``, the first token has no log-probability: the prompt's
    tokens are read like the others, and no prompt is asked for.

    The log-probabilities have to be those at T = 1, before top-p and the like. OpenAI, vLLM
    (``logprobs_mode=raw_logprobs``) and llama.cpp (without ``post_sampling_probs``) give them so by default, whatever
    the temperature of the sampling. -9999, and less as by llama.cpp, stands for "not known", and is left out. Without
    ``bytes``, OpenAI's ``bytes:\xe2\x80`` is read as these, vLLM's ``token_id:17`` as a number, and a token with U+FFFD
    in it, part of a character, is not known.

    Raises:
        ValueError: With file and line, for a line that is torn, a request that failed, a missing prompt, missing
            log-probabilities, and such that are none: NaN, above 0, or of probabilities with a sum above 1.
    """
    number = 0
    try:
        with _opened(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from _read_line(line, f"{file}, line {number}")
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read beyond line {number} ({error}): write the file again") from error


def _opened(file: Path) -> IO[str]:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    opened: IO[str] = openers.get(file.suffix, open)(file, "rt", encoding="utf-8")
    return opened


def _read_line(text: str, where: str) -> Iterator[Completion]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is torn, or no JSON ({error}): write it again, or take it out") from error
    if not isinstance(line, Mapping):
        raise ValueError(f"{where} is a {type(line).__name__}, expected an object with 'choices' or 'response'")
    response = _response(line, where)
    choices = response.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"{where} has no choices, expected a response of completions, got {_keys(response)}")
    prompt = _prompt(line, where)
    for choice in choices:
        tokens = _tokens(choice, where)
        echoed = bool(tokens) and tokens[0].best is None
        if not echoed and prompt is None:
            raise ValueError(
                f"{where} has no prompt, expected 'prompt' or 'messages' beside the response: join a request and its "
                "response by custom_id"
            )
        yield Completion(where, None if echoed else prompt, [token for token in tokens if token.spelling != b""])


def _response(line: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    response = line if "choices" in line else line.get("response")
    status = response.get("status_code", 200) if isinstance(response, Mapping) else 200
    if isinstance(response, Mapping) and isinstance(response.get("body"), Mapping):
        response = response["body"]
    error = line.get("error") or (response.get("error") if isinstance(response, Mapping) else None)
    if error or status != 200:
        raise ValueError(f"{where} is a request that failed ({error or status}): send it again, or take it out")
    if not isinstance(response, Mapping):
        raise ValueError(f"{where} has no response, expected 'choices' or 'response', got {_keys(line)}")
    return response


def _prompt(line: Mapping[str, Any], where: str) -> str | Sequence[Message] | None:
    requests: list[Any] = [line, line.get("request"), line.get("body")]
    requests += [request.get("body") for request in requests[1:] if isinstance(request, Mapping)]
    for request in requests:
        if not isinstance(request, Mapping):
            continue
        if isinstance(request.get("messages"), list):
            return [_message(message, where) for message in request["messages"]]
        if "prompt" in request:
            if not isinstance(request["prompt"], str):
                raise ValueError(f"{where} has a prompt of {_kind(request['prompt'])}, expected one text a line")
            return request["prompt"]
    return None


def _message(message: Any, where: str) -> Message:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{where} has a message of {_kind(content)}, expected 'role' and a text as 'content'")
    return Message(str(message.get("role", "user")), content)


def _tokens(choice: Any, where: str) -> list[Token]:
    logprobs = choice.get("logprobs") if isinstance(choice, Mapping) else None
    if isinstance(logprobs, Mapping) and isinstance(logprobs.get("content"), list):
        return [_of_chat(entry, where) for entry in logprobs["content"]]
    if isinstance(logprobs, Mapping) and isinstance(logprobs.get("tokens"), list):
        return _of_text(logprobs, where)
    raise ValueError(f"{where} has no logprobs of its tokens, got {_kind(logprobs)}: {_ASK}")


def _of_chat(entry: Any, where: str) -> Token:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("token"), str):
        raise ValueError(f"{where} has {_kind(entry)} among its tokens, expected 'token', 'logprob' and 'top_logprobs'")
    own, *others = (
        (_spelling(one["token"], one.get("bytes"), where), one.get("logprob"))
        for one in (entry, *(entry.get("top_logprobs") or ()))
    )
    return Token(own[0], entry["token"], _known([*others, own], entry["token"], where))


def _of_text(logprobs: Mapping[str, Any], where: str) -> list[Token]:
    tokens, own = logprobs["tokens"], logprobs.get("token_logprobs")
    others = logprobs.get("top_logprobs") or [None] * len(tokens)
    if not isinstance(own, list) or not len(tokens) == len(own) == len(others):
        raise ValueError(f"{where} has {len(tokens)} tokens, expected as many token_logprobs and top_logprobs: {_ASK}")
    found = []
    for i, (token, log_prob, best) in enumerate(zip(tokens, own, others, strict=True)):
        spelling = _spelling(token, None, where)
        entries = [(_spelling(other, None, where), value) for other, value in (best or {}).items()]
        first = i == 0 and log_prob is None
        found.append(Token(spelling, token, None if first else _known([*entries, (spelling, log_prob)], token, where)))
    return found


def _known(entries: Iterable[tuple[Spelling, Any]], token: str, where: str) -> dict[Spelling, float]:
    """Return the log-probabilities by token; of tokens that are spelled alike, such as special ones, the first."""
    known: dict[Spelling, float] = {}
    unknown = 0.0  # the mass of tokens whose spelling is not told
    for spelling, value in entries:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{where} has no logprob at the token {token!r}, got {_kind(value)}: {_ASK}")
        if math.isnan(value) or value > _ROUNDING:
            raise ValueError(f"{where} has a logprob of {value} at the token {token!r}, expected 0 or less, at T = 1")
        if value <= SENTINEL:
            continue
        if spelling is None:
            unknown = max(unknown, math.exp(value))
        known.setdefault(spelling, min(float(value), 0.0))
    known.pop(None, None)
    mass = unknown + sum(map(math.exp, known.values()))
    if mass > 1 + _ROUNDING:
        raise ValueError(
            f"{where} has probabilities with a sum of {mass:.3g} at the token {token!r}, expected 1 at most: logprobs "
            "are natural logarithms, at T = 1"
        )
    return known


def _spelling(token: str, given: Any, where: str) -> Spelling:
    if re.fullmatch(r"token_id:\d+", token):
        return int(token.removeprefix("token_id:"))
    if given is not None:
        if not isinstance(given, list) or not all(isinstance(byte, int) and 0 <= byte < 256 for byte in given):
            raise ValueError(f"{where} has bytes {given!r} of the token {token!r}, expected numbers from 0 to 255")
        if "\ufffd" not in token or bytes(given) != token.encode():
            return bytes(given)
    if token.startswith("bytes:") and "\\x" in token:
        return token.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1")
    return None if "\ufffd" in token else token.encode()


def _keys(value: Mapping[str, Any]) -> list[str]:
    return sorted(value)[:8]


def _kind(value: Any) -> str:
    return f"{value!r}"[:40]
