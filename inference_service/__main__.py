"""The commands of the inference service: `python -m inference_service --help`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inference_service.settings import read_settings
from shared import cli, logs
from shared.errors import InvalidArgument

if TYPE_CHECKING:
    from inference_service.client import Parameters

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serves the best version of the registry over gRPC, and talks to such a server.",
)

Address = Annotated[
    str | None, typer.Option(help="Where the server is; otherwise as GPTLOOP_INFERENCE_HOST and _PORT say.")
]
Version = Annotated[int | None, typer.Option(min=1, help="The number of the version that answers.")]
Label = Annotated[str | None, typer.Option(help="best or latest; without a choice the serving version answers.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**64 - 1, help="With the same version and prompt: the same text.")
]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token. Default 0.8.")]
TopK = Annotated[int | None, typer.Option(help="Only the k likeliest tokens; 0: all.")]
TopP = Annotated[float | None, typer.Option(help="Only the likeliest tokens that together reach this probability.")]
MinP = Annotated[float | None, typer.Option(help="Only tokens at least this fraction as likely as the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 makes tokens that were seen less likely.")]
MaxTokens = Annotated[int | None, typer.Option(help="At most this many tokens. Default 256.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; can be given up to 16 times.")]


@app.command()
def serve() -> None:
    """Serves until it is stopped. Settings are read from the environment: GPTLOOP_VAR and GPTLOOP_INFERENCE_*.

    Example: GPTLOOP_INFERENCE_PORT=50061 python -m inference_service serve
    """
    import asyncio

    from shared import accelerator

    settings = read_settings(os.environ)
    logs.configure("inference")
    # Training runs on the same cores, and BLAS threads that wait there for one another make a step ten times slower.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    accelerator.prepare(settings.directories.cache / "inference")
    # Brings MLX in, so not before the accelerator is prepared.
    from inference_service import server

    if not asyncio.run(server.serve(settings)):
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """Says what the model computes on: device, backend, memory, speed."""
    from shared import accelerator

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
    max_tokens: MaxTokens = None,
    stop: Stop = None,
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
        "max_tokens": max_tokens,
        "stop": stop,
    }
    from inference_service.client import InferenceClient
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
    from inference_service.client import InferenceClient
    from inference_service.terminal import Terminal

    with InferenceClient(address or _default_address()) as client:
        Terminal(client).chat(parameters)


def _default_address() -> str:
    settings = read_settings(os.environ)
    return f"{settings.host}:{settings.port}"


def _read_prompts(path: Path) -> list[str]:
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InvalidArgument(f"The prompts in {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"The prompts in {path} are not UTF-8: {error.reason} at byte {error.start}.") from None
    if not prompts:
        raise InvalidArgument(f"{path} holds no prompt: it needs one a line.")
    return prompts


if __name__ == "__main__":
    try:
        cli.run(app)
    except KeyboardInterrupt:
        sys.exit(130)
