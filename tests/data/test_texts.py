"""Blocks of tokens: what is followed by what, ends of documents, and who gets which text."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kd_lightning.data import ShakespeareText, TextFiles
from kd_lightning.data.shakespeare import read_plays
from kd_lightning.data.texts import Blocks, divided


def files(folder: Path, **texts: str) -> dict[str, list[str]]:
    for role, text in texts.items():
        (folder / f"{role}.txt").write_text(text, encoding="utf-8")
    return {role: [str(folder / f"{role}.txt")] for role in texts}


def four(folder: Path, text: str = "abcdefgh") -> dict[str, list[str]]:
    return files(folder, **{role: text + role for role in ("teacher", "student", "validation", "test")})


def test_each_token_is_followed_by_the_next_one_and_none_by_that_of_another_document() -> None:
    documents = [np.arange(1, 12), np.arange(21, 25), np.arange(31, 33)]
    blocks = Blocks(documents, length=4, stride=2)
    tokens, target = blocks.__getitems__(range(len(blocks)))
    counts = target != -100
    assert torch.equal(target[counts], tokens[counts] + 1)
    found = {(int(a), int(b)) for a, b in zip(tokens[counts], target[counts], strict=True)}
    assert found == {(int(a), int(a) + 1) for document in documents for a in document[:-1]}
    assert torch.equal(counts, counts.cummin(1).values)  # what is missing is at the end


def test_without_overlap_each_token_is_judged_once() -> None:
    for length in (2, 3, 5, 20):
        blocks = Blocks([np.arange(1, 18)], length=length, stride=length)
        _, target = blocks.__getitems__(range(len(blocks)))
        assert target[target != -100].tolist() == list(range(2, 18))


def test_a_last_block_that_shows_nothing_new_is_left_out() -> None:
    assert len(Blocks([np.arange(9)], length=8, stride=4)) == 1
    assert len(Blocks([np.arange(10)], length=8, stride=4)) == 2


def test_fewer_blocks_are_judged_evenly_over_the_text() -> None:
    every, some = Blocks([np.arange(1, 102)], 4, 4), Blocks([np.arange(1, 102)], 4, 4, most=5)
    assert (len(every), len(some)) == (25, 5)
    assert [int(some[i][0][0]) for i in range(5)] == [int(every[i][0][0]) for i in range(0, 25, 5)]
    assert some.content() != every.content()
    assert len(ShakespeareText(eval_blocks=100).subset("test")) == 100


def test_the_tests_blocks_are_of_its_plays_in_their_order() -> None:
    data = ShakespeareText(context=500)
    names, of_block = data.test_groups
    assert names == list(data.plays["test"])
    assert of_block == sorted(of_block)
    sizes = [len(read_plays()[name]) for name in names]
    assert [of_block.count(i) for i in range(len(names))] == [-(-(size - 1) // 500) for size in sizes]
    assert len(of_block) == len(data.test_dataloader().dataset)


def test_a_document_of_one_token_has_nothing_to_tell() -> None:
    assert len(Blocks([np.array([3])], length=4, stride=4)) == 0


def test_the_fingerprint_changes_with_text_blocks_and_context() -> None:
    plain = Blocks([np.arange(30)], 8, 4).content()
    assert plain == Blocks([np.arange(30)], 8, 4).content()
    for other in (Blocks([np.arange(1, 31)], 8, 4), Blocks([np.arange(30)], 8, 8), Blocks([np.arange(30)], 7, 4)):
        assert other.content() != plain


def test_tokens_beyond_a_byte_are_kept_whole() -> None:
    tokens, _ = Blocks([np.array([3, 70_000, 1])], 2, 2)[0]
    assert tokens.tolist() == [3, 70_000]


def test_plays_are_divided_by_whole_plays_and_are_all_there() -> None:
    data = ShakespeareText()
    assert data.token_counts == {"teacher": 4_012_985, "student": 176_820, "validation": 257_220, "test": 520_445}
    assert data.described["tokens/student"] == 176_820
    assert data.described["plays/test"] == "as-you-like-it, henry-v, king-lear, the-tempest"
    assert sum(data.token_counts.values()) == sum(map(len, read_plays().values()))
    tokens, _ = data.subset("student")[0]
    assert data.tokenizer.decode(tokens.tolist()) == read_plays()["hamlet"][:128]


def test_the_student_may_have_all_of_the_teachers_plays() -> None:
    data = ShakespeareText(student_plays=None)
    assert data.plays["student"] == data.plays["teacher"]
    assert len(data.plays["teacher"]) == 32


def test_an_own_text_is_divided_by_shares_without_a_character_twice() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(1000))
    shares = {"teacher": 0.5, "student": 0.25, "validation": 0.15, "test": 0.1}
    found = divided([text[:300], text[300:]], shares)
    assert "".join("".join(parts) for parts in found.values()) == text
    assert {role: sum(map(len, parts)) for role, parts in found.items()} == {
        role: 1000 * share for role, share in shares.items()
    }


def test_files_by_role_and_a_separator_between_documents(tmp_path: Path) -> None:
    given = four(tmp_path)
    (tmp_path / "student.txt").write_text("one\n<end>\ntwo lines\nhere\n<end>\n")
    data = TextFiles(given, separator="<end>", tokens="characters", context=4)
    assert data.documents()["student"] == ["one", "two lines\nhere"]
    joined = TextFiles(given, separator="<end>", tokens="characters", context=4, cross_documents=True)
    assert len(joined.subset("student")) < len(data.subset("student")) + 1


def test_the_student_may_share_the_teachers_files(tmp_path: Path) -> None:
    data = TextFiles(four(tmp_path), share_texts=True)
    assert data.documents()["student"] == ["abcdefghteacher", "abcdefghstudent"]


def test_a_teacher_that_is_not_trained_needs_no_text(tmp_path: Path) -> None:
    given = four(tmp_path)
    del given["teacher"]
    data = TextFiles(given)
    assert data.documents()["student"] == ["abcdefghstudent"]
    assert set(data.counts) == {"student", "validation", "test"}
    with pytest.raises(ValueError, match="expected texts for a teacher that is trained, got none"):
        TextFiles(given, role="teacher").train_dataloader()
    with pytest.raises(ValueError, match="expected files by role, teacher, student"):
        TextFiles(given, share_texts=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected text files, got none"),
        (["missing.txt"], "there is no text file missing.txt"),
        ({"teacher": ["a"], "student": ["b"]}, "expected files by role, teacher, student, validation, test, got"),
    ],
)
def test_wrong_files_are_named(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextFiles(given)  # type: ignore[arg-type]


def test_texts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    given = four(tmp_path)
    (tmp_path / "test.txt").write_bytes(b"na\xefve")
    with pytest.raises(ValueError, match=r"test.txt is not UTF-8 .*iconv"):
        TextFiles(given).setup()
    (tmp_path / "test.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test.txt is empty"):
        TextFiles(given).setup()


def test_one_text_in_two_roles_is_refused(tmp_path: Path) -> None:
    given = four(tmp_path)
    (tmp_path / "test.txt").write_bytes((tmp_path / "teacher.txt").read_bytes())
    with pytest.raises(ValueError, match=r"test.txt is a text of teacher and of test"):
        TextFiles(given)


def test_shares_and_blocks_out_of_range_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not")
    with pytest.raises(ValueError, match="expected shares > 0"):
        TextFiles([str(tmp_path / "a.txt")], shares={"teacher": 0.5, "student": 0.5, "validation": 0.5, "test": -0.5})
    with pytest.raises(ValueError, match="expected eval_blocks of 1 or more"):
        TextFiles([str(tmp_path / "a.txt")], eval_blocks=0)
    for options in ({"context": 1}, {"context": 8, "stride": 9}, {"context": 8, "stride": 0}):
        with pytest.raises(ValueError, match="expected a context of 2 tokens or more"):
            TextFiles([str(tmp_path / "a.txt")], **options)
