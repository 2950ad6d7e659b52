"""Record kd_lightning/data/completions.jsonl.xz: what a character model writes after pieces of Hamlet.

As an API tells it, with the five best at each place. The model is the teacher of experiment=shakespeare/few_plays,
which has not read Hamlet:

    kd-lightning experiment=shakespeare/few_plays 'stages=[teacher]'
    python -m tests.benchmarks.record_completions mlruns/stages/teacher-*/final.ckpt completions.jsonl.xz
"""

import json
import lzma
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_lightning.checkpoint import load_weights
from kd_lightning.data import ShakespeareText
from kd_lightning.data.shakespeare import read_plays
from kd_lightning.models import GPT

COMPLETIONS, PROMPT, LENGTH, BEST = 480, 48, 80, 5
"""How many; characters of the prompt and of the completion, at most 128 together; alternatives at each place."""


def main(checkpoint: str, file: str) -> None:
    network = GPT(vocabulary=79, context=128, layers=3, heads=4, width=128)
    load_weights(network, Path(checkpoint))
    prompts = lines_of(read_plays()["hamlet"])
    tokenizer = ShakespeareText().tokenizer
    torch.manual_seed(0)
    tokens = torch.stack([torch.from_numpy(tokenizer.encode(prompt)).long() for prompt in prompts])
    written, log_probs = write(network.eval(), tokens)
    with lzma.open(file, "wt", encoding="utf-8", preset=9 | lzma.PRESET_EXTREME) as out:
        for prompt, ids, table in zip(prompts, written, log_probs, strict=True):
            entries = [_entry(tokenizer.decode, i, row) for i, row in zip(ids.tolist(), table, strict=True)]
            text = "".join(entry["token"] for entry in entries)
            choice = {"index": 0, "text": text, "logprobs": legacy(entries), "finish_reason": "length"}
            line = {"prompt": prompt, "response": {"object": "text_completion", "choices": [choice]}}
            out.write(json.dumps(line, separators=(",", ":")) + "\n")
    print(f"{file}: {written.numel():,} tokens, {Path(file).stat().st_size:,} bytes")


def lines_of(play: str) -> list[str]:
    """Return pieces of a play, PROMPT characters each, that end at different places of it."""
    ends = random.Random(0).sample(range(PROMPT, len(play)), COMPLETIONS)
    return [play[end - PROMPT : end] for end in sorted(ends)]


@torch.no_grad()
def write(network: GPT, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the next tokens from the model at T = 1: these (N, LENGTH), and all log-probabilities (N, LENGTH, V)."""
    cache: list[tuple[Tensor, Tensor]] = []
    new, found, told = tokens, [], []
    for _ in range(LENGTH):
        log_p = torch.log_softmax(network(new, cache)[:, -1].float(), -1)
        new = torch.multinomial(log_p.exp(), 1)
        found.append(new)
        told.append(log_p)
    return torch.cat(found, 1), torch.stack(told, 1)


def legacy(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the tokens into the form of text completions."""
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [entry["top_logprobs"] for entry in entries],
    }


def _entry(decode: Any, token: int, log_probs: Tensor) -> dict[str, Any]:
    best = log_probs.topk(BEST)
    top = {decode([i]): _rounded(value) for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
    return {"token": decode([token]), "logprob": _rounded(float(log_probs[token])), "top_logprobs": top}


def _rounded(value: float) -> float:
    return round(value, 2)


if __name__ == "__main__":
    main(*sys.argv[1:])
