"""Lists every command of `gptloop` by topic; the module behind a command loads when the command runs."""

from importlib import import_module, metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

_STACK = "deploy.stack"
_JOBS = "trainer_service.commands.jobs"
_SWEEP = "trainer_service.commands.sweep"
_DISTILL = "trainer_service.commands.distill"
_EVALUATION = "trainer_service.commands.evaluation"
_STORIES = "trainer_service.commands.stories"
_HISTORY = "trainer_service.commands.history"
_REGISTRY = "trainer_service.commands.registry"
_BACKUP = "trainer_service.commands.backup"
_INFERENCE = "inference_service.__main__"


class Command(TyperCommand):
    """A command that loads when it runs, from the app of a module; `original` is its name there, if it differs."""

    def __init__(self, name: str, summary: str, module: str, original: str = "") -> None:
        super().__init__(name, short_help=summary)
        self._module = module
        self._original = original or name

    def load(self) -> Any:
        """Returns the command itself."""
        return typer.main.get_group(import_module(self._module).app).commands[self._original]

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Lets the command itself read its arguments and run."""
        return self.load().make_context(*arguments, **options)


class Topic:
    """Commands that belong together, with an example of one of them."""

    def __init__(self, title: str, example: str, *commands: Command) -> None:
        self.title = title
        self.example = example
        self.commands = commands


TOPICS = (
    Topic(
        "Start and stop",
        "gptloop up",
        Command("demo", "Show the whole loop: train, serve each better version, measure.", "deploy.demo"),
        Command("up", "Start every process and return when all of them are healthy.", _STACK),
        Command("status", "Show every process and its health.", _STACK),
        Command("down", "Stop every process and return when all of them are gone.", _STACK),
        Command("service", "Let launchd or systemd keep the processes running.", "deploy.service"),
        Command("info", "Show the device, its memory, and its threads or its speed.", _INFERENCE),
    ),
    Topic(
        "Train",
        'gptloop train --preset small --dataset stories.txt --set "max_steps=500"',
        Command("train", "Queue a training job and follow it.", _JOBS),
        Command("prepare", "Prepare a data set and show a sample of it.", _JOBS, "data"),
        Command("eval", "Evaluate versions on the whole held-out text and compare them.", _EVALUATION, "evaluate"),
        Command("sweep", "Try a grid of training values, and stop the worst candidates early.", _SWEEP),
        Command("distill", "Teach a model, and judge it beside a control that had no teacher.", _DISTILL),
        Command("stories", "Pay a large teacher for stories to learn from.", _STORIES),
        Command("jobs", "List the jobs, the newest first.", _JOBS),
        Command("watch", "Follow a job from its first event until it ends.", _JOBS),
        Command("cancel", "Ask a job to end.", _JOBS),
        Command("runs", "List the runs and the values in which they differ.", _JOBS),
        Command("history", "Show what a run has reported, or export it for plots.", _HISTORY),
    ),
    Topic(
        "Generate text",
        'gptloop generate --prompt "Once upon a time" --temperature 0.7',
        Command("generate", "Continue a prompt, or every line of a file.", _INFERENCE),
        Command("chat", "Continue what you type, line by line.", _INFERENCE),
    ),
    Topic(
        "Choose the version that serves",
        "gptloop pin 7",
        Command("versions", "List the versions as the server sees them.", _INFERENCE),
        Command("follow", "Serve the version of a label, now and when it changes.", _INFERENCE),
        Command("pin", "Serve one version, whatever training publishes.", _INFERENCE),
        Command("promote", "Make a version the stable one.", _INFERENCE),
        Command("rollback", "Refuse the serving version, so that another one serves.", _INFERENCE),
        Command("load", "Load a version into memory, so that it answers at once.", _INFERENCE),
        Command("unload", "Remove a version from memory.", _INFERENCE),
    ),
    Topic(
        "Keep the registry",
        "gptloop prune --dry-run",
        Command("checkpoints", "List the versions in the registry, the oldest first.", _REGISTRY),
        Command(
            "verify",
            "Compare every file of every version and state, and of the teachers of runs, with its hash.",
            _REGISTRY,
        ),
        Command("prune", "Remove the versions and states that no rule keeps.", _REGISTRY),
        Command("disk", "Show how much disk space each kind of file takes.", _REGISTRY),
        Command("backup", "Write the registry, the jobs and the stories that were paid for into one file.", _BACKUP),
        Command("restore", "Restore a backup into a new folder of state and an empty Redis.", _BACKUP),
        Command("import", "Make a version of a GPT-2 folder in Hugging Face's layout.", _REGISTRY),
        Command("export", "Write a version as a GPT-2 folder in Hugging Face's layout.", _REGISTRY),
    ),
)

COMMANDS = {str(command.name): command for topic in TOPICS for command in topic.commands}

_HELP = """Train a GPT with MLX and serve its best version while training goes on.

Start with `gptloop demo`, or with these three commands:

\b
  gptloop up
  gptloop train
  gptloop generate --prompt "Once upon a time"

`gptloop COMMAND --help` explains a command. Paths that you type are relative to your folder. State is in the folder
`var` of the project, or in the folder that GPTLOOP_VAR names.
"""
_EPILOG = """Process managers start single processes:

\b
  python -m trainer_service serve | work | rank | redis
  python -m inference_service serve
"""


class CommandGroup(TyperGroup):
    """Lists the commands by topic."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "commands": COMMANDS})

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes a section for each topic."""
        width = max(map(len, COMMANDS))
        for topic in TOPICS:
            with formatter.section(topic.title):
                formatter.write_dl([(str(each.name).ljust(width), str(each.short_help)) for each in topic.commands])
                formatter.write(f"\n{'':{formatter.current_indent}}Example: {topic.example}\n")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"gptloop {metadata.version('gptloop')}")
        raise typer.Exit


app = typer.Typer(
    cls=CommandGroup,
    help=_HELP,
    epilog=_EPILOG,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
