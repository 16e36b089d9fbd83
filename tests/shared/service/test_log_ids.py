import asyncio

import pytest

from shared.service.log_ids import about, current_ids, note, request_id_of
from tests.asynchronous import async_test


@pytest.mark.parametrize("given", ["a", "0f" * 64, "call/7:{a}~=_"])
def test_the_id_of_a_client_is_kept(given: str) -> None:
    assert request_id_of(given) == given


@pytest.mark.parametrize("given", [None, "", "a" * 129, "two\nlines", "ü", b"bytes", "\x7f", "a b", "a]", "[a"])
def test_an_id_that_cannot_stand_in_a_line_is_replaced(given: str | bytes | None) -> None:
    one, other = request_id_of(given), request_id_of(given)
    assert len(one) == 32 and one.isalnum() and one != other


@async_test
async def test_ids_follow_to_tasks_and_threads_that_a_task_starts_and_to_no_others() -> None:
    async def look() -> dict[str, str | int]:
        return dict(current_ids())

    with about(request_id="a") as work:
        with about(version=1):
            assert await asyncio.create_task(look()) == {"request_id": "a", "version": 1}
            assert await asyncio.to_thread(current_ids) == {"request_id": "a", "version": 1}
        note(generated_tokens=3, run="r")
        assert (work.ids, work.generated_tokens) == ({"request_id": "a", "run": "r"}, 3)
    note(version=2)
    assert current_ids() == {}
