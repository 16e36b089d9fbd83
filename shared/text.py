"""How values are written for people and for messages: shortened, printable, in fitting units."""

# An excerpt spends this share of its length on the beginning of the text, and the rest on the end.
_HEAD_SHARE = 0.7


def excerpt(value: object, limit: int = 80) -> str:
    """Returns a value as one printable line of at most about `limit` characters.

    Escapes unprintable characters as `repr` does, and replaces the middle of a longer text with `…`.
    """
    if isinstance(value, int) and abs(value) >= 10**limit:
        return f"a number of about {value.bit_length() * 0.30103:,.0f} digits"
    try:
        text = value if isinstance(value, str) else str(value)
    except ValueError:  # Python refuses to write integers of several thousand digits, also inside a list
        text = f"a {type(value).__name__} with a very long number"
    escaped = "".join(_escaped(text[: limit + 1]))
    if len(escaped) <= limit:
        return escaped
    head = int(limit * _HEAD_SHARE)
    beginning, end = _fitting(text[:head], head), _fitting(text[: -limit - 1 : -1], limit - head - 1)
    return f"{''.join(beginning)}…{''.join(reversed(end))}"


def _escaped(text: str) -> list[str]:
    return [character if character in "'\"" else repr(character)[1:-1] for character in text]


def _fitting(text: str, limit: int) -> list[str]:
    """Returns the first characters of a text, escaped, that fit into `limit` characters; never cuts an escape."""
    characters = _escaped(text)
    while sum(map(len, characters)) > limit:
        characters.pop()
    return characters


def shorten(text: str, limit: int) -> str:
    """Returns the text, or its beginning followed by `…` if it has more than `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def valid_unicode(text: str) -> str:
    """Escapes lone surrogates, which represent invalid bytes in Python, so that the text can be encoded as UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def printable(text: str) -> str:
    """Escapes every character that a terminal does not show or that controls it."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def format_size(size_bytes: int | float) -> str:
    """Formats a size, such as `0.4 MiB`, `18 MiB` or `2.5 GiB`."""
    mebibytes = size_bytes / 2**20
    if mebibytes >= 1024:
        return f"{mebibytes / 1024:.1f} GiB"
    return f"{mebibytes:.1f} MiB" if mebibytes < 1 else f"{mebibytes:.0f} MiB"


def format_duration(seconds: float) -> str:
    """Formats a duration in its largest unit, such as `17 s`, `4 min`, `3 h` or `12 d`; negative ones as `0 s`."""
    seconds = max(seconds, 0.0)
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"
