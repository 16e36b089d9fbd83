"""Files of tokens, for tests."""

from pathlib import Path

# Each has what a token may have, and is long enough.
ALICE, BOB, OPERATOR = "alice's-token-12", "bob!#$%&*+/=?^_`{|}~", "open-sesame-0123456789"


def write_tokens(path: Path, *lines: str) -> Path:
    """Writes a file of tokens, whole and for its owner only, as a program that rotates tokens does."""
    new = path.with_suffix(".new")
    new.touch(0o600)
    new.write_text("".join(f"{line}\n" for line in lines))
    return new.rename(path)
