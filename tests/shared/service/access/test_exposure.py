import pytest

from shared.errors import InvalidArgument
from shared.service.access.exposure import check_exposure, read_insecure

TOKENS = ("GPTLOOP_CLIENT_TOKENS", "GPTLOOP_OPERATOR_TOKENS")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_nothing(host: str) -> None:
    assert check_exposure(host, "THE_HOST", has_tls=False, missing_tokens=TOKENS, insecure=False) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1"])
def test_other_machines_need_tls_and_tokens(host: str) -> None:
    assert check_exposure(host, "THE_HOST", has_tls=True, missing_tokens=(), insecure=False) is None
    for has_tls, tokens, missing, it in (
        (False, (), "GPTLOOP_TLS_CERT and GPTLOOP_TLS_KEY", "them"),
        (True, TOKENS[1:], "GPTLOOP_OPERATOR_TOKENS", "it"),
        (
            False,
            TOKENS,
            "GPTLOOP_TLS_CERT, GPTLOOP_TLS_KEY, GPTLOOP_CLIENT_TOKENS and GPTLOOP_OPERATOR_TOKENS",
            "them",
        ),
    ):
        with pytest.raises(InvalidArgument) as refused:
            check_exposure(host, "THE_HOST", has_tls, tokens, insecure=False)
        assert str(refused.value) == (
            f"THE_HOST is '{host}', which other machines can reach, but without {missing} anybody there could read or "
            f"control this service; set {it}, or GPTLOOP_INSECURE=1 to listen there all the same."
        )
        warning = check_exposure(host, "THE_HOST", has_tls, tokens, insecure=True)
        assert warning == (
            f"THE_HOST is '{host}', which other machines can reach, without {missing}: GPTLOOP_INSECURE allows it"
        )


def test_a_host_that_does_not_exist_is_left_to_the_one_who_listens() -> None:
    assert check_exposure("nowhere.invalid", "THE_HOST", has_tls=False, missing_tokens=TOKENS, insecure=False) is None


def test_only_1_allows_it() -> None:
    assert [read_insecure({"GPTLOOP_INSECURE": text}) for text in ("", " 1 ")] == [False, True]
    assert not read_insecure({})
    with pytest.raises(InvalidArgument, match="GPTLOOP_INSECURE is 'yes', but must be 1 or unset"):
        read_insecure({"GPTLOOP_INSECURE": "yes"})
