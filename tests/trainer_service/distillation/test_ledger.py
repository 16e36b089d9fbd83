import json
import resource
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import AlreadyExists, FailedPrecondition, NotFound
from trainer_service.distillation.answers import Answer, Kind, Usage
from trainer_service.distillation.ledger import (
    LEDGER_NAME,
    Account,
    Ledger,
    key_of,
    last_rows,
    read_account,
    read_stories,
)
from trainer_service.distillation.prices import written
from trainer_service.distillation.prompts import draw_prompt

MOST = Decimal("0.0004")
COST = Decimal("0.000123456")


def key(sample: int) -> str:
    return key_of("m", "t", {"temperature": 1.0}, sample)


def send(ledger: Ledger, sample: int) -> str:
    ledger.sent(key(sample), sample, "m", "t", MOST, vars(draw_prompt(sample)))
    return key(sample)


def answer(text: str) -> Answer:
    return Answer(text, Usage(100, 200, 50), "stop", "m", "fp_1")


def test_what_was_paid_and_what_may_have_been_paid_add_up(tmp_path: Path) -> None:
    with Ledger(tmp_path / "set") as ledger:
        ledger.answered(send(ledger, 0), COST, answer("One."))
        ledger.refused(send(ledger, 1), COST, Kind.TRUNCATED)
        ledger.refused(send(ledger, 2), Decimal(0), Kind.RATE_LIMITED)
        send(ledger, 3)
        kept = ledger.account
    assert kept == read_account(tmp_path / "set")
    assert kept.spent_usd == COST + COST + MOST and kept.open_usd == {key(3): MOST}
    assert (kept.answered, kept.answered_usd, kept.refused_usd) == (1, COST, COST)
    assert kept.refused == {"truncated": 1, "rate limited": 1}
    # What was certainly not paid may be asked again.
    assert [kept.may_ask(key(sample)) for sample in range(5)] == [False, False, True, False, True]


def test_a_row_is_on_the_disk_when_it_has_been_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    with Ledger(tmp_path) as ledger:
        monkeypatch.setattr("trainer_service.distillation.ledger.sync", lambda path: synced.append(path.read_bytes()))
        ledger.answered(send(ledger, 0), COST, answer("One."))
    assert [json.loads(text.splitlines()[-1])["state"] for text in synced] == ["sent", "answered"]


def test_stories_are_read_with_their_prompts_while_more_are_written(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no set of stories 'none'; `gptloop stories none` asks for some"):
        read_stories(tmp_path / "none")
    with Ledger(tmp_path) as ledger:
        first, second, third = (send(ledger, sample) for sample in range(3))
        ledger.answered(second, COST, answer("Two.\u2028And two.\n"))
        ledger.refused(third, COST, Kind.EMPTY)
        ledger.answered(first, COST, answer("One."))
        found = read_stories(tmp_path)
    assert [(story.key, story.text) for story in found] == [(second, "Two.\u2028And two.\n"), (first, "One.")]
    assert found[1].prompt == draw_prompt(0).short()


@given(cut=st.integers(min_value=0))
@settings(max_examples=25)
def test_a_torn_row_is_dropped_and_counted_and_nothing_else_is_lost(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    with Ledger(folder) as ledger:
        ledger.answered(send(ledger, 0), COST, answer("One."))
        send(ledger, 1)
    path = folder / LEDGER_NAME
    whole = path.read_bytes()
    last = len(whole.splitlines()[-1])
    # From the row without its line end down to nothing of it.
    kept = last - cut % (last + 1)
    path.write_bytes(whole[: len(whole) - last - 1 + kept])
    is_torn = 0 < kept < last
    for _ in range(2):
        with Ledger(folder) as ledger:
            assert ledger.account.garbled == is_torn
            assert ledger.account.spent_usd == COST + (MOST if kept == last else 0)
    with Ledger(folder) as ledger:
        ledger.answered(send(ledger, 2), COST, answer("Three."))
    assert [story.text for story in read_stories(folder)] == ["One.", "Three."]


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[1]",
        b"[" * 100_000,
        b'{"state": "sent", "key": 3, "cost_usd": "1"}',
        b'{"state": "sent", "key": "a", "cost_usd": "-1"}',
        b'{"state": "sent", "key": "a", "cost_usd": 0.1}',
        b'{"state": "sent", "key": "a", "cost_usd": "1e999999"}',
        b'{"state": "answered", "key": "a", "cost_usd": "1"}',
        b'{"state": "paid", "key": "a", "cost_usd": "1"}',
        b"",
    ],
)
def test_a_line_that_is_no_row_changes_nothing(tmp_path: Path, line: bytes) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.answered(send(ledger, 0), COST, answer("One."))
    with (tmp_path / LEDGER_NAME).open("ab") as file:
        file.write(line + b"\n")
    account = read_account(tmp_path)
    assert (account.garbled, account.spent_usd, len(read_stories(tmp_path))) == (1, COST, 1)


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    with Ledger(tmp_path), pytest.raises(AlreadyExists, match=r"Another process writes .*ledger\.jsonl now; wait"):
        Ledger(tmp_path)
    with Ledger(tmp_path):
        pass


