import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unauthenticated, shown
from shared.service.access.tokens import (
    MAX_CHARACTERS,
    MAX_TOKENS,
    Caller,
    Callers,
    TokenFile,
    TokenSettings,
    digest_of,
    read_token_settings,
)
from tests.token_files import ALICE, BOB, OPERATOR, write_tokens

VARIABLE = "GPTLOOP_CLIENT_TOKENS"
PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=16, max_size=40)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "clients", f"alice {ALICE}", f"bob {BOB}")


@pytest.fixture
def callers(path: Path) -> Callers:
    operators = write_tokens(path.with_name("operators"), f"olga {OPERATOR}")
    return TokenSettings(path, operators).open()


def name_of(tokens: TokenFile, token: str) -> str | None:
    return tokens.name_of(digest_of(token.encode()))


def test_a_token_has_the_name_of_its_line(path: Path) -> None:
    tokens = TokenFile(VARIABLE, path)
    assert [name_of(tokens, token) for token in (ALICE, BOB, OPERATOR, "", "alice", f"{ALICE} ", ALICE[:-1])] == [
        *("alice", "bob"),
        *[None] * 5,
    ]


def test_a_name_may_have_several_tokens_and_a_file_comments(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "t", "# Clients, über alles", "", f"alice {ALICE}", " ", f"\talice\t {BOB} \r")
    tokens = TokenFile(VARIABLE, path)
    assert (name_of(tokens, ALICE), name_of(tokens, BOB)) == ("alice", "alice")


@given(st.lists(PRINTABLE, min_size=1, max_size=20, unique=True), PRINTABLE)
def test_only_the_tokens_of_a_file_are_known(
    tmp_path_factory: pytest.TempPathFactory, known: list[str], other: str
) -> None:
    path = tmp_path_factory.mktemp("t") / "tokens"
    write_tokens(path, *(f"n{number} {token}" for number, token in enumerate(known)))
    tokens = TokenFile(VARIABLE, path)
    assert [name_of(tokens, token) for token in known] == [f"n{number}" for number in range(len(known))]
    assert name_of(tokens, other) == (f"n{known.index(other)}" if other in known else None)


SECRET = "do-not-show-this-one"


@pytest.mark.parametrize(
    ("lines", "finding"),
    [
        ([], "has no token, but must have at least one line with a name and a token"),
        (["# none"], "has no token, but must have at least one line with a name and a token"),
        (["# one", SECRET], "needs two words in line 2, a name and a token, but has 1"),
        ([f"alice {SECRET} # hers"], "needs two words in line 1, a name and a token, but has 4"),
        (
            [f"{SECRET}! alice"],
            "has a wrong name in line 1; a name has up to 64 letters, digits, dots, dashes and underscores",
        ),
        (
            [f"{'a' * 65} {SECRET}"],
            "has a wrong name in line 1; a name has up to 64 letters, digits, dots, dashes and underscores",
        ),
        ([f"alice {SECRET}ü"], "has a token in line 1 with a character that is not printable ASCII"),
        ([f"alice {SECRET}\x07"], "has a token in line 1 with a character that is not printable ASCII"),
        (
            [f"alice {SECRET[:15]}"],
            "has a token of 15 characters in line 1, but a token must have 16 to 1024; `openssl rand -hex 24` makes "
            "one",
        ),
        (
            [f"alice {SECRET}{'x' * MAX_CHARACTERS}"],
            "has a token of 1044 characters in line 1, but a token must have 16 to 1024; `openssl rand -hex 24` makes "
            "one",
        ),
        (
            [f"alice {SECRET}", f"bob {ALICE}", f"carol {SECRET}"],
            "has the token of line 1 again in line 3; give each line its own",
        ),
        ([f"n{n} {SECRET}{n}" for n in range(MAX_TOKENS + 1)], "has more than 1000 tokens, which is the limit"),
    ],
)
def test_a_wrong_file_is_one_sentence_without_the_token(tmp_path: Path, lines: list[str], finding: str) -> None:
    path = write_tokens(tmp_path / "t", *lines)
    with pytest.raises(InvalidArgument) as raised:
        TokenFile(VARIABLE, path)
    assert str(raised.value) == f"{VARIABLE}: the file {shown(str(path), 150)} {finding}."
    assert SECRET[:15] not in str(raised.value)


def test_what_is_no_readable_file_is_one_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b"#" * (4 << 20) + b"\n")
    for name, finding in (
        ("none", "cannot be read: No such file or directory"),
        ("", "is not a file"),
        ("fifo", "is not a file"),
        ("large", "has 4,194,305 bytes, but the limit is 4,194,304"),
    ):
        with pytest.raises(InvalidArgument) as raised:
            TokenFile(VARIABLE, tmp_path / name)
        assert str(raised.value) == f"{VARIABLE}: the file {shown(str(tmp_path / name), 150)} {finding}."


