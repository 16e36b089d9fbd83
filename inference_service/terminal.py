"""Shows generations to a person: text on standard output, everything else on standard error."""

import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from unicodedata import category

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from inference_service.client.client import InferenceClient, Parameters
from inference_service.client.completion import Event, sample_seed
from inference_service.word_wrap import WordWrap
from shared.errors import GptloopError
from shared.pb.inference.v1 import inference_pb2 as pb

# Prompts that are sent at the same time. The server decodes some of them and lets the others wait.
_TOGETHER = 64


@dataclass
class Answer:
    """The answer to one prompt so far; `texts` has the text of each sample as far as it has arrived."""

    prompt: str
    texts: list[str]
    started: pb.Started | None = None
    finished: dict[int, pb.Finished] = field(default_factory=dict)
    error: GptloopError | None = None

    def add(self, event: Event) -> None:
        """Adds the next event."""
        match event:
            case pb.Started():
                self.started = event
            case pb.Delta():
                self.texts[event.index] += event.text
            case pb.Finished():
                self.finished[event.index] = event

    def summary(self, index: int, seconds: float) -> str:
        """Returns one line on a sample: version, seed, tokens, speed, time to the first token, reason."""
        assert self.started is not None
        head = f"version {self.started.model_version} · seed {sample_seed(self.started, index)}"
        if (finished := self.finished.get(index)) is None:
            return f"{head} · stopped after {seconds:.1f} s"
        decode_s = finished.total_seconds - finished.time_to_first_token_seconds
        rate = ""
        if finished.generated_tokens > 1 and decode_s > 0:
            rate = f" · {(finished.generated_tokens - 1) / decode_s:.0f} tokens/s"
        reason = pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_")
        return (
            f"{head} · {finished.generated_tokens} tokens{rate} · "
            f"first token {finished.time_to_first_token_seconds * 1000:.0f} ms · {reason}"
        )


class Page:
    """Prints the samples of an answer one after another while they arrive, each followed by a line about it."""

    def __init__(self, answer: Answer, notes: Console) -> None:
        self._answer = answer
        self._notes = notes
        self._begin_s = time.monotonic()
        self._index = 0
        # How many characters of the sample are printed; None before it has begun.
        self._shown: int | None = None
        self._wrap = WordWrap()

    def show(self) -> None:
        """Prints what is new."""
        while self._answer.started is not None and self._index < len(self._answer.texts):
            if self._shown is None:
                self._shown = 0
                if len(self._answer.texts) > 1:
                    self._notes.print(f"--- {self._index + 1} of {len(self._answer.texts)}", style="dim")
            story = self._answer.prompt + self._answer.texts[self._index]
            new = story[self._shown :]
            # A model may generate control characters. A terminal shows them escaped; a file gets the text unchanged.
            sys.stdout.write(self._wrap.add(_harmless(new), _width()) if sys.stdout.isatty() else new)
            sys.stdout.flush()
            self._shown = len(story)
            if self._index not in self._answer.finished:
                return
            self.end()

    def end(self) -> None:
        """Ends the sample that is being printed, complete or not."""
        if self._shown is not None:
            sys.stdout.write(self._wrap.end(_width()) + "\n")
            sys.stdout.flush()
            self._wrap = WordWrap()
            self._notes.print(self._answer.summary(self._index, time.monotonic() - self._begin_s), style="dim")
            self._index += 1
            self._shown = None


