"""The measurements from playing a schedule."""

import json
from dataclasses import asdict, dataclass, field

# The status of a stream with all its tokens; others have the name of a gRPC status code or of a finish reason.
OK = "OK"


@dataclass
class Stream:
    """A request, with the times at which it was due, it was sent, each of its tokens arrived, and it ended, all in
    seconds from the start of the schedule."""

    due_s: float
    sent_s: float
    token_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    status: str = OK


@dataclass
class Recording:
    """All requests of a schedule, and the resident memory of the generating process at the start, about once a second,
    and at the end."""

    streams: list[Stream]
    resident_bytes: list[int]

    def to_json(self) -> str:
        """Returns one line of JSON, with times rounded to microseconds."""
        values = asdict(self)
        for stream in values["streams"]:
            stream["token_s"] = [round(at, 6) for at in stream["token_s"]]
        return json.dumps(values)

    @classmethod
    def from_json(cls, line: str) -> "Recording":
        """The inverse of `to_json`."""
        values = json.loads(line)
        return cls([Stream(**each) for each in values["streams"]], values["resident_bytes"])
