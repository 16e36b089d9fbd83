"""How the commands reach the services of a folder of state, and what these need to let other machines in."""

import re
from collections.abc import Mapping
from pathlib import Path

import inference_service.settings
import trainer_service.settings
from shared.errors import InvalidArgument
from shared.service import traces
from shared.service.access.credentials import CA_VARIABLE, SYSTEM, Credentials, read_credentials
from shared.service.access.credentials import CERTIFICATE_VARIABLE as CLIENT_CERTIFICATE_VARIABLE
from shared.service.access.credentials import KEY_VARIABLE as CLIENT_KEY_VARIABLE
from shared.service.access.exposure import check_exposure
from shared.service.access.tls import CERTIFICATE_VARIABLE, CLIENT_CA_VARIABLE, ServerTls, read_tls
from shared.service.settings import Environment

# Other names end with TOKENS, too, and are numbers.
_PATH_NAME = re.compile(r"GPTLOOP_(\w+_(FILE|DIR|CERT|KEY|CA)|(CLIENT|OPERATOR)_TOKENS)")


def own_credentials(environment: Environment) -> Credentials:
    """Returns the credentials for the services that have the settings of an environment.

    Raises `InvalidArgument` if they use TLS, and the environment does not say which authority signed their certificate,
    or lacks the certificate that they ask for.
    """
    credentials = read_credentials(environment)
    tls = read_tls(environment)
    if tls is not None and credentials.ca is None:
        raise InvalidArgument(
            f"{CERTIFICATE_VARIABLE} is set, but not {CA_VARIABLE}, without which this command cannot reach the "
            "servers; set it to the file with the authority that signed the certificate."
        )
    if tls is not None and tls.client_ca is not None and credentials.certificate is None:
        raise InvalidArgument(
            f"{CLIENT_CA_VARIABLE} is set, but not {CLIENT_CERTIFICATE_VARIABLE} and {CLIENT_KEY_VARIABLE}, without "
            "which this command cannot reach the servers; set them to the files of a certificate that this authority "
            "signed."
        )
    return credentials


def check_access(environment: Environment) -> None:
    """Checks what every process would refuse at its start, so that it is said once and nothing starts.

    Raises `InvalidArgument` if a service would refuse its settings of TLS or a command could not reach it, and what
    `traces.are_wanted` raises.
    """
    inference = inference_service.settings.read_settings(environment)
    trainer = trainer_service.settings.read_settings(environment)
    for settings, variable in (
        (inference, inference_service.settings.HOST_VARIABLE),
        (trainer, trainer_service.settings.HOST_VARIABLE),
    ):
        check_exposure(settings.host, variable, settings.tls is not None, settings.missing_tokens, settings.insecure)
    if inference.tls is not None:
        ServerTls(inference.tls)
    own_credentials(environment)
    traces.are_wanted(environment)


def with_absolute_paths(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment whose paths are absolute, for processes that run in another folder."""
    return {name: _absolute(name, text) for name, text in environment.items()}


def _absolute(name: str, text: str) -> str:
    is_path = _PATH_NAME.fullmatch(name) and text.strip()
    return str(Path(text.strip()).absolute()) if is_path and (name, text.strip()) != (CA_VARIABLE, SYSTEM) else text
