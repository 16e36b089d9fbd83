"""Several tokens for each of some rows, which the GPU draws without the host in between.

Shapes: R rows, S steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.decoding.cuda.program import DrawInput, Row
from shared.decoding.multi_step import DecodeRow
from shared.decoding.sampling import inverse_temperature, to_bits, uniforms

# No token: none is masked, or none was drawn.
NO_TOKEN = -1


@dataclass(frozen=True)
class MultiStepBatch:
    """Rows (R,) that draw `steps` tokens each. The other arrays are the fields of `DecodeRow`; the slot of a row that
    has ended is -1.

    `places` (R,) are the indices of the rows in the batch before, if they go on from it. Then `tokens` says nothing:
    the GPU has the tokens, and knows which rows have ended without one.
    """

    steps: int
    slots: NDArray[np.int64]
    starts: NDArray[np.int64]
    tokens: NDArray[np.signedinteger[Any]]
    inverse_temperatures: NDArray[np.float32]
    seeds: NDArray[np.uint64]
    drawn: NDArray[np.uint64]
    masked: NDArray[np.int64]
    masked_draws: NDArray[np.int64]
    places: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, rows: Sequence[DecodeRow], steps: int) -> "MultiStepBatch":
        """Returns the batch of some rows."""
        return cls(
            steps,
            slots=np.array([row.slot for row in rows]),
            starts=np.array([row.start for row in rows]),
            tokens=np.array([row.token for row in rows]),
            inverse_temperatures=np.array([inverse_temperature(row.temperature) for row in rows], np.float32),
            seeds=to_bits([row.seed for row in rows]),
            drawn=to_bits([row.drawn for row in rows]),
            masked=np.array([row.masked for row in rows]),
            masked_draws=np.array([row.masked_draws for row in rows]),
        )

    def find(self, rows: Sequence[DecodeRow], steps: int) -> list[int] | None:
        """Returns the index of each row in this batch; None if a row is missing or starts elsewhere, or if the batch
        has fewer steps."""
        place_of_slot = {slot: place for place, slot in enumerate(self.slots.tolist())}
        starts = self.starts.tolist()
        found = [place_of_slot.get(row.slot, -1) for row in rows]
        as_asked = all(place >= 0 and starts[place] == row.start for place, row in zip(found, rows, strict=True))
        return found if as_asked and steps <= self.steps else None

    def following(self, places: list[int], steps: int, context_length: int) -> "MultiStepBatch":
        """Returns the batch in which the rows at some places go on after this one."""
        names = {each.name for each in fields(self)} - {"steps", "places"}
        some = replace(self, **{name: getattr(self, name)[places] for name in names})
        starts = some.starts + self.steps
        return replace(
            some,
            steps=steps,
            places=np.array(places),
            slots=np.where(starts < context_length, some.slots, -1),
            starts=starts,
            drawn=some.drawn + np.uint64(self.steps),
            masked_draws=some.masked_draws - self.steps,
        )

    def rows(self) -> NDArray[Any]:
        """Returns the rows (R,) of the first step, as in `Row`."""
        rows = np.zeros(len(self.slots), Row)
        rows["token"], rows["slot"], rows["position"] = self.tokens, self.slots, self.starts
        return rows

    def draws(self) -> NDArray[Any]:
        """Returns the draws (S, R), as in `DrawInput`."""
        steps = np.arange(self.steps)[:, None]  # (S, 1)
        draws = np.zeros((self.steps, len(self.slots)), DrawInput)
        draws["logits_row"] = np.arange(len(self.slots))
        draws["masked"] = np.where(steps < self.masked_draws, self.masked, NO_TOKEN)
        draws["inverse_temperature"] = self.inverse_temperatures
        draws["uniform"] = uniforms(self.seeds, self.drawn + steps.astype(np.uint64))
        return draws
