"""The commands of the inference service: `python -m inference_service --help`."""

if __name__ == "__main__":
    # Before the modules that take long to load.
    from shared.service import interrupts

    interrupts.end_quietly()

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inference_service.settings import prefill_tokens_on, read_settings
from shared.errors import InvalidArgument, shown
from shared.service import cli, logs
from shared.service.lists import JsonOption
from shared.service.settings import to_address

if TYPE_CHECKING:
    from inference_service.client.admin_client import AdminClient
    from inference_service.client.client import Parameters

app = cli.new_app("Serves the best version of the registry over gRPC, and talks to such a server.")

Address = Annotated[
    str | None, typer.Option(help="Where the server is; otherwise as GPTLOOP_INFERENCE_HOST and _PORT say.")
]
Version = Annotated[int | None, typer.Option(min=1, help="The number of the version that answers.")]
Label = Annotated[
    str | None, typer.Option(help="best, latest, stable, run:<name> or pinned:<version>; else what serves.")
]
Number = Annotated[int, typer.Argument(min=1, help="The number of a version.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**64 - 1, help="With the same version and prompt: the same text.")
]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token. Default 0.8.")]
TopK = Annotated[int | None, typer.Option(help="Only the k likeliest tokens; 0: all.")]
TopP = Annotated[float | None, typer.Option(help="Only the likeliest tokens that together reach this probability.")]
MinP = Annotated[float | None, typer.Option(help="Only tokens at least this fraction as likely as the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 makes tokens that were seen less likely.")]
PresencePenalty = Annotated[
    float | None, typer.Option(help="From -2 to 2; above 0 makes tokens that were generated less likely.")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="From -2 to 2; the same, once for each time that a token was generated.")
]
MaxTokens = Annotated[int | None, typer.Option(help="At most this many tokens. Default 256.")]
MinTokens = Annotated[int | None, typer.Option(min=0, help="The end token is not drawn before so many tokens.")]
# A server has at most 1024 slots.
Samples = Annotated[
    int | None, typer.Option("--n", min=1, max=1024, help="How many texts continue each prompt. Default 1.")
]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; can be given up to 16 times.")]


@app.command()
def serve() -> None:
    """Serves until it is stopped. Settings are read from the environment: GPTLOOP_VAR and GPTLOOP_INFERENCE_*.

    Example: GPTLOOP_INFERENCE_PORT=50061 python -m inference_service serve
    """
    import asyncio

    from shared.device import accelerator

    settings = read_settings(os.environ)
    logs.configure("inference")
    # Training runs on the same cores, and BLAS threads that wait there for one another make a step ten times slower.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # The threads of a step wait for one another only for moments, but between steps they would keep cores busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    device = accelerator.prepare(settings.directories.cache / "inference")
    # Brings MLX in, so not before the accelerator is prepared.
    from inference_service import server

    prefill_tokens = settings.prefill_tokens or prefill_tokens_on(device.backend)
    if not asyncio.run(server.serve(settings, device.backend, prefill_tokens)):
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """Says what the model computes on: device, backend, memory, speed."""
    from shared.device import accelerator

    directories = read_settings(os.environ).directories
    typer.echo(accelerator.report(accelerator.prepare(directories.cache / "inference")))


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Option(help="The beginning that is continued; empty: a text from its very start.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with one prompt a line; all are continued together.")
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
    """Continues a prompt, or every line of a file. The text, its prompt first, goes to standard output.

    Example: python -m inference_service generate --prompt "Once upon a time" --temperature 0.7

    Example: python -m inference_service generate --prompts prompts.txt --max-tokens 100 > stories.txt

    Example, the same text again: python -m inference_service generate --prompt "Once" --version 7 --seed 1234
    """
    if (prompt is None) == (prompts is None):
        raise InvalidArgument("Give a prompt, as PROMPT=… or PROMPTS=<file> to make, or as --prompt or --prompts here.")
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

    with InferenceClient(address or _default_address()) as client:
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
    max_tokens: MaxTokens = None,
    address: Address = None,
) -> None:
    """Continues what you type, line by line; /help there says more.

    Example: python -m inference_service chat --temperature 0.5
    """
    parameters: Parameters = {
        "version": version,
        "label": label,
        "seed": seed,
        "temperature": temperature,
        "max_tokens": max_tokens,
    }
    from inference_service.client.client import InferenceClient
    from inference_service.terminal import Terminal

    with InferenceClient(address or _default_address()) as client:
        Terminal(client).chat(parameters)


