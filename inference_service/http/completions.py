"""OpenAI's completions: translates JSON into the requests of `draft.py`, and events into choices."""

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from inference_service.admission import Call
from inference_service.draft import Draft, Selection, new_draft
from inference_service.engine.request import Delta, Draw, Finished, GenerationRequest, PromptRead
from inference_service.generation import Generations
from inference_service.http.choices import Choice, Usage
from inference_service.http.errors import HttpError
from inference_service.versions.resident import Resident
from shared.decoding.sampling import SamplingParameters
from shared.errors import InvalidArgument, NotFound
from shared.service.access.tokens import Caller

# Prompts of one request; each takes the slots of its samples.
MAX_PROMPTS = 128
# OpenAI's defaults.
_MAX_TOKENS = 16


_Item = TypeVar("_Item")
# Without the limit, millions of wrong values make as many errors, for each of the types.
_List = Annotated[list[_Item], Field(fail_fast=True)]


class StreamOptions(BaseModel):
    """Whether a last event of a stream has the counts of tokens."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    # OpenAI pads events against eavesdroppers; this server does not.
    include_obfuscation: bool | None = None


class CompletionRequest(BaseModel):
    """The body of `POST /v1/completions`: OpenAI's fields, then those that the engine has besides.

    Absent fields have OpenAI's defaults. `user` is ignored, and `best_of` must equal `n`. `model` may be a number:
    some tools read a name of digits as one.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str | _List[int] | _List[str] | _List[_List[int]]
    model: str | int = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | _List[str] | None = None
    seed: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = Field(None, strict=False)
    best_of: int | None = None
    user: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None

    def drafts(self, slots: int) -> list[Draft]:
        """Returns a draft for each prompt; raises `InvalidArgument` or `HttpError` that names the field."""
        samples = 1 if self.n is None else self.n
        if self.best_of is not None and self.best_of != samples:
            raise HttpError(400, f"best_of is {self.best_of}, but must equal n, {samples}.", "best_of")
        prompts = self._prompts()
        names = {each.name for each in fields(SamplingParameters)} - {"logit_bias"}
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        biases = tuple(sorted((self.logit_bias or {}).items()))
        sampling = SamplingParameters(**{"temperature": 1.0, **given}, logit_bias=biases)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        # A number that JavaScript can hold.
        seed = secrets.randbits(53) if self.seed is None else self.seed
        # A step of the engine always draws a token; without room for one, it is left out of the answer.
        max_tokens = _MAX_TOKENS if self.max_tokens is None else self.max_tokens or (1 if self.echo else 0)
        return [
            new_draft(
                selection=Selection(),
                prompt=prompt,
                slots=slots,
                sampling=sampling,
                # As with one prompt, each sample draws with its own seed.
                seed=(seed + number * samples) % 2**64,
                max_tokens=max_tokens,
                min_tokens=self.min_tokens or 0,
                stop=stop,
                ignore_eos=bool(self.ignore_eos),
                logprobs=self.logprobs,
                prompt_logprobs=self.logprobs if self.echo else None,
                n=samples,
            )
            for number, prompt in enumerate(prompts)
        ]

    def _prompts(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise HttpError(400, "prompt is an empty list, but must have a prompt or tokens.", "prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        if len(self.prompt) > MAX_PROMPTS:
            raise HttpError(400, f"prompt has {len(self.prompt)} prompts, but the limit is {MAX_PROMPTS}.", "prompt")
        return self.prompt


def _selection(model: str) -> Selection:
    """Returns the version that a model's name selects: a number or a label; without a name the one that serves."""
    if not model:
        return Selection()
    if model.isascii() and model.isdecimal() and len(model) <= 18 and int(model):
        return Selection(version=int(model))
    return Selection(label=model)


def _named(error: InvalidArgument) -> HttpError:
    """Returns the error of a draft with the field that it names at its beginning."""
    sentence = str(error).replace("prompt_tokens contains", "prompt contains", 1)
    name = sentence.removeprefix("The ").split(maxsplit=1)[0]
    return HttpError(400, sentence, name if name in CompletionRequest.model_fields else None)


class Completion:
    """The answer to one request: its choices, and what all of its events or its response have in common."""

    def __init__(self, request: CompletionRequest) -> None:
        self.usage = Usage()
        self._request = request
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = str(request.model)
        self._fingerprint: str | None = None
        self._weights: str | None = None
        self._seeds: dict[int, int] = {}

    def begin(self, number: int, request: GenerationRequest, resident: Resident) -> list[Choice]:
        """Returns the choices of a prompt, with its text if it is echoed."""
        self._model, self._fingerprint = str(request.version), resident.manifest.digest
        self._weights = resident.weights
        self._seeds[number] = request.seed
        self.usage.prompt_tokens += len(request.prompt)
        given = self._request
        return [
            Choice(
                number * request.samples + sample, resident.tokenizer, given.logprobs is not None, given.max_tokens == 0
            )
            for sample in range(request.samples)
        ]

    def count(self, finished: Finished, is_first: bool) -> None:
        """Counts the tokens of a sample."""
        self.usage.completion_tokens += 0 if self._request.max_tokens == 0 else finished.generated_tokens
        self.usage.cached_tokens += finished.cached_prompt_tokens if is_first else 0

    def event(self, choices: Sequence[Choice], **more: Any) -> str:
        """Returns an event of a stream as JSON."""
        return _to_json(self._common() | {"choices": [choice.take() for choice in choices], **more})

    async def whole(self, choices: Sequence[Choice]) -> str:
        """Returns a response as JSON, written choice by choice, so that a large one does not hold up other streams."""
        parts = []
        for choice in choices:
            parts.append(_to_json(choice.take()))
            await asyncio.sleep(0)
        rest = _to_json(self._common() | {"usage": self.usage.to_json()})
        return f'{rest[:-1]},"choices":[{",".join(parts)}]}}'

    def _common(self) -> dict[str, Any]:
        """Returns what all answers have. `seed` is that of the first choice; the others follow it."""
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "weight_format": self._weights,
            "seed": self._seeds.get(0),
        }


def _to_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


# Receives choices with news; may wait until the client has read.
Send = Callable[[Sequence[Choice]], Awaitable[None]]


class _Prompt:
    """Receives the events of one prompt of a request."""

    def __init__(self, number: int, completion: Completion, draft: Draft, echo: bool, send: Send) -> None:
        self._number = number
        self._completion = completion
        self._draft = draft
        self._echo = echo
        self._send = send
        self._read: list[Draw] = []
        self.choices: list[Choice] = []

    async def started(self, request: GenerationRequest, resident: Resident) -> None:
        self.choices = self._completion.begin(self._number, request, resident)
        self._request, self._tokenizer = request, resident.tokenizer
        if self._echo and request.prompt_logprobs is None:
            self._add_prompt()

    async def prompt(self, read: PromptRead) -> None:
        self._read += read.tokens
        if len(self._read) == len(self._request.prompt):
            self._add_prompt()

    async def delta(self, delta: Delta, index: int) -> None:
        self.choices[index].add(delta)
        await self._send([self.choices[index]])

    async def finished(self, finished: Finished, index: int) -> None:
        self._completion.count(finished, index == 0)
        self.choices[index].finish(finished)
        await self._send([self.choices[index]])

    def _add_prompt(self) -> None:
        given = self._draft.prompt
        text = given if isinstance(given, str) else self._tokenizer.decode(list(given))
        for choice in self.choices:
            choice.echo(text, self._read)


async def complete(
    request: CompletionRequest, generations: Generations, caller: Caller | None, send: Callable[[str], Awaitable[None]]
) -> tuple[str, str]:
    """Answers all prompts of a request with one version; returns the response, or if it streams the last event, and the
    finish reason of its last prompt.

    A request that streams calls `send` with each event. At most as many prompts run or wait at once as the caller may
    have samples, so that a batch does not fill the queue. Raises the errors of `Generations`; then all of its prompts
    have ended.
    """
    completion = Completion(request)
    usage: dict[str, Any] = {}
    if request.stream and request.stream_options is not None and request.stream_options.include_usage:
        usage = {"usage": None}

    async def pass_on(choices: Sequence[Choice]) -> None:
        if request.stream:
            await send(completion.event(choices, **usage))

    slots = generations.most_samples(caller)
    try:
        drafts = request.drafts(slots)
    except InvalidArgument as error:
        raise _named(error) from None
    try:
        manifest = await generations.choose(_selection(str(request.model)))
    except (InvalidArgument, NotFound) as error:
        raise HttpError(404, str(error), "model", "model_not_found") from None
    prompts = [_Prompt(number, completion, draft, bool(request.echo), pass_on) for number, draft in enumerate(drafts)]
    samples = drafts[0].options.samples
    at_once = min(len(drafts), slots // samples)
    with generations.call(caller, at_once * samples) as call:
        async with generations.version(manifest) as resident:
            reasons = await _answer_all(list(zip(drafts, prompts, strict=True)), at_once, generations, resident, call)
    if request.stream:
        last = completion.event([], usage=completion.usage.to_json()) if usage else ""
    else:
        last = await completion.whole([choice for prompt in prompts for choice in prompt.choices])
    return last, reasons[-1]


async def _answer_all(
    prompts: Sequence[tuple[Draft, _Prompt]], at_once: int, generations: Generations, resident: Resident, call: Call
) -> list[str]:
    """Answers prompts, some at once; returns their finish reasons. After an error, all have ended."""
    room = asyncio.Semaphore(at_once)

    async def answer(draft: Draft, prompt: _Prompt) -> str:
        async with room:
            try:
                return await generations.run_on(resident, draft, prompt, call)
            except InvalidArgument as error:
                raise _named(error) from None

    tasks = [asyncio.create_task(answer(draft, prompt)) for draft, prompt in prompts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
