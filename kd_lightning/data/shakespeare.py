"""The plays of Shakespeare that come with the package: by name, divided among teacher and student, cut into speeches.

Shakespeare's words are in the public domain; see NOTICE.md for where this text of them comes from.
"""

import lzma
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGED = Path(__file__).parent / "shakespeare.txt.xz"
VALIDATION = ("love-s-labours-lost", "richard-ii")
TEST = ("as-you-like-it", "henry-v", "king-lear", "the-tempest")

_HEADING = re.compile(r"(?m)^=== (.+)\n")
_DIRECTION = re.compile(r"\[[^\]]*\]+")
_SCENE = ("ACT ", "SCENE", "Scene ", "PROLOGUE", "EPILOGUE", "INDUCTION")
_SMALL_WORDS = ("of", "to", "and", "the")
_MARKS = tuple(".,;:!?-")
_LONGEST_NAME = 5  # words


class Speech(NamedTuple):
    """What one speaker says until another one does.

    Attributes:
        speaker: As the play names them: ``HAMLET``, ``First Clown``.
        lines: Lines of the text, of verse or prose, without stage directions.
    """

    speaker: str
    lines: tuple[str, ...]


@cache
def read_plays(file: Path = PACKAGED) -> dict[str, str]:
    """Read all plays by name, in the order of the file.

    Raises:
        ValueError: When the file is torn or another one.

    >>> len(read_plays())
    38
    """
    try:
        text = lzma.decompress(file.read_bytes()).decode("ascii")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is torn or another file ({error}): install the package again") from error
    begin, *parts = _HEADING.split(text)
    if begin or not parts:
        raise ValueError(f"{file} begins with {text[:20]!r}, expected a line '=== name' before each play")
    return dict(zip(parts[::2], parts[1::2], strict=True))


def divide(
    student: Sequence[str] | None = ("hamlet",), teacher: Sequence[str] | None = None, share: bool = False
) -> dict[str, tuple[str, ...]]:
    """Divide the plays' names among ``teacher``, ``student``, ``validation`` and ``test``; no play is in two of them.

    Args:
        student: Plays that the student trains on; None for the teacher's, which are then shared.
        teacher: Plays that the teacher trains on; all that are left unless given.
        share: Whether the student's plays may be the teacher's as well.

    Raises:
        ValueError: For a name that no play has, that is given twice, or that belongs to another role.

    >>> len(divide()["teacher"])
    31
    """
    held_out = {"validation": VALIDATION, "test": TEST}
    taken = [*VALIDATION, *TEST, *([] if share or student is None else student)]
    if teacher is None:
        teacher = [name for name in read_plays() if name not in taken]
    if student is None:
        student, share = teacher, True
    for role, names in (("student", student), ("teacher", teacher)):
        _check_names(role, names)
    both = sorted(set(student) & set(teacher))
    if both and not share:
        raise ValueError(f"{both} are the student's and the teacher's plays, expected no play in both: name others")
    return {"teacher": tuple(teacher), "student": tuple(student), **held_out}


def speeches(play: str) -> list[Speech]:
    """Cut the text of a play into speeches; headings and stage directions are left out.

    >>> speeches(read_plays()["hamlet"])[0]
    Speech(speaker='BERNARDO', lines=("Who's there?",))
    """
    found: list[tuple[str, list[str]]] = []
    for block in re.split(r"\n{2,}", _DIRECTION.sub("", play)):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines or lines[0].startswith(_SCENE):
            continue
        if len(lines) > 1 and _names_a_speaker(lines[0]):
            found.append((lines[0], lines[1:]))
        elif found:  # goes on after a stage direction
            found[-1][1].extend(lines)
    return [Speech(speaker, tuple(lines)) for speaker, lines in found]


def _names_a_speaker(line: str) -> bool:
    words = line.split()
    return (
        len(words) <= _LONGEST_NAME
        and not line.endswith(_MARKS)
        and all(word[0].isupper() or word in _SMALL_WORDS for word in words)
    )


def _check_names(role: str, names: Iterable[str]) -> None:
    names = list(names)
    unknown = [name for name in names if name not in read_plays()]
    if unknown:
        raise ValueError(f"no play has the name {unknown[0]!r}, expected names among {', '.join(read_plays())}")
    if len(set(names)) < len(names):
        raise ValueError(f"expected each play once among the {role}'s, got {names}")
    held_out = [name for name in names if name in (*VALIDATION, *TEST)]
    if held_out:
        raise ValueError(
            f"{held_out[0]!r} is kept for {'validation' if held_out[0] in VALIDATION else 'the test'}, expected the "
            f"{role} to train on other plays: leave it out"
        )
