"""Shows the whole loop from the start: trains on the built-in stories, serves each better version, and measures."""

import os
import shlex
import shutil
import signal
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.live import Live
from rich.text import Text

from deploy.access import own_credentials
from deploy.ports import Ports, free_ports, page_url, read_ports
from deploy.stack import Stack
from deploy.supervisor import wait_until
from inference_service.client.client import InferenceClient
from shared.errors import GptloopError, Unavailable
from shared.pb.inference.v1 import inference_pb2
from shared.pb.training.v1 import training_pb2 as pb
from shared.service import cli
from shared.service.access.credentials import PLAIN, Credentials
from shared.service.lists import print_rows
from shared.service.settings import Directories, read_directories
from shared.text import format_duration, format_size
from trainer_service.client import TrainerClient
from trainer_service.jobs.requests import TrainRequest

_PRESET = "demo"
_PROMPTS = ("Once upon a time", "One morning", "There was once", "Long ago", "One day")
_STORY_TOKENS = 220
_TEMPERATURE = 0.6
# Limit on the time from the publication of a version until it serves.
_SWAP_LIMIT_S = 60.0
_INDENT = " " * 4
_PROGRESS_INTERVAL_S = 8.0
# The run of a demo is not continued, so a long step need not end.
_WORKER_STOP_S = 3

app = cli.new_app(None)


class Samples(dict[str, float]):
    """The samples of a metrics page, by their names, followed by the label `kind` if there is one."""

    def __missing__(self, name: str) -> float:
        raise GptloopError(f"A metrics page lacks {name}.")


@dataclass
class Demo:
    """What the demonstration has shown so far."""

    console: Console
    ports: Ports
    credentials: Credentials = PLAIN
    began_s: float = field(default_factory=time.monotonic)
    first_story_s: float | None = None
    versions: list[pb.VersionPublished] = field(default_factory=list)
    # Scraped during training: afterwards the rate is 0 and the memory is missing.
    training: Samples = field(default_factory=Samples)
    # The highest rate after a story.
    tokens_per_second: float = 0.0
    stage: str = ""
    shown_s: float = 0.0

    def run(self) -> None:
        """Trains, and shows a story of each version that is the best so far; raises `GptloopError` if a part fails."""
        trainer, inference = f"127.0.0.1:{self.ports.trainer}", f"127.0.0.1:{self.ports.inference}"
        with (
            TrainerClient(trainer, credentials=self.credentials) as trainer_client,
            InferenceClient(inference, credentials=self.credentials) as client,
        ):
            job = trainer_client.submit(TrainRequest(preset=_PRESET)).job
            self.say(f"Job {job.id} is queued: preset {_PRESET}, the built-in stories.")
            for response in trainer_client.watch(job.id):
                self._show(response, client)
        self._check()
        self._print_tables()

    def say(self, text: str) -> None:
        """Prints a line with the time since the start."""
        seconds = time.monotonic() - self.began_s
        self.console.print(f"[{seconds:5.1f} s] {text}", soft_wrap=True)

    def _show(self, response: pb.WatchJobResponse, client: InferenceClient) -> None:
        match response.WhichOneof("event"):
            case "preparation" if response.preparation.stage != self.stage:
                self.stage = response.preparation.stage
                self.say(self.stage.capitalize() + ".")
            case "notice":
                self.say(response.notice.text)
            case "run_started":
                started = response.run_started
                self.say(
                    f"Training {started.parameters:,} parameters on {started.train_tokens:,} tokens, {started.device}."
                )
            case "progress":
                self._show_progress(response.progress)
            case "version_published":
                self._read_story(response.version_published, client)
            case "state_changed" if response.state_changed.state in (pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED):
                raise GptloopError(f"Training did not finish: {response.state_changed.reason or 'it was cancelled'}")

    def _show_progress(self, progress: pb.Progress) -> None:
        now_s = time.monotonic()
        if now_s - self.shown_s >= _PROGRESS_INTERVAL_S or progress.step in (1, progress.max_steps):
            self.shown_s = now_s
            speed = "speed not yet known"
            if progress.HasField("eta_seconds"):
                speed = f"{progress.tokens_per_second:,.0f} tokens/s  ETA {format_duration(progress.eta_seconds)}"
            self.say(f"step {progress.step}/{progress.max_steps}  loss {progress.loss:.3f}  {speed}")

    def _read_story(self, version: pb.VersionPublished, client: InferenceClient) -> None:
        self.versions.append(version)
        self.say(f"Version {version.version} is published: {version.bits_per_byte:.3f} bits per byte on held-out text.")
        samples = self._scrape(self.ports.trainer_metrics)
        if samples.get("gptloop_training_tokens_per_second"):
            self.training = samples
        if not version.best:
            return
        self._wait_until_served(version.version, client)
        prompt, story = _PROMPTS[len(self.versions) % len(_PROMPTS)], ""
        self.console.print()
        # Drawn again while it grows, because a terminal would break its lines inside words.
        with Live(console=self.console, transient=True) as live:
            for event in client.generate(
                prompt, temperature=_TEMPERATURE, max_tokens=_STORY_TOKENS, seed=version.version
            ):
                match event:
                    case inference_pb2.Started():
                        self.first_story_s = self.first_story_s or time.monotonic() - self.began_s
                    case inference_pb2.Delta():
                        story += event.text
                    case inference_pb2.Finished():
                        rate = event.generated_tokens / event.total_seconds
                        end = f"({event.generated_tokens} tokens, {rate:,.0f} tokens/s)"
                live.update(self._wrapped(prompt, story))
        self.console.print(self._wrapped(prompt, story))
        self.console.print(f"{_INDENT}{end}\n", style="dim")
        rate = self._scrape(self.ports.inference_metrics)["gptloop_inference_tokens_per_second"]
        self.tokens_per_second = max(self.tokens_per_second, rate)

    def _wrapped(self, prompt: str, story: str) -> Text:
        lines = Text.assemble((prompt, "bold"), story).wrap(self.console, self.console.width - len(_INDENT))
        return Text("\n").join(Text(_INDENT).append_text(line) for line in lines)

    def _wait_until_served(self, version: int, client: InferenceClient) -> None:
        def serves() -> bool:
            with suppress(Unavailable):  # no version serves yet
                return client.model().version >= version
            return False

        if not wait_until(serves, _SWAP_LIMIT_S):
            raise GptloopError(f"Version {version} does not serve {_SWAP_LIMIT_S:.0f} s after it was published.")

    def _check(self) -> None:
        if self.first_story_s is None:
            raise GptloopError("No story was generated.")
        losses = [version.bits_per_byte for version in self.versions]
        if len(losses) < 2 or losses[-1] >= losses[0]:
            raise GptloopError(f"Held-out bits per byte did not fall: {losses}.")
        if not self.training:
            raise GptloopError("The trainer's metrics page never showed a training rate.")

    def _print_tables(self) -> None:
        print_rows(
            ("version", "step", "held-out loss", "bits per byte"),
            [
                (str(each.version), str(each.step), f"{each.validation_loss:.3f}", f"{each.bits_per_byte:.3f}")
                for each in self.versions
            ],
        )
        self.console.print()
        trained = self._scrape(self.ports.trainer_metrics)["gptloop_training_tokens_total"]
        inference = self._scrape(self.ports.inference_metrics)
        generated = inference["gptloop_inference_generated_tokens_total"]
        rate = self.training["gptloop_training_tokens_per_second"]
        memory = [
            (
                f"{kind} memory",
                format_size(self.training[f"gptloop_training_memory_bytes {kind}"]),
                format_size(inference[f"gptloop_inference_memory_bytes {kind}"]),
            )
            for kind in ("active", "peak", "resident")
        ]
        print_rows(
            ("from /metrics", "training", "inference"),
            [
                ("tokens per second", f"{rate:,.0f}", f"{self.tokens_per_second:,.0f}"),
                ("tokens", f"{trained:,.0f}", f"{generated:,.0f}"),
                *memory,
                ("versions published", str(len(self.versions)), ""),
                ("swaps", "", f"{inference['gptloop_inference_swaps_total']:.0f}"),
            ],
        )
        self.console.print()
        self.say(f"Done. The first story came after {self.first_story_s:.0f} s.")

    def _scrape(self, port: int) -> Samples:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            families = text_string_to_metric_families(page.read().decode())
        return Samples(
            (f"{sample.name} {sample.labels['kind']}" if "kind" in sample.labels else sample.name, sample.value)
            for family in families
            for sample in family.samples
        )


