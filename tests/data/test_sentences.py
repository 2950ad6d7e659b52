from pathlib import Path

import pytest
import torch

from kd_lightning.data import ShakespeareSentences
from kd_lightning.data.sentences import sentences
from kd_lightning.data.shakespeare import TEST, VALIDATION, read_plays

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "king", "is", "my", "lord"]


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    """A folder with a tokenizer of a few words."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


def made(encoder: str, **options: int | str) -> ShakespeareSentences:
    given = {"tokens": 8, "train": 300, "validation": 50, "test": 60, **options}
    return ShakespeareSentences(encoder, **given)  # type: ignore[arg-type]


def test_a_sentence_ends_with_its_mark_and_a_short_one_is_none() -> None:
    found = list(sentences("hamlet"))
    assert "For this relief much thanks: 'tis bitter cold, And I am sick at heart." in found  # of two lines
    assert all(len(text.split()) >= 4 for text in found)
    assert "Who's there?" not in found


def test_sentences_are_of_their_own_plays_and_each_is_there_once(encoder: str) -> None:
    data = made(encoder)
    assert data.counts == {"train": 300, "validation": 50, "test": 60}
    names = list(read_plays())
    plays = {name: {names[i] for i in data.subset(name).plays.tolist()} for name in data.counts}
    assert plays["validation"] == set(VALIDATION)
    assert plays["test"] == set(TEST)
    assert len(plays["train"]) > 25
    assert not plays["train"] & {*VALIDATION, *TEST}


def test_tokens_are_the_encoders_cut_and_padded(encoder: str) -> None:
    tokens = made(encoder).subset("train").tokens
    assert tokens.shape == (300, 8)
    assert (tokens[:, 0] == 2).all()  # [CLS]
    assert ((tokens == 3).sum(1) == 1).all()  # [SEP], in cut ones, too
    padded = tokens == 0
    assert torch.equal(padded, padded.cummax(1).values.bool())
    assert padded.any()
    assert (tokens == 4).any()  # the


def test_each_role_has_the_same_sentences_and_fingerprint(encoder: str) -> None:
    roles = [made(encoder, role=role, batch_size=300) for role in ("teacher", "student", "distilled")]
    batches = [next(iter(data.train_dataloader())) for data in roles]
    assert batches[0][0].dtype == batches[0][1].dtype == torch.int64
    assert all(torch.equal(batches[0][0], batch[0]) for batch in batches)
    assert len({data.fingerprint() for data in roles}) == 1
    assert made(encoder, train=299).fingerprint() != roles[0].fingerprint()
    assert made(encoder, tokens=9).fingerprint() != roles[0].fingerprint()


def test_what_cannot_be_is_refused(encoder: str) -> None:
    with pytest.raises(ValueError, match="expected 3 tokens or more, got 2"):
        made(encoder, tokens=2)
    with pytest.raises(ValueError, match="expected test of 1 or more, got 0"):
        made(encoder, test=0)
    with pytest.raises(ValueError, match=r"expected validation of up to [\d,]+ sentences, got 90,000: ask for fewer"):
        made(encoder, validation=90_000).setup()
