"""Reads and writes GPT-2's tokenizer files, vocab.json and merges.txt.

These files list merges of pairs by rank. Our tokenizer always merges the pair that spells the token with the lowest id.
Both encode every text alike if exactly one merge spells each token, the merges are in the order of their tokens' ids,
and each merge is the last one that our tokenizer makes when it encodes the bytes of the token alone. Then every pair
that our tokenizer meets in a text is the pair of a merge: no merge has crossed the ends of the pair, so the bytes
between them have merged as they do alone. A trained BPE has these properties, and `read_tokenizer` checks them.
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
# Newer programs write both into this file.
WHOLE_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
GPT2_TOKENS = 50257
# Many programs pad GPT-2's vocabulary to a multiple of 64, 128 or more.
_MOST_PADDED_TOKENS = 51200

Merge = tuple[str, str]

# The longest reason in an error, in characters.
_REASON = 160


def read_tokenizer(directory: Path, vocabulary_size: int) -> Tokenizer:
    """Returns the tokenizer of a folder; GPT-2's own if the folder has none and the model has GPT-2's 50257 tokens,
    padded or not.

    Raises `InvalidArgument` if our tokenizer cannot represent it or it has more tokens than the model, and
    `Unavailable` if GPT-2's own cannot be loaded.
    """
    try:
        if any((directory / name).exists() for name in (VOCABULARY_FILE, MERGES_FILE)):
            vocabulary = read_json(directory / VOCABULARY_FILE)
            merges = _read_merges(directory / MERGES_FILE)
        elif (directory / WHOLE_FILE).exists():
            vocabulary, merges = _read_whole(directory / WHOLE_FILE)
        elif GPT2_TOKENS <= vocabulary_size <= _MOST_PADDED_TOKENS:
            return load_gpt2()
        else:
            raise InvalidArgument(
                f"{directory} has no {VOCABULARY_FILE} and {MERGES_FILE}, and its model has {vocabulary_size} tokens; "
                f"only a model of {GPT2_TOKENS} tokens can do without them, with GPT-2's own tokenizer."
            )
        tokenizer = _tokenizer(vocabulary | _added_tokens(directory), merges)
    except KeyError as error:
        raise InvalidArgument(f"The tokenizer in {directory} is not supported: it has no {error.args[0]}.") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = excerpt(error, _REASON)
        raise InvalidArgument(f"The tokenizer in {directory} is not supported: {reason}.") from None
    if tokenizer.vocabulary_size > vocabulary_size:
        raise InvalidArgument(
            f"The tokenizer in {directory} has {tokenizer.vocabulary_size} tokens, but the model has only "
            f"{vocabulary_size}."
        )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, context_length: int, directory: Path) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json into a folder.

    Raises `InvalidArgument` if these files cannot describe the tokenizer.
    """
    if tokenizer.pattern != PATTERN:
        raise InvalidArgument(
            f"The tokenizer {tokenizer.name!r} cannot be exported, because it does not split text as GPT-2 does."
        )
    letters = {value: letter for letter, value in byte_of_letter().items()}
    ranks = {token_bytes: rank for rank, token_bytes in enumerate(tokenizer.vocabulary[:-1])}
    merges = []
    for token_bytes in filter(_is_merged, ranks):
        parts = _last_merge(token_bytes, ranks)
        if len(parts) != 2:
            raise InvalidArgument(
                f"The tokenizer cannot be exported, because no merge gives its token {token_bytes!r}."
            )
        merges.append(" ".join(_spell(part, letters) for part in parts))
    vocabulary = {_spell(token_bytes, letters): rank for token_bytes, rank in ranks.items()} | {
        END_OF_TEXT: tokenizer.end_token
    }
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
    """Makes a tokenizer from a vocabulary in GPT-2's spelling; raises `ValueError` if the merges do not match it."""
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
    for token_bytes, merge in zip_longest(filter(_is_merged, ranks), merges):
        if token_bytes is None:
            raise ValueError(f"its merge {merge} comes after that of the last token")
        expected = tokens[ranks[token_bytes]]
        if merge is None:
            raise ValueError(f"no merge spells its token {expected!r}")
        if "".join(merge) != expected:
            raise ValueError(f"its merges must be in the order of ids, but {merge} comes where {expected!r} is next")
        if _last_merge(token_bytes, ranks) != [bytes(map(values.__getitem__, part)) for part in merge]:
            raise ValueError(f"its merge {merge} is not the last merge that encodes {expected!r}")
    if len(vocabulary) == GPT2_TOKENS and (gpt2 := load_gpt2()).vocabulary[:-1] == list(ranks):
        return gpt2
    return Tokenizer("bpe", PATTERN, list(ranks))


def _is_merged(token_bytes: bytes) -> bool:
    return len(token_bytes) > 1


def _last_merge(token_bytes: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Merges pairs in a token's bytes, lowest rank first, below the token's own rank; returns the two or more parts
    that are left."""
    parts = [token_bytes[at : at + 1] for at in range(len(token_bytes))]
    while len(parts) > 2:
        rank, at = min((ranks.get(left + right, len(ranks)), at) for at, (left, right) in enumerate(pairwise(parts)))
        if rank >= ranks[token_bytes]:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _spell(token_bytes: bytes, letters: Mapping[int, str]) -> str:
    return "".join(map(letters.__getitem__, token_bytes))


def _read_merges(path: Path) -> list[Merge]:
    """Reads a merges.txt, whose first line may be a version; raises `ValueError` if a line is not a pair."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}.") from None
    return [_pair(line.split()) for line in lines[lines[0].startswith("#version") :] if line]


def _read_whole(path: Path) -> tuple[dict[str, int], list[Merge]]:
    """Reads the vocabulary and the merges of a tokenizer.json, in which a merge is a pair or a string of two parts."""
    whole = read_json(path)
    model, split = whole.get("model") or {}, whole.get("pre_tokenizer") or {}
    kind = (model.get("type"), split.get("type"), split.get("add_prefix_space"), split.get("use_regex", True))
    if kind != ("BPE", "ByteLevel", False, True) or whole.get("normalizer"):
        raise ValueError(f"{path.name} does not split and merge text as GPT-2 does")
    added = {token["content"]: token["id"] for token in whole["added_tokens"]}
    return model["vocab"] | added, [_pair(each.split() if isinstance(each, str) else each) for each in model["merges"]]


def _pair(parts: Sequence[str]) -> Merge:
    if len(parts) != 2:
        raise ValueError(f"its merge {' '.join(parts)!r} is not a pair")
    return parts[0], parts[1]


def _added_tokens(directory: Path) -> dict[str, int]:
    """Reads the tokens that other files add to the vocabulary; raises `ValueError` if the tokenizer would add something
    to a text."""
    config = read_json(directory / CONFIG_FILE) if (directory / CONFIG_FILE).exists() else {}
    for name in ("add_prefix_space", "add_bos_token"):
        if config.get(name):
            raise ValueError(f"{CONFIG_FILE} sets {name}")
    added = read_json(directory / ADDED_FILE) if (directory / ADDED_FILE).exists() else {}
    decoder = config.get("added_tokens_decoder", {})
    return added | {token["content"]: int(number) for number, token in decoder.items()}
