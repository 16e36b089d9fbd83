"""Which sequences do what in the next step. Plain Python over plain data; it knows no tensors.

What it promises, B being the prompt tokens that a step may read, C = SPAN_TOKENS the most of a chunk, m the slots:

- A sequence whose prompt is read gets a token in every step, and no step reads more than B prompt tokens beside it.
- Prompts are read in the order in which they got their slots, and a step reads at least B // C chunks while there are
  so many. So a prompt whose own and all earlier unread prompts make q chunks gives its first token in the step that
  reads the last of them, at most ceil(q / (B // C)) steps after it got its slot, whatever arrives later.
- Slots go to whoever waits longest. No sequence keeps one for more than h steps, the bound on its prompt and the most
  tokens that it may generate. A request that finds k samples before it in the queue has its slots after at most
  (2 (k // (m + 1)) + 2) h steps: one of several samples waits until so many slots are free at once.
"""

from collections import deque
from dataclasses import dataclass

from inference_service.engine.sequence import Sequence
from shared.decoding.spans import SPAN_TOKENS

# The samples of one request. The first reads the prompt, and the others get a copy of what it read.
Group = tuple[Sequence, ...]


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt to read: the tokens from position `start` up to `end`, into the first of the slots."""

    group: Group
    slots: tuple[int, ...]
    start: int
    end: int

    @property
    def ends_prompt(self) -> bool:
        """Whether the whole prompt is read then, so that every sample draws its first token."""
        return self.end == len(self.group[0].request.prompt)


@dataclass(frozen=True)
class Row:
    """A sequence that decodes in its slot."""

    sequence: Sequence
    slot: int


@dataclass(frozen=True)
class Plan:
    """One step: chunks to read and rows to decode."""

    chunks: tuple[Chunk, ...]
    rows: tuple[Row, ...]

    @property
    def prompt_tokens(self) -> int:
        """How many prompt tokens are read."""
        return sum(chunk.end - chunk.start for chunk in self.chunks)

    @property
    def sequences(self) -> list[Sequence]:
        """Every sequence that the step concerns."""
        reading = dict.fromkeys(sequence for chunk in self.chunks for sequence in chunk.group)
        return [*(row.sequence for row in self.rows), *reading]


class Scheduler:
    """Fixed slots, given first come, first served; prompts are read in the same order, under a budget each step."""

    def __init__(self, slots: int) -> None:
        self._free = list(reversed(range(slots)))
        self._waiting: deque[Group] = deque()
        # Those with a slot, and those of them whose prompt is being read, in the order in which they got it.
        self._running: dict[Sequence, int] = {}
        self._prefilling: dict[Sequence, Group] = {}

    @property
    def sequences(self) -> list[Sequence]:
        """Everything that was added and not removed."""
        return [*self._running, *(sequence for group in self._waiting for sequence in group)]

    @property
    def running(self) -> list[Sequence]:
        """Those that have a slot."""
        return list(self._running)

    def add(self, group: Group) -> None:
        """Puts a request's samples, no more than there are slots, at the end of the queue."""
        self._waiting.append(group)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is; its slot is free at once. As long as the prompt is not read, all of a
        request's samples have to go together."""
        slot = self._running.pop(sequence, None)
        if slot is not None:
            self._prefilling.pop(sequence, None)
            self._free.append(slot)
        else:
            self._waiting = deque(group for group in self._waiting if sequence not in group)

    def slot_of(self, sequence: Sequence) -> int:
        """The slot that an admitted sequence has."""
        return self._running[sequence]

    def admit(self) -> list[Group]:
        """Gives the free slots to those who waited longest; returns them."""
        admitted = []
        while self._waiting and len(self._waiting[0]) <= len(self._free):
            group = self._waiting.popleft()
            # The lowest slots, so that what a small load touches stays small.
            self._free.sort(reverse=True)
            self._running |= {sequence: self._free.pop() for sequence in group}
            self._prefilling[group[0]] = group
            admitted.append(group)
        return admitted

    def plan(self, budget: int) -> Plan | None:
        """The next step, with at most `budget` prompt tokens, which are at least SPAN_TOKENS; None where nothing has a
        slot. `record` it before the next one is planned."""
        chunks: list[Chunk] = []
        for first, group in self._prefilling.items():
            start, length = first.read, len(first.request.prompt)
            while start < length:
                # Borders stand at fixed positions, so that the numbers of a prompt never hang on what else was read.
                end = min(start // SPAN_TOKENS * SPAN_TOKENS + SPAN_TOKENS, length)
                if end - start > budget:
                    break
                chunks.append(Chunk(group, tuple(self._running[sequence] for sequence in group), start, end))
                budget -= end - start
                start = end
            if start < length:
                # Nobody overtakes.
                break
        rows = [Row(sequence, slot) for sequence, slot in self._running.items() if sequence.prefilled]
        return Plan(tuple(chunks), tuple(rows)) if chunks or rows else None

    def record(self, plan: Plan) -> None:
        """Notes that a plan was carried out."""
        for chunk in plan.chunks:
            chunk.group[0].read = chunk.end
            if chunk.ends_prompt:
                del self._prefilling[chunk.group[0]]
                for sequence in chunk.group:
                    sequence.read = chunk.end
        for row in plan.rows:
            row.sequence.read += 1

    def forget_prompts(self) -> None:
        """Lets every prompt that is being read begin anew, as after a loss of what the slots held."""
        for group in self._prefilling.values():
            group[0].read = 0
            for sequence in group:
                sequence.cached = 0
