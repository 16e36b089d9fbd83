"""The meeting of the ranks, over real sockets."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from shared.errors import FailedPrecondition, Unavailable
from shared.service.listening import free_port_numbers
from trainer_service.jobs.attempt import Stopped
from trainer_service.ranks.meeting import Dismissed, Meeting
from trainer_service.ranks.place import Place


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


@pytest.fixture
def port() -> int:
    return free_port_numbers(3)[0]


def meeting(port: int, rank: int, count: int = 3, job: str = "ab", attempt: int | None = 1) -> Meeting:
    return Meeting(Place(rank, count, ("127.0.0.1", port)), job, attempt)


def wait(_: int) -> None:
    """Nothing ends the wait."""


def test_all_ranks_get_the_addresses_of_all(pool: ThreadPoolExecutor, port: int) -> None:
    # The others come first, and one does not know the attempt.
    others = [pool.submit(meeting(port, 2).attend, wait), pool.submit(meeting(port, 1, attempt=None).attend, wait)]
    expected = [f"127.0.0.1:{port + rank}" for rank in range(3)]
    assert meeting(port, 0).hold(wait) == expected
    assert [each.result() for each in others] == [expected, expected]
    with socket.create_server(("127.0.0.1", port)):
        """The port is free at once for MLX."""


def test_rank_0_says_how_many_have_come(pool: ThreadPoolExecutor, port: int) -> None:
    seen = set[int]()
    others = list[Future[list[str]]]()

    def tick(count: int) -> None:
        seen.add(count)
        if len(others) < count:
            others.append(pool.submit(meeting(port, count).attend, wait))

    meeting(port, 0).hold(tick)
    assert len([each.result() for each in others]) == 2 and seen == {1, 2}


def test_missing_ranks_are_named(port: int) -> None:
    with pytest.raises(Unavailable, match="Ranks 1, 2 have not come within 0 s"):
        replace(meeting(port, 0), limit_s=0.0).hold(wait)


def test_a_missing_rank_0_is_named(port: int) -> None:
    with pytest.raises(Unavailable, match=rf"Rank 0 did not answer at 127.0.0.1:{port} within 0 s: .*refused"):
        replace(meeting(port, 1), limit_s=0.4).attend(wait)


def test_an_unknown_host_is_named(port: int) -> None:
    elsewhere = Meeting(Place(1, 2, ("no-such-host.invalid", port)), "ab", 1, limit_s=0.1)
    with pytest.raises(Unavailable, match=r"Rank 0 did not answer at no-such-host\.invalid"):
        elsewhere.attend(wait)


def test_a_port_in_use_is_named(port: int) -> None:
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(Unavailable, match=f"cannot listen at 127.0.0.1:{port}: Address already in use"),
    ):
        meeting(port, 0).hold(wait)


@pytest.mark.parametrize("stranger", [{"job": "other"}, {"attempt": 2}, {"count": 4}])
def test_a_rank_of_another_attempt_is_refused_and_the_others_meet(
    pool: ThreadPoolExecutor, port: int, stranger: dict[str, object]
) -> None:
    held = pool.submit(meeting(port, 0).hold, wait)
    with pytest.raises(FailedPrecondition, match=r"This is rank 1 of .* but it met rank 0 of 3 of job ab, attempt 1"):
        meeting(port, 1, **stranger).attend(wait)  # type: ignore[arg-type]
    others = [pool.submit(meeting(port, rank).attend, wait) for rank in (1, 2)]
    assert held.result() == others[0].result() == others[1].result()


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"{}\n", b'{"rank": "x"}\n', b"\xff\n"])
def test_other_programs_do_not_disturb(pool: ThreadPoolExecutor, port: int, noise: bytes) -> None:
    held = pool.submit(meeting(port, 0, count=2).hold, wait)
    while not (is_sent := send(port, noise)):
        assert not held.done()
    assert is_sent and pool.submit(meeting(port, 1, count=2).attend, wait).result() == held.result()


def send(port: int, noise: bytes) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(noise)
    except ConnectionRefusedError:
        return False
    return True


def stop_at(count: int) -> Callable[[int], None]:
    def tick(present: int) -> None:
        if present >= count:
            raise Stopped

    return tick


def test_a_rank_0_that_stops_sends_the_others_home(pool: ThreadPoolExecutor, port: int) -> None:
    other = pool.submit(meeting(port, 1).attend, wait)
    with pytest.raises(Stopped):
        meeting(port, 0).hold(stop_at(2))
    with pytest.raises(Dismissed):
        other.result()


def test_ranks_that_are_not_needed_are_sent_home(pool: ThreadPoolExecutor, port: int) -> None:
    others = [pool.submit(meeting(port, rank).attend, wait) for rank in (1, 2)]
    meeting(port, 0, attempt=None).dismiss("The job ab is finished already.", 3)
    for each in others:
        with pytest.raises(Dismissed) as dismissed:
            each.result()
        assert dismissed.value.code == 3


def test_a_rank_that_waits_for_rank_0_can_be_stopped(port: int) -> None:
    with pytest.raises(Stopped):
        meeting(port, 1).attend(stop_at(1))
