import base64
import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from shared.service.access.expiry import ends_at
from tests.certificates import Authority


def signed(end: datetime.datetime) -> bytes:
    """Returns a certificate of an own key that ends at a time."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gptloop")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, datetime.datetime(2020, 1, 1), end)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


# From 2050, years have four digits.
@pytest.mark.parametrize("year", [2021, 2049, 2050, 2300])
def test_the_end_of_a_certificate_is_read(year: int) -> None:
    end = datetime.datetime(year, 2, 3, 4, 5, 6, tzinfo=datetime.UTC)
    assert ends_at(signed(end)) == end.timestamp()


def test_the_first_certificate_of_a_chain_counts(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pem = authority.issue("localhost", expired=True).certificate.read_bytes()
    expected = x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()
    assert ends_at(b"A comment.\n" + pem + authority.file.read_bytes()) == expected


@given(st.binary(max_size=60), st.sampled_from([b"", b"-----BEGIN CERTIFICATE-----\n%s\n-----END CERTIFICATE-----"]))
def test_what_is_no_certificate_is_a_value_error(content: bytes, frame: bytes) -> None:
    with pytest.raises(ValueError):
        ends_at(frame % content if frame else content)


@given(st.binary(max_size=80))
def test_random_values_inside_a_certificate_are_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError):
        ends_at(b"-----BEGIN CERTIFICATE-----\n%s\n-----END CERTIFICATE-----" % base64.b64encode(content))
