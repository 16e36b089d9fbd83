"""The text of one sample, with every kind of end."""

from hypothesis import example, given
from hypothesis import strategies as st

from inference_service.engine.request import Delta, Draw, Event, Finished, FinishReason
from inference_service.engine.sequence import Sequence
from tests.inference_service.engine.harness import request
from tests.inference_service.engine.test_detokenizer import any_tokens, cut, stops, tokens_of_text

PROMPT = "Once"
FAR = 1000

endings = st.sampled_from([reason for reason in FinishReason if reason is not FinishReason.STOP])


def run(tokens: list[bytes], stops: list[str], ending: FinishReason, in_a_row: int = 1) -> list[Event]:
    """Returns the events of tokens with these bytes; the last one ends the stream if no stop text does."""
    count = len(tokens)
    sequence = Sequence(
        request(
            "a", PROMPT, stop=tuple(stops), max_tokens=count if ending is FinishReason.LENGTH else FAR, ignore_eos=False
        ),
        index=0,
        context_length=len(PROMPT) + (count if ending is FinishReason.CONTEXT_LENGTH else FAR),
        end_token=count - 1 if ending is FinishReason.EOS else FAR,
        token_bytes=tokens.__getitem__,
    )
    events: list[Event] = []
    for first in range(0, count, in_a_row):
        draws = tuple(Draw(token) for token in range(first, min(first + in_a_row, count)))
        events += sequence.accept(draws, None, now=1.0)
        if isinstance(events[-1], Finished):
            return events
    assert ending in (FinishReason.CANCELLED, FinishReason.DEADLINE)
    return events + sequence.end(ending, now=1.0)


@given(
    tokens=st.one_of(tokens_of_text, any_tokens.filter(bool)),
    stops=stops,
    ending=endings,
    in_a_row=st.integers(1, 5),
)
@example(tokens=[b"a", b"\xe2"], stops=[], ending=FinishReason.LENGTH, in_a_row=1)
@example(tokens=[b"a", b"\xe2"], stops=[], ending=FinishReason.CANCELLED, in_a_row=1)
@example(tokens=[b"a", b"\xe2"], stops=["\ufffd"], ending=FinishReason.LENGTH, in_a_row=1)
@example(tokens=[b"a", b"\xe2"], stops=["\ufffd"], ending=FinishReason.EOS, in_a_row=1)
@example(tokens=[b"a", b"\xe2"], stops=["\ufffd"], ending=FinishReason.CONTEXT_LENGTH, in_a_row=1)
@example(tokens=[b"a", b"\xe2"], stops=["\ufffd"], ending=FinishReason.CANCELLED, in_a_row=1)
@example(tokens=[b"a", b"b"], stops=["abc"], ending=FinishReason.DEADLINE, in_a_row=1)
def test_the_text_of_all_tokens_is_cut_at_the_stop_with_its_reason(
    tokens: list[bytes], stops: list[str], ending: FinishReason, in_a_row: int
) -> None:
    *events, finished = run(tokens, stops, ending, in_a_row)
    deltas = [event for event in events if isinstance(event, Delta)]
    text, stop = cut(b"".join(tokens).decode("utf-8", errors="replace"), stops)
    assert "".join(delta.text for delta in deltas) == text
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.matched_stop) == (ending if stop is None else FinishReason.STOP, stop)
    assert finished.generated_tokens == sum(len(delta.draws) for delta in deltas)