def continuation(var: Path, page: str) -> str:
    """Says how to go on with the model that a demo has left in the folder `var`.

    page: where the page is after `gptloop up`.
    """
    command = "gptloop" if shutil.which("gptloop") else _shown(Path(sys.executable).with_name("gptloop"))
    return f"""
The model stays in {_shown(var)} until the next demo; rename the folder to keep it. To go on with it:

    export GPTLOOP_VAR={_shown(var)}
    {command} up
    {command} chat
    {command} train --resume best --set max_steps=800
    {command} down

After `up`, the page is at {page}"""


def _shown(path: Path) -> str:
    """Returns a path as a word for a shell, relative to the current folder if it lies there."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


@app.command()
def demo() -> None:
    """Show the whole loop: train, serve each better version, measure.

    Trains a small model on the built-in stories, in `var/demo` and on free ports. Takes two to four minutes on two
    cores and leaves nothing running.

    Example: gptloop demo
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    console = Console(markup=False, highlight=False)
    directories = Directories(read_directories(os.environ).var / "demo")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("REDIS_URL", "GPTLOOP_REGISTRY") and not name.endswith("_PROBE_PORT")
    }
    ports, later = free_ports(), read_ports(environment)
    stack = Stack(directories, ports, environment, worker_stop_s=_WORKER_STOP_S)
    try:
        # Perhaps its model is trained further there.
        if stack.is_up():
            raise Unavailable(
                f"Something runs in {_shown(directories.var)}, which a demo empties; stop it with "
                f"`GPTLOOP_VAR={_shown(directories.var)} gptloop down` and rename the folder to keep it."
            )
        # An earlier demo may have been killed.
        stack.down()
        for folder in (directories.registry, directories.redis, directories.log):
            shutil.rmtree(folder, ignore_errors=True)
        shown = Demo(console, ports, own_credentials(environment))
        shown.say("Starting Redis, the trainer, its worker and the inference server.")
        try:
            with console.status("") as line:
                outcome = stack.up(line.update)
            shown.say(f"{outcome} The page: {page_url(environment, ports)}")
            shown.run()
        finally:
            # A second Ctrl-C would leave processes behind.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            with console.status("Stopping everything"):
                stack.down()
        console.print(continuation(directories.var, page_url(environment, later)), soft_wrap=True)
    except KeyboardInterrupt:
        console.print("Interrupted; everything that was started is stopped.")
        raise typer.Exit(130) from None
    except (GptloopError, OSError) as error:
        console.print(f"error: {error}\nThe logs are in {directories.log}.", soft_wrap=True)
        raise typer.Exit(1) from None
