"""Tokens that callers show: files that name their callers, read again when they change, and who calls by a token."""

import hashlib
import hmac
import logging
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from shared.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unauthenticated, shown
from shared.service.access.file_stamp import stamp_of
from shared.service.settings import Environment, read_str

logger = logging.getLogger(__name__)

CLIENT_TOKENS_VARIABLE = "GPTLOOP_CLIENT_TOKENS"
OPERATOR_TOKENS_VARIABLE = "GPTLOOP_OPERATOR_TOKENS"

MIN_CHARACTERS, MAX_CHARACTERS = 16, 1024
MAX_TOKENS = 1000
# More than the longest file with that many tokens.
_MAX_BYTES = 4 << 20
# Names stand in logs and metrics.
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SCHEME = b"bearer "
# Of a path, in a sentence.
_SHOWN_CHARACTERS = 150


@dataclass(frozen=True)
class Caller:
    """Who calls, by the name that a file of tokens gives."""

    name: str
    is_operator: bool


@dataclass(frozen=True)
class _Entry:
    name: str
    digest: bytes


class TokenFile:
    """The tokens of a file with lines `name token`; `variable` is the setting that names it.

    The file is read again when it changes; if it is broken or gone then, the tokens that were read before remain. Keeps
    digests of the tokens only. Raises `InvalidArgument` if the file cannot be used at the start.
    """

    def __init__(self, variable: str, path: Path) -> None:
        self._variable = variable
        self._path = path
        self._has_warned = False
        self._stamp = stamp_of(path)
        self._entries = self._read()

    def name_of(self, digest: bytes) -> str | None:
        """Returns the name that has the token of a SHA-256 digest, None if there is none.

        The time that it takes says nothing about the tokens.
        """
        self._look()
        found = None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.name
        return found

    def _look(self) -> None:
        """Reads the file again if it has changed."""
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._entries = self._read()
        except InvalidArgument as error:
            logger.error("%s The tokens that were read before remain.", error)
        else:
            names = sorted({entry.name for entry in self._entries})
            logger.info("%s was read again: %d tokens of %s", self._variable, len(self._entries), ", ".join(names))

    def _read(self) -> tuple[_Entry, ...]:
        try:
            status = self._path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise self._refusal("is not a file")
            if status.st_size > _MAX_BYTES:
                raise self._refusal(f"has {status.st_size:,} bytes, but the limit is {_MAX_BYTES:,}")
            content = self._path.read_bytes()
        except OSError as error:
            raise self._refusal(f"cannot be read: {error.strerror}") from None
        if status.st_mode & stat.S_IROTH and not self._has_warned:
            self._has_warned = True
            logger.warning("every user of this machine can read %s; run `chmod o-r` on it", self._place())
        entries: list[_Entry] = []
        lines: dict[bytes, int] = {}
        for number, line in enumerate(content.split(b"\n"), 1):
            words = line.split()
            if not words or words[0].startswith(b"#"):
                continue
            entry = self._entry(number, words)
            if (earlier := lines.setdefault(entry.digest, number)) != number:
                raise self._refusal(f"has the token of line {earlier} again in line {number}; give each line its own")
            entries.append(entry)
            if len(entries) > MAX_TOKENS:
                raise self._refusal(f"has more than {MAX_TOKENS} tokens, which is the limit")
        if not entries:
            raise self._refusal("has no token, but must have at least one line with a name and a token")
        return tuple(entries)

    def _entry(self, number: int, words: list[bytes]) -> _Entry:
        """Reads a line; no sentence quotes it, because any word of a wrong line may be the token."""
        if len(words) != 2:
            raise self._refusal(f"needs two words in line {number}, a name and a token, but has {len(words)}")
        name, token = (word.decode("ascii", "replace") for word in words)
        if not _NAME.fullmatch(name):
            raise self._refusal(
                f"has a wrong name in line {number}; a name has up to 64 letters, digits, dots, dashes and underscores"
            )
        if not (token.isascii() and token.isprintable()):
            raise self._refusal(f"has a token in line {number} with a character that is not printable ASCII")
        if not MIN_CHARACTERS <= len(token) <= MAX_CHARACTERS:
            raise self._refusal(
                f"has a token of {len(token)} characters in line {number}, but a token must have {MIN_CHARACTERS} to "
                f"{MAX_CHARACTERS}; `openssl rand -hex 24` makes one"
            )
        return _Entry(name, digest_of(token.encode()))

    def _place(self) -> str:
        return shown(str(self._path), _SHOWN_CHARACTERS)

    def _refusal(self, finding: str) -> InvalidArgument:
        return InvalidArgument(f"{self._variable}: the file {self._place()} {finding}.")


