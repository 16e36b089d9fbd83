"""How events are merged for slow readers; other tests make its calls on a real server."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from inference_service.engine.request import Admitted, Delta, Draw, Finished, FinishReason, Output
from inference_service.generation import _take
from tests.asynchronous import async_test

SAMPLES = 3


def finished(tokens: int) -> Finished:
    return Finished(FinishReason.LENGTH, None, 1, 0, tokens, 0.0, 0.0, 0.0)


async def take(outputs: list[Output]) -> list[Output]:
    queue: asyncio.Queue[Output] = asyncio.Queue()
    for output in outputs:
        queue.put_nowait(output)
    return await _take(queue)


@given(st.lists(st.integers(0, SAMPLES - 1), max_size=30))
@async_test
async def test_waiting_deltas_are_merged_into_one_per_sample(indices: list[int]) -> None:
    outputs = [Output("r", 0, Admitted(0.0))]
    for number, index in enumerate(indices):
        outputs.append(Output("r", index, Delta((float(number),), f"{number} ", (Draw(number),))))
    outputs += [Output("r", index, finished(indices.count(index))) for index in set(indices)]
    taken = await take(outputs)
    assert taken[0] == outputs[0]
    assert len(taken) == 1 + 2 * len(set(indices))
    for index in set(indices):
        delta, end = (output.event for output in taken[1:] if output.index == index)
        numbers = [number for number, other in enumerate(indices) if other == index]
        assert delta == Delta(
            tuple(map(float, numbers)), "".join(f"{number} " for number in numbers), tuple(map(Draw, numbers))
        )
        assert end == finished(len(numbers))


@async_test
async def test_a_single_event_is_passed_on_unchanged() -> None:
    output = Output("r", 0, Delta((1.0,), "a", (Draw(1),)))
    assert await take([output]) == [output]
