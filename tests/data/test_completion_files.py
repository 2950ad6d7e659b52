import gzip
import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.data.completion_files import Completion, Message, read_completions

HALF, QUARTER = math.log(0.5), math.log(0.25)
# As servers write them, cut to what is read and a little of what is not.
CHAT: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "né"},
            "logprobs": {
                "content": [
                    {
                        "token": "n",
                        "logprob": HALF,
                        "bytes": [110],
                        "top_logprobs": [
                            {"token": "n", "logprob": HALF, "bytes": [110]},
                            {"token": "m", "logprob": QUARTER, "bytes": [109]},
                            {"token": "x", "logprob": -9999.0, "bytes": [120]},
                        ],
                    },
                    {"token": "é", "logprob": -0.25, "bytes": [195, 169], "top_logprobs": []},
                ],
                "refusal": None,
            },
            "finish_reason": "stop",
        }
    ],
    "usage": {"completion_tokens": 2},
}
TEXT: dict[str, Any] = {
    "object": "text_completion",
    "choices": [
        {
            "text": "to be",
            "logprobs": {
                "tokens": ["to", " be"],
                "token_logprobs": [QUARTER, HALF],
                "top_logprobs": [{"it": HALF, "to": QUARTER}, {" be": HALF}],
                "text_offset": [3, 5],
            },
        }
    ],
}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]


def read(folder: Path, *lines: Any) -> list[Completion]:
    file = folder / "c.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return list(read_completions(file))


def changed(response: dict, **changes: Any) -> dict:
    """A response with other logprobs."""
    copy = json.loads(json.dumps(response))
    copy["choices"][0]["logprobs"] |= changes
    return copy


def test_a_chat_is_read_with_its_bytes_and_best_tokens(tmp_path: Path) -> None:
    (found,) = read(tmp_path, {**CHAT, "messages": MESSAGES})
    assert found.where == f"{tmp_path / 'c.jsonl'}, line 1"
    assert found.prompt == [Message("system", "Be brief."), Message("user", "Hi")]
    assert [token.spelling for token in found.tokens] == [b"n", "é".encode()]
    assert found.tokens[0].best == {b"n": HALF, b"m": QUARTER}  # the sentinel is left out
    assert found.tokens[1].best == {"é".encode(): -0.25}  # what was written is known without being among the best


def test_a_text_completion_is_read(tmp_path: Path) -> None:
    (found,) = read(tmp_path, {**TEXT, "prompt": "or "})
    assert found.prompt == "or "
    assert [token.spelling for token in found.tokens] == [b"to", b" be"]
    assert [token.best for token in found.tokens] == [{b"it": HALF, b"to": QUARTER}, {b" be": HALF}]


def test_the_prompt_of_an_echo_is_in_its_tokens(tmp_path: Path) -> None:
    echo = {
        "tokens": ["or", " ", "to"],
        "token_logprobs": [None, HALF, HALF],
        "top_logprobs": [None, {" ": HALF}, {"to": HALF}],
    }
    (found,) = read(tmp_path, {**changed(TEXT, **echo), "prompt": "or "})
    assert found.prompt is None
    assert [(token.spelling, token.best) for token in found.tokens] == [
        (b"or", None),
        (b" ", {b" ": HALF}),
        (b"to", {b"to": HALF}),
    ]


@pytest.mark.parametrize(
    "line",
    [
        {"request": {"prompt": "or "}, "response": TEXT},
        {"body": {"prompt": "or "}, "response": TEXT},
        {"request": {"body": {"prompt": "or "}}, "response": TEXT},
        {"custom_id": "1", "prompt": "or ", "response": {"status_code": 200, "body": TEXT}, "error": None},
        {"custom_id": "1", "body": {"prompt": "or "}, "response": {"status_code": 200, "body": TEXT}},
    ],
)
def test_a_request_is_read_with_its_response(tmp_path: Path, line: dict) -> None:
    (found,) = read(tmp_path, line)
    assert (found.prompt, len(found.tokens)) == ("or ", 2)


def test_each_choice_is_a_completion(tmp_path: Path) -> None:
    found = read(
        tmp_path, {"prompt": "a", "choices": [*TEXT["choices"], *CHAT["choices"]]}, "", {**TEXT, "prompt": "b"}
    )
    assert [(one.prompt, one.where[-6:], len(one.tokens)) for one in found] == [
        ("a", "line 1", 2),
        ("a", "line 1", 2),
        ("b", "line 3", 2),
    ]


