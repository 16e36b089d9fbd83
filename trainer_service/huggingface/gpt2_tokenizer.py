"""GPT-2's tokenizer files: vocab.json and merges.txt, into our tokenizer and out of it.

These files list the merges of pairs by rank; our tokenizer merges whichever pair spells the token with the lowest id.
The two agree on every text where each token is spelled by one merge, merges stand in the order of their tokens' ids,
and each merge is the last one that our tokenizer makes when it encodes the token's bytes alone. Then each pair that it
comes upon in a text is the pair of a merge: nothing has merged across the ends of the pair so far, so what stands
between them is what the bytes give alone. A trained BPE is like that, and it is checked.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path

from shared.errors import InvalidArgument
from shared.gpt.tokenizer import END_OF_TEXT, PATTERN, Tokenizer, byte_of_letter, load_gpt2
from shared.text import excerpt
from trainer_service.huggingface.gpt2 import read_json

VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
# The one file in which newer writers keep the same.
WHOLE_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
GPT2_TOKENS = 50257
# Many programs fill GPT-2's table up to a multiple of 64, of 128, or of some more.
_MOST_FILLED_UP = 51200

Merge = tuple[str, str]

# Characters of the reason for which a tokenizer cannot be represented.
_REASON = 160


def read_tokenizer(directory: Path, vocabulary_size: int) -> Tokenizer:
    """The tokenizer of a folder, with no more tokens than the model has; GPT-2's own if the folder holds none and the
    model has 50257 tokens or is padded beyond them.

    Raises `InvalidArgument` where there is none that we can represent, or it does not fit the model, and `Unavailable`
    where GPT-2's own cannot be had.
    """
    try:
        if any((directory / name).exists() for name in (VOCABULARY_FILE, MERGES_FILE)):
            vocabulary = read_json(directory / VOCABULARY_FILE)
            merges = _read_merges(directory / MERGES_FILE)
        elif (directory / WHOLE_FILE).exists():
            vocabulary, merges = _read_whole(directory / WHOLE_FILE)
        elif GPT2_TOKENS <= vocabulary_size <= _MOST_FILLED_UP:
            return load_gpt2()
        else:
            raise InvalidArgument(
                f"{directory} has no {VOCABULARY_FILE} and {MERGES_FILE}; only a model of {GPT2_TOKENS} tokens is "
                f"understood without them, as GPT-2's own, and this one has {vocabulary_size}."
            )
        tokenizer = _tokenizer(vocabulary | _added_tokens(directory), merges)
    except KeyError as error:
        raise InvalidArgument(f"The tokenizer in {directory} cannot be represented here: no {error.args[0]}.") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = excerpt(error, _REASON)
        raise InvalidArgument(f"The tokenizer in {directory} cannot be represented here: {reason}.") from None
    if tokenizer.vocabulary_size > vocabulary_size:
        raise InvalidArgument(
            f"The tokenizer in {directory} has {tokenizer.vocabulary_size} tokens, but the model has only "
            f"{vocabulary_size}."
        )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, context_length: int, directory: Path) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json into a folder.

    Raises `InvalidArgument` for a tokenizer that these files cannot describe.
    """
    if tokenizer.pattern != PATTERN:
        raise InvalidArgument(
            f"The tokenizer {tokenizer.name!r} does not split text as GPT-2 does, so cannot be exported."
        )
    letters = {value: letter for letter, value in byte_of_letter().items()}
    ranks = {piece: rank for rank, piece in enumerate(tokenizer.pieces[:-1])}
    merges = []
    for piece in filter(_is_merged, ranks):
        parts = _last_merge(piece, ranks)
        if len(parts) != 2:
            raise InvalidArgument(f"No merge gives the token {piece!r} of the tokenizer, so it cannot be exported.")
        merges.append(" ".join(_spell(part, letters) for part in parts))
    vocabulary = {_spell(piece, letters): rank for piece, rank in ranks.items()} | {END_OF_TEXT: tokenizer.end_token}
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": context_length,
    }
    (directory / VOCABULARY_FILE).write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (directory / MERGES_FILE).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _tokenizer(vocabulary: Mapping[str, int], merges: Sequence[Merge]) -> Tokenizer:
    """The tokenizer of a vocabulary in GPT-2's spelling; raises `ValueError` where it and the merges do not agree."""
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError(f"its ids must be 0 to {len(tokens) - 1}, once each")
    *tokens, last = tokens
    if last != END_OF_TEXT:
        raise ValueError(f"its last token must be {END_OF_TEXT}, but is {last!r}")
    values = byte_of_letter()
    for token in tokens:
        if not token or not values.keys() >= set(token):
            raise ValueError(f"its token {token!r} is not spelled in GPT-2's letters for bytes")
    ranks = {bytes(map(values.__getitem__, token)): rank for rank, token in enumerate(tokens)}
    for piece, merge in zip_longest(filter(_is_merged, ranks), merges):
        expected = None if piece is None else tokens[ranks[piece]]
        if merge is None or "".join(merge) != expected:
            raise ValueError(f"where the token {expected!r} comes next in the order of ids, the next merge is {merge}")
        if _last_merge(piece, ranks) != [bytes(map(values.__getitem__, part)) for part in merge]:
            raise ValueError(f"its merge {merge} is not the last one by which {expected!r} is encoded")
    if len(vocabulary) == GPT2_TOKENS and (gpt2 := load_gpt2()).pieces[:-1] == list(ranks):
        return gpt2
    return Tokenizer("bpe", PATTERN, list(ranks))


