import errno
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import DataError, FailedPrecondition, GptloopError, ResourceExhausted
from shared.gpt.tokenizer import train_bpe
from tests.waiting import HANG_S
from trainer_service.presets import PRESETS
from trainer_service.text import bpe_process, file_bytes, tokens
from trainer_service.text.corpus import DatasetSpec
from trainer_service.text.shards import HEADER_BYTES
from trainer_service.text.stories import generate_stories
from trainer_service.text.tokens import PreparedData, Stage, prepare
from trainer_service.training.config import TrainingConfig

pytestmark = pytest.mark.slow

MARKER = "<|endoftext|>"
STORIES = list(generate_stories(3, range(200)))
CONFIG = replace(
    PRESETS["demo"], vocabulary_size=512, context_length=32, max_steps=10, batch_size=8, evaluation_windows=4
)
TRAIN_LIMIT = 10 * 8 * 33

Reported = tuple[Stage, float | None]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text(MARKER.join(STORIES))
    return path


def run(
    text: Path, config: TrainingConfig = CONFIG, seen: list[Reported] | None = None, validation: str = ""
) -> PreparedData:
    def report(stage: Stage, fraction: float | None) -> None:
        if seen is not None:
            seen.append((stage, fraction))

    spec = DatasetSpec((str(text),), (validation,) if validation else ())
    return prepare(spec, config, text.parent / "data", report)


def files(text: Path, pattern: str) -> list[Path]:
    return sorted((text.parent / "data").rglob(pattern))


def test_documents_end_in_the_end_token_and_decode_to_the_text(text: Path) -> None:
    data = run(text, replace(CONFIG, max_train_tokens=10**6, max_validation_tokens=10**6))
    decoded = []
    for split in (data.train, data.validation):
        ends = np.flatnonzero(split == data.tokenizer.end_token)
        documents = np.split(split, ends + 1)
        assert documents.pop().size == 0
        decoded.append([data.tokenizer.decode(document.tolist()) for document in documents])
        assert split.dtype == np.uint16
    train, held_out = decoded
    assert train == [story for story in STORIES if story not in held_out]
    assert held_out == [story for story in STORIES if story not in train]
    assert len(held_out) == 10


def test_only_the_text_that_the_run_reads_is_tokenised(text: Path) -> None:
    data = run(text)
    assert data.train.size == TRAIN_LIMIT
    assert data.validation.size == 4 * 32 + 1
    (train,) = files(text, "train.bin")
    assert train.stat().st_size == HEADER_BYTES + 2 * TRAIN_LIMIT
    data = run(text, replace(CONFIG, max_train_tokens=500, max_validation_tokens=99))
    assert (data.train.size, data.validation.size) == (500, 99)


def test_existing_shards_are_used_and_cut_to_the_limit(text: Path) -> None:
    first = run(text)
    before = {path: path.stat().st_mtime_ns for path in files(text, "*.*")}
    seen: list[Reported] = []
    again = run(text, seen=seen)
    less = run(text, replace(CONFIG, max_steps=3), seen)
    assert {stage for stage, _ in seen} == {Stage.OPEN}
    assert {path: path.stat().st_mtime_ns for path in files(text, "*.*")} == before
    assert np.array_equal(again.train, first.train)
    assert np.array_equal(less.train, first.train[: 3 * 8 * 33])


def test_a_longer_run_extends_the_same_tokens(text: Path) -> None:
    first = np.array(run(text).train)
    longer = run(text, replace(CONFIG, max_steps=20))
    assert longer.train.size == 2 * TRAIN_LIMIT
    assert np.array_equal(longer.train[:TRAIN_LIMIT], first)


def test_a_shard_with_the_whole_split_serves_any_limit(text: Path) -> None:
    whole = run(text, replace(CONFIG, max_steps=10**6))
    seen: list[Reported] = []
    assert run(text, replace(CONFIG, max_steps=10**7), seen).train.size == whole.train.size
    assert {stage for stage, _ in seen} == {Stage.OPEN}


def test_changed_text_is_prepared_again(text: Path) -> None:
    first = run(text)
    text.write_text(MARKER.join(reversed(STORIES)))
    second = run(text)
    assert first.revision != second.revision
    assert not np.array_equal(first.train, second.train)
    assert len(files(text, "train.bin")) == 2


@pytest.mark.parametrize("damage", ["cut", "grown", "empty", "header", "magic"])
def test_a_damaged_shard_is_written_again(text: Path, damage: str) -> None:
    expected = np.array(run(text).train)
    (path,) = files(text, "train.bin")
    content = path.read_bytes()
    damaged = {
        "cut": content[:-1],
        "grown": content + b"12",
        "empty": b"",
        "header": b"x" * HEADER_BYTES + content[HEADER_BYTES:],
        "magic": content.replace(b"gptloop-tokens", b"gptloop-tokenz", 1),
    }
    path.write_bytes(damaged[damage])
    assert np.array_equal(run(text).train, expected)
    assert path.read_bytes() == content


