import json
from pathlib import Path

from tests.benchmarks.lm_eval import PAIRS, write_material
from trainer_service.text.sentence_pairs import read_pairs


def test_the_pairs_are_sentences_that_differ_in_the_order_of_two_words(tmp_path: Path) -> None:
    write_material(tmp_path)
    pairs = read_pairs(tmp_path / "gptloop_pairs.jsonl").pairs
    assert len(pairs) == len({pair.good for pair in pairs}) == PAIRS
    text = json.loads((tmp_path / "gptloop_text.jsonl").read_text())["text"]
    for pair in pairs:
        good, bad = pair.good.split(), pair.bad.split()
        assert sorted(good) == sorted(bad)
        assert sum(one != other for one, other in zip(good, bad, strict=True)) == 2
        assert pair.good in text.replace("\n", " ")