class Callers:
    """Who may call: clients, and operators, who may do everything that clients may; None: no such tokens are set."""

    def __init__(self, clients: TokenFile | None = None, operators: TokenFile | None = None) -> None:
        self._clients = clients
        self._operators = operators

    @property
    def clients_need_token(self) -> bool:
        """Whether a client needs a token."""
        return self._clients is not None

    @property
    def operators_need_token(self) -> bool:
        """Whether an operator needs a token."""
        return self._operators is not None or self._clients is not None

    def client(self, authorization: str | bytes) -> Caller | None:
        """Returns who calls, by the value of `authorization`; None if clients need no token.

        Raises `Unauthenticated` if the value carries no token of a client or of an operator.
        """
        return None if self._clients is None else self._caller(authorization)

    def operator(self, authorization: str | bytes) -> Caller | None:
        """Returns which operator calls; None if no token is needed.

        Raises `Unauthenticated` if the value carries no token, `PermissionDenied` if it carries a client's, and
        `FailedPrecondition` if there are tokens of clients only.
        """
        if self._operators is None:
            if self._clients is None:
                return None
            raise FailedPrecondition(
                f"This server has tokens of clients but none of operators, so it takes no such calls; set "
                f"{OPERATOR_TOKENS_VARIABLE} to a file of tokens and start it again."
            )
        caller = self._caller(authorization)
        if not caller.is_operator:
            raise PermissionDenied("This call needs the token of an operator, but has that of a client.")
        return caller

    def _caller(self, authorization: str | bytes) -> Caller:
        given = authorization.encode(errors="replace") if isinstance(authorization, str) else authorization
        token = given[len(_SCHEME) :].strip() if given[: len(_SCHEME)].lower() == _SCHEME else b""
        digest = digest_of(token)
        client = None if self._clients is None else self._clients.name_of(digest)
        operator = None if self._operators is None else self._operators.name_of(digest)
        # A token in both files is an operator's.
        if (name := operator or client) is not None:
            return Caller(name, operator is not None)
        raise Unauthenticated(
            f"This call has {'the wrong' if given else 'no'} bearer token: put a valid one into the file that "
            'GPTLOOP_TOKEN_FILE names, or send "authorization: Bearer <token>".'
        )


@dataclass(frozen=True)
class TokenSettings:
    """The files with tokens, None if they are not set."""

    clients: Path | None = None
    operators: Path | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """Returns the variables that are not set."""
        files = {CLIENT_TOKENS_VARIABLE: self.clients, OPERATOR_TOKENS_VARIABLE: self.operators}
        return tuple(name for name, file in files.items() if file is None)

    def open(self) -> Callers:
        """Reads the files; raises `InvalidArgument` that names the wrong one and its line."""
        return Callers(
            None if self.clients is None else TokenFile(CLIENT_TOKENS_VARIABLE, self.clients),
            None if self.operators is None else TokenFile(OPERATOR_TOKENS_VARIABLE, self.operators),
        )


def read_token_settings(environment: Environment) -> TokenSettings:
    """Reads where the files are, without opening them."""
    clients, operators = (
        read_str(environment, name, "") for name in (CLIENT_TOKENS_VARIABLE, OPERATOR_TOKENS_VARIABLE)
    )
    return TokenSettings(Path(clients) if clients else None, Path(operators) if operators else None)


def digest_of(token: bytes) -> bytes:
    """Returns the digest by which tokens are compared."""
    return hashlib.sha256(token).digest()
