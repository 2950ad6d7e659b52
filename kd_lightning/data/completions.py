"""What a teacher wrote of which only an API can be reached, with the k best tokens at each place."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import pad

from kd_lightning.data.completion_files import Completion, Message, read_completions
from kd_lightning.data.loaders import Batched
from kd_lightning.data.role_data import RoleData
from kd_lightning.data.texts import Blocks, TextData
from kd_lightning.tasks.batch import IGNORE_INDEX
from kd_lightning.tokens import Tokenizer

PACKAGED = Path(__file__).parent / "completions.jsonl.xz"
_NAMED = 3  # mismatches in an error
_FILL = -1  # the class of what fills up the k best

Batch = tuple[Tensor, Tensor, dict[str, Tensor]]


class Passage:
    """A completion in the student's tokens: at each place the next token, and the teacher's k best of these.

    Args:
        tokens: All of them, the prompt's too.
        best: Beside each token the log-probabilities of those that might have stood there; None for the prompt's.
    """

    def __init__(self, tokens: Sequence[int], best: Sequence[Mapping[int, float] | None]) -> None:
        self.tokens = np.array(tokens[:-1], np.int32)
        self.best = [one or {} for one in best[1:]]
        self.target = np.where([bool(one) for one in self.best], np.array(tokens[1:], np.int32), IGNORE_INDEX)

    def windows(self, context: int) -> list[tuple[int, int, int]]:
        """Cut it to what a network sees: (first place, end, first place that counts), the last one first.

        One window where all that counts fits into the context: the prompt is cut on the left. What is longer has
        windows that overlap by half, so that each token beyond the first window's has half a context before it at
        least. Each counts once.
        """
        (counts,) = (self.target != IGNORE_INDEX).nonzero()
        if not len(counts):
            return []
        found, end, first = list[tuple[int, int, int]](), int(counts[-1]) + 1, int(counts[0])
        while True:
            start = max(0, end - context)
            if start <= first:
                return [*found, (start, end, first)]
            middle = start + context // 2
            found.append((start, end, middle))
            end = middle


class Written(Batched):
    """Passages of several lengths; a batch is padded to its longest one, with target -100.

    A batch is the tokens (B, S), the next token of each (B, S), and as ``indices`` and ``log_probs`` (B, S, k) the
    teacher's best of these; see :class:`~kd_lightning.outputs.TopK`.

    Args:
        passages: The completions.
        context: Tokens that a network sees at most.
    """

    def __init__(self, passages: Sequence[Passage], context: int) -> None:
        windows = [(passage, *window) for passage in passages for window in passage.windows(context)[::-1]]
        lengths = np.array([end - start for _, start, end, _ in windows], np.int64)
        self.lengths = torch.from_numpy(lengths)
        self.starts = torch.from_numpy(np.cumsum(lengths) - lengths)
        self.k = max((len(best) for passage in passages for best in passage.best), default=1) or 1
        places = int(lengths.sum())
        tokens, target = np.zeros(places, np.int32), np.full(places, IGNORE_INDEX, np.int32)
        indices = np.full((places, self.k), _FILL, np.int32)
        log_probs = np.full((places, self.k), -np.inf, np.float32)
        at = 0
        for passage, start, end, first in windows:
            tokens[at : at + end - start] = passage.tokens[start:end]
            target[at + first - start : at + end - start] = passage.target[first:end]
            for place in range(first, end):
                best = passage.best[place]
                indices[at + place - start, : len(best)] = list(best)
                log_probs[at + place - start, : len(best)] = list(best.values())
            at += end - start
        self.tokens, self.target = torch.from_numpy(tokens), torch.from_numpy(target)
        self.indices, self.log_probs = torch.from_numpy(indices), torch.from_numpy(log_probs)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, samples: Sequence[int], epoch: int | None) -> Batch:
        lengths = self.lengths[samples]
        places = torch.arange(int(lengths.max()))
        inside = places < lengths[:, None]
        places = (self.starts[samples][:, None] + places).clamp_max(len(self.tokens) - 1)
        best = {
            "indices": self.indices[places].long().masked_fill(~inside[..., None], _FILL),
            "log_probs": self.log_probs[places].masked_fill(~inside[..., None], -torch.inf),
        }
        tokens, target = self.tokens[places].long(), self.target[places].long()
        return tokens.masked_fill(~inside, 0), target.masked_fill(~inside, IGNORE_INDEX), best

    def content(self) -> bytes:
        """Return all that a fingerprint depends on."""
        parts = (self.lengths, self.tokens, self.target, self.indices, self.log_probs)
        return b"".join(part.numpy().tobytes() for part in parts)


class WithOwnText(Batched):
    """Blocks of a text of one's own, and behind them what the teacher wrote.

    Of one's own text the teacher is taken to be sure of the token that is there: distilling it is learning it, since
    KL of that to the student is the cross-entropy.
    """

    def __init__(self, own: Blocks, written: Written) -> None:
        self.own, self.written = own, written

    def __len__(self) -> int:
        return len(self.own) + len(self.written)

    def batch(self, samples: Sequence[int], epoch: int | None) -> Batch:
        parts, order = list[Batch](), list[int]()
        for own in (True, False):
            places = [i for i, sample in enumerate(samples) if (sample < len(self.own)) == own]
            some = [samples[i] for i in places]
            if some:
                parts.append(self._sure(some) if own else self.written.__getitems__([i - len(self.own) for i in some]))
                order += places
        length, back = max(part[0].shape[1] for part in parts), torch.tensor(order).argsort()

        def joined(tensors: Sequence[Tensor], value: float) -> Tensor:
            wide = [pad(x, [*[0] * (2 * (x.ndim - 2)), 0, length - x.shape[1]], value=value) for x in tensors]
            return torch.cat(wide)[back]

        tokens, target, best = zip(*parts, strict=True)
        return (
            joined(tokens, 0),
            joined(target, IGNORE_INDEX),
            {
                "indices": joined([one["indices"] for one in best], _FILL),
                "log_probs": joined([one["log_probs"] for one in best], -torch.inf),
            },
        )

    def content(self) -> bytes:
        """Return all that a fingerprint depends on."""
        return self.own.content() + self.written.content()

    def _sure(self, samples: Sequence[int]) -> Batch:
        tokens, target = self.own.__getitems__(samples)
        indices = torch.full((*target.shape, self.written.k), _FILL)
        log_probs = torch.full(indices.shape, -torch.inf)
        indices[..., 0], log_probs[..., 0] = target, 0.0
        return tokens, target, {"indices": indices, "log_probs": log_probs}


class Completions(RoleData):
    r"""A teacher's completions, with the k best tokens at each place: for ``teachers=from_batch``.

    Who trains on what, so that each difference has one reason:

    - ``student``, alone: the texts of its own.
    - ``control``: these and the teacher's completions, of which its losses read the tokens that are there
      (``hard_label``; sequence-level distillation, Kim & Rush, EMNLP 2016, https://arxiv.org/abs/1606.07947).
    - ``distilled``: the same, of which its losses read the k best (``top_k_kl``; ``deit_hard``: the best one).

    With ``own_texts=False`` there is nothing but the completions: the student alone learns the tokens that are there.
    No network of the teacher is there to train or to be judged: leave its stage out.

    Args:
        texts: A data module of texts: the student's own, those for validation and test, the tokens and the context.
        files: ``.jsonl``, also ``.jsonl.gz`` and ``.jsonl.xz``; see
            :func:`~kd_lightning.data.completion_files.read_completions` for what they hold. Unless given, the packaged
            one: a small character model's continuations of lines of Hamlet, with five best.
        own_texts: Whether all train on the student's own texts as well.
        message: How a message of a chat is written for the student, such as
            ``"<|im_start|>{role}\n{content}<|im_end|>\n"``.
        reply: What stands before the answer, such as ``"<|im_start|>assistant\n"``.
        leave_out: Leave completions out, with a warning that counts them, of which the student's tokenizer does not
            have a token; an error unless it is asked for.
        batch_size: Passages of a training batch.
        eval_batch_size: Passages of a batch for validation and test.
        num_workers: Processes that load.
        role: Whose training it is: ``student``, ``control``, ``distilled``.
        seed: Of the order of the passages, together with the epoch.

    Raises:
        ValueError: For a file that is not there; when they are read, with file and line, for what cannot be read and
            for tokens that are none of the student's.
    """

    def __init__(
        self,
        texts: TextData,
        files: Sequence[str] | None = None,
        own_texts: bool = True,
        message: str = "{content}",
        reply: str = "",
        leave_out: bool = False,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        role: str = "distilled",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, role, seed)
        self.texts, self.own_texts, self.leave_out = texts, own_texts, leave_out
        self.message, self.reply = message, reply
        self.files = [PACKAGED] if files is None else [Path(file) for file in files]
        if not self.files:
            raise ValueError("expected files of completions, got none: data.files=[a.jsonl,b.jsonl.gz]")
        for file in self.files:
            if not file.is_file():
                raise ValueError(f"there is no file of completions {file}: data.files=[a.jsonl], relative to here")

    def files_read(self) -> Sequence[Path] | None:
        texts = self.texts.sources()
        return None if texts is None else [*texts, *self.files]

    @property
    def tokenizer(self) -> Tokenizer:
        """What cuts the texts into tokens: the student's."""
        return self.texts.tokenizer

    @property
    def context(self) -> int:
        """Tokens that a network sees at most."""
        return self.texts.context

    @property
    def token_counts(self) -> dict[str, int]:
        """Tokens of the student's own, of the completions that count, and of the texts for validation and test."""
        written: Written = self.subset("unlabelled")
        counts = {name: self.texts.token_counts[name] for name in ("student", "validation", "test")}
        return {**counts, "unlabelled": int((written.target != IGNORE_INDEX).sum())}

    @property
    def described(self) -> dict[str, str | int]:
        """Tokens by what they are for, for the tracking."""
        return {f"tokens/{name}": count for name, count in self.token_counts.items()}

    def load_subsets(self) -> dict[str, Any]:
        found = {name: self.texts.subset(name) for name in ("student", "validation", "test")}
        passages = list(self._passages())
        if not passages:
            raise ValueError(f"expected completions in {', '.join(map(str, self.files))}, got none: look at the files")
        return {**found, "unlabelled": Written(passages, self.context)}

    def training_set(self) -> Any:
        if self.role == "teacher":
            raise ValueError(
                "the teacher of completions is behind an API, expected no training of it: leave the stage out, "
                "stages=[student,control,distilled,quantized,verdict] with teachers=from_batch"
            )
        if not self.own_texts:
            return self.subset("unlabelled")
        own = self.subset("student")
        return own if self.role == "student" else WithOwnText(own, self.subset("unlabelled"))

    def _passages(self) -> list[Passage]:
        matched = _Matched(self.tokenizer, self._written)
        found = [matched(completion) for file in self.files for completion in read_completions(file)]
        matched.report(len(found), self.leave_out)
        return [passage for passage in found if passage is not None]

    def _written(self, messages: Sequence[Message]) -> str:
        return "".join(self.message.format(role=one.role, content=one.content) for one in messages) + self.reply


class _Matched:
    """Puts completions into the student's tokens, and keeps in mind what has none."""

    def __init__(self, tokenizer: Tokenizer, write: Any) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._ids = {spelling: i for i, spelling in enumerate(tokenizer.spellings()) if spelling is not None}
        self._mismatches: list[str] = []
        self._others: dict[str, int] = {}

    def __call__(self, completion: Completion) -> Passage | None:
        """Return a completion's passage; None where it has a token that the student has not."""
        try:
            prompt = completion.prompt
            text = prompt if isinstance(prompt, str) or prompt is None else self._write(prompt)
            tokens = [] if text is None else self._tokenizer.encode(text).tolist()
        except ValueError as error:
            self._mismatches.append(f"{completion.where}: in the prompt, {error}")
            return None
        best: list[Mapping[int, float] | None] = [None] * len(tokens)
        for token in completion.tokens:
            i = self._id(token.spelling)
            if i is None:
                self._mismatches.append(f"{completion.where}: the token {token.text!r}")
                return None
            tokens.append(i)
            best.append(None if token.best is None else self._known(token.best))
        return Passage(tokens, best)

    def report(self, completions: int, leave_out: bool) -> None:
        """Say what was not matched.

        Raises:
            ValueError: For tokens that were written, unless their completions are left out.
        """
        if self._mismatches:
            found = (
                f"{len(self._mismatches)} of {completions} completions have a token that is not exactly one of the "
                f"student's {self._tokenizer.size} tokens: {'; '.join(self._mismatches[:_NAMED])}"
            )
            if not leave_out:
                raise ValueError(
                    f"{found}. Give the student the tokenizer of the model that wrote them "
                    "(data.texts.tokens=tokenizer.json), or leave them out: data.leave_out=true"
                )
            rank_zero_warn(f"{found}. They are left out.")
        if self._others:
            most = sorted(self._others, key=self._others.__getitem__, reverse=True)[:_NAMED]
            rank_zero_warn(
                f"{sum(self._others.values())} times one of the k best is none of the student's tokens, such as "
                f"{', '.join(most)}: its probability is part of the rest, which is not known token by token"
            )

    def _id(self, spelling: Any) -> int | None:
        if isinstance(spelling, int):
            return spelling if spelling < self._tokenizer.size else None
        return self._ids.get(spelling)

    def _known(self, best: Mapping[Any, float]) -> dict[int, float]:
        known: dict[int, float] = {}
        for spelling, log_prob in best.items():
            i = self._id(spelling)
            if i is None:
                self._others[repr(spelling)] = self._others.get(repr(spelling), 0) + 1
            else:
                known.setdefault(i, log_prob)
        return known