class Terminal:
    """Runs generations and shows them."""

    def __init__(self, client: InferenceClient) -> None:
        self._client = client
        self._notes = new_notes()

    def generate(self, prompt: str, parameters: Parameters) -> None:
        """Streams one story after its prompt; then prints a line about it and the command that repeats it.

        Several samples follow one another.
        """
        answer = new_answer(prompt, parameters)
        self.stream(answer, parameters)
        if answer.started is None:
            return
        for index in sorted(answer.finished):
            what = "The same text" if len(answer.texts) == 1 else f"Sample {index + 1}"
            version, seed = answer.started.model_version, sample_seed(answer.started, index)
            command = _command_of(prompt, {**parameters, "version": version, "seed": seed, "label": None, "n": None})
            self._notes.print(f"{what} again: {command}", style="dim", markup=False, soft_wrap=True)

    def generate_all(self, prompts: Sequence[str], parameters: Parameters) -> None:
        """Streams a story for each prompt at the same time; prints each one when it and those before it are complete.

        Raises the first error after everything else is printed.
        """
        answers = [new_answer(prompt, parameters) for prompt in prompts]
        begin = time.monotonic()
        left = False

        def run(answer: Answer) -> None:
            try:
                with self._client.generate(answer.prompt, **parameters) as stream:
                    for event in stream:
                        answer.add(event)
                        if left:
                            return
            except GptloopError as error:
                answer.error = error

        with contextlib.ExitStack() as stack:
            if self._notes.is_terminal:
                stack.enter_context(
                    Live(
                        get_renderable=lambda: _overview(answers, self._notes.width),
                        console=self._notes,
                        transient=True,
                    )
                )
            pool = stack.enter_context(ThreadPoolExecutor(_TOGETHER))
            try:
                runs = [pool.submit(run, answer) for answer in answers]
                for number, (answer, done) in enumerate(zip(answers, runs, strict=True), start=1):
                    done.result()
                    self._print_whole(number, answer)
            except KeyboardInterrupt:
                left = True
                pool.shutdown(cancel_futures=True)
                raise
        tokens = sum(finished.generated_tokens for answer in answers for finished in answer.finished.values())
        seconds = time.monotonic() - begin
        self._notes.print(
            f"{len(answers)} prompts · {tokens} tokens in {seconds:.1f} s · {tokens / seconds:.0f} tokens/s",
            style="dim",
        )
        for answer in answers:
            if answer.error is not None:
                raise answer.error

    def stream(self, answer: Answer, parameters: Parameters) -> None:
        """Fills an answer, and prints it while it arrives."""
        page = Page(answer, self._notes)
        try:
            with self._client.generate(answer.prompt, **parameters) as stream:
                for event in stream:
                    answer.add(event)
                    page.show()
        finally:
            page.end()

    def _print_whole(self, number: int, answer: Answer) -> None:
        if answer.error is not None:
            self._notes.print(f"--- {number}: error: {answer.error}", markup=False)
            return
        for index, text in enumerate(answer.texts):
            sample = "" if len(answer.texts) == 1 else f", {index + 1} of {len(answer.texts)}"
            self._notes.print(f"--- {number}{sample}: {answer.summary(index, 0.0)}", style="dim")
            print(answer.prompt + text, flush=True)


def new_notes() -> Console:
    """Returns standard error, where lines break between words on a terminal and nowhere else."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def new_answer(prompt: str, parameters: Parameters) -> Answer:
    """Returns an answer of which nothing has arrived."""
    return Answer(prompt, [""] * (parameters.get("n") or 1))


def _command_of(prompt: str, parameters: Parameters) -> str:
    """Returns the command line that continues a prompt with these parameters."""
    words = ["gptloop", "generate", "--prompt", prompt]
    for name, value in parameters.items():
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                words += [f"--{name.replace('_', '-')}", str(each)]
    return _harmless(shlex.join(words))


def _harmless(text: str) -> str:
    """Escapes the control characters of a text, except line breaks and tabs."""
    return "".join(
        each.encode("unicode_escape").decode() if category(each) == "Cc" and each not in "\n\t" else each
        for each in text
    )


def _width() -> int:
    """Returns how many cells of a line are used."""
    # Some terminals begin a new line when the last cell is filled.
    return max(shutil.get_terminal_size().columns - 1, 2)


def _overview(answers: Sequence[Answer], width: int) -> Table:
    """Returns a line for each unfinished answer: the end of the text of a sample."""
    table = Table.grid(padding=(0, 1))
    for number, answer in enumerate(answers, start=1):
        running = [text for index, text in enumerate(answer.texts) if index not in answer.finished]
        if answer.started is not None and running:
            # The number, and the gaps around it, take up to eight columns.
            text = (answer.prompt + running[0])[-max(width - 8, 1) :]
            table.add_row(str(number), Text(text.replace("\n", " "), no_wrap=True, overflow="crop"))
    return table
