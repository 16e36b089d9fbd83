"""What the registry reads of a record as the evaluation writes it."""

from dataclasses import replace
from pathlib import Path

from shared.registry.evaluations import Figures
from tests.fakes import publish_tiny_version
from tests.registries import disk_registry
from trainer_service.evaluation.method import HeldOutText, Method
from trainer_service.evaluation.record import Interval, Record, Subject, TextQuality


def test_the_registry_reads_the_figures_of_a_record(tmp_path: Path) -> None:
    registry = disk_registry(tmp_path)
    version = publish_tiny_version(registry, 1.0)
    method = Method(
        text=HeldOutText("stories, held out", "r1", tokens=3000, text_bytes=9000, documents=2, digest="d"),
        tokenizer="t",
        window=64,
        stride=32,
        precision="float32",
        device="cpu",
        prompts=2,
        prompt_tokens=8,
        seeds=(1, 2),
        max_tokens=20,
        temperature=0.8,
    )
    subject = Subject(version.version, version.run, version.step, version.digest, version.parameters)
    started = Record(subject, method)
    registry.evaluations.write(version.version, method.digest, started.to_json())
    assert registry.evaluations.of([version]) == {}
    quality = TextQuality(
        nats_per_token=2.5,
        perplexity=12.2,
        bits_per_byte=1.25,
        interval=Interval(2.4, 2.6),
        unit="document",
        unit_nats=(5000.0, 2500.0),
        unit_tokens=(2000, 1000),
        positions=(),
    )
    measured = replace(started, text=quality, measured_at={"text": 100.0})
    registry.evaluations.write(version.version, method.digest, measured.to_json())
    figures = Figures(method.digest, version.digest, 3000, 2.5, 2.4, 2.6, 12.2, 1.25, 100.0)
    assert registry.evaluations.of([version]) == {version.version: [figures]}
