from pathlib import Path

import pytest

from shared.errors import InvalidArgument
from tests.benchmarks.checkpoint import tokenizer_for
from trainer_service.huggingface.gpt2_tokenizer import read_tokenizer, write_tokenizer


@pytest.mark.parametrize("size", [257, 2048, 4096])
def test_a_tokenizer_of_any_size_can_be_exported(size: int, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(size)
    assert tokenizer.vocabulary_size == size
    write_tokenizer(tokenizer, 128, tmp_path)
    assert read_tokenizer(tmp_path, size).vocabulary == tokenizer.vocabulary


def test_a_vocabulary_smaller_than_the_number_of_bytes_is_rejected() -> None:
    with pytest.raises(InvalidArgument, match="256"):
        tokenizer_for(256)
