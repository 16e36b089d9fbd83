from hypothesis import example, given
from hypothesis import strategies as st

from inference_service.engine.detokenizer import Detokenizer


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Returns the text before the stop that completes first, found without a stream."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def run(tokens: list[bytes], stops: list[str]) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(lambda token: tokens[token], stops)
    texts = []
    for token in range(len(tokens)):
        texts.append(detokenizer.add([token])[0])
        if detokenizer.matched_stop is not None:
            break
    texts.append(detokenizer.finish())
    return texts, detokenizer.matched_stop


tokens_of_text = (
    st.text(alphabet="abé\n€🙂", max_size=30)
    .map(str.encode)
    .flatmap(
        lambda data: st.lists(st.integers(0, len(data)), max_size=8).map(
            lambda cuts: [data[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True)]
        )
    )
)
any_tokens = st.lists(st.binary(max_size=5), max_size=12)
stops = st.lists(st.text(alphabet="abé\n€🙂\ufffd", min_size=1, max_size=4), max_size=3)


@given(tokens=st.one_of(tokens_of_text, any_tokens), stops=stops)
@example(tokens=[b"\xe2\x82", b"(", b"\xf0\x9f"], stops=[])
@example(tokens=[b"aa", b"ab"], stops=["ab", "aab"])
def test_the_stream_equals_the_whole_text_cut_at_the_stop(tokens: list[bytes], stops: list[str]) -> None:
    texts, matched = run(tokens, stops)
    assert ("".join(texts), matched) == cut(b"".join(tokens).decode("utf-8", errors="replace"), stops)


def test_a_character_appears_when_its_last_byte_comes() -> None:
    assert run([b"\xe2", b"\x82", b"\xac"], [])[0] == ["", "", "€", ""]


def test_only_a_possible_stop_is_held_back() -> None:
    texts, matched = run([b"one", b" EN", b"T", b" E", b"ND", b"!"], [" END"])
    assert texts == ["one", "", " ENT", "", "", ""]
    assert matched == " END"