def test_a_ledger_that_cannot_be_written_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match=r"The ledger .* cannot be written: .*; check its disk\."):
        Ledger(tmp_path / "file")


def test_a_row_that_does_not_fit_on_the_disk_leaves_nothing_of_itself(tmp_path: Path) -> None:
    no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Ledger(tmp_path) as ledger:
        first, second = send(ledger, 0), send(ledger, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / LEDGER_NAME).stat().st_size + 50, no_limit[1]))
        try:
            with pytest.raises(FailedPrecondition, match=r"cannot be written: File too large; check its disk"):
                ledger.answered(first, COST, answer("One."))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
        ledger.answered(second, COST, answer("Two."))
    account = read_account(tmp_path)
    assert (account.garbled, account.answered, account.spent_usd) == (0, 1, MOST + COST)
    assert [story.text for story in read_stories(tmp_path)] == ["Two."]


def test_an_absent_ledger_adds_up_to_nothing(tmp_path: Path) -> None:
    assert read_account(tmp_path / "none") == Account()


def test_a_key_follows_from_all_that_decides_an_answer() -> None:
    asked: list[tuple[str, str, dict[str, object], int]] = [
        ("m", "t", {"a": 1, "b": 2}, 0),
        ("n", "t", {"a": 1, "b": 2}, 0),
        ("m", "u", {"a": 1, "b": 2}, 0),
        ("m", "t", {"a": 1, "b": 3}, 0),
        ("m", "t", {"a": 1, "b": 2}, 1),
    ]
    assert len({key_of(*each) for each in asked}) == len(asked)
    assert key_of("m", "t", {"b": 2, "a": 1}, 0) == key_of(*asked[0])


@given(st.decimals(min_value=0, max_value=10**8, allow_nan=False, places=12))
def test_money_is_written_exactly_and_without_an_exponent(cost_usd: Decimal) -> None:
    text = written(cost_usd)
    assert Decimal(text) == cost_usd and "E" not in text


@pytest.mark.parametrize("sample", [None, "1", 0.5, True, [1], {"a": 1}])
def test_a_row_whose_sample_is_no_number_costs_what_it_says_and_names_no_call(tmp_path: Path, sample: object) -> None:
    with Ledger(tmp_path) as ledger:
        send(ledger, 0)
        send(ledger, 1)
    path = tmp_path / LEDGER_NAME
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    path.write_text(f"{json.dumps(first | {'sample': sample})}\n{json.dumps(second)}\n")
    assert list(last_rows(tmp_path)) == [1]
    assert read_account(tmp_path).spent_usd == MOST + MOST
