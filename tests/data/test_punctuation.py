from functools import cache

import pytest
import torch

from kd_lightning.data import ShakespearePunctuation
from kd_lightning.data.punctuation import CLASSES, LETTERS, words_and_classes
from kd_lightning.data.shakespeare import Speech, read_plays


@cache
def data() -> ShakespearePunctuation:
    made = ShakespearePunctuation()
    made.setup()
    return made


def written(letters: torch.Tensor, target: torch.Tensor) -> str:
    """A passage as the classes say that it is written."""
    found = []
    for word, kind in zip(letters.tolist(), target.tolist(), strict=True):
        if kind != -100:
            spelled = "".join(LETTERS[symbol] for symbol in word).rstrip()
            name = CLASSES[kind]
            found.append((spelled.capitalize() if name[0] == "W" else spelled) + name[4:])
    return " ".join(found)


def test_words_are_given_the_classes_that_they_had() -> None:
    """Worked out by hand: line 2 begins with a capital as verse does, "Hamlet" is a name, ";" counts as a comma."""
    lines = ("O, that this too too solid flesh would melt", "Thaw; and", "Hamlet,--friend!", "Who? 'Tis I.")
    words, target = words_and_classes(Speech("HAMLET", lines), {"hamlet", "i", "o"})
    assert " ".join(words) == "o that this too too solid flesh would melt thaw and hamlet friend who 'tis i"
    expected = ["Word,", *["word"] * 8, "word,", "word", "Word,", "word.", "Word?", "Word", "Word."]
    assert [CLASSES[kind] for kind in target] == expected


def test_passages_are_the_plays_words_in_their_order() -> None:
    test = data().subset("test")
    begin = written(*test[0])
    assert begin.startswith("As I remember, Adam, it was upon this fashion bequeathed me by will but poor a thousand")
    words = int((test.target != -100).sum())
    assert words == 88_575
    spoken = sum(len(read_plays()[name].split()) for name in data().plays["test"])
    assert 0.85 * spoken < words < spoken  # headings, speakers and stage directions are left out


def test_a_passage_is_written_as_its_words() -> None:
    data = ShakespearePunctuation()
    letters, target = next(iter(data.test_dataloader()))
    words = data.words_of(letters[0])
    assert len(words) == (target[0] != -100).sum()
    assert " ".join(words[:40]) == " ".join(words[:40]).lower()
    assert all(len(word) <= 12 for word in words)


def test_padding_is_at_the_end_has_no_label_and_no_letters() -> None:
    for name in data().counts:
        subset = data().subset(name)
        padded = subset.target == -100
        assert padded.any()
        assert torch.equal(padded, subset.letters.sum(-1) == 0)
        assert torch.equal(padded, padded.cummax(1).values.bool())
        assert not padded[:, 0].any()


def test_classes_are_unbalanced_but_all_are_there() -> None:
    for name in data().counts:
        target = data().subset(name).target
        shares = torch.bincount(target[target >= 0], minlength=8) / (target >= 0).sum()
        assert 0.70 < shares[0] < 0.73
        assert shares.min() > 0


def test_whole_speeches_are_kept_together_and_longer_ones_cut() -> None:
    short, long = ShakespearePunctuation(words=4), ShakespearePunctuation(words=200)
    for made in (short, long):
        made.setup()
    assert written(*short.subset("student")[0]) == "Who's there?"  # the second speech would not fit
    assert written(*long.subset("student")[0]).startswith("Who's there? Nay, answer me, stand, and unfold yourself.")
    assert len(short.subset("student")) > 8 * len(long.subset("student"))
    for made in (short, long):
        assert int((made.subset("student").target != -100).sum()) == 29_837


def test_long_words_keep_their_beginning_and_end() -> None:
    spelled = {written(letters, torch.tensor([0])) for letters in data().subset("test").letters.flatten(0, 1)[:, None]}
    assert max(map(len, spelled)) == 12
    assert {"notwithsding", "entertaiment"} <= spelled  # notwithstanding, entertainment


@pytest.mark.parametrize(("role", "subset"), [("teacher", "teacher"), ("control", "student"), ("distilled", "student")])
def test_each_role_trains_on_its_own_plays(role: str, subset: str) -> None:
    made = ShakespearePunctuation(role=role, batch_size=100, seed=1)
    batches = list(made.train_dataloader())
    letters, target = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    assert (letters.dtype, target.dtype) == (torch.int64, torch.int64)
    expected = data().subset(subset)
    assert letters.shape == expected.letters.shape
    assert not torch.equal(letters, expected.letters.long())
    assert sorted(map(bytes, letters.to(torch.uint8).numpy())) == sorted(map(bytes, expected.letters.numpy()))
    again = ShakespearePunctuation(role=role, batch_size=100, seed=1).train_dataloader()
    assert torch.equal(torch.cat([batch[0] for batch in again]), letters)


def test_the_fingerprint_is_that_of_what_is_seen() -> None:
    fingerprint = ShakespearePunctuation(role="student").fingerprint()
    assert ShakespearePunctuation(role="control", teacher_plays=["macbeth"]).fingerprint() == fingerprint
    assert ShakespearePunctuation(role="student", student_plays=["macbeth"]).fingerprint() != fingerprint
    assert ShakespearePunctuation(role="teacher").fingerprint() != fingerprint


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="expected words of 1 or more, got 0"):
        ShakespearePunctuation(words=0)
    with pytest.raises(ValueError, match="no play has the name 'hamlte'"):
        ShakespearePunctuation(student_plays=["hamlte"])
    with pytest.raises(ValueError, match="expected role to be one of"):
        ShakespearePunctuation(role="pupil")
