"""A plain client of the S3 server, to look at what a registry keeps there."""

from datetime import timedelta
from typing import TYPE_CHECKING

from tests.object_storage.server import Place

if TYPE_CHECKING:
    from obstore.store import S3Store


def open_place(place: Place, timeout_s: float = 600.0, retries: int = 0) -> "S3Store":
    """Returns a store of obstore for this place, with a limit for each request."""
    from obstore.store import S3Store

    settings = place.settings
    return S3Store.from_url(
        place.url,
        config={
            "endpoint": place.endpoint,
            "access_key_id": settings["AWS_ACCESS_KEY_ID"],
            "secret_access_key": settings["AWS_SECRET_ACCESS_KEY"],
            "region": settings["AWS_REGION"],
        },
        client_options={"allow_http": True, "timeout": timedelta(seconds=timeout_s)},
        retry_config={"max_retries": retries},
    )