def test_what_servers_write_otherwise_is_read(tmp_path: Path) -> None:
    lowest = -3.4028234663852886e38  # llama.cpp, of a probability of 0
    entries = [
        {"id": 7, "token": "", "bytes": [195], "logprob": HALF, "top_logprobs": [{"token": "b", "logprob": lowest}]},
        {"token": "\ufffd", "bytes": [239, 191, 189], "logprob": HALF, "top_logprobs": []},  # vLLM: not its bytes
        {"token": "token_id:17", "logprob": HALF, "top_logprobs": [{"token": "token_id:18", "logprob": HALF}]},
        {"token": "bytes:\\xe2\\x80", "logprob": HALF, "top_logprobs": []},
        {"token": "", "bytes": [], "logprob": HALF, "top_logprobs": []},  # the end
    ]
    (found,) = read(tmp_path, {**changed(CHAT, content=entries), "prompt": "a"})
    assert [token.spelling for token in found.tokens] == [b"\xc3", None, 17, b"\xe2\x80"]
    assert [token.best for token in found.tokens] == [
        {b"\xc3": HALF},
        {},
        {18: HALF, 17: HALF},
        {b"\xe2\x80": HALF},
    ]


@pytest.mark.parametrize(("suffix", "write"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_compressed_files_are_read_and_torn_ones_named(tmp_path: Path, suffix: str, write: Any) -> None:
    file = tmp_path / f"c.jsonl{suffix}"
    with write(file, "wt", encoding="utf-8") as lines:
        for i in range(200):
            lines.write(json.dumps({**TEXT, "prompt": str(i)}) + "\n")
    assert [one.prompt for one in read_completions(file)] == list(map(str, range(200)))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"c.jsonl{suffix} cannot be read beyond line \d+ \(.+\): write the file"):
        list(read_completions(file))


def with_first(**changes: Any) -> dict:
    return {**changed(CHAT, content=[CHAT["choices"][0]["logprobs"]["content"][0] | changes]), "prompt": "a"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "choi', "line 2 is torn, or no JSON"),
        ("[1]", "line 2 is a list, expected an object with 'choices' or 'response'"),
        ({"prompt": "a", "choices": []}, "line 2 has no choices"),
        ({"custom_id": "1", "response": None, "error": {"code": "late"}}, r"line 2 is a request that failed \(.*late"),
        ({"response": {"status_code": 429, "body": {}}}, r"line 2 is a request that failed \(429\)"),
        ({"custom_id": "1"}, r"line 2 has no response, expected 'choices' or 'response', got \['custom_id'\]"),
        (TEXT, "line 2 has no prompt, expected 'prompt' or 'messages' beside the response"),
        ({**TEXT, "prompt": ["a", "b"]}, "line 2 has a prompt of .*expected one text a line"),
        ({**TEXT, "messages": [{"role": "user", "content": None}]}, "line 2 has a message of None"),
        (
            {"prompt": "a", "choices": [{"text": "b", "logprobs": None}]},
            "line 2 has no logprobs of its tokens, got None",
        ),
        (
            {**changed(TEXT, token_logprobs=[0.0]), "prompt": "a"},
            "line 2 has 2 tokens, expected as many token_logprobs",
        ),
        ({**changed(TEXT, token_logprobs=[HALF, None]), "prompt": "a"}, "line 2 has no logprob at the token ' be'"),
        (with_first(logprob=None), "line 2 has no logprob at the token 'n', got None: ask for logprobs=true"),
        (with_first(logprob=math.nan), "line 2 has a logprob of nan at the token 'n', expected 0 or less"),
        (with_first(logprob=0.5), "line 2 has a logprob of 0.5 at the token 'n', expected 0 or less"),
        (with_first(bytes=[300]), r"line 2 has bytes \[300\] of the token 'n'"),
        (
            with_first(top_logprobs=[{"token": "m", "logprob": -0.1}, {"token": "x", "logprob": -0.2}]),
            "line 2 has probabilities with a sum of 2.22 at the token 'n', expected 1 at most",
        ),
    ],
)
def test_a_line_that_cannot_be_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"c.jsonl, {message}"):
        read(tmp_path, {**TEXT, "prompt": "fine"}, line)


def test_rounded_probabilities_are_read(tmp_path: Path) -> None:
    (found,) = read(tmp_path, with_first(logprob=-0.01, top_logprobs=[{"token": "m", "logprob": -4.57}]))
    assert found.tokens[0].best == {b"m": -4.57, b"n": -0.01}
    (found,) = read(tmp_path, with_first(logprob=1e-6, top_logprobs=[]))
    assert found.tokens[0].best == {b"n": 0.0}
