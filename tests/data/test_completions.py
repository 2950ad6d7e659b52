import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kd_lightning import DistillationModule
from kd_lightning.data import Completions, TextFiles
from kd_lightning.data.completions import Passage, Written
from kd_lightning.losses import HardLabel, TopKKL
from kd_lightning.models import GPT
from kd_lightning.outputs import Outputs, TopK
from kd_lightning.tasks import LanguageModelling
from kd_lightning.teachers import FromBatch
from tests.tiny import trainer

HALF, QUARTER = math.log(0.5), math.log(0.25)
TEXTS = {
    "teacher": "abcdefgh \n" * 3,
    "student": "hg fe dc ba\n" * 9,
    "validation": "ab cd ef gh\n" * 5,
    "test": "ha hb hc hd\n" * 5,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for role, text in TEXTS.items():
        (tmp_path / f"{role}.txt").write_text(text)
    return tmp_path


def texts(folder: Path, **options: Any) -> TextFiles:
    files = {role: [str(folder / f"{role}.txt")] for role in TEXTS}
    return TextFiles(**{"files": files, "tokens": "characters", "context": 8, "batch_size": 4, **options})


def line(prompt: str, *tokens: tuple[str, dict[str, float]]) -> dict[str, Any]:
    logprobs = {
        "tokens": [token for token, _ in tokens],
        "token_logprobs": [best.get(token, -3.0) for token, best in tokens],
        "top_logprobs": [best for _, best in tokens],
    }
    return {"prompt": prompt, "choices": [{"logprobs": logprobs}]}


def made(folder: Path, *lines: dict[str, Any], text_options: Any = None, **options: Any) -> Completions:
    file = folder / "c.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return Completions(texts(folder, **(text_options or {})), [str(file)], **options)


def test_the_best_tokens_stand_at_the_place_before_the_next_one(folder: Path) -> None:
    data = made(folder, line("ab", ("c", {"c": HALF, "d": QUARTER}), ("e", {"f": HALF})))
    tokens, target, best = data.subset("unlabelled")[0]
    text = data.tokenizer.decode
    assert text(tokens.tolist()) == "abc"
    assert target.tolist() == [-100, *data.tokenizer.encode("ce").tolist()]
    told = [
        {text([i]): p for i, p in zip(*pair, strict=True) if p > -math.inf}
        for pair in zip(best["indices"].tolist(), best["log_probs"].tolist(), strict=True)
    ]
    assert told == [{}, {"c": pytest.approx(HALF), "d": pytest.approx(QUARTER)}, {"f": pytest.approx(HALF), "e": -3.0}]


def test_batches_are_padded_with_targets_that_do_not_count(folder: Path) -> None:
    data = made(folder, line("a", ("b", {"b": HALF})), line("abc", ("d", {"d": HALF}), ("e", {"e": HALF})))
    tokens, target, best = data.subset("unlabelled").__getitems__([0, 1])
    assert tokens.shape == target.shape == (2, 4)
    assert (target != -100).tolist() == [[True, False, False, False], [False, False, True, True]]
    assert not tokens[0, 1:].any()
    assert best["log_probs"].shape == (2, 4, 1)
    assert best["log_probs"].isfinite()[..., 0].tolist() == (target != -100).tolist()


def test_the_prompt_is_cut_to_the_context_and_longer_completions_overlap_by_half() -> None:
    best = {0: HALF}
    short = Passage(list(range(20)), [None] * 15 + [best] * 5)  # 19 places, those from 14 on count
    assert short.windows(8) == [(11, 19, 14)]
    assert Passage(list(range(6)), [None] * 4 + [best] * 2).windows(8) == [(0, 5, 3)]
    long = Passage(list(range(40)), [None] * 5 + [best] * 35)
    windows = long.windows(8)
    assert all(end - start == 8 for start, end, _ in windows[:-1])
    counted = sorted(place for _, end, first in windows for place in range(first, end))
    assert counted == list(range(4, 39))  # each once
    assert all(first - start >= 4 for start, _, first in windows[:-1])
    written = Written([long], 8)
    targets = torch.cat([target[target != -100] for _, target, _ in (written[i] for i in range(len(written)))])
    assert targets.tolist() == list(range(5, 40))


def test_each_role_trains_on_its_own(folder: Path) -> None:
    lines = [line("ab", ("c", {"c": HALF, "d": QUARTER}))] * 3
    for role, count, parts in (("student", 26, 2), ("control", 29, 3), ("distilled", 29, 3)):
        data = made(folder, *lines, role=role, batch_size=100)
        (batch,) = data.train_dataloader()
        assert (len(batch[0]), len(batch)) == (count, parts)
    assert data.counts == {"student": 26, "validation": 8, "test": 8, "unlabelled": 3}
    assert data.token_counts == {"student": 108, "validation": 60, "test": 60, "unlabelled": 3}
    assert data.described["tokens/unlabelled"] == 3
    only = made(folder, *lines, role="student", own_texts=False)
    assert len(only.training_set()) == 3
    with pytest.raises(ValueError, match=r"behind an API, expected no training of it: .*stages=\[student,control"):
        made(folder, *lines, role="teacher").train_dataloader()


def test_of_ones_own_text_the_loss_is_that_of_its_labels(folder: Path) -> None:
    data = made(folder, *[line("abcd", ("c", {"c": HALF, "d": QUARTER}))] * 3)
    training = data.training_set()
    keys = [27, 0, 28, 5]
    tokens, target, best = training.__getitems__(keys)
    own, written = [1, 3], [0, 2]
    for row, key in enumerate(keys):
        alone = training[key]
        assert torch.equal(tokens[row, : len(alone[0])], alone[0])
        assert torch.equal(target[row, : len(alone[0])], alone[1])
    torch.manual_seed(0)
    logits = torch.randn(*tokens.shape, data.tokenizer.size, requires_grad=True)

    def loss(rows: list[int]) -> torch.Tensor:
        teacher = TopK.of(best["indices"][rows], best["log_probs"][rows])
        return TopKKL(k=5)(Outputs(logits[rows]), teacher, target[rows])

    labels = F.cross_entropy(logits[own].flatten(0, 1), target[own].flatten())
    assert loss(own).item() == pytest.approx(labels.item(), rel=1e-5)
    assert torch.allclose(torch.autograd.grad(loss(own), logits)[0], torch.autograd.grad(labels, logits)[0], atol=1e-6)
    log_p = logits[written, 3].log_softmax(-1)  # of the one place that counts
    c, d = (data.tokenizer.encode(symbol)[0] for symbol in "cd")
    rest = torch.log1p(-log_p[:, [c, d]].exp().sum(1))
    expected = -(0.5 * log_p[:, c] + 0.25 * log_p[:, d] + 0.25 * rest) + 0.5 * HALF + 0.5 * QUARTER
    assert loss(written).item() == pytest.approx(expected.mean().item(), rel=1e-4)


def test_tokens_that_are_not_the_students_are_named_or_left_out(folder: Path) -> None:
    lines = [
        line("ab", ("cd", {"cd": HALF})),
        line("ab", ("c", {"c": HALF})),
        line("ab", ("Ü", {"Ü": HALF})),
        line("aX", ("c", {"c": HALF})),
    ]
    with pytest.raises(
        ValueError, match=r"3 of 4 completions .* one of the student's 10 tokens: .*line 1: the token 'cd'"
    ):
        made(folder, *lines).setup()
    with pytest.raises(ValueError, match=r"line 3: the token 'Ü'; .*line 4: in the prompt, the character 'X'"):
        made(folder, *lines).setup()
    data = made(folder, *lines, leave_out=True)
    with pytest.warns(UserWarning, match=r"3 of 4 completions .* They are left out"):
        data.setup()
    assert data.counts["unlabelled"] == 1


def test_alternatives_that_are_not_the_students_are_part_of_the_rest(folder: Path) -> None:
    lines = [line("ab", ("c", {"c": HALF, "Z": QUARTER, "cd": -3.0}))] * 2
    data = made(folder, *lines)
    with pytest.warns(
        UserWarning, match="4 times one of the k best is none of the student's tokens, such as b'Z', b'cd'"
    ):
        data.setup()
    best = data.subset("unlabelled")[0][2]
    assert best["log_probs"][-1].tolist() == [pytest.approx(HALF)]


def test_bytes_are_matched_by_byte(folder: Path) -> None:
    halves = [
        {
            "token": "",
            "bytes": [byte],
            "logprob": HALF,
            "top_logprobs": [{"token": "a", "bytes": [97], "logprob": QUARTER}],
        }
        for byte in "é".encode()
    ]
    data = made(
        folder, {"prompt": "é", "choices": [{"logprobs": {"content": halves}}]}, text_options={"tokens": "bytes"}
    )
    tokens, target, best = data.subset("unlabelled")[0]
    assert tokens.tolist() == [0xC3, 0xA9, 0xC3]
    assert target.tolist() == [-100, 0xC3, 0xA9]
    assert best["indices"][1:].tolist() == [[97, 0xC3], [97, 0xA9]]


def test_a_chat_is_written_as_the_student_reads_it(folder: Path) -> None:
    chat = {**line("", ("c", {"c": HALF})), "messages": [{"role": "a", "content": "b{"}, {"role": "b", "content": "d"}]}
    del chat["prompt"]
    file = folder / "c.jsonl"
    file.write_text(json.dumps(chat))
    symbols = {"tokens": "bytes", "context": 32}
    data = Completions(texts(folder, **symbols), [str(file)], message="<{role}>{content}\n", reply="<c>")
    tokens, target, _ = data.subset("unlabelled")[0]
    assert data.tokenizer.decode(tokens.tolist()) == "<a>b{\n<b>d\n<c>"
    assert target[-1] == ord("c")


def test_a_sentinel_leaves_the_token_and_a_place_of_which_nothing_is_known_does_not_count(folder: Path) -> None:
    data = made(
        folder,
        line("ab", ("c", {"c": -9999.0, "d": HALF}), ("e", {"e": -9999.0}), ("f", {"f": HALF})),
    )
    _, target, best = data.subset("unlabelled")[0]
    c, d, f = data.tokenizer.encode("cdf").tolist()
    assert target.tolist() == [-100, c, -100, f]
    assert best["indices"][1].tolist() == [d]


def test_the_fingerprint_is_that_of_the_content(folder: Path) -> None:
    one = line("ab", ("c", {"c": HALF}))
    other = line("ab", ("c", {"c": QUARTER}))
    fingerprint = made(folder, one).fingerprint()
    assert made(folder, one, leave_out=True).fingerprint() == fingerprint
    assert made(folder, other).fingerprint() != fingerprint
    assert made(folder, other, role="student").fingerprint() == made(folder, one, role="student").fingerprint()


def test_files_that_are_not_there_or_hold_nothing_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file of completions none\.jsonl"):
        Completions(texts(folder), ["none.jsonl"])
    with pytest.raises(ValueError, match="expected files of completions, got none"):
        Completions(texts(folder), [])
    with pytest.raises(ValueError, match=r"expected completions in .*c.jsonl, got none"):
        made(folder).setup()


def test_a_student_learns_what_the_k_best_say(folder: Path) -> None:
    """After "a" the teacher writes b or c, as likely; the file has b alone: the k best tell of c."""
    data = made(folder, *[line("ha", ("b", {"b": HALF, "c": HALF}))] * 8, own_texts=False, batch_size=8)
    data.setup()
    torch.manual_seed(0)
    network = GPT(vocabulary=data.tokenizer.size, context=8, layers=1, heads=2, width=16)
    module = DistillationModule(
        network,
        FromBatch(),
        {"top_k_kl": TopKKL(k=5)},
        lambda parameters: torch.optim.Adam(parameters, 0.02),
        task=LanguageModelling(per="character"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(max_epochs=60).fit(module, data)
    tokens = torch.from_numpy(data.tokenizer.encode("ha")).long()[None]
    p = network.eval()(tokens)[0, -1].softmax(-1)
    b, c = data.tokenizer.encode("bc")
    assert p[b].item() == pytest.approx(0.5, abs=0.05)
    assert p[c].item() == pytest.approx(0.5, abs=0.05)


def test_without_a_teacher_the_tokens_that_are_there_are_learnt(folder: Path) -> None:
    data = made(folder, *[line("ha", ("b", {"b": HALF, "c": HALF}))] * 8, own_texts=False, batch_size=8)
    data.setup()
    torch.manual_seed(0)
    network = GPT(vocabulary=data.tokenizer.size, context=8, layers=1, heads=2, width=16)
    losses = {"hard_label": HardLabel()}
    task = LanguageModelling(per="character")
    module = DistillationModule(
        network, FromBatch(), losses, lambda parameters: torch.optim.Adam(parameters, 0.02), task=task
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(max_epochs=40).fit(module, data)
    tokens = torch.from_numpy(data.tokenizer.encode("ha")).long()[None]
    assert network.eval()(tokens)[0, -1].softmax(-1)[data.tokenizer.encode("b")[0]].item() > 0.9
