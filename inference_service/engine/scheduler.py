"""Which sequence does what in the next step. Plain Python over plain data; it knows no tensors."""

from collections import deque
from dataclasses import dataclass

from inference_service.engine.sequence import Sequence

# Prompts are read in chunks whose borders are multiples of this, so that the numbers of a prompt never depend on what
# else was read in the same step.
CHUNK_TOKENS = 64
# Prompt tokens a step reads at most: what streams that decode wait for.
STEP_PREFILL_TOKENS = 256


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt to read into a slot: the tokens from position `start` up to `end`."""

    sequence: Sequence
    slot: int
    start: int
    end: int


@dataclass(frozen=True)
class Row:
    """A sequence that decodes in its slot."""

    sequence: Sequence
    slot: int


@dataclass(frozen=True)
class Plan:
    """One step: the chunks are read, then every row decodes one token.

    `positions` has for each slot the first position that is not filled once the chunks are read. A decode forward
    writes all slots; one that does not decode is written there, where its next tokens come anyway.
    """

    chunks: tuple[Chunk, ...]
    rows: tuple[Row, ...]
    positions: tuple[int, ...]


class Scheduler:
    """Fixed slots, given first come, first served; prompts are read in the same order, under a budget each step."""

    def __init__(self, slots: int) -> None:
        self._slots: list[Sequence | None] = [None] * slots
        self._waiting: deque[Sequence] = deque()
        # Those with a slot, in the order in which they got it.
        self._running: dict[Sequence, int] = {}

    @property
    def sequences(self) -> list[Sequence]:
        """Everything that was added and not removed."""
        return [*self._running, *self._waiting]

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is; its slot is free at once."""
        slot = self._running.pop(sequence, None)
        if slot is None:
            self._waiting.remove(sequence)
        else:
            self._slots[slot] = None

    def slot_of(self, sequence: Sequence) -> int:
        """The slot that an admitted sequence has."""
        return self._running[sequence]

    def admit(self) -> list[Sequence]:
        """Gives the free slots to those who waited longest; returns them."""
        admitted = []
        for slot, holder in enumerate(self._slots):
            if holder is None and self._waiting:
                sequence = self._waiting.popleft()
                self._slots[slot] = sequence
                self._running[sequence] = slot
                admitted.append(sequence)
        return admitted

    def plan(self) -> Plan | None:
        """The next step; None where nothing has a slot. `record` it before the next one is planned."""
        if not self._running:
            return None
        chunks: list[Chunk] = []
        budget = STEP_PREFILL_TOKENS
        for sequence, slot in self._running.items():
            start = sequence.read
            while start < len(sequence.request.prompt) and budget > 0:
                end = min(start + CHUNK_TOKENS, len(sequence.request.prompt))
                chunks.append(Chunk(sequence, slot, start, end))
                budget -= end - start
                start = end
        filled = [0 if sequence is None else sequence.read for sequence in self._slots]
        for chunk in chunks:
            filled[chunk.slot] = chunk.end
        rows = tuple(Row(sequence, slot) for sequence, slot in self._running.items() if sequence.prefilled)
        return Plan(tuple(chunks), rows, tuple(filled))

    def record(self, plan: Plan) -> None:
        """Notes that a plan was carried out."""
        for chunk in plan.chunks:
            chunk.sequence.read = chunk.end
        for row in plan.rows:
            row.sequence.read += 1
