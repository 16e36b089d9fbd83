import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_service.text.near_duplicates import HASHES, RUN_WORDS, MinHash, near_duplicates, similarity
from trainer_service.text.word_grams import Grams, WordGrams


def runs(*words: str) -> Grams:
    return WordGrams().of(words, RUN_WORDS)


def mixed(shared: int, others: int, seed: int) -> tuple[Grams, Grams]:
    """Returns the runs of two texts: some that both have, and as many others for each."""
    drawn = np.random.default_rng(seed).integers(0, 1 << 64, size=shared + 2 * others, dtype=np.uint64)
    return drawn[: shared + others], np.concatenate([drawn[:shared], drawn[shared + others :]])


@given(shared=st.integers(0, 200), others=st.integers(0, 200), seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_signatures_estimate_the_exact_similarity(shared: int, others: int, seed: int) -> None:
    shared = shared if others else max(shared, 1)
    first, second = mixed(shared, others, seed)
    exact = len(set(first.tolist()) & set(second.tolist())) / len(set(first.tolist()) | set(second.tolist()))
    hashing = MinHash()
    estimate = similarity(hashing.signature(first), hashing.signature(second)[None])[0]
    # Five standard deviations of a mean of HASHES draws, the largest at a similarity of a half.
    assert abs(estimate - exact) <= 5 * 0.5 / np.sqrt(HASHES)


def test_the_estimate_is_unbiased() -> None:
    hashing = MinHash()
    pairs = [mixed(120, 60, seed) for seed in range(200)]  # 120 of 240 runs are shared
    estimates = [similarity(hashing.signature(first), hashing.signature(second)[None])[0] for first, second in pairs]
    assert abs(np.mean(estimates) - 0.5) < 0.01


def test_a_signature_does_not_depend_on_order_or_repetition() -> None:
    hashing, text = MinHash(), runs(*["the", "cat", "sat", "on", "the", "mat", "and", "saw", "a", "dog", "run", "by"])
    again = np.concatenate([text[::-1], text])
    assert np.array_equal(hashing.signature(text), MinHash().signature(again))


def signatures(*texts: Grams) -> np.ndarray:
    hashing = MinHash()
    return np.array([hashing.signature(text) for text in texts])


def test_the_first_of_near_duplicates_stays() -> None:
    first, near = mixed(190, 10, 1)
    far, _ = mixed(200, 0, 2)
    stacked = signatures(first, far, near, first, near, far)
    assert near_duplicates(stacked).tolist() == [False, False, True, True, True, True]


def test_a_text_is_compared_with_those_that_stay_only() -> None:
    drawn = mixed(440, 0, 4)[0]
    first, middle, last = drawn[:300], drawn[70:370], drawn[140:440]  # neighbours share 0.62, the others 0.36
    assert near_duplicates(signatures(first, middle, last)).tolist() == [False, True, False]
    assert near_duplicates(signatures(middle, first, last)).tolist() == [False, True, True]


def test_texts_that_share_little_all_stay() -> None:
    pairs = [mixed(20, 180, seed) for seed in range(50)]
    assert not near_duplicates(signatures(*(text for pair in pairs for text in pair))).any()


def test_bands_find_almost_every_pair_well_above_the_limit() -> None:
    pairs = [mixed(160, 30, seed) for seed in range(200)]  # 160 of 220 runs are shared: 0.73
    found = near_duplicates(signatures(*(text for pair in pairs for text in pair)))
    assert not found[::2].any() and found[1::2].sum() >= 199


def test_later_texts_do_not_change_what_happens_to_earlier_ones() -> None:
    generator = np.random.default_rng(3)
    base = [mixed(150, 50, seed)[0] for seed in range(5)]
    texts = [np.concatenate([base[n % 5][: generator.integers(100, 200)], mixed(40, 0, n)[0]]) for n in range(60)]
    stacked = signatures(*texts)
    whole = near_duplicates(stacked)
    assert 0 < whole.sum() < 60
    for count in (1, 17, 42):
        assert np.array_equal(near_duplicates(stacked[:count]), whole[:count])


def test_no_text_has_no_duplicate() -> None:
    assert near_duplicates(np.zeros((0, HASHES), np.uint32)).tolist() == []
