from pathlib import Path

from shared.device.machine import memory_limit_bytes, physical_memory_bytes


def test_the_limit_of_memory_is_that_of_the_container_if_it_has_one(tmp_path: Path) -> None:
    first, second = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    assert memory_limit_bytes((first, second)) == physical_memory_bytes()
    second.write_text("4096\n")
    assert memory_limit_bytes((first, second)) == 4096
    first.write_text("8192\n")
    assert memory_limit_bytes((first, second)) == 8192


def test_a_container_without_a_limit_may_use_the_whole_machine(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    # Version 2 writes a word, and version 1 a number that no machine has.
    for text in ("max\n", str(2**63 - 4096)):
        limit.write_text(text)
        assert memory_limit_bytes((limit,)) == physical_memory_bytes()
