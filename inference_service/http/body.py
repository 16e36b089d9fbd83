"""Reads the bodies of requests: JSON of a limited size, checked against a model of pydantic."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from inference_service.generation import ClientLeft
from inference_service.http.errors import HttpError
from shared.text import excerpt

# As gRPC's limit on a message.
MAX_BODY_BYTES = 4 << 20
_JSON = "application/json"

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body]) -> Body:
    """Returns the body of a request; one without a body has an empty object.

    Raises `HttpError` if it is too large, is not sent as JSON, or does not fit the model: with the first field that is
    wrong. A page of another site can send any type but JSON without asking the browser's permission.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != _JSON:
        raise HttpError(415, f"The content type is {given or 'missing'}, but must be {_JSON}.")
    content = bytearray()
    try:
        async for part in request.stream():
            content += part
            if len(content) > MAX_BODY_BYTES:
                raise HttpError(413, f"The body has more than {MAX_BODY_BYTES:,} bytes, which is the limit.")
    except ClientDisconnect as error:
        raise ClientLeft from error
    try:
        return kind.model_validate_json(bytes(content) or b"{}")
    except ValidationError as error:
        raise _refusal(error, kind) from None


def _refusal(error: ValidationError, kind: type[BaseModel]) -> HttpError:
    first = error.errors()[0]
    # The first part is the field, the others lead to a value in it.
    place = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "json_invalid":
        return HttpError(400, f"The body is not JSON: {excerpt(first['ctx']['error'])}.")
    if first["type"] == "extra_forbidden":
        if len(first["loc"]) > 1:
            return HttpError(400, f"{excerpt('.'.join(map(str, first['loc'])))} is not supported.", place)
        fields = f"the fields are {', '.join(kind.model_fields)}" if kind.model_fields else "this call has no fields"
        return HttpError(400, f"{excerpt(place)} is not supported; {fields}.", place)
    value = excerpt(repr(first["input"]), 60)
    return HttpError(400, f"{place or 'The body'}: {excerpt(first['msg'])}, but there is {value}.", place or None)
