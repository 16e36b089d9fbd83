import subprocess
import sys

import numpy as np

from trainer_service.text.word_grams import WordGrams, words_of


def test_words_have_no_case_and_no_punctuation() -> None:
    assert words_of("“Don't  GO!” said\nÉmile, 3 times.") == ["don", "t", "go", "said", "émile", "3", "times"]


def test_a_run_is_known_by_its_words_in_their_order() -> None:
    grams = WordGrams()
    text = grams.of(["a", "b", "c", "a", "b", "c", "b", "a"], 2)
    assert text.tolist()[:2] == text.tolist()[3:5]
    assert len(set(text.tolist())) == 5  # ab, bc, ca, cb, ba
    assert np.array_equal(WordGrams().of(["a", "b", "c", "a", "b", "c", "b", "a"], 2), text)


def test_fewer_words_than_a_run_have_no_run() -> None:
    assert WordGrams().of(["a", "b"], 3).tolist() == [] == WordGrams().of([], 3).tolist()
    assert WordGrams().of(["a", "b"], 2).size == 1


def test_numbers_are_the_same_in_every_process() -> None:
    code = "from trainer_service.text.word_grams import WordGrams; print(*WordGrams().of(['one', 'two'], 2))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == [str(number) for number in WordGrams().of(["one", "two"], 2)]