def test_a_damaged_tokenizer_is_trained_again(text: Path) -> None:
    digest = run(text).tokenizer.digest
    (path,) = files(text, "*.json")
    path.write_text("{")
    assert run(text).tokenizer.digest == digest


def test_the_header_describes_the_shard(text: Path) -> None:
    data = run(text)
    (path,) = files(text, "validation.bin")
    header = json.loads(path.read_bytes()[:HEADER_BYTES])
    assert header == {
        "magic": "gptloop-tokens",
        "version": 1,
        "tokenizer": data.tokenizer.digest,
        "source": "stories.txt",
        "revision": data.revision,
        "split": "validation",
        "count": 129,
        "complete": False,
    }


def test_a_given_tokenizer_is_used(text: Path) -> None:
    other = train_bpe(["some other text"] * 9, 260)
    data = prepare(DatasetSpec((str(text),)), CONFIG, text.parent / "data", lambda *_: None, other)
    assert data.tokenizer is other
    assert data.train[:100].tolist() == other.encode(STORIES[0])[:100]


def test_gpt2_tokens_fit(text: Path) -> None:
    data = run(text, replace(CONFIG, tokenizer="gpt2", vocabulary_size=50257))
    assert data.train[:2000].max() > 32767
    assert data.tokenizer.decode(data.train[:100].tolist()) == data.tokenizer.decode(
        data.tokenizer.encode(STORIES[0])[:100]
    )


def test_progress_counts_up_to_the_limit(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 2000)
    seen: list[Reported] = []
    data = run(text, seen=seen)
    assert list(dict(seen)) == [Stage.OPEN, Stage.TOKENIZER, Stage.TRAIN, Stage.VALIDATION]
    assert seen[0] == (Stage.OPEN, None)
    counts = [data.train.size * (fraction or 0.0) for stage, fraction in seen if stage is Stage.TRAIN]
    assert len(counts) > 2
    assert counts == sorted(counts)
    assert counts[-1] == TRAIN_LIMIT


def test_the_passages_of_a_long_document_get_one_end_token(text: Path) -> None:
    text.write_text(" ".join(STORIES * 20))
    data = run(text, replace(CONFIG, max_train_tokens=10**7))
    assert np.count_nonzero(data.train == data.tokenizer.end_token) == 1
    assert data.train[-1] == data.tokenizer.end_token
    expected = data.tokenizer.encode(data.tokenizer.decode(data.train.tolist()))
    assert data.train[:-1].tolist() == expected


def test_a_notice_reports_too_few_held_out_windows(text: Path) -> None:
    held_out = text.parent / "held_out.txt"
    held_out.write_text(STORIES[0][:200])
    data = run(text, validation=str(held_out))
    windows = (data.validation.size - 1) // 32
    assert 1 <= windows < 4
    assert f"only {windows} of the 4 evaluation windows" in data.notices[-1]


@pytest.mark.parametrize(
    ("content", "config", "error", "sentence"),
    [
        ("a b", CONFIG, DataError, "training text of .* holds 4 tokens"),
        (" \n ", replace(CONFIG, tokenizer="gpt2", vocabulary_size=50257), DataError, "'stories.txt' has no text"),
        (
            "some words " * 30,
            replace(CONFIG, tokenizer="gpt2", vocabulary_size=50257),
            DataError,
            r"held-out text of stories\.txt holds \d+ tokens, but one window of context_length needs 33: raise",
        ),
    ],
)
def test_too_little_text_is_rejected(
    text: Path, content: str, config: TrainingConfig, error: type[GptloopError], sentence: str
) -> None:
    text.write_text(content)
    with pytest.raises(error, match=sentence):
        run(text, config)


def test_a_notice_reports_a_vocabulary_that_the_text_makes_smaller(text: Path) -> None:
    text.write_text("so few words, so few tokens. " * 200)
    for _ in range(2):  # the second time with the stored tokenizer
        data = run(text, replace(CONFIG, vocabulary_size=5000))
        size = data.tokenizer.vocabulary_size
        assert data.config == replace(CONFIG, vocabulary_size=size) and 257 < size < 300
        assert any(f"for a vocabulary of only {size} tokens, not 5,000" in notice for notice in data.notices)
    given = run(text, replace(CONFIG, tokenizer="gpt2", vocabulary_size=50257))
    assert given.config.vocabulary_size == 50257


