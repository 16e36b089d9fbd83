"""Decides whether a service may listen on an address: other machines need TLS and a token, unless that is waived."""

import ipaddress
import logging
import socket
from collections.abc import Sequence

from shared.errors import InvalidArgument, shown
from shared.service.settings import Environment, read_str

logger = logging.getLogger(__name__)

INSECURE_VARIABLE = "GPTLOOP_INSECURE"


def read_insecure(environment: Environment) -> bool:
    """Returns whether other machines may reach a service without TLS or tokens."""
    text = read_str(environment, INSECURE_VARIABLE, "")
    if text not in ("", "1"):
        raise InvalidArgument(f"{INSECURE_VARIABLE} is {shown(text)}, but must be 1 or unset.")
    return bool(text)


def check_exposure(
    host: str, host_variable: str, has_tls: bool, missing_tokens: Sequence[str], insecure: bool
) -> str | None:
    """Returns a warning if other machines reach the service without TLS or tokens because `insecure` allows it.

    missing_tokens: the variables of tokens that the service lacks.

    Raises `InvalidArgument`, which names what is missing, if `insecure` does not allow it.
    """
    missing = [*([] if has_tls else ["GPTLOOP_TLS_CERT", "GPTLOOP_TLS_KEY"]), *missing_tokens]
    if not missing or _is_loopback(host):
        return None
    where = f"{host_variable} is {shown(host)}, which other machines can reach"
    named = ", ".join(missing[:-1]) + (" and " if missing[1:] else "") + missing[-1]
    if insecure:
        return f"{where}, without {named}: {INSECURE_VARIABLE} allows it"
    raise InvalidArgument(
        f"{where}, but without {named} anybody there could read or control this service; set "
        f"{'them' if missing[1:] else 'it'}, or {INSECURE_VARIABLE}=1 to listen there all the same."
    )


def warn_if_exposed(
    host: str, host_variable: str, has_tls: bool, missing_tokens: Sequence[str], insecure: bool
) -> None:
    """Logs what `check_exposure` warns of, and raises what it raises."""
    warning = check_exposure(host, host_variable, has_tls, missing_tokens, insecure)
    if warning is not None:
        logger.warning(warning)


def _is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches a host; a name that means nothing is refused where it is used."""
    try:
        places = {str(place[4][0]) for place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return True
    return all(ipaddress.ip_address(place.partition("%")[0]).is_loopback for place in places)
