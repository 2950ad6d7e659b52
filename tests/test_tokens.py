"""Characters, bytes and the tokens of a Hugging Face tokenizer."""

from pathlib import Path

import pytest

from kd_lightning.tokens import Bytes, Characters, HuggingFace, Tokenizer, read_tokenizer

TEXT = "To be, or not to be: thé question. Tö"


def library_file(folder: Path) -> Path:
    """A tokenizer that has learnt its tokens from a few words."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    made.train_from_iterator([TEXT] * 4, trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(params=["characters", "bytes", "library"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    name = str(library_file(tmp_path)) if request.param == "library" else request.param
    return read_tokenizer(name, [TEXT])


def test_a_text_comes_back_from_its_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert ids.min() >= 0
    assert ids.max() < tokenizer.size
    assert tokenizer.decode(ids.tolist()) == TEXT


def test_tokens_are_as_long_as_the_text_has_characters_and_bytes(tokenizer: Tokenizer) -> None:
    plain = TEXT.replace("é", "e").replace("ö", "o")  # a token that is a part of a character has no length of its own
    if not isinstance(tokenizer, Bytes):
        tokenizer = Characters.of([TEXT]) if isinstance(tokenizer, Characters) else tokenizer
    ids = tokenizer.encode(plain)
    assert tokenizer.lengths("character")[ids].sum() == len(plain)
    assert tokenizer.lengths("byte")[ids].sum() == len(plain.encode())
    assert tokenizer.lengths("token")[ids].sum() == len(ids)


def test_bytes_of_characters_beyond_ascii_are_one_character() -> None:
    assert Bytes().lengths("character")[Bytes().encode("hé")].sum() == 2
    assert Characters.of(["hé"]).lengths("byte").tolist() == [1, 2]


def test_a_text_is_spelled_by_the_bytes_of_its_tokens(tokenizer: Tokenizer) -> None:
    spelled = tokenizer.spellings()
    assert len(spelled) == tokenizer.size
    parts = [spelled[i] for i in tokenizer.encode(TEXT).tolist()]
    assert all(part is not None for part in parts)
    assert b"".join(part for part in parts if part is not None).decode() == TEXT


def test_a_character_that_is_no_symbol_is_named_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"the character 'x' \(at 6, after 'To be,'\) is none of the 7 symbols"):
        Characters("To be,.").encode("To be,x.")


def test_symbols_that_are_no_alphabet_are_refused() -> None:
    for wrong in ("", "abca"):
        with pytest.raises(ValueError, match="expected different characters"):
            Characters(wrong)


def test_a_file_that_is_no_tokenizers_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"there is no tokenizer's file .*missing.json.*'characters', 'bytes'"):
        HuggingFace(tmp_path / "missing.json")
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(ValueError, match=r"torn.json is no file of the tokenizers library"):
        HuggingFace(tmp_path / "torn.json")
