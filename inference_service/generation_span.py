"""The spans of a generation: the wait for a slot, the prompt, and the tokens of each sample."""

from collections.abc import Iterator
from contextlib import contextmanager

from inference_service.draft import Draft
from inference_service.engine.request import Finished, GenerationRequest
from shared.service import traces
from shared.service.tracer import Attributes, Mark

# Names that begin with gen_ai are OpenTelemetry's conventions for generative AI.
_OPERATION = "text_completion"


class GenerationSpan:
    """Takes the ends of samples, and adds a span for each part of the work, whose times the engine measured."""

    def __init__(self, mark: Mark) -> None:
        self._mark = mark
        self._generated_tokens = 0
        self._reasons: list[str] = []

    def finished(self, request: GenerationRequest, finished: Finished, index: int) -> None:
        """Adds the spans of a sample; the first one has the wait and the prompt, which all samples share."""
        if not traces.are_on():
            return
        arrived, end_s = request.arrived, request.arrived + finished.total_s
        admitted_s = end_s if finished.queue_s is None else arrived + finished.queue_s
        read_s = end_s if finished.first_token_s is None else arrived + finished.first_token_s
        if index == 0:
            traces.add("queue", arrived, admitted_s)
            if finished.queue_s is not None:
                cached = {"gptloop.cached_prompt_tokens": finished.cached_prompt_tokens}
                traces.add(
                    "prompt", admitted_s, read_s, {"gen_ai.usage.input_tokens": finished.prompt_tokens, **cached}
                )
        if finished.first_token_s is not None:
            traces.add(
                "decode",
                *(read_s, end_s),
                {
                    "gptloop.version": request.version,
                    "gptloop.sample": index,
                    "gen_ai.usage.output_tokens": finished.generated_tokens,
                },
            )
        self._generated_tokens += finished.generated_tokens
        self._reasons.append(finished.reason.name.lower())
        self._mark(
            {
                "gen_ai.response.id": request.call_id,
                "gen_ai.response.finish_reasons": self._reasons,
                "gen_ai.usage.input_tokens": finished.prompt_tokens,
                "gen_ai.usage.output_tokens": self._generated_tokens,
            }
        )


@contextmanager
def generation_span(draft: Draft, version: int) -> Iterator[GenerationSpan]:
    """Makes a block the span of a generation by a version."""
    options = draft.options
    attributes: Attributes = {}
    if traces.are_on():
        attributes = {
            "gen_ai.operation.name": _OPERATION,
            "gen_ai.provider.name": "gptloop",
            "gen_ai.response.model": str(version),
            "gen_ai.request.max_tokens": options.max_tokens,
            "gen_ai.request.choice.count": options.samples,
            "gen_ai.request.temperature": options.sampling.temperature,
            "gen_ai.request.top_p": options.sampling.top_p,
            "gptloop.version": version,
        }
    with traces.span(f"{_OPERATION} {version}", attributes) as mark:
        yield GenerationSpan(mark)
