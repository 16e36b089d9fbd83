"""The commands of the inference service: talk to a server, choose the version that serves, run a server."""

if __name__ == "__main__":
    # Before the modules that take long to load.
    from shared.service import grpc_logs, interrupts

    interrupts.end_quietly()
    grpc_logs.silence()

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inference_service.settings import Settings, read_settings
from shared.errors import InvalidArgument, shown
from shared.service import cli, logs, traces
from shared.service.lists import JsonOption
from shared.service.settings import reachable_address

if TYPE_CHECKING:
    from inference_service.client.admin_client import AdminClient
    from inference_service.client.client import Parameters
    from shared.device.accelerator import Accelerator

app = cli.new_app("Serve the best version of the registry over gRPC, and talk to such a server.")

Address = Annotated[
    str | None,
    typer.Option(help="The server's host and port. Default: GPTLOOP_INFERENCE_HOST and GPTLOOP_INFERENCE_PORT."),
]
Version = Annotated[int | None, typer.Option(min=1, help="The number of the version that answers.")]
Label = Annotated[
    str | None,
    typer.Option(help="best, latest, stable, run:<name> or pinned:<version>. Default: the serving version."),
]
Number = Annotated[int, typer.Argument(min=1, help="The number of a version.")]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0, max=2**64 - 1, help="With the same version, prompt and format of weights, it gives the same text."
    ),
]
Temperature = Annotated[float | None, typer.Option(help="0 takes the most likely token. Default 0.8.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k most likely tokens; 0: from all.")]
TopP = Annotated[
    float | None, typer.Option(help="Draw from the most likely tokens that together reach this probability.")
]
MinP = Annotated[
    float | None, typer.Option(help="Draw from tokens that have at least this fraction of the highest probability.")
]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1: tokens that were seen become less likely.")]
PresencePenalty = Annotated[
    float | None, typer.Option(help="From -2 to 2; above 0: tokens that were generated become less likely.")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="From -2 to 2; the same, once for each time that the token was generated.")
]
MaxTokens = Annotated[int | None, typer.Option(help="At most this many tokens. Default 256.")]
MinTokens = Annotated[int | None, typer.Option(min=0, help="The end token is not drawn before this many tokens.")]
# A server has at most 1024 slots.
Samples = Annotated[
    int | None, typer.Option("--n", min=1, max=1024, help="How many texts continue each prompt. Default 1.")
]
# The numbers of requests at once that `measure` measures by default.
_MEASURED_ROWS = (1, 8, 32)
Stop = Annotated[list[str] | None, typer.Option(help="End before this text. Repeatable up to 16 times.")]


@app.command()
def serve() -> None:
    """Run the inference server until it is stopped.

    Settings are read from the environment: GPTLOOP_VAR and GPTLOOP_INFERENCE_*.

    Example: GPTLOOP_INFERENCE_PORT=50061 python -m inference_service serve
    """
    import asyncio

    logs.configure("inference", more_ids=traces.ids)
    settings = read_settings(os.environ)
    traces.start("inference")
    device = _prepare(settings)
    # Brings MLX in, so not before the accelerator is prepared.
    from inference_service import server

    if not asyncio.run(server.serve(settings, device)):
        raise typer.Exit(1)


@app.command()
def measure(
    folder: Annotated[Path, typer.Argument(help="The folder of a version in the registry.")],
    rows: Annotated[
        list[int] | None, typer.Option(min=1, max=1024, help="Requests at once. Repeatable. Default: 1, 8 and 32.")
    ] = None,
) -> None:
    """Measure how fast this machine serves a version, and the memory that it takes.

    The engine is the server's, with the same settings, and has a slot for each request. The last line of the output is
    JSON. If the output is a pipe, the process ends when nobody reads it any more.

    Example: python -m inference_service measure var/registry/versions/7 --rows 1 --rows 8
    """
    import json
    from dataclasses import asdict

    from shared.service.reader import end_without_reader

    end_without_reader()
    settings = read_settings(os.environ)
    device = _prepare(settings)
    # Brings MLX in, so not before the accelerator is prepared.
    from inference_service.measure import measure as measure_version

    measured = measure_version(folder, rows or _MEASURED_ROWS, settings, device, typer.echo)
    typer.echo(json.dumps(asdict(measured)))


@app.command()
def info() -> None:
    """Show the device, its memory, and its threads or its speed.

    Example: gptloop info
    """
    from shared.device import accelerator

    directories = read_settings(os.environ).directories
    typer.echo(accelerator.report(accelerator.prepare(directories.cache / "inference")))


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option(help="The text to continue; empty: a new text from its start.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with one prompt on each line; all are continued at the same time.")
    ] = None,
    version: Version = None,
    label: Label = None,
    seed: Seed = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    max_tokens: MaxTokens = None,
    min_tokens: MinTokens = None,
    stop: Stop = None,
    n: Samples = None,
    address: Address = None,
) -> None:
    """Continue a prompt, or every line of a file.

    The prompt and its continuation go to standard output, everything else to standard error.

    \b
    Examples:
      gptloop generate --prompt "Once upon a time" --temperature 0.7
      gptloop generate --prompts prompts.txt --max-tokens 100 > stories.txt

    \b
    The same text again:
      gptloop generate --prompt "Once" --version 7 --seed 1234
    """
    if (prompt is None) == (prompts is None):
        raise InvalidArgument("Give a prompt with --prompt or --prompts; with make, as PROMPT=… or PROMPTS=<file>.")
    parameters: Parameters = {
        "version": version,
        "label": label,
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "stop": stop,
        "n": n,
    }
    from inference_service.client.client import InferenceClient
    from inference_service.terminal import Terminal
    from shared.service.access.credentials import read_credentials

    with InferenceClient(address or _default_address(), credentials=read_credentials(os.environ)) as client:
        if prompts is None:
            Terminal(client).generate(prompt or "", parameters)
        else:
            Terminal(client).generate_all(_read_prompts(prompts), parameters)


