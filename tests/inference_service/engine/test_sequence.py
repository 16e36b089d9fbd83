"""What one sample shows of its tokens, however it ends."""

from hypothesis import example, given
from hypothesis import strategies as st

from inference_service.engine.request import Delta, Draw, Event, Finished, FinishReason
from inference_service.engine.sequence import Sequence
from tests.inference_service.engine.harness import request
from tests.inference_service.engine.test_detokenizer import any_pieces, cut, pieces_of_text, stops

PROMPT = "Once"
FAR = 1000

endings = st.sampled_from([reason for reason in FinishReason if reason is not FinishReason.STOP])


def run(pieces: list[bytes], stops: list[str], ending: FinishReason) -> list[Event]:
    """What is shown of a token for each piece, of which the last one is the end, unless a stop text comes before."""
    count = len(pieces)
    sequence = Sequence(
        request(
            "a", PROMPT, stop=tuple(stops), max_tokens=count if ending is FinishReason.LENGTH else FAR, ignore_eos=False
        ),
        index=0,
        context_length=len(PROMPT) + (count if ending is FinishReason.CONTEXT_LENGTH else FAR),
        end_token=count - 1 if ending is FinishReason.EOS else FAR,
        token_bytes=pieces.__getitem__,
    )
    events: list[Event] = []
    for token in range(count):
        events += sequence.accept(Draw(token), now=1.0)
        if isinstance(events[-1], Finished):
            return events
    assert ending in (FinishReason.CANCELLED, FinishReason.DEADLINE)
    return events + sequence.end(ending, now=1.0)


@given(pieces=st.one_of(pieces_of_text, any_pieces.filter(bool)), stops=stops, ending=endings)
@example(pieces=[b"a", b"\xe2"], stops=[], ending=FinishReason.LENGTH)
@example(pieces=[b"a", b"\xe2"], stops=[], ending=FinishReason.CANCELLED)
@example(pieces=[b"a", b"\xe2"], stops=["\ufffd"], ending=FinishReason.LENGTH)
@example(pieces=[b"a", b"\xe2"], stops=["\ufffd"], ending=FinishReason.EOS)
@example(pieces=[b"a", b"\xe2"], stops=["\ufffd"], ending=FinishReason.CONTEXT_LENGTH)
@example(pieces=[b"a", b"\xe2"], stops=["\ufffd"], ending=FinishReason.CANCELLED)
@example(pieces=[b"a", b"b"], stops=["abc"], ending=FinishReason.DEADLINE)
def test_the_text_of_all_tokens_is_cut_at_the_stop_with_its_reason(
    pieces: list[bytes], stops: list[str], ending: FinishReason
) -> None:
    *events, finished = run(pieces, stops, ending)
    deltas = [event for event in events if isinstance(event, Delta)]
    text, stop = cut(b"".join(pieces).decode("utf-8", errors="replace"), stops)
    assert "".join(delta.text for delta in deltas) == text
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.matched_stop) == (ending if stop is None else FinishReason.STOP, stop)
    assert finished.generated_tokens == sum(len(delta.draws) for delta in deltas)
