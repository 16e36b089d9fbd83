"""The request id of each call, on its span and in its log lines, of which the last one tells how it ended."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shared.service import traces
from shared.service.log_ids import about, request_id_of

logger = logging.getLogger(__name__)

# Takes the status of a call, and logs its end.
End = Callable[[str], None]


@contextmanager
def logged_call(method: str, given_id: str | bytes | None, level: int = logging.INFO) -> Iterator[tuple[str, End]]:
    """Gives a call a request id, on its span and in its log lines: the one of its client, or else a new one.

    Yields the id, and a function that logs the end of the call with its status.
    """
    begin_s = time.monotonic()
    request_id = request_id_of(given_id)
    traces.mark({"gptloop.request_id": request_id})
    with about(request_id=request_id) as work:

        def end(status: str) -> None:
            duration_s = round(time.monotonic() - begin_s, 4)
            fields: dict[str, object] = {"method": method, "status": status, "duration_s": duration_s}
            tokens = ""
            if work.generated_tokens:
                fields["generated_tokens"] = work.generated_tokens
                tokens = f", {work.generated_tokens} tokens"
            logger.log(level, "%s: %s after %.3f s%s", method, status, duration_s, tokens, extra={"fields": fields})

        yield request_id, end