def test_a_changed_file_is_read_again_at_the_next_call(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tokens = TokenFile(VARIABLE, path)
    write_tokens(path, f"alice {ALICE}", f"alice {OPERATOR}")
    assert [name_of(tokens, token) for token in (ALICE, BOB, OPERATOR)] == ["alice", None, "alice"]
    # In place, with the size that it had.
    before = path.stat()
    path.write_text(path.read_text().replace(ALICE, ALICE.upper()))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert [name_of(tokens, token) for token in (ALICE, ALICE.upper(), OPERATOR)] == [None, "alice", "alice"]
    assert caplog.messages == [f"{VARIABLE} was read again: 2 tokens of alice"] * 2


def test_a_link_that_points_elsewhere_is_followed(tmp_path: Path) -> None:
    # Kubernetes replaces the link to a folder, and leaves the link to the file in it alone.
    for folder, token in (("old", ALICE), ("new", BOB)):
        (tmp_path / folder).mkdir()
        write_tokens(tmp_path / folder / "tokens", f"alice {token}")
    (tmp_path / "data").symlink_to("old")
    (tmp_path / "tokens").symlink_to("data/tokens")
    tokens = TokenFile(VARIABLE, tmp_path / "tokens")
    assert (name_of(tokens, ALICE), name_of(tokens, BOB)) == ("alice", None)
    (tmp_path / "next").symlink_to("new")
    (tmp_path / "next").rename(tmp_path / "data")
    assert (name_of(tokens, ALICE), name_of(tokens, BOB)) == (None, "alice")


@pytest.mark.parametrize("content", [None, "", "alice\n", f"alice {BOB} again\n"])
def test_the_old_tokens_remain_while_the_file_is_broken_or_gone(
    path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = TokenFile(VARIABLE, path)
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    assert [name_of(tokens, token) for token in (ALICE, BOB, OPERATOR)] * 2 == ["alice", "bob", None] * 2
    (message,) = caplog.messages
    assert message.startswith(f"{VARIABLE}: the file {shown(str(path), 150)} ")
    assert message.endswith(". The tokens that were read before remain.")
    write_tokens(path, f"olga {OPERATOR}")
    assert [name_of(tokens, token) for token in (ALICE, BOB, OPERATOR)] == [None, None, "olga"]


def test_a_file_that_everybody_can_read_is_warned_of_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.chmod(0o640)
    TokenFile(VARIABLE, path)
    assert not caplog.messages
    path.chmod(0o644)
    tokens = TokenFile(VARIABLE, path)
    path.write_text(f"alice {ALICE}\n")
    assert name_of(tokens, BOB) is None
    assert caplog.messages == [f"every user of this machine can read {shown(str(path), 150)}; run `chmod o-r` on it"]


def test_an_operator_may_do_what_a_client_may(callers: Callers) -> None:
    assert callers.client(f"Bearer {ALICE}") == Caller("alice", is_operator=False)
    assert callers.client(f"Bearer {OPERATOR}") == Caller("olga", is_operator=True)
    assert callers.operator(f"Bearer {OPERATOR}".encode()) == Caller("olga", is_operator=True)
    with pytest.raises(PermissionDenied, match=r"needs the token of an operator, but has that of a client\.$"):
        callers.operator(f"Bearer {BOB}")


def test_the_scheme_is_read_as_http_says(callers: Callers) -> None:
    for authorization in (f"bearer {ALICE}", f"BEARER   {ALICE} "):
        assert callers.client(authorization) == Caller("alice", is_operator=False)


@pytest.mark.parametrize(
    ("authorization", "found"),
    [
        ("", "no"),
        *((value, "the wrong") for value in ("Bearer ", ALICE, f"Basic {ALICE}", f"Bearer {ALICE[:-1]}", "Bearer é")),
        *((value, "the wrong") for value in (f"Bearer{ALICE}", f"Bearer {ALICE} {BOB}", f"Bearer {ALICE}, {BOB}")),
        (b"Bearer \xff\x00", "the wrong"),
        ("Bearer \udcff", "the wrong"),
    ],
)
def test_a_missing_or_wrong_token_is_refused(callers: Callers, authorization: str | bytes, found: str) -> None:
    for required in (callers.client, callers.operator):
        with pytest.raises(Unauthenticated) as raised:
            required(authorization)
        assert str(raised.value) == (
            f"This call has {found} bearer token: put a valid one into the file that GPTLOOP_TOKEN_FILE names, or send "
            '"authorization: Bearer <token>".'
        )


def test_without_files_everybody_may_call_and_nobody_has_a_name() -> None:
    callers = TokenSettings().open()
    assert (callers.client(""), callers.operator(""), callers.client(f"Bearer {ALICE}")) == (None, None, None)
    assert (callers.clients_need_token, callers.operators_need_token) == (False, False)


def test_with_tokens_of_clients_only_nobody_may_operate(path: Path) -> None:
    callers = TokenSettings(clients=path).open()
    for authorization in ("", f"Bearer {ALICE}"):
        with pytest.raises(FailedPrecondition, match="set GPTLOOP_OPERATOR_TOKENS to a file of tokens"):
            callers.operator(authorization)
    assert (callers.clients_need_token, callers.operators_need_token) == (True, True)


def test_with_tokens_of_operators_only_clients_need_none(path: Path) -> None:
    callers = TokenSettings(operators=path).open()
    assert callers.client("") is None
    assert callers.operator(f"Bearer {ALICE}") == Caller("alice", is_operator=True)


def test_who_has_a_token_in_both_files_is_an_operator(path: Path) -> None:
    callers = TokenSettings(path, write_tokens(path.with_name("operators"), f"olga {ALICE}")).open()
    assert callers.client(f"Bearer {ALICE}") == Caller("olga", is_operator=True)


def test_the_settings_name_the_files(path: Path) -> None:
    assert read_token_settings({}) == TokenSettings()
    assert read_token_settings({VARIABLE: f" {path}\n"}) == TokenSettings(clients=path)
    with pytest.raises(InvalidArgument, match=r"^GPTLOOP_OPERATOR_TOKENS: the file '/nowhere' cannot be read"):
        read_token_settings({VARIABLE: str(path), "GPTLOOP_OPERATOR_TOKENS": "/nowhere"}).open()
