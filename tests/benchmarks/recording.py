"""What came of a schedule."""

import json
from dataclasses import asdict, dataclass, field

# How a stream ended that got all its tokens; others have the name of a gRPC status code, or of a finish reason.
OK = "OK"


@dataclass
class Stream:
    """One request. All times are seconds from the beginning of the schedule: when it was due, when it was sent, when
    each of its tokens came, and when it ended."""

    due_s: float
    sent_s: float
    token_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    status: str = OK


@dataclass
class Recording:
    """Every request of a schedule, and the resident memory of the process that generates: at the beginning, about once
    a second, at the end."""

    streams: list[Stream]
    resident_bytes: list[int]

    def to_json(self) -> str:
        """As one line, times to the microsecond."""
        values = asdict(self)
        for stream in values["streams"]:
            stream["token_s"] = [round(at, 6) for at in stream["token_s"]]
        return json.dumps(values)

    @classmethod
    def from_json(cls, line: str) -> "Recording":
        """The inverse of `to_json`."""
        values = json.loads(line)
        return cls([Stream(**each) for each in values["streams"]], values["resident_bytes"])
