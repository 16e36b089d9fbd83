"""The inbox, without an engine."""

import threading
from concurrent.futures import Future
from functools import partial

import pytest

from inference_service.engine.inbox import Inbox
from inference_service.engine.request import Failed, NotFinite, Output
from shared.errors import Unavailable
from tests.inference_service.engine.harness import request
from tests.waiting import HANG_S


def nothing() -> None: ...


def failed(request_id: str, index: int = 0) -> Output:
    return Output(request_id, index, Failed(NotFinite("no")))


def test_commands_are_taken_once_in_their_order() -> None:
    inbox = Inbox()
    done: list[int] = []
    for number in range(3):
        inbox.post(partial(done.append, number))
    for command in inbox.take(wait=True) or []:
        command()
    assert done == [0, 1, 2]
    assert inbox.take(wait=False) == []


@pytest.mark.parametrize("closes", [False, True])
def test_a_command_or_a_close_wakes_the_waiting_thread(closes: bool) -> None:
    inbox = Inbox()
    taken: Future[object] = Future()
    thread = threading.Thread(target=lambda: taken.set_result(inbox.take(wait=True)))
    thread.start()
    if closes:
        inbox.close("It is over.")
    else:
        inbox.post(nothing)
    assert taken.result(HANG_S) == (None if closes else [nothing])
    thread.join(HANG_S)


def test_a_future_gets_its_result_or_its_failure() -> None:
    inbox = Inbox()
    good: Future[int] = Future()
    bad: Future[int] = Future()
    for promise in (good, bad):
        inbox.promise(promise, nothing)
    inbox.keep(good, 3)
    inbox.keep(bad, ValueError("no"))
    assert good.result(0) == 3
    with pytest.raises(ValueError, match="no"):
        bad.result(0)


def test_a_closed_inbox_rejects_commands_and_fails_its_futures_with_the_first_reason() -> None:
    inbox = Inbox()
    before: Future[int] = Future()
    after: Future[int] = Future()
    inbox.promise(before, nothing)
    inbox.close("It is over.")
    inbox.close("Again.")
    inbox.promise(after, nothing)
    # The engine may still resolve it.
    inbox.keep(before, 3)
    for promise in (before, after):
        with pytest.raises(Unavailable, match=r"It is over\."):
            promise.result(0)
    with pytest.raises(Unavailable, match=r"It is over\."):
        inbox.post(nothing)
    assert inbox.take(wait=True) is None


def test_a_request_is_open_until_its_last_sample_ends() -> None:
    inbox = Inbox()
    for name in ("none", "one", "both"):
        inbox.post(nothing, opens=request(name, samples=2))
    inbox.note_ends([failed("one"), failed("both"), failed("both", 1)])
    inbox.close("It is over.")
    outputs = inbox.fail_open()
    assert [output.request_id for output in outputs] == ["none", "one"]
    assert all(isinstance(output.event, Failed) and isinstance(output.event.error, Unavailable) for output in outputs)
    assert inbox.fail_open() == []
