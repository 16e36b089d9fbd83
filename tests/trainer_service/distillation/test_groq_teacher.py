import logging
from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import FailedPrecondition
from tests.asynchronous import async_test
from tests.groq_service import KEY, MODEL, GroqService, Outcome
from trainer_service.distillation.answers import Answer, Kind, Refused, Usage
from trainer_service.distillation.groq_settings import GroqSettings
from trainer_service.distillation.groq_teacher import GroqTeacher
from trainer_service.distillation.prices import Schema, most_usage
from trainer_service.distillation.prompts import MAX_TOKENS, draw_prompt

MESSAGES = draw_prompt(0).messages()
SCHEMA: Schema = {
    "type": "object",
    "properties": {"winner": {"type": "string", "enum": ["A", "B", "tie"]}},
    "required": ["winner"],
    "additionalProperties": False,
}


async def asked(settings: GroqSettings, schema: Schema | None = None, timeout_s: float = 60.0) -> Answer:
    async with GroqTeacher(settings, timeout_s) as teacher:
        return await teacher.ask(MESSAGES, MAX_TOKENS, schema)


async def refusal(settings: GroqSettings, schema: Schema | None = None, timeout_s: float = 60.0) -> Refused:
    with pytest.raises(Refused) as refused:
        await asked(settings, schema, timeout_s)
    # Nothing that is printed or logged has the key, nor has what led to the error.
    error: BaseException | None = refused.value
    while error:
        assert KEY not in f"{error!r}{vars(error)}"
        error = error.__cause__
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
    return refused.value


@async_test
async def test_an_answer_has_its_usage_and_what_wrote_it(service: GroqService) -> None:
    answer = await asked(service.settings)
    assert (answer.finish_reason, answer.model, answer.fingerprint) == ("stop", MODEL, "fp_local")
    assert "There was a word." in answer.text and answer.usage.reasoning_tokens == 40
    most = most_usage(MESSAGES, MAX_TOKENS)
    assert answer.usage.prompt_tokens < most.prompt_tokens and answer.usage.completion_tokens < most.completion_tokens


@pytest.mark.parametrize(
    ("outcome", "kind", "is_free", "sentence"),
    [
        (Outcome.EMPTY, Kind.EMPTY, False, "The answer is empty: the reasoning took all its tokens."),
        (Outcome.TRUNCATED, Kind.TRUNCATED, False, "The answer is not complete ('length')."),
        (Outcome.UNREADABLE, Kind.UNREADABLE, False, "The answer of Groq cannot be read."),
        (Outcome.DROP, Kind.CUT_OFF, False, "The connection to Groq ended before the answer."),
        (Outcome.BAD_GATEWAY, Kind.SERVER_ERROR, False, "Groq has failed (status 502)."),
        (Outcome.GATEWAY_UNAVAILABLE, Kind.SERVER_ERROR, False, "Groq has failed (status 503)."),
        (Outcome.GATEWAY_TIMEOUT, Kind.SERVER_ERROR, False, "Groq has failed (status 408)."),
        (Outcome.CLIENT_CLOSED, Kind.SERVER_ERROR, False, "Groq has failed (status 499)."),
        (Outcome.UNAVAILABLE, Kind.UNAVAILABLE, True, "Groq is not available now (status 503)."),
        (
            Outcome.MINUTE_LIMIT,
            Kind.RATE_LIMITED,
            True,
            "The limit of tokens per minute at Groq is reached for a moment.",
        ),
        (Outcome.DAY_LIMIT, Kind.DAILY_LIMIT, True, "The limit of tokens per day at Groq is reached."),
        (
            Outcome.TOO_LARGE,
            Kind.TOO_LARGE,
            True,
            "A call needs 1,500 tokens, but the limit of the account at Groq is 1,000 tokens per minute: raise it, or "
            "name another model in GPTLOOP_GROQ_MODEL.",
        ),
    ],
)
@async_test
async def test_every_failure_has_its_kind_and_a_sentence(
    service: GroqService, outcome: Outcome, kind: Kind, is_free: bool, sentence: str
) -> None:
    service.script.append(outcome)
    refused = await refusal(service.settings)
    assert (refused.kind, str(refused), refused.kind.is_free) == (kind, sentence, is_free)
    # The client has not asked again by itself.
    assert len(service.calls) == 1
    assert bool(service.bill_usd) is not is_free


@async_test
async def test_a_refusal_says_how_long_to_wait(service: GroqService) -> None:
    service.script.extend([Outcome.MINUTE_LIMIT, Outcome.DAY_LIMIT])
    assert (await refusal(service.settings)).wait_s == pytest.approx(0.05)
    assert (await refusal(service.settings)).wait_s == 7 * 3600 + 12 * 60 + 3.5


