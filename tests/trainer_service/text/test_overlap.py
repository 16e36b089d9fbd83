from hypothesis import given
from hypothesis import strategies as st

from trainer_service.text.overlap import RUN_WORDS, HeldOutRuns
from trainer_service.text.word_grams import WordGrams, words_of

WORDS = [f"w{number}" for number in range(40)]
HELD_OUT = ["A fox. " * 3 + " ".join(WORDS[:20]), "Short.", " ".join(WORDS[20:])]


def overlaps(text: str) -> bool:
    return HeldOutRuns(HELD_OUT, WordGrams()).overlap(words_of(text))


def test_a_run_of_13_held_out_words_overlaps_and_one_of_12_does_not() -> None:
    run = WORDS[3 : 3 + RUN_WORDS]
    assert RUN_WORDS == 13
    assert overlaps("It began. " + " ".join(run) + " and so on")
    assert not overlaps("It began. " + " ".join(run[:-1]) + " and so on")


def test_case_and_punctuation_do_not_hide_an_overlap() -> None:
    assert overlaps("“" + "! — ".join(word.upper() for word in WORDS[20:33]) + "”")


def test_a_run_does_not_reach_from_one_held_out_text_into_the_next() -> None:
    assert not overlaps(" ".join(WORDS[14:27]))


def test_nothing_overlaps_with_no_held_out_text() -> None:
    assert not HeldOutRuns([], WordGrams()).overlap(WORDS)
    assert not overlaps("")


@given(st.lists(st.sampled_from("abc"), max_size=40), st.lists(st.sampled_from("abc"), max_size=40))
def test_overlap_is_a_run_in_both(held_out: list[str], words: list[str]) -> None:
    def runs(of: list[str]) -> set[tuple[str, ...]]:
        return {tuple(of[first : first + RUN_WORDS]) for first in range(len(of) - RUN_WORDS + 1)}

    found = HeldOutRuns([" ".join(held_out)], WordGrams()).overlap(words)
    assert found == bool(runs(held_out) & runs(words))


def test_reading_held_out_text_can_be_ended() -> None:
    seen = []
    HeldOutRuns(HELD_OUT, WordGrams(), lambda: seen.append(1))
    assert len(seen) == len(HELD_OUT)
