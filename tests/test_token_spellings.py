from pathlib import Path

import pytest

from kd_lightning.tokens import Bytes, Characters, HuggingFace


def spelled(tokenizer: HuggingFace) -> dict[bytes, int]:
    return {spelling: i for i, spelling in enumerate(tokenizer.spellings()) if spelling is not None}


def test_characters_and_bytes_spell_themselves() -> None:
    assert Characters("né").spellings() == [b"n", b"\xc3\xa9"]
    assert Bytes().spellings() == [bytes([i]) for i in range(256)]


def test_a_byte_level_vocabulary_spells_each_byte(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    training = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    library.train_from_iterator(["the thé the thé the"] * 5, training)
    library.save(str(tmp_path / "t.json"))
    made = HuggingFace(tmp_path / "t.json")
    found = spelled(made)
    assert {bytes([i]) for i in range(256)} <= found.keys()
    assert found[b"<|end|>"] == library.token_to_id("<|end|>")
    ids = made.encode("the thé\n the")
    spellings = made.spellings()
    assert b"".join(spellings[i] or b"" for i in ids) == "the thé\n the".encode()
    assert len(ids) < len("the thé\n the")


def test_a_vocabulary_with_marked_spaces_spells_them(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "\u2581": 3, "t": 4, "\u2581t": 5}
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("\u2581", "t")], unk_token="<unk>", byte_fallback=True)
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    steps = tokenizers.decoders
    library.decoder = steps.Sequence([steps.Replace("\u2581", " "), steps.ByteFallback(), steps.Fuse()])
    library.save(str(tmp_path / "t.json"))
    found = spelled(HuggingFace(tmp_path / "t.json"))
    assert {b" t": 5, b"t": 4, b"\xc3": 1, b" ": 3}.items() <= found.items()
