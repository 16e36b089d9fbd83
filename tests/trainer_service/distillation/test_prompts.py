import hashlib
import json
from collections import Counter
from itertools import chain

from trainer_service.distillation.prompts import TEMPLATE, Prompt, draw_prompt

MANY = 100_000


def test_a_prompt_follows_from_the_number_of_its_sample_and_the_template_alone() -> None:
    assert draw_prompt(0) == Prompt("stick", "cook", "crunchy", ("dialogue", "sad ending", "foreshadowing"))
    said = json.dumps([draw_prompt(sample).messages() for sample in range(2000)])
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    # Other words need another name of the template, so that stories that were paid for keep their prompts.
    assert (TEMPLATE, digest) == ("stories-1", "8421081f03c52d09")


def test_many_samples_have_as_many_prompts_of_all_words_and_features() -> None:
    prompts = [draw_prompt(sample) for sample in range(MANY)]
    assert len(set(prompts)) > 0.999 * MANY
    for words, fewest in (
        (Counter(prompt.noun for prompt in prompts), 300),
        (Counter(prompt.verb for prompt in prompts), 150),
        (Counter(prompt.adjective for prompt in prompts), 150),
    ):
        assert len(words) >= fewest
        assert max(words.values()) < 2 * min(words.values())
    features = Counter(chain.from_iterable(prompt.features for prompt in prompts))
    assert len(features) == 8
    assert all(0.24 * MANY < number < 0.26 * MANY for number in features.values())


def test_the_teacher_reads_every_word_and_feature() -> None:
    system, user = Prompt("dog", "run", "happy", ("dialogue", "twist")).messages()
    assert (system["role"], user["role"]) == ("system", "user")
    assert all(word in user["content"] for word in ("“dog”", "“run”", "“happy”"))
    assert "talk to each other. Something that nobody expects" in user["content"]
    assert "  " not in user["content"] and "{" not in user["content"]


def test_a_student_reads_a_short_line() -> None:
    assert Prompt("dog", "run", "happy", ("dialogue",)).short() == "Words: dog, run, happy. Features: dialogue."
    assert Prompt("dog", "run", "happy", ()).short() == "Words: dog, run, happy."
