"""Reports of evaluations: printed, and written as files."""

import json
from collections.abc import Sequence

from rich.console import Console

from shared.atomic_file import replacing
from shared.errors import NotFound
from shared.registry.registry import Registry
from trainer_service.commands.options import settings
from trainer_service.evaluation.comparison import compare_all
from trainer_service.evaluation.record import Record
from trainer_service.evaluation.report import build_report, summary
from trainer_service.evaluation.views.html import to_html
from trainer_service.evaluation.views.markdown import to_markdown
from trainer_service.evaluation.views.terminal import print_report
from trainer_service.jobs.queue import JobQueue


def evaluation_of(job: str, queue: JobQueue, registry: Registry) -> Record:
    """Returns the record that a finished evaluation job has written; raises `NotFound` if there is none."""
    measured = queue.store.get(job).evaluation
    if measured is None or measured.version is None:
        raise NotFound(f"The job {job} has reported no evaluation; run the same command again.")
    return read_record(measured.version, measured.method_digest, registry)


def read_record(number: int, method_digest: str, registry: Registry) -> Record:
    """Returns a record of a version; raises `NotFound` if there is none, or `CorruptCheckpoint`."""
    return Record.from_json(registry.evaluations.read(number, method_digest))


def print_evaluation(records: Sequence[Record], registry: Registry) -> None:
    """Prints the report, writes it as Markdown and HTML, and prints its JSON in the last line."""
    comparisons = compare_all(records)
    histories = registry.histories
    runs = {record.version.run for record in records} & set(histories.ages_s())
    report = build_report(records, comparisons, [histories.read(run) for run in sorted(runs)])
    print_report(report, Console())
    folder = settings().directories.reports
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join(["evaluation", *(str(record.version.number) for record in records)])
    paths = [folder / f"{name}.md", folder / f"{name}.html"]
    for path, text in zip(paths, (to_markdown(report), to_html(report)), strict=True):
        with replacing(path) as file:
            file.write(text.encode())
    print(*paths, sep="\n")
    print(json.dumps({**summary(records, comparisons), "reports": list(map(str, paths))}))