@app.command()
def chat(
    version: Version = None,
    label: Label = None,
    seed: Seed = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    address: Address = None,
) -> None:
    """Continue what you type, line by line.

    /help lists the commands that you can type there. On a terminal, the arrow keys bring earlier lines back, and Ctrl-R
    finds them; they are kept in the folder of state, in a file that only you can read.

    Example: gptloop chat --temperature 0.5
    """
    parameters: Parameters = {
        "version": version,
        "label": label,
        "seed": seed,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
    }
    from inference_service.chat import Chat
    from inference_service.client.client import InferenceClient
    from shared.service.access.credentials import read_credentials

    with InferenceClient(address or _default_address(), credentials=read_credentials(os.environ)) as client:
        Chat(client, parameters, read_settings(os.environ).directories.chat_history).run()


@app.command()
def versions(address: Address = None, as_json: JsonOption = False) -> None:
    """List the versions as the server sees them.

    \b
    available: in the registry, not in memory.
    waiting: is loaded as soon as there is room in memory.
    loading: its files are read and examined.
    resident: in memory, for requests that name it.
    serving: in memory, for requests that name no version.
    refused: must not serve; a line below the table says why.

    \b
    streams: the number of requests that it answers now; held, if load keeps it.
    held-out loss: nats per token, as training measured it on all held-out text.
    as served: the difference on this server, measured on a part of that text.
    weights: the format in which this server computes with them.
    policy: the label whose version is to serve.

    Example: gptloop versions
    """
    from inference_service.operator_terminal import print_versions

    with _admin(address) as client:
        print_versions(client.versions(), as_json)


@app.command()
def promote(version: Number, address: Address = None) -> None:
    """Make a version the stable one.

    The label stable names it from then on. It serves if that label is the policy.

    Example: gptloop promote 7
    """
    from inference_service.operator_terminal import describe

    with _admin(address) as client:
        typer.echo(f"{describe(client.promote(version))} is the stable one now.")


@app.command()
def pin(version: Number, address: Address = None) -> None:
    """Serve one version, whatever training publishes.

    It serves until follow names a label again. Until it is in memory, the version before it serves.

    Example: gptloop pin 7
    """
    _set_policy(f"pinned:{version}", address)


@app.command()
def follow(
    label: Annotated[str, typer.Argument(help="best, latest, stable or run:<name>.")], address: Address = None
) -> None:
    """Serve the version of a label, now and when it changes.

    \b
    best: the fewest bits per byte of all versions that were not refused.
    latest: the version that was published last.
    stable: the version that promote named.
    run:<name>: the best version of a run.

    Example: gptloop follow best
    """
    _set_policy(label, address)


@app.command()
def rollback(
    version: Annotated[
        int | None, typer.Argument(min=1, help="The version to serve and pin. Default: the next one of the policy.")
    ] = None,
    address: Address = None,
) -> None:
    """Refuse the serving version, so that another one serves.

    The other version serves at once if it is in memory. If it cannot be loaded, or the decision cannot be written, the
    serving version stays. Streams on the refused version run to their end. Only load gives it another chance.

    \b
    Examples:
      gptloop rollback
      gptloop rollback 7
    """
    from inference_service.operator_terminal import describe_rollback

    with _admin(address) as client:
        typer.echo(describe_rollback(client.roll_back(version)))


@app.command()
def load(version: Number, address: Address = None) -> None:
    """Load a version into memory, so that it answers at once.

    A refused version is examined again. The version stays until unload; without streams, it also leaves when another
    one needs its room.

    Example: gptloop load 7
    """
    from inference_service.operator_terminal import describe_loaded

    with _admin(address) as client:
        typer.echo(describe_loaded(client.load(version)))


@app.command()
def unload(version: Number, address: Address = None) -> None:
    """Remove a version from memory.

    It leaves when its last stream has ended.

    Example: gptloop unload 7
    """
    from inference_service.operator_terminal import describe_unloaded

    with _admin(address) as client:
        typer.echo(describe_unloaded(client.unload(version)))


def _prepare(settings: Settings) -> "Accelerator":
    """Prepares the accelerator for the engine."""
    from shared.device import accelerator

    # The threads of a step wait for one another only briefly, but between steps they would keep cores busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return accelerator.prepare(settings.directories.cache / "inference")


def _set_policy(label: str, address: str | None) -> None:
    from inference_service.operator_terminal import describe_policy

    with _admin(address) as client:
        client.set_policy(label)
        typer.echo(describe_policy(client.versions()))


def _admin(address: str | None) -> "AdminClient":
    from inference_service.client.admin_client import AdminClient
    from shared.service.access.credentials import read_credentials

    return AdminClient(address or _default_address(), read_credentials(os.environ))


def _default_address() -> str:
    settings = read_settings(os.environ)
    return reachable_address(settings.host, settings.port)


def _read_prompts(path: Path) -> list[str]:
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InvalidArgument(f"The prompts in {shown(str(path))} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"The prompts in {shown(str(path))} are not UTF-8: {error.reason} at byte {error.start}."
        ) from None
    if not prompts:
        raise InvalidArgument(f"{shown(str(path))} holds no prompt: it needs one on each line.")
    return prompts


if __name__ == "__main__":
    cli.run(app)
