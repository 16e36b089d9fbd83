import re

from tests.workplace import PROJECT

_LINES = (PROJECT / "deploy/failures.md").read_text(encoding="utf-8").splitlines()
ROWS = [line.split("|")[1:-1] for line in _LINES if line.startswith("| ")][1:]


def test_every_failure_has_a_test_that_exists() -> None:
    assert len(ROWS) > 20
    for what, seen, action, tests in ROWS:
        assert what.strip() and seen.strip() and action.strip()
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert named and len(named) == tests.count("`") // 2, what
        for path, name in named:
            assert (PROJECT / path).is_file(), path
            text = (PROJECT / path).read_text(encoding="utf-8")
            assert re.search(rf"^(?:async )?def {name}\(", text, re.MULTILINE), f"{path} has no {name}."


def test_no_failure_has_two_rows() -> None:
    assert len({what for what, *_ in ROWS}) == len(ROWS)
