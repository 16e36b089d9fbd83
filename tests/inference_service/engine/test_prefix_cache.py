"""The prefix cache, with blocks that name their tokens."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_service.engine.prefix_cache import PrefixCache, Tokens
from shared.decoding.spans import SPAN_TOKENS


def tokens(*blocks: int) -> Tokens:
    return tuple(block for block in blocks for _ in range(SPAN_TOKENS))


def keep(cache: PrefixCache, *blocks: int) -> None:
    """Computes a prompt from its start, as the engine does."""
    for end in range(1, len(blocks) + 1):
        cache.keep(tokens(*blocks[:end]), partial(tokens, *blocks[:end]))


def found(cache: PrefixCache, *blocks: int) -> int:
    """Returns how many cached blocks a prompt begins with, each of which must be the right one."""
    cached = cache.find((*tokens(*blocks), 99))
    for end, block in enumerate(cached, start=1):
        assert block == tokens(*blocks[:end])
    return len(cached)


def test_the_common_prefix_of_a_prompt_is_found() -> None:
    cache = PrefixCache(10)
    keep(cache, 1, 2, 3)
    assert found(cache, 1, 2, 3, 4) == 3
    assert found(cache, 1, 2, 4) == 2
    # The same block after another one is another block.
    assert found(cache, 2, 2) == 0
    # The last token of a prompt is always left to be computed.
    assert len(cache.find(tokens(1, 2))) == 1
    cache.clear()
    assert found(cache, 1) == 0


def test_the_last_blocks_of_a_prompt_are_removed_first() -> None:
    cache = PrefixCache(4)
    keep(cache, 1, 2, 3)
    keep(cache, 7, 8)
    assert (found(cache, 1, 2, 3), found(cache, 7, 8)) == (2, 2)
    keep(cache, 5)
    assert (found(cache, 7, 8), found(cache, 5), found(cache, 1, 2)) == (2, 1, 1)


def test_a_cached_block_is_not_read_again() -> None:
    cache = PrefixCache(4)
    keep(cache, 1)
    cache.keep(tokens(1), pytest.fail)


def test_a_block_is_cached_only_after_those_before_it() -> None:
    cache = PrefixCache(4)
    cache.keep(tokens(1, 2), pytest.fail)
    keep(cache, 1, 2)
    assert found(cache, 1, 2) == 2


@pytest.mark.parametrize("capacity", [0, 2])
def test_a_prompt_longer_than_the_cache_keeps_its_prefix(capacity: int) -> None:
    cache = PrefixCache(capacity)
    keep(cache, *range(10))
    assert found(cache, *range(10)) == capacity


@given(st.integers(0, 6), st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=30))
def test_the_last_used_blocks_are_cached_within_the_capacity(capacity: int, prompts: list[list[int]]) -> None:
    cache = PrefixCache(capacity)
    for prompt in prompts:
        keep(cache, *prompt)
        assert found(cache, *prompt) == min(len(prompt), capacity)
        assert len(cache._blocks) <= capacity
