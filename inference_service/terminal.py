"""What a person sees of generations: text on standard output, everything else on standard error."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from inference_service.client import InferenceClient, Parameters
from shared.errors import GptloopError, InvalidArgument
from shared.pb.inference.v1 import inference_pb2 as pb

# Prompts that are sent together; the server itself decodes some of them at a time and lets the others wait.
_TOGETHER = 64

CHAT_HELP = """The model continues what you type; each line stands alone.
  /seed N          the same answer to the same line again; /seed alone: a new one each time
  /temperature X   0: always the likeliest word; higher: bolder
  /reset           seed and temperature as at the start
  /quit            or Ctrl-D; Ctrl-C stops an answer"""


@dataclass
class Stream:
    """What came of one prompt so far."""

    prompt: str
    text: str = ""
    started: pb.Started | None = None
    finished: pb.Finished | None = None
    error: GptloopError | None = None

    def summary(self, seconds: float) -> str:
        """One line: version, seed, tokens, speed, time to the first token, reason."""
        assert self.started is not None
        head = f"version {self.started.model_version} · seed {self.started.seed}"
        if self.finished is None:
            return f"{head} · stopped after {seconds:.1f} s"
        finished = self.finished
        decode_s = finished.total_seconds - finished.time_to_first_token_seconds
        rate = f" · {(finished.generated_tokens - 1) / decode_s:.0f} tokens/s" if finished.generated_tokens > 1 else ""
        reason = pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_")
        return (
            f"{head} · {finished.generated_tokens} tokens{rate} · "
            f"first token {finished.time_to_first_token_seconds * 1000:.0f} ms · {reason}"
        )


class Terminal:
    """Runs generations and shows them."""

    def __init__(self, client: InferenceClient) -> None:
        self._client = client
        self._notes = Console(stderr=True, highlight=False, soft_wrap=True)

    def generate(self, prompt: str, parameters: Parameters) -> None:
        """Streams one story, its prompt first; then a line about it, and how to have it again."""
        started = self._stream(prompt, parameters)
        if started is not None:
            again = f"VERSION={started.model_version} SEED={started.seed}"
            for name in ("temperature", "max_tokens"):
                if (value := parameters.get(name)) is not None:
                    again += f" {name.upper()}={value}"
            self._notes.print(f"The same text again: {again}", style="dim")

    def generate_all(self, prompts: Sequence[str], parameters: Parameters) -> None:
        """Streams a story for each prompt, together; each is printed when it and those before it are whole.

        Raises the first error after everything else was printed.
        """
        streams = [Stream(prompt) for prompt in prompts]
        begin = time.monotonic()
        left = False

        def run(stream: Stream) -> None:
            try:
                self._collect(stream, parameters, lambda: left)
            except GptloopError as error:
                stream.error = error

        with contextlib.ExitStack() as stack:
            if self._notes.is_terminal:
                stack.enter_context(
                    Live(get_renderable=lambda: _overview(streams), console=self._notes, transient=True)
                )
            pool = stack.enter_context(ThreadPoolExecutor(_TOGETHER))
            try:
                runs = [pool.submit(run, stream) for stream in streams]
                for number, (stream, done) in enumerate(zip(streams, runs, strict=True), start=1):
                    done.result()
                    self._print_whole(number, stream)
            except KeyboardInterrupt:
                left = True
                pool.shutdown(cancel_futures=True)
                raise
        tokens = sum(stream.finished.generated_tokens for stream in streams if stream.finished is not None)
        seconds = time.monotonic() - begin
        self._notes.print(
            f"{len(streams)} prompts · {tokens} tokens in {seconds:.1f} s · {tokens / seconds:.0f} tokens/s",
            style="dim",
        )
        for stream in streams:
            if stream.error is not None:
                raise stream.error

    def chat(self, parameters: Parameters) -> None:
        """Reads lines and continues each of them, until the end of the input."""
        current = parameters.copy()
        model = self._client.model(parameters.get("version"), parameters.get("label"))
        self._notes.print(f"version {model.version}, {model.parameters:,} parameters. /help says what can be typed.")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                self._notes.print()
                return
            except KeyboardInterrupt:
                self._notes.print()
                continue
            try:
                if line == "/quit":
                    return
                if line.startswith("/"):
                    current = self._command(line, current, parameters)
                elif line:
                    self._stream(line, current)
            except KeyboardInterrupt:
                continue
            except GptloopError as error:
                self._notes.print(f"error: {error}", markup=False)

    def _command(self, line: str, current: Parameters, initial: Parameters) -> Parameters:
        name, _, value = line.partition(" ")
        try:
            match name:
                case "/seed":
                    return {**current, "seed": int(value) if value else None}
                case "/temperature":
                    return {**current, "temperature": float(value)}
                case "/reset":
                    return initial.copy()
                case "/help":
                    self._notes.print(CHAT_HELP)
                    return current
        except ValueError:
            raise InvalidArgument(f"{name} needs a number, but {value!r} is none.") from None
        raise InvalidArgument(f"Unknown command {name!r}: /help says what can be typed.")

    def _stream(self, prompt: str, parameters: Parameters) -> pb.Started | None:
        """Prints a story while it comes."""
        stream = Stream(prompt)
        begin = time.monotonic()
        shown = 0

        def show() -> bool:
            nonlocal shown
            if stream.started is not None:
                story = prompt + stream.text
                sys.stdout.write(story[shown:])
                sys.stdout.flush()
                shown = len(story)
            return False

        try:
            self._collect(stream, parameters, show)
        finally:
            if stream.started is not None:
                sys.stdout.write("\n")
                sys.stdout.flush()
                self._notes.print(stream.summary(time.monotonic() - begin), style="dim")
        return stream.started

    def _collect(self, stream: Stream, parameters: Parameters, leave: Callable[[], bool]) -> None:
        """Fills a stream until its end, or until `leave`, asked after every event, says so."""
        for event in self._client.generate(stream.prompt, **parameters):
            match event:
                case pb.Started():
                    stream.started = event
                case pb.Delta():
                    stream.text += event.text
                case pb.Finished():
                    stream.finished = event
            if leave():
                return

    def _print_whole(self, number: int, stream: Stream) -> None:
        if stream.error is None:
            self._notes.print(f"--- {number}: {stream.summary(0.0)}", style="dim")
            print(stream.prompt + stream.text, flush=True)
        else:
            self._notes.print(f"--- {number}: error: {stream.error}", markup=False)


def _overview(streams: Sequence[Stream]) -> Table:
    """One line for each stream that runs: its end."""
    table = Table.grid(padding=(0, 1))
    for number, stream in enumerate(streams, start=1):
        if stream.started is not None and stream.finished is None:
            table.add_row(str(number), Text((stream.prompt + stream.text)[-72:].replace("\n", " ")))
    return table
