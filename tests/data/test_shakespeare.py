import lzma
from itertools import combinations
from pathlib import Path

import pytest

from kd_lightning.data.shakespeare import PACKAGED, TEST, VALIDATION, divide, read_plays, speeches


def test_all_plays_are_there_whole_and_in_plain_letters() -> None:
    plays = read_plays()
    assert len(plays) == 38
    assert sum(len(f"=== {name}\n{play}") for name, play in plays.items()) == 4_968_225
    assert plays["hamlet"].startswith("Hamlet\n\nACT I\n\nSCENE I. Elsinore.")
    assert "To be, or not to be: that is the question:" in plays["hamlet"]
    assert len(set("".join(plays.values())) | set("=")) == 80  # 79 symbols and the newline


def test_no_play_has_two_roles_and_none_is_left_out() -> None:
    plays = divide()
    assert all(set(one).isdisjoint(other) for one, other in combinations(plays.values(), 2))
    assert sorted(name for names in plays.values() for name in names) == sorted(read_plays())
    assert {role: len(names) for role, names in plays.items()} == {
        "teacher": 31, "student": 1, "validation": 2, "test": 4,
    }  # fmt: skip


def test_plays_can_be_named_and_shared() -> None:
    plays = divide(["macbeth", "othello"], ["hamlet"])
    assert (plays["student"], plays["teacher"]) == (("macbeth", "othello"), ("hamlet",))
    shared = divide(["macbeth"], share=True)
    assert "macbeth" in shared["teacher"]
    assert not {*VALIDATION, *TEST} & set(shared["teacher"])


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (["hamlte"], None, "no play has the name 'hamlte', expected names among .*hamlet"),
        (["hamlet", "hamlet"], None, "expected each play once among the student's"),
        (["king-lear"], None, "'king-lear' is kept for the test, expected the student to train on other plays"),
        (["hamlet"], ["richard-ii"], "'richard-ii' is kept for validation, expected the teacher"),
        (["hamlet"], ["hamlet", "macbeth"], r"\['hamlet'\] are the student's and the teacher's plays"),
    ],
)
def test_plays_that_cannot_be_had_are_refused(student: list[str], teacher: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divide(student, teacher)


def test_speeches_are_what_is_spoken_by_whom() -> None:
    found = speeches(read_plays()["the-tempest"])
    assert found[0] == ("Master", ("Boatswain!",))
    assert found[1] == ("Boatswain", ("Here, master: what cheer?",))
    spoken = "\n".join(line for speech in found for line in speech.lines)
    for heading in ("ACT ", "SCENE", "[", "Exeunt"):
        assert heading not in spoken
    # After a stage direction, the same speaker goes on.
    (cry,) = [speech for speech in found if "A plague upon this howling! they are louder than" in speech.lines]
    assert cry.speaker == "Boatswain"
    assert cry.lines[0] == "Down with the topmast! yare! lower, lower! Bring"


def test_every_play_is_mostly_speeches() -> None:
    for name, play in read_plays().items():
        found = speeches(play)
        assert len(found) > 300, name
        assert sum(len(line) for speech in found for line in speech.lines) > 0.7 * len(play), name
        assert max(len(speech.speaker.split()) for speech in found) <= 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_a_torn_file_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    file, content = tmp_path / "plays.xz", PACKAGED.read_bytes()
    if damage == "cut":
        content = content[:1000]
    elif damage == "flipped":
        content = content[:50_000] + bytes([content[50_000] ^ 1]) + content[50_001:]
    else:
        content = lzma.compress(b"no plays")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"plays\.xz (is torn or another file .*: install|begins with 'no plays')"):
        read_plays(file)
