"""Compares figures of lm-evaluation-harness with those of `gptloop eval`: python -m tests.benchmarks.lm_eval --help"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from shared.device.accelerator import prepare
from shared.registry.registry import Registry
from shared.service import cli
from shared.service.settings import Directories, read_directories
from tests.benchmarks.checkpoint import Checkpoint
from tests.benchmarks.server import Server
from tests.registries import disk_registry, version_folder
from trainer_service.commands.options import version_number
from trainer_service.text.stories import validation_stories

TOLERANCE_BITS_PER_BYTE = 1e-3
STORIES = 40
PAIRS = 200
_SLOTS = 8

# Like lm-evaluation-harness's own tasks for WikiText and BLiMP, but of local files. No blank stands before a sentence.
_TASKS: dict[str, dict[str, object]] = {
    "gptloop_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
    "gptloop_pairs": {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Figures:
    """Bits per byte of a text, and the share of pairs whose right sentence is preferred."""

    bits_per_byte: float
    accuracy: float


def write_material(folder: Path) -> None:
    """Writes held-out stories as one document, and pairs of a sentence and the same one with two words exchanged."""
    text = "\n\n".join(islice(validation_stories(), STORIES))
    _write_lines(folder / "gptloop_text.jsonl", [{"text": text}])
    _write_lines(folder / "gptloop_pairs.jsonl", list(islice(_pairs(text), PAIRS)))
    for name, task in _TASKS.items():
        whole = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "test_split": "test",
            **task,
        }
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(whole))


def _pairs(text: str) -> Iterator[dict[str, str]]:
    seen = set[str]()
    for sentence in text.replace("\n", " ").split(". "):
        words = sentence.split()
        if len(words) < 6 or '"' in sentence or sentence in seen:
            continue
        seen.add(sentence)
        first = len(words) // 2
        words[first], words[first + 1] = words[first + 1], words[first]
        if (bad := " ".join(words)) != " ".join(sentence.split()):
            yield {"sentence_good": " ".join(sentence.split()), "sentence_bad": bad}


def _write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def measure_theirs(python: Path, url: str, version: int, exported: Path, context: int, folder: Path) -> Figures:
    """Runs lm-evaluation-harness against a server; raises `SystemExit` with its output if it fails."""
    arguments = {
        "model": version,
        "base_url": f"{url}/v1/completions",
        "tokenizer": exported,
        "tokenizer_backend": "huggingface",
        "max_length": context,
        "num_concurrent": 4,
    }
    command = [
        *(str(python), "-m", "lm_eval", "run", "--model", "local-completions"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--tasks", ",".join(_TASKS), "--include_path", str(folder), "--output_path", str(folder / "results")),
        *("--batch_size", "2"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr}lm-eval ended with exit code {done.returncode}.")
    (results,) = (folder / "results").rglob("results_*.json")
    found: Mapping[str, Mapping[str, float]] = json.loads(results.read_text())["results"]
    return Figures(found["gptloop_text"]["bits_per_byte,none"], found["gptloop_pairs"]["acc,none"])


def measure_ours(number: int, registry: Registry, folder: Path, threads: int) -> tuple[Figures, Figures]:
    """Returns the figures in the windows of lm-evaluation-harness, and in those of `gptloop eval`."""
    # Brings MLX in, so not before the accelerator is prepared.
    import numpy as np

    from shared import version_format
    from shared.gpt.config import GPTConfig
    from trainer_service.evaluation.minimal_pairs import measure_pairs
    from trainer_service.evaluation.text_quality import measure_text
    from trainer_service.training.workers import Workers

    source = version_folder(registry, number)
    config = GPTConfig.from_dict(registry.version(number).model)
    model, tokenizer = version_format.read_model(source, config), version_format.read_tokenizer(source)
    tokens = np.array(tokenizer.encode(json.loads((folder / "gptloop_text.jsonl").read_text())["text"]), np.uint16)
    context = config.context_length
    with Workers(threads) as workers:
        pairs = measure_pairs(model, tokenizer, folder / "gptloop_pairs.jsonl", workers, lambda _: None)
        theirs, ours = (
            measure_text(
                model, tokens, tokenizer, window=window, stride=stride, workers=workers, report=lambda _: None
            ).bits_per_byte
            # lm-evaluation-harness leaves room for a generated token, and one more; its windows do not overlap.
            for window, stride in ((context - 2, context - 2), (context, context // 2))
        )
    return Figures(theirs, pairs.accuracy), Figures(ours, pairs.accuracy)


@app.command()
def compare(
    version: Annotated[str, typer.Argument(help="A version in the registry of GPTLOOP_VAR: a number or a label.")],
    python: Annotated[Path, typer.Option(help="A Python that has lm-eval[api] and transformers.")] = Path(
        sys.executable
    ),
) -> None:
    """Let lm-evaluation-harness measure a version through the HTTP API, and compare with what gptloop measures.

    The exit code is 1 if bits per byte differ by more than 0.001, or if the accuracies differ at all.

    Example: GPTLOOP_VAR=var/demo python -m tests.benchmarks.lm_eval best --python /tmp/lm-eval/bin/python
    """
    directories = read_directories(os.environ)
    device = prepare(directories.cache / "trainer")
    from trainer_service.huggingface.interchange import export_version

    registry = disk_registry(directories.registry)
    number = version_number(version, registry)
    context = int(registry.version(number).model["context_length"])
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_material(folder)
        export_version(number, folder / "exported", registry)
        with _serving(directories, folder) as server:
            theirs = measure_theirs(python, server.endpoint.url, number, folder / "exported", context, folder)
        same, usual = measure_ours(number, registry, folder, device.threads)
    print(
        f"version {number}, {STORIES} held-out stories, {PAIRS} pairs of sentences\n"
        f"lm-evaluation-harness         {theirs.bits_per_byte:.5f} bits per byte, accuracy {theirs.accuracy:.3f}\n"
        f"gptloop, in the same windows  {same.bits_per_byte:.5f} bits per byte, accuracy {same.accuracy:.3f}\n"
        f"gptloop eval, windows overlap {usual.bits_per_byte:.5f} bits per byte"
    )
    differs = abs(theirs.bits_per_byte - same.bits_per_byte) > TOLERANCE_BITS_PER_BYTE
    raise typer.Exit(int(differs or theirs.accuracy != same.accuracy))


def _serving(directories: Directories, folder: Path) -> Server:
    (folder / "var").symlink_to(directories.var)
    return Server(Checkpoint(folder), slots=_SLOTS, threads=1, log=folder / "server.log")


if __name__ == "__main__":
    cli.run(app)
