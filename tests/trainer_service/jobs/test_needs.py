from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.device.machine import cores, memory_limit_bytes
from shared.errors import InvalidArgument
from tests.nvidia import nvidia_machine
from trainer_service.jobs.needs import Needs, Offer, awaited_worker

CPU = Offer(gpus=0, memory_bytes=16 << 30, ranks=4)
GPU = Offer(gpus=2, memory_bytes=80 << 30, ranks=2)


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ("", Needs()),
        ("gpu", Needs(gpu=True)),
        ("memory=500M", Needs(memory_bytes=500 << 20)),
        (" memory=16GB, gpu ", Needs(gpu=True, memory_bytes=16 << 30)),
    ],
)
def test_needs_are_read(text: str, needs: Needs) -> None:
    assert Needs.parse(text) == needs


@pytest.mark.parametrize(
    "text", ["tpu", "gpu gpu", "gpu,gpu", "memory", "memory=", "memory=0", "memory=-1", "memory=1G,memory=2G", "gpu=1"]
)
def test_other_needs_are_refused_with_what_would_be_right(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"needs is .* but must be gpu, memory=<size> or both, .*gpu,memory=16G"):
        Needs.parse(text)


@given(st.booleans(), st.integers(0, 1 << 50))
def test_needs_have_a_shortest_text(gpu: bool, memory_bytes: int) -> None:
    needs = Needs(gpu, memory_bytes)
    assert Needs.parse(needs.to_text()) == needs


def test_a_long_text_of_needs_becomes_short() -> None:
    assert Needs.parse("memory=16384MB" + "," * 1000 + " gpu").to_text() == "gpu,memory=16G"


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert isinstance(Needs.parse(text), Needs)
    except InvalidArgument as error:
        assert len(str(error)) < 300


def test_a_worker_takes_what_it_has_enough_for() -> None:
    assert CPU.meets(Needs()) and GPU.meets(Needs())
    assert not CPU.meets(Needs(gpu=True)) and GPU.meets(Needs(gpu=True))
    assert not CPU.meets(Needs(memory_bytes=17 << 30)) and GPU.meets(Needs(memory_bytes=80 << 30))
    assert CPU.meets(Needs(ranks=4)) and not GPU.meets(Needs(ranks=4))
    # Two ranks on one GPU would not do.
    assert GPU.meets(Needs(gpu=True, ranks=2)) and not Offer(gpus=1, ranks=2).meets(Needs(gpu=True, ranks=2))


def test_the_worker_that_a_job_waits_for_is_named_if_none_is_enough() -> None:
    wide = Needs(gpu=True, memory_bytes=40 << 30, ranks=8)
    assert awaited_worker(wide, [CPU, GPU]) == "a worker with 8 ranks, a GPU for each, 40.0 GiB of memory"
    assert awaited_worker(Needs(gpu=True), [CPU]) == "a worker with a GPU"
    assert awaited_worker(Needs(gpu=True), [CPU, GPU]) == ""
    assert awaited_worker(Needs(), []) == ""


def test_an_offer_survives_redis_and_what_is_none_offers_nothing() -> None:
    assert Offer.from_json(GPU.to_json()) == GPU
    for text in (b"1", b"", b"[]", b"\xff", b'{"gpus": "many"}', b"[" * 100_000):
        assert Offer.from_json(text) == Offer()


def test_a_worker_offers_its_cores_unless_it_has_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Offer.of_this_machine(None, launcher=False) == Offer(0, memory_limit_bytes(), cores())
    assert Offer.of_this_machine(8, launcher=False).ranks == 8
    monkeypatch.setenv("PATH", nvidia_machine(tmp_path, [1000, 900])["PATH"])
    monkeypatch.syspath_prepend(tmp_path / "packages")
    assert Offer.of_this_machine(None, launcher=False) == Offer(2, 900 << 20, 2)
    assert Offer.of_this_machine(8, launcher=False) == Offer(2, 900 << 20, 8)
    # The machines that a launcher reaches are taken to be like this one.
    assert Offer.of_this_machine(8, launcher=True) == Offer(8, 900 << 20, 8)