def test_training_the_tokenizer_can_be_stopped(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class RecordedPopen(subprocess.Popen[bytes]):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            started.append(self)

    def report(stage: Stage, _: float | None) -> None:
        assert stage in (Stage.OPEN, Stage.TOKENIZER)
        if started:
            raise KeyboardInterrupt

    monkeypatch.setattr(bpe_process, "SHORT_CHARACTERS", 0)
    monkeypatch.setattr(subprocess, "Popen", RecordedPopen)
    monkeypatch.setattr(tokens, "REPORT_INTERVAL_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        prepare(DatasetSpec((str(text),)), CONFIG, text.parent / "data", report)
    assert [process.returncode for process in started] == [-signal.SIGKILL]
    assert not [path for path in files(text, "*") if path.is_file()]


def test_a_tokenizer_trained_in_another_process_is_the_same_and_reports_progress(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = run(text).tokenizer.digest
    for path in files(text, "*.json"):
        path.unlink()
    monkeypatch.setattr(bpe_process, "SHORT_CHARACTERS", 0)
    monkeypatch.setattr(tokens, "REPORT_INTERVAL_S", 0.0)
    seen: list[Reported] = []
    assert run(text, seen=seen).tokenizer.digest == digest
    fractions = [fraction for stage, fraction in seen if stage is Stage.TOKENIZER]
    known = [fraction for fraction in fractions if fraction is not None]
    assert fractions[-len(known) :] == known == sorted(known) and len(known) > 0 and known[-1] <= 1.0


def test_a_disk_that_is_full_for_the_tokenizer_is_reported(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = text.parent / "python"
    full.write_text(f"#!/bin/sh\nexit {bpe_process.DISK_FULL_EXIT_CODE}\n")
    full.chmod(0o755)
    monkeypatch.setattr(bpe_process, "SHORT_CHARACTERS", 0)
    monkeypatch.setattr(sys, "executable", str(full))
    with pytest.raises(ResourceExhausted, match=r"No space left on device\. Free some space"):
        run(text)


def test_reading_reports_its_progress(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "REPORT_INTERVAL_S", 0.0)
    monkeypatch.setattr(file_bytes, "CHUNK_BYTES", 4096)
    seen: list[Reported] = []
    run(text, seen=seen)
    fractions = [fraction or 0.0 for stage, fraction in seen if stage is Stage.OPEN]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and len(set(fractions)) > 10


def test_a_full_disk_leaves_no_file(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceExhausted, match=r"No space left on device\. Free some space"):
        run(text)
    with pytest.raises(ResourceExhausted, match="No space left on device"):
        run(text, replace(CONFIG, tokenizer="gpt2", vocabulary_size=50257))
    assert not [path for path in files(text, "*") if path.is_file()]


def test_a_folder_that_cannot_be_made_is_reported(text: Path) -> None:
    (text.parent / "data").write_text("a file is in the way")
    with pytest.raises(FailedPrecondition, match="cannot be written"):
        run(text)


def test_interrupted_work_leaves_no_partial_file(text: Path) -> None:
    def end(stage: Stage, _: float | None) -> None:
        if stage is Stage.TRAIN:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(DatasetSpec((str(text),)), CONFIG, text.parent / "data", end)
    assert not files(text, "*.partial")
    assert not files(text, "train.bin")


def test_partial_files_of_a_killed_process_are_removed(text: Path) -> None:
    run(text)
    (train,) = files(text, "train.bin")
    train.unlink()
    old, fresh = train.with_name("train.bin.a.partial"), train.with_name("train.bin.b.partial")
    for path in (old, fresh):
        path.write_bytes(b"torn")
    os.utime(old, (1, 1))
    run(text)
    assert files(text, "*.partial") == [fresh]


def test_two_threads_can_prepare_the_same_data_at_once(text: Path) -> None:
    both = threading.Barrier(2, timeout=HANG_S)
    results: list[PreparedData] = []

    def work() -> None:
        def meet(stage: Stage, _: float | None) -> None:
            if stage is Stage.TRAIN:
                both.wait()

        results.append(prepare(DatasetSpec((str(text),)), CONFIG, text.parent / "data", meet))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=HANG_S)
    assert np.array_equal(results[0].train, results[1].train)
    assert np.array_equal(run(text).train, results[0].train)
    assert not files(text, "*.partial")


def test_tokens_that_a_run_uses_stay_and_unused_ones_are_removed(text: Path) -> None:
    run(text)
    (own,) = (text.parent / "data" / "shards").iterdir()
    other = own.with_name("other")
    other.mkdir()
    for path in (own, other):
        os.utime(path, (0, 0))
    run(text)
    assert own.is_dir() and not other.exists()
