import sys

import pytest
import torch

from compress.calibration import fingerprint, hold_out, read_tokens
from sslc_common.errors import InputError, MissingError


def words(first, count):
    """Text of `count` tokens: first, first + 1, ... below 97, again and again."""
    return " ".join(f"w{(first + i) % 97}" for i in range(count))


def draw(source, model, tokens=64, length=16, seed=0):
    sources = source if isinstance(source, tuple) else (source,)
    return read_tokens([str(s) for s in sources], model, tokens=tokens, length=length, seed=seed)


def test_a_file_becomes_sequences_of_its_tokens(tmp_path, tokenizer_folder):
    (tmp_path / "text.txt").write_text(words(0, 1000))
    sequences = draw(tmp_path / "text.txt", tokenizer_folder, tokens=70)
    assert sequences.shape == (4, 16)
    assert sequences.dtype == torch.int64
    # Words inside a piece of text follow each other; a piece may begin in the middle of a word.
    steps = (sequences[:, 1:] - sequences[:, :-1]) % 97
    assert (steps == 1).float().mean() > 0.9


def test_the_seed_decides_the_draw(tmp_path, tokenizer_folder):
    (tmp_path / "text.txt").write_text(words(0, 20_000))
    one, again, other = (draw(tmp_path / "text.txt", tokenizer_folder, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert fingerprint(one) == fingerprint(again) != fingerprint(other)


def test_a_fingerprint_knows_the_length_of_the_sequences():
    assert fingerprint(torch.zeros(4, 8)) != fingerprint(torch.zeros(8, 4))


def test_a_folder_is_all_its_text_files(tmp_path, tokenizer_folder):
    (tmp_path / "b.txt").write_text(words(0, 50))
    (tmp_path / "a.txt").write_text(words(0, 50))
    (tmp_path / "c.md").write_text(words(0, 1000))
    assert draw(tmp_path, tokenizer_folder, tokens=100, length=10).shape == (10, 10)
    with pytest.raises(InputError, match="100 tokens"):
        draw(tmp_path, tokenizer_folder, tokens=110, length=10)


def test_several_sources_take_turns(tmp_path, tokenizer_folder):
    for name, word in (("one", "w1"), ("two", "w2")):
        (tmp_path / name).write_text(f"{word} " * 500)
    sequences = draw((tmp_path / "one", tmp_path / "two"), tokenizer_folder, tokens=5 * 16)
    # Pieces of text may cut a word in two, and half a word is w0.
    assert sequences.mode(1).values.tolist() == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(("text", "fact", "got"), [("", "empty", "0 tokens"), ("w1 w2 w3", "too short", "3 tokens")])
def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(tmp_path, tokenizer_folder, text, fact, got):
    (tmp_path / "text.txt").write_text(text)
    with pytest.raises(InputError, match=fact) as error:
        draw(tmp_path / "text.txt", tokenizer_folder)
    assert got in str(error.value)
    assert "64 tokens" in str(error.value)


def test_exactly_enough_text_is_enough(tmp_path, tokenizer_folder):
    (tmp_path / "text.txt").write_text("w1\n" * 64)
    assert draw(tmp_path / "text.txt", tokenizer_folder).shape == (4, 16)


@pytest.mark.parametrize("source", ["nothing.txt", "/no/such/place", "./nothing", "~/nothing"])
def test_text_that_is_not_there(tokenizer_folder, source):
    with pytest.raises(InputError, match="no calibration text"):
        draw(source, tokenizer_folder)


def test_no_source_at_all(tokenizer_folder):
    with pytest.raises(InputError, match="no calibration text"):
        read_tokens([], tokenizer_folder, tokens=64, length=16, seed=0)


def test_a_folder_without_text(tmp_path, tokenizer_folder):
    with pytest.raises(InputError, match=r"no \.txt files"):
        draw(tmp_path, tokenizer_folder)


def test_a_file_that_is_not_text(tmp_path, tokenizer_folder):
    (tmp_path / "archive.txt").write_bytes(b"\x1f\x8b\xff\xfe" * 100)
    with pytest.raises(InputError, match="not UTF-8"):
        draw(tmp_path / "archive.txt", tokenizer_folder)


def test_a_model_without_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text(words(0, 1000))
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match="no tokenizer"):
        draw(tmp_path / "text.txt", tmp_path / "model")


def test_a_damaged_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text(words(0, 1000))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer .*cannot be read"):
        draw(tmp_path / "text.txt", tmp_path / "model")


def test_a_dataset_without_the_package_names_the_extra(monkeypatch, tokenizer_folder):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingError, match=r"sslc-export\[datasets\]"):
        draw("wikitext", tokenizer_folder)


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("name", ("name", None, "train")),
        ("name:conf", ("name", "conf", "train")),
        ("name:conf:test", ("name", "conf", "test")),
        ("owner/name::test", ("owner/name", None, "test")),
    ],
)
def test_a_dataset_is_read_through_its_package(monkeypatch, tokenizer_folder, source, arguments):
    class Rows:
        column_names = ("text",)

        def __getitem__(self, column):
            assert column == "text"
            return [words(0, 40)] * 3

    class Datasets:
        @staticmethod
        def load_dataset(name, configuration, split):
            assert (name, configuration, split) == arguments
            return Rows()

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert draw(source, tokenizer_folder).shape == (4, 16)


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (12, 1), (13, 1), (14, 1), (26, 2), (60, 4)])
def test_one_sequence_of_thirteen_is_held_out(count, held_out):
    tokens = torch.arange(count)[:, None].repeat(1, 3)
    ordered, solving = hold_out(tokens)
    assert solving == count - held_out
    assert sorted(ordered[:, 0].tolist()) == list(range(count))
    assert ordered[:solving, 0].tolist() == sorted(ordered[:solving, 0].tolist())


@pytest.mark.parametrize("sources", [2, 3, 4])
def test_sequences_of_every_source_are_held_out(sources):
    ordered, solving = hold_out(torch.arange(60)[:, None] % sources)
    assert set(ordered[solving:, 0].tolist()) == set(range(sources))
