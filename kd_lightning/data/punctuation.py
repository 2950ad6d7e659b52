"""Words of Shakespeare's plays in lower case and without punctuation, to be given back their capitals and marks."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.data.loaders import Batched
from kd_lightning.data.role_data import RoleData
from kd_lightning.data.shakespeare import Speech, divide, read_plays, speeches
from kd_lightning.tasks.batch import IGNORE_INDEX

LETTERS = " abcdefghijklmnopqrstuvwxyz'-"
"""Symbols by id; 0 fills up what a word has less than :data:`WORD_LENGTH`, and words that are padding."""
WORD_LENGTH = 12
CLASSES = ("word", "word,", "word.", "word?", "Word", "Word,", "Word.", "Word?")

_WORD = re.compile(r"('?[A-Za-z][A-Za-z']*(?:-[A-Za-z']+)*)[^A-Za-z',;:.!?]*([,;:.!?]?)")
"""A word, and the first mark between it and the next one."""
_MARKS = {"": 0, ",": 1, ";": 1, ":": 1, ".": 2, "!": 2, "?": 3}
_ENDS = (2, 3)
_CAPITAL = 4


class Passage(NamedTuple):
    """Neighbouring words and their classes."""

    words: list[str]
    target: list[int]


class Passages(Batched):
    """Passages of one length, in which -100 marks the words that are padding.

    Shape: letters (N, S, :data:`WORD_LENGTH`) of uint8, target (N, S); a batch comes as int64.
    """

    def __init__(self, letters: NDArray[np.uint8], target: NDArray[np.int64]) -> None:
        self.letters, self.target = torch.from_numpy(letters), torch.from_numpy(target)

    def __len__(self) -> int:
        return len(self.target)

    def batch(self, samples: Sequence[int], epoch: int | None) -> tuple[Tensor, Tensor]:
        return self.letters[samples].long(), self.target[samples]

    def content(self) -> bytes:
        """Return all that a fingerprint depends on."""
        return self.letters.numpy().tobytes() + self.target.numpy().tobytes()


class ShakespearePunctuation(RoleData):
    """Restore capitals and punctuation: for each word its class, capital or not and the mark that followed it.

    The marks are the usual four of this task (Tilk & Alumäe, Interspeech 2016): none, a comma (which stands for ``;``
    and ``:`` too), a period (for ``!`` too) and a question mark. A passage holds as many whole speeches as fit, a
    longer speech is cut; who speaks is not told. Words come as their letters, so that no word is unknown: the first 8
    and the last 4 of a longer one.

    A line of verse begins with a capital whatever the sentence does. There the class says a capital where a sentence
    begins, or where the word has one mostly within lines, as names have.

    Args:
        student_plays: Names of the plays that the student trains on.
        teacher_plays: Names of those that the teacher trains on; all others unless given, less those for validation
            (Love's Labour's Lost, Richard II) and test (As You Like It, Henry V, King Lear, The Tempest).
        share_plays: Whether the student's plays may be the teacher's as well.
        words: Length of a passage.
        batch_size: Number of passages of a training batch.
        eval_batch_size: Number of passages of a batch in validation and test.
        num_workers: Processes that load; 0 is the fastest for what is in memory.
        role: Whose passages ``train_dataloader`` gives: ``teacher``, or ``student``, ``control``, ``distilled``.
        seed: Seed of the order of the passages, together with the epoch.

    Raises:
        ValueError: For a play that is unknown, given twice or to two roles, and for an empty passage.
    """

    num_classes = len(CLASSES)
    class_names = CLASSES

    def __init__(
        self,
        student_plays: Sequence[str] = ("hamlet",),
        teacher_plays: Sequence[str] | None = None,
        share_plays: bool = False,
        words: int = 64,
        batch_size: int = 16,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        role: str = "distilled",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, role, seed)
        if words < 1:
            raise ValueError(f"expected words of 1 or more, got {words}: 64 is a passage of some five speeches")
        self.words = words
        self.plays = divide(student_plays, teacher_plays, share_plays)

    def load_subsets(self) -> dict[str, Passages]:
        return {role: passages_of(names, self.words) for role, names in self.plays.items()}

    def words_of(self, inputs: Tensor) -> list[str]:
        """Return the words of one passage; of a long one the letters that the networks get. Shape: (S, 12)."""
        return [found for word in inputs.tolist() if (found := "".join(LETTERS[i] for i in word if i))]

    def training_set(self) -> Passages:
        training: Passages = self.subset("teacher" if self.role == "teacher" else "student")
        return training


@cache
def passages_of(plays: tuple[str, ...], words: int) -> Passages:
    """Return the passages of some plays, none of which goes over the end of a play. Read-only: made once."""
    found = [passage for name in plays for passage in _packed(_labelled(speeches(read_plays()[name])), words)]
    letters = np.zeros((len(found), words, WORD_LENGTH), np.uint8)
    target = np.full((len(found), words), IGNORE_INDEX, np.int64)
    for i, passage in enumerate(found):
        letters[i, : len(passage.words)] = np.frombuffer(b"".join(map(_spelled, passage.words)), np.uint8).reshape(
            -1, WORD_LENGTH
        )
        target[i, : len(passage.words)] = passage.target
    return Passages(letters, target)


def words_and_classes(speech: Speech, names: Iterable[str]) -> Passage:
    """Return a speech's words in lower case, and their classes.

    Args:
        speech: As the play has it.
        names: Words in lower case that have a capital wherever they stand.

    >>> words_and_classes(Speech("A", ("Who's there? Tell", "Me, and Hamlet,--friend!")), ["hamlet"])
    Passage(words=["who's", 'there', 'tell', 'me', 'and', 'hamlet', 'friend'], target=[4, 3, 4, 1, 0, 5, 2])
    """
    words: list[str] = []
    target: list[int] = []
    for line in speech.lines:
        for i, (word, mark) in enumerate(_WORD.findall(line)):
            lower = word.lower()
            within_sentence = bool(target) and target[-1] % _CAPITAL not in _ENDS
            capital = word != lower and not (i == 0 and within_sentence and lower not in names)
            words.append(lower)
            target.append(_CAPITAL * capital + _MARKS[mark])
    return Passage(words, target)


def _labelled(found: Iterable[Speech]) -> Iterator[Passage]:
    names = _names()
    return (words_and_classes(speech, names) for speech in found)


def _packed(found: Iterable[Passage], words: int) -> Iterator[Passage]:
    """Put as many speeches into each passage as fit."""
    held = Passage([], [])
    for speech in found:
        for start in range(0, len(speech.words), words):
            part = Passage(speech.words[start : start + words], speech.target[start : start + words])
            if held.words and len(held.words) + len(part.words) > words:
                yield held
                held = Passage([], [])
            held = Passage(held.words + part.words, held.target + part.target)
    if held.words:
        yield held


@cache
def _names() -> frozenset[str]:
    """Return the words that have a capital in most places within lines and sentences, of all plays."""
    counts: Counter[str] = Counter()
    for play in read_plays().values():
        for speech in speeches(play):
            for line in speech.lines:
                found = _WORD.findall(line)
                for (_, mark), (word, _) in pairwise(found):
                    if _MARKS[mark] not in _ENDS:
                        lower = word.lower()
                        counts[lower] += 1 if word != lower else -1
    return frozenset(word for word, more in counts.items() if more > 0)


@cache
def _spelled(word: str) -> bytes:
    letters = [LETTERS.index(letter) for letter in word]
    if len(letters) > WORD_LENGTH:
        letters = letters[: WORD_LENGTH - 4] + letters[-4:]
    return bytes(letters).ljust(WORD_LENGTH, b"\0")
