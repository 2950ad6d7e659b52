"""Shakespeare's plays as text, character by character."""

from collections.abc import Sequence
from typing import Any

from kd_lightning.data.shakespeare import divide, read_plays
from kd_lightning.data.texts import TextData
from kd_lightning.tokens import Characters, Tokenizer


class ShakespeareText(TextData):
    """The plays that come with the package (4.97 million characters, 79 different ones), divided by whole plays.

    Validation: Love's Labour's Lost, Richard II. Test: As You Like It, Henry V, King Lear, The Tempest. The student's
    plays are none of the teacher's unless they are shared.

    Args:
        student_plays: Names of plays; None for all of the teacher's, which are then shared.
        teacher_plays: Names of plays; all that are left unless given.
        share_plays: Whether the student's plays may be the teacher's as well.
        options: Of :class:`~kd_lightning.data.TextData`.

    Raises:
        ValueError: For a play that is unknown, given twice or to two roles.

    Example:
        >>> ShakespeareText().token_counts
        {'teacher': 4012985, 'student': 176820, 'validation': 257220, 'test': 520445}
    """

    def __init__(
        self,
        student_plays: Sequence[str] | None = ("hamlet",),
        teacher_plays: Sequence[str] | None = None,
        share_plays: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.plays = divide(student_plays, teacher_plays, share_plays)

    def documents(self) -> dict[str, list[str]]:
        return {role: [read_plays()[name] for name in names] for role, names in self.plays.items()}

    @property
    def test_groups(self) -> tuple[list[str], list[int]]:
        """The test's plays, and which of them each block is of; all in one where blocks go over their ends."""
        names, of_block = super().test_groups
        plays = list(self.plays["test"])
        return (plays if len(plays) == len(names) else names), of_block

    @property
    def described(self) -> dict[str, str | int]:
        """Tokens and plays by role, for the tracking."""
        return {**super().described, **{f"plays/{role}": ", ".join(names) for role, names in self.plays.items()}}

    def make_tokenizer(self, texts: Sequence[str]) -> Tokenizer:
        # Of all plays, whichever were chosen: a number stands for the same character in each pipeline.
        return Characters.of(read_plays().values()) if self.tokens == "characters" else super().make_tokenizer(texts)
