"""Reads when a certificate ends; Python's own modules read that of a connection's other end only."""

import base64
import re
from collections.abc import Iterator
from datetime import UTC, datetime

_PEM = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----(.*?)-----END", re.DOTALL)
# Tags of DER: the field of the version, which may be absent, and a time whose year has two digits.
_VERSION, _SHORT_TIME = 0xA0, 0x17


def ends_at(pem: bytes) -> float:
    """Returns when the first certificate of a PEM file ends, in seconds since the epoch (RFC 5280, section 4.1).

    Raises `ValueError` if it is not a certificate.
    """
    found = _PEM.search(pem)
    if found is None:
        raise ValueError("it contains no certificate")
    try:
        _, certificate = next(_values(base64.b64decode(found[1])))
        _, signed = next(_values(certificate))
        fields = list(_values(signed))
        # After the serial number, the algorithm and the issuer.
        _, validity = fields[4 if fields[0][0] == _VERSION else 3]
        _, (tag, end) = _values(validity)
    except (IndexError, StopIteration) as error:
        raise ValueError("its certificate cannot be read") from error
    form = "%y%m%d%H%M%SZ" if tag == _SHORT_TIME else "%Y%m%d%H%M%SZ"
    return datetime.strptime(end.decode("ascii"), form).replace(tzinfo=UTC).timestamp()


def _values(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the tag and the content of each value."""
    at = 0
    while at < len(der):
        tag, length, at = der[at], der[at + 1], at + 2
        if length > 0x7F:
            digits = length & 0x7F
            length, at = int.from_bytes(der[at : at + digits]), at + digits
        yield tag, der[at : at + length]
        at += length
