"""Decides what each sequence does in the next step, in plain Python over plain data, without tensors.

Its promises, with B prompt tokens per step at most, chunks of at most C = SPAN_TOKENS tokens, and m slots:

- A sequence whose prompt is computed gets at least one token in every step, and no step computes more than B prompt
  tokens.
- Prompts are computed in the order in which they got their slots, and a step computes at least B // C chunks if there
  are that many. If q chunks of a prompt and of all earlier prompts are left when it gets its slot, it gets its first
  token at most ceil(q / (B // C)) steps later, or one more with multi-step decoding, whatever arrives after it.
- Slots go to the request that waits longest. No sequence keeps a slot for more than h steps, which follows from the
  lengths of its prompt and of its output, and is one more with multi-step decoding. A request with k samples before it
  in the queue gets its slots after at most (2 (k // (m + 1)) + 2) h steps: a request with several samples waits until
  enough slots are free at once.
"""

from collections import deque
from dataclasses import dataclass

from inference_service.engine.sequence import Sequence
from shared.decoding.spans import SPAN_TOKENS

# The samples of one request. The first computes the prompt, and the others get a copy of its keys and values.
Group = tuple[Sequence, ...]


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt to compute in the first of the slots: the tokens from position `start` up to `end`."""

    group: Group
    slots: tuple[int, ...]
    start: int
    end: int

    @property
    def ends_prompt(self) -> bool:
        """Whether this completes the prompt, so that every sample draws its first token."""
        return self.end == len(self.group[0].request.prompt)


@dataclass(frozen=True)
class Row:
    """A sequence that decodes in its slot."""

    sequence: Sequence
    slot: int


@dataclass(frozen=True)
class Plan:
    """One step: chunks of prompts to compute, and rows to decode, each by up to `decode_steps` tokens.

    With `multi_step`, no row needs the engine between two tokens, and there are no chunks.
    If `next_decode_steps` is not 0, the next plan decodes the rows that go on by that many tokens, before any prompt.
    """

    chunks: tuple[Chunk, ...]
    rows: tuple[Row, ...]
    decode_steps: int = 1
    next_decode_steps: int = 0
    multi_step: bool = False

    @property
    def prompt_tokens(self) -> int:
        """The number of prompt tokens in the step."""
        return sum(chunk.end - chunk.start for chunk in self.chunks)

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences in the step."""
        prefilling = dict.fromkeys(sequence for chunk in self.chunks for sequence in chunk.group)
        return [*(row.sequence for row in self.rows), *prefilling]


class Scheduler:
    """Gives out fixed slots, first come, first served, and computes prompts in the same order within a budget."""

    def __init__(self, slots: int) -> None:
        self._free = list(reversed(range(slots)))
        self._waiting: deque[Group] = deque()
        # The sequences with a slot, and the groups of those whose prompt is not complete, in the order of their slots.
        self._running: dict[Sequence, int] = {}
        self._prefilling: dict[Sequence, Group] = {}
        # `next_decode_steps` of the last recorded plan.
        self._next_decode_steps = 0

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences that were added and not removed."""
        return [*self._running, *(sequence for group in self._waiting for sequence in group)]

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have a slot."""
        return list(self._running)

    def add(self, group: Group) -> None:
        """Adds the samples of a request, no more than there are slots, to the end of the queue."""
        self._waiting.append(group)

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence and frees its slot at once.

        While the prompt of a request is not complete, all of its samples must be removed together.
        """
        slot = self._running.pop(sequence, None)
        if slot is not None:
            self._prefilling.pop(sequence, None)
            self._free.append(slot)
        else:
            self._waiting = deque(group for group in self._waiting if sequence not in group)

    def slot_of(self, sequence: Sequence) -> int:
        """Returns the slot of an admitted sequence."""
        return self._running[sequence]

    def admit(self) -> list[Group]:
        """Gives the free slots to the groups that waited longest, and returns those groups."""
        admitted = []
        while self._waiting and len(self._waiting[0]) <= len(self._free):
            group = self._waiting.popleft()
            # The lowest slots, so that a small load uses little memory.
            self._free.sort(reverse=True)
            self._running |= {sequence: self._free.pop() for sequence in group}
            self._prefilling[group[0]] = group
            admitted.append(group)
        return admitted

    def plan(self, budget: int, max_decode_steps: int = 1) -> Plan | None:
        """Plans a step with at most `budget` prompt tokens, at least SPAN_TOKENS; None if no sequence has a slot.

        If the step computes no prompt, and no row needs the engine between two tokens, rows draw up to
        `max_decode_steps` tokens, as many as the longest may still draw. A row that ends earlier keeps its slot until
        the step ends. The next step may do the same, before a prompt that arrived meanwhile. Call `record` before
        planning the next step.
        """
        rows = tuple(Row(sequence, slot) for sequence, slot in self._running.items() if sequence.prefilled)
        if self._next_decode_steps and rows:
            return self._plan_multi_step(rows, self._next_decode_steps, max_decode_steps)
        chunks: list[Chunk] = []
        for first, group in self._prefilling.items():
            start, length = first.computed_tokens, len(first.request.prompt)
            while start < length:
                # Chunks end at fixed positions, so that a prompt's numbers never depend on other prompts.
                end = min(start // SPAN_TOKENS * SPAN_TOKENS + SPAN_TOKENS, length)
                if end - start > budget:
                    break
                chunks.append(Chunk(group, tuple(self._running[sequence] for sequence in group), start, end))
                budget -= end - start
                start = end
            if start < length:
                # No prompt overtakes another.
                break
        if not chunks and not rows:
            return None
        if max_decode_steps > 1 and not chunks and all(row.sequence.can_decode_multi_step for row in rows):
            return self._plan_multi_step(rows, max_decode_steps, max_decode_steps)
        return Plan(tuple(chunks), rows)

    def _plan_multi_step(self, rows: tuple[Row, ...], steps: int, next_steps: int) -> Plan:
        """Plans several tokens for each row, and as many for the next plan unless a prompt waits."""
        left = max(row.sequence.most_tokens_left for row in rows)
        steps = min(steps, left)
        next_steps = 0 if self._prefilling else min(next_steps, left - steps)
        return Plan((), rows, steps, next_steps, multi_step=True)

    def record(self, plan: Plan) -> None:
        """Records that a plan was carried out."""
        self._next_decode_steps = plan.next_decode_steps
        for chunk in plan.chunks:
            chunk.group[0].computed_tokens = chunk.end
            if chunk.ends_prompt:
                del self._prefilling[chunk.group[0]]
                for sequence in chunk.group:
                    sequence.computed_tokens = chunk.end
        for row in plan.rows:
            # A sequence that drew fewer has ended.
            row.sequence.computed_tokens += plan.decode_steps

    def forget_prompts(self) -> None:
        """Restarts all prompts that are not complete, after the content of the slots was lost."""
        for group in self._prefilling.values():
            group[0].computed_tokens = 0
            for sequence in group:
                sequence.cached_tokens = 0