@async_test
async def test_the_usage_of_an_answer_that_cannot_be_used_is_known(service: GroqService) -> None:
    service.script.extend([Outcome.EMPTY, Outcome.TRUNCATED])
    for reasoning in (MAX_TOKENS, 40):
        usage = (await refusal(service.settings)).usage
        assert usage == Usage(usage.prompt_tokens, MAX_TOKENS, reasoning) if usage else False


@async_test
async def test_a_service_that_does_not_answer_is_given_up(service: GroqService) -> None:
    service.script.append(Outcome.HANG)
    refused = await refusal(service.settings, timeout_s=0.2)
    assert (refused.kind, str(refused)) == (Kind.TIMED_OUT, "Groq has not answered within 0.2 s.")


@async_test
async def test_an_answer_in_a_schema_is_json(service: GroqService) -> None:
    service.write = lambda body: '{"winner": "A"}' if "response_format" in body else "none"
    assert (await asked(service.settings, SCHEMA)).text == '{"winner": "A"}'
    service.script.extend([Outcome.MALFORMED, Outcome.NOT_VALID])
    first, second = [await refusal(service.settings, SCHEMA) for _ in range(2)]
    assert first.kind is second.kind is Kind.MALFORMED and not first.kind.is_free
    assert first.usage is not None and second.usage is None
    loose = {**SCHEMA, "additionalProperties": True}
    refused = await refusal(service.settings, loose)
    assert refused.kind is Kind.REJECTED and "additionalProperties:false" in str(refused)


@async_test
async def test_a_wrong_key_is_refused_with_a_sentence_that_does_not_have_it(
    service: GroqService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "gsk_a-wrong-key-of-somebody"
    settings = replace(service.settings, key=wrong)
    assert wrong not in repr(settings)
    refused = await refusal(settings)
    assert refused.kind is Kind.REJECTED
    assert str(refused) == "Groq does not know the key: correct GROQ_API_KEY or GPTLOOP_GROQ_KEY_FILE."
    assert wrong not in f"{refused!r}{caplog.text}"


@async_test
async def test_an_unknown_model_is_named(service: GroqService) -> None:
    refused = await refusal(replace(service.settings, model="llama-3"))
    assert refused.kind is Kind.REJECTED
    assert str(refused) == (
        "Groq rejects the call to 'llama-3' with the status 404: 'The model `llama-3` does not exist or you do not "
        "have access to it'."
    )


@async_test
async def test_without_a_network_the_address_is_named(service: GroqService) -> None:
    for url in ("http://127.0.0.1:9", "https://127.0.0.1:9"):
        refused = await refusal(replace(service.settings, url=url))
        assert refused.kind is Kind.UNREACHABLE and refused.kind.is_free
        assert str(refused).startswith(f"Groq cannot be reached at {url} (")
        assert str(refused).endswith("): check the network and GPTLOOP_GROQ_URL.")


@async_test
async def test_the_key_may_stand_in_a_file(service: GroqService, tmp_path: Path) -> None:
    file = tmp_path / "key"
    settings = replace(service.settings, key="", key_file=str(file))
    with pytest.raises(FailedPrecondition, match=r"^The file .*key' of GPTLOOP_GROQ_KEY_FILE cannot be read: No such"):
        GroqTeacher(settings)
    for content in (b"", b"two words", b"\xff\xfe", b"k\x00"):
        file.write_bytes(content)
        with pytest.raises(FailedPrecondition, match="of GPTLOOP_GROQ_KEY_FILE holds no key"):
            GroqTeacher(settings)
    file.write_text(f"{KEY}\n")
    assert (await asked(settings)).text


def test_without_a_key_nothing_is_asked(service: GroqService) -> None:
    with pytest.raises(FailedPrecondition, match="There is no key for Groq: set GROQ_API_KEY, or GPTLOOP_GROQ_KEY"):
        GroqTeacher(replace(service.settings, key=""))


@async_test
async def test_a_redirection_is_not_followed(service: GroqService, monkeypatch: pytest.MonkeyPatch) -> None:
    def redirect(request: object, *_: object) -> None:
        request.answer(307, b"", {"location": "/openai/v1/chat/completions"})  # type: ignore[attr-defined]

    monkeypatch.setattr(service, "_send", redirect)
    assert (await refusal(service.settings)).kind is Kind.REJECTED
    assert len(service.calls) == 1