@app.command()
def versions(address: Address = None, as_json: JsonOption = False) -> None:
    """Lists every version: whether it serves, is in memory or was refused, and why.

    \b
    available: in the registry, not in memory.
    waiting: to be loaded once there is room in memory.
    loading: its files are read, and it is examined.
    resident: in memory, for those who name it.
    serving: in memory, for all who name none.
    refused: must not serve; a line below the table says why.

    \b
    streams: requests that it answers now; held, where load keeps it.
    held-out loss: nats a token, as training measured it on all held-out text.
    as served: by how much the loss on some of it differs on this server.
    policy: the label whose version is to serve.

    Example: python -m inference_service versions
    """
    from inference_service.operator_terminal import print_versions

    with _admin(address) as client:
        print_versions(client.versions(), as_json)


@app.command()
def promote(version: Number, address: Address = None) -> None:
    """Makes a version the stable one, which the label stable names; it serves where that is the policy.

    Example: python -m inference_service promote 7
    """
    from inference_service.operator_terminal import describe

    with _admin(address) as client:
        typer.echo(f"{describe(client.promote(version))} is the stable one now.")


@app.command()
def pin(version: Number, address: Address = None) -> None:
    """Lets a version serve, whatever training publishes, until follow names a label again.

    The one before it serves until it is in memory.

    Example: python -m inference_service pin 7
    """
    _set_policy(f"pinned:{version}", address)


@app.command()
def follow(
    label: Annotated[str, typer.Argument(help="best, latest, stable or run:<name>.")], address: Address = None
) -> None:
    """Lets the version of a label serve, and the next one as soon as the label names it.

    \b
    best: the fewest bits per byte of all that were not refused.
    latest: published last.
    stable: what promote made so.
    run:<name>: the best one of a run.

    Example: python -m inference_service follow best
    """
    _set_policy(label, address)


@app.command()
def rollback(
    version: Annotated[
        int | None, typer.Argument(min=1, help="The version to serve, which is pinned then; else the policy's next.")
    ] = None,
    address: Address = None,
) -> None:
    """Refuses the serving version, so that another one serves: at once where it is in memory.

    If it cannot be loaded, or the decision cannot be written, the serving one stays.
    Streams that run on the refused version go on to their end.
    Only load gives it another chance.

    Example: python -m inference_service rollback

    Example, to a version of your choice: python -m inference_service rollback 7
    """
    from inference_service.operator_terminal import describe_rollback

    with _admin(address) as client:
        typer.echo(describe_rollback(client.roll_back(version)))


@app.command()
def load(version: Number, address: Address = None) -> None:
    """Brings a version into memory, so that it answers at once; one that was refused is examined again.

    It stays until unload, or without streams until another one needs its room.

    Example: python -m inference_service load 7
    """
    from inference_service.operator_terminal import describe_loaded

    with _admin(address) as client:
        typer.echo(describe_loaded(client.load(version)))


@app.command()
def unload(version: Number, address: Address = None) -> None:
    """Lets a loaded version go, once its last stream has ended.

    Example: python -m inference_service unload 7
    """
    from inference_service.operator_terminal import describe_unloaded

    with _admin(address) as client:
        typer.echo(describe_unloaded(client.unload(version)))


def _set_policy(label: str, address: str | None) -> None:
    from inference_service.operator_terminal import describe_policy

    with _admin(address) as client:
        client.set_policy(label)
        typer.echo(describe_policy(client.versions()))


def _admin(address: str | None) -> "AdminClient":
    from inference_service.client.admin_client import AdminClient

    return AdminClient(address or _default_address(), read_settings(os.environ).admin_token)


def _default_address() -> str:
    settings = read_settings(os.environ)
    return to_address(settings.host, settings.port)


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
        raise InvalidArgument(f"{shown(str(path))} holds no prompt: it needs one a line.")
    return prompts


if __name__ == "__main__":
    cli.run(app)