def _is_merged(piece: bytes) -> bool:
    return len(piece) > 1


def _last_merge(piece: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """What is left of a token's bytes when pairs of lower rank are merged, the lowest first: two parts, or more."""
    parts = [piece[at : at + 1] for at in range(len(piece))]
    while len(parts) > 2:
        rank, at = min((ranks.get(left + right, len(ranks)), at) for at, (left, right) in enumerate(pairwise(parts)))
        if rank >= ranks[piece]:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _spell(piece: bytes, letters: Mapping[int, str]) -> str:
    return "".join(map(letters.__getitem__, piece))


def _read_merges(path: Path) -> list[Merge]:
    """The merges of a merges.txt, whose first line can be a version; raises `ValueError` where a line is no pair."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}.") from None
    return [_pair(line.split()) for line in lines[lines[0].startswith("#version") :] if line]


def _read_whole(path: Path) -> tuple[dict[str, int], list[Merge]]:
    """Vocabulary and merges of a tokenizer.json, in which merges are pairs or pairs in one text."""
    whole = read_json(path)
    model, split = whole.get("model") or {}, whole.get("pre_tokenizer") or {}
    kind = (model.get("type"), split.get("type"), split.get("add_prefix_space"), split.get("use_regex", True))
    if kind != ("BPE", "ByteLevel", False, True) or whole.get("normalizer"):
        raise ValueError(f"{path.name} does not describe GPT-2's way to split and merge")
    added = {token["content"]: token["id"] for token in whole["added_tokens"]}
    return model["vocab"] | added, [_pair(each.split() if isinstance(each, str) else each) for each in model["merges"]]


def _pair(parts: Sequence[str]) -> Merge:
    if len(parts) != 2:
        raise ValueError(f"its merge {' '.join(parts)!r} is no pair")
    return parts[0], parts[1]


def _added_tokens(directory: Path) -> dict[str, int]:
    """Tokens that are told beside the vocabulary; raises `ValueError` where text is not encoded as it stands."""
    config = read_json(directory / CONFIG_FILE) if (directory / CONFIG_FILE).exists() else {}
    for name in ("add_prefix_space", "add_bos_token"):
        if config.get(name):
            raise ValueError(f"{CONFIG_FILE} sets {name}")
    added = read_json(directory / ADDED_FILE) if (directory / ADDED_FILE).exists() else {}
    decoder = config.get("added_tokens_decoder", {})
    return added | {token["content"]: int(number) for number, token in decoder.items()}
