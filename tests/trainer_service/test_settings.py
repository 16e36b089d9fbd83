"""The settings of the trainer service."""

from decimal import Decimal

import pytest

from shared.errors import InvalidArgument
from shared.registry.decisions import BestBy
from shared.registry.retention import Retention
from trainer_service.distillation.prices import Prices
from trainer_service.settings import read_retention, read_settings


def test_the_environment_sets_each_value_of_retention() -> None:
    assert read_retention({}) == Retention()
    environment = {f"GPTLOOP_KEEP_{name}": str(at) for at, name in enumerate(("STATES", "BEST", "NEWEST", "EVERY"), 3)}
    assert read_retention(environment | {"GPTLOOP_KEEP_RUNS": "7"}) == Retention(3, 4, 5, 6, 7)
    with pytest.raises(InvalidArgument, match="GPTLOOP_KEEP_STATES is 0"):
        read_retention({"GPTLOOP_KEEP_STATES": "0"})
    for text, size_bytes in (("5", 5), ("500M", 500 << 20), ("10g", 10 << 30), (" 2T ", 2 << 40), ("0", 0)):
        assert read_retention({"GPTLOOP_KEEP_BYTES": text}).size_bytes == size_bytes
    for text in ("10 G", "1.5G", "-1", "G", "10GB", "٣G", "9" * 30, "9999999999999999999T"):
        with pytest.raises(
            InvalidArgument, match=r"GPTLOOP_KEEP_BYTES is .*, but must be a number of bytes, such as 500M"
        ):
            read_retention({"GPTLOOP_KEEP_BYTES": text})


def test_the_environment_says_what_best_compares() -> None:
    assert read_settings({}).open_registry().best_by is BestBy.TRAINING
    assert read_settings({"GPTLOOP_BEST_BY": "evaluation"}).open_registry().best_by is BestBy.EVALUATION
    with pytest.raises(InvalidArgument, match="GPTLOOP_BEST_BY is 'loss', but must be training or evaluation"):
        read_settings({"GPTLOOP_BEST_BY": "loss"})


def test_the_environment_describes_the_large_teacher_and_no_message_has_its_key() -> None:
    groq = read_settings({}).groq
    assert (groq.url, groq.model, groq.key, groq.input_usd) == ("https://api.groq.com", "openai/gpt-oss-20b", "", None)
    prices = {"GPTLOOP_GROQ_INPUT_USD": "0.075", "GPTLOOP_GROQ_OUTPUT_USD": " 0.30 "}
    settings = read_settings({"GROQ_API_KEY": "gsk_secret", "GPTLOOP_GROQ_URL": "http://127.0.0.1:8000/x", **prices})
    assert settings.groq.read_key() == "gsk_secret" and "gsk_secret" not in repr(settings)
    assert settings.groq.prices() == Prices(Decimal("0.075"), Decimal("0.30"))
    for text in ("-1", "1e3", "free", "0,30", "nan", "99999", "0.1234567", "٣", "0", "0.00"):
        with pytest.raises(InvalidArgument, match=r"GPTLOOP_GROQ_INPUT_USD is .*, but must be the price of a million"):
            read_settings({"GPTLOOP_GROQ_INPUT_USD": text})
    for text in ("api.groq.com", "ftp://a", "https://", "https://user:secret@host", "https://a b"):
        with pytest.raises(InvalidArgument, match="GPTLOOP_GROQ_URL must be an address such as https://api") as refused:
            read_settings({"GPTLOOP_GROQ_URL": text})
        assert "secret" not in str(refused.value)


def test_the_trainer_lacks_tokens_of_operators_only() -> None:
    missing = ("GPTLOOP_OPERATOR_TOKENS",)
    assert read_settings({}).missing_tokens == read_settings({"GPTLOOP_CLIENT_TOKENS": "/clients"}).missing_tokens
    assert read_settings({}).missing_tokens == missing
    assert read_settings({"GPTLOOP_OPERATOR_TOKENS": "/operators"}).missing_tokens == ()


def test_a_launcher_is_split_as_a_shell_does_and_says_how_many_ranks_it_starts() -> None:
    assert (read_settings({}).launcher, read_settings({}).worker_ranks) == ((), None)
    command = "mpirun -n {world_size} --hostfile '/etc/my hosts'"
    settings = read_settings({"GPTLOOP_LAUNCHER": command, "GPTLOOP_WORKER_RANKS": "16"})
    assert settings.launcher == ("mpirun", "-n", "{world_size}", "--hostfile", "/etc/my hosts")
    assert settings.worker_ranks == 16
    with pytest.raises(InvalidArgument, match="GPTLOOP_WORKER_RANKS is not: set it to the number of ranks"):
        read_settings({"GPTLOOP_LAUNCHER": command})
    with pytest.raises(InvalidArgument, match=r"GPTLOOP_LAUNCHER is .*must be a command line such as mpirun"):
        read_settings({"GPTLOOP_LAUNCHER": "mpirun 'a", "GPTLOOP_WORKER_RANKS": "2"})
    for text in ("0", "1025", "two"):
        with pytest.raises(InvalidArgument, match=f"GPTLOOP_WORKER_RANKS is .*{text}.* from 1 to 1024"):
            read_settings({"GPTLOOP_WORKER_RANKS": text})
