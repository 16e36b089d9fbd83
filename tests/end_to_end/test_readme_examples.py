"""The examples of all pages, run as printed against the real system; only training is made small.

The tests go through the pages from top to bottom, each on what those before it have left.
"""

import json
import re
from itertools import islice
from pathlib import Path

import pytest
from google.protobuf import json_format

from shared.pb.inference.v1 import inference_pb2
from shared.pb.training.v1 import training_pb2
from tests.end_to_end.conftest import TINY, System
from tests.pages import BLOCKS, TEXT, rows
from tests.waiting import wait_until
from tests.workplace import Workplace
from trainer_service.text.stories import train_stories

pytestmark = pytest.mark.slow

PYTHON = [text for language, text in BLOCKS if language == "python"]
SMALL = " ".join(f"{name}={value}" for name, value in {**TINY, "max_steps": "20", "evaluation_interval": "10"}.items())
ON_PATH = "set -eo pipefail; PATH=$PWD/.venv/bin:$PATH\n"
# The reader's training takes minutes; here it is small.
SHELL = f"""{ON_PATH}
make() {{
    case " $* " in
        *" train "*) command make "$@" SET="{SMALL}" ;;
        *) command make "$@" ;;
    esac
}}
gptloop() {{
    case " $* " in
        *" train "*) command gptloop "$@" --set "{SMALL}" ;;
        *) command gptloop "$@" ;;
    esac
}}
"""


@pytest.fixture(scope="module")
def workplace(system: System, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    workplace = Workplace(tmp_path_factory.mktemp("a folder"), system.environment)
    stories = list(islice(train_stories(), 300))
    for name in ("one.txt", "stories.txt"):
        (workplace.folder / name).write_text("<|endoftext|>".join(stories[:200]))
    (workplace.folder / "two.jsonl").write_text("\n".join(json.dumps({"text": story}) for story in stories[200:250]))
    (workplace.folder / "held-out.txt").write_text("<|endoftext|>".join(stories[250:]))
    return workplace


def block(language: str, beginning: str) -> str:
    (found,) = [text for kind, text in BLOCKS if kind == language and text.startswith(beginning)]
    return str(found)


def printed(line: str) -> str:
    """Returns a line after checking that a page has it, in its text or in a table."""
    assert f"`{line}`" in TEXT, line
    return line


def shell(workplace: Workplace, script: str, prelude: str = SHELL) -> str:
    ended = workplace.run("bash", "-c", prelude + script)
    assert ended.returncode == 0, (script, ended.stdout[-2000:], ended.stderr[-2000:])
    return ended.stdout


def queued(workplace: Workplace, line: str) -> str:
    """Queues a job by a command without following it, cancels the job, and returns what the command printed."""
    said = shell(workplace, f"{line} --no-follow", ON_PATH)
    (job,) = re.findall(r"^job ([0-9a-f]+) queued", said, re.MULTILINE)
    assert "is cancel" in shell(workplace, f"make cancel JOB={job}", ON_PATH)
    return said


def test_the_first_three_commands_train_and_generate(workplace: Workplace) -> None:
    up, train, generate = block("sh", "make up").splitlines()
    said = shell(workplace, f"{up}\n{train}")
    assert "Everything is up already" in said and "version 2 published" in said and "finished." in said
    wait_until(lambda: "serving" in workplace.run(".venv/bin/python", "-m", "inference_service", "versions").stdout)
    assert shell(workplace, generate).startswith("Once upon a time")


def test_jobs_follow_each_other(workplace: Workplace) -> None:
    said = shell(workplace, block("sh", "JOB="))
    assert len(re.findall(r"held-out loss [0-9.]+ nats", said)) == 1


def test_versions_are_evaluated_on_held_out_files_and_compared(workplace: Workplace) -> None:
    said = shell(workplace, "make eval VERSIONS='1 2' VALIDATION=held-out.txt SPEED=0")
    assert "windows of held-out.txt" in said and "Evaluation of versions 1 and 2" in said
    *_, markdown, html, last = said.splitlines()
    assert Path(markdown).read_text().startswith("# Evaluation of versions 1 and 2")
    assert "<svg" in Path(html).read_text()
    found = json.loads(last)
    assert [each["version"]["number"] for each in found["versions"]] == [1, 2]
    assert found["comparisons"][0]["verdict"] in ("better", "worse", "cannot be told")
    assert found["reports"] == [markdown, html]


def test_a_model_is_exported_and_imported(workplace: Workplace) -> None:
    shell(workplace, "make export VERSION=2 DIR=gpt2")
    said = shell(workplace, block("sh", "gptloop import"))
    assert (workplace.folder / "my-gpt2/model.safetensors").exists()
    assert re.search(r"^version +\d+$", said, re.MULTILINE)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_examples_run(workplace: Workplace, system: System, code: str) -> None:
    code = code.replace(":50051", f":{system.ports.inference}").replace(":50052", f":{system.ports.trainer}")
    ended = workplace.run(".venv/bin/python", "-c", code)
    assert ended.returncode == 0 and ended.stdout.strip(), ended.stderr


def test_messages_of_grpcurl_are_those_of_the_contracts() -> None:
    calls = re.findall(r"-d '(.*?)' \\\n +\S+ (\S+)$", block("sh", "grpcurl"), re.MULTILINE)
    requests = {"Generate": inference_pb2.GenerateRequest, "EnqueueJob": training_pb2.EnqueueJobRequest}
    assert [json_format.Parse(text, requests[name.rpartition("/")[2]]()).ByteSize() > 0 for text, name in calls] == [
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('gptloop train --preset small --set "max_steps=500 batch_size=8"', "steps       1 to 500"),
        ('gptloop train --dataset "one.txt two.jsonl" --validation held-out.txt', "steps       1 to 320"),
        ('gptloop train --resume 7 --set "max_steps=800"', "to 800"),
    ],
)
def test_lines_of_the_text_put_jobs_on_the_queue(workplace: Workplace, line: str, said: str) -> None:
    assert said in queued(workplace, printed(line).replace("--resume 7", "--resume 2"))


@pytest.mark.parametrize("line", [line for line, _ in rows("Everyday commands")])
def test_everyday_commands_run(workplace: Workplace, line: str) -> None:
    if " train " in line:
        assert "steps " in queued(workplace, line)
    elif " distill " in line:
        # The small versions here are hardly trained, and the best one may be an import, which has no preset.
        said = shell(workplace, f'{line} --force --preset demo --set "{SMALL}"', ON_PATH)
        (version,) = json.loads(said.splitlines()[-1])["versions"][-1:]
        control, teacher = (each["role"] for each in version["verdict"]["rivals"])
        assert control == "control" and re.fullmatch(r"teacher \d+", teacher)
    elif " sweep " in line:
        # The reader's sweep takes minutes, and more on a busy machine; here its candidates are small.
        assert "4 candidates" in shell(workplace, f'{line} --set "{SMALL}"', ON_PATH)
    else:
        shell(workplace, f"{line} < /dev/null", ON_PATH)


def test_commands_that_only_read_answer(workplace: Workplace) -> None:
    said = shell(
        workplace, "make jobs; make checkpoints; make verify; make prune DRY_RUN=1; make status; make chat < /dev/null"
    )
    assert "Whole:" in said and "would be removed" in said and "serves on" in said
    assert len(json.loads(shell(workplace, "make -s jobs JSON=1"))) >= 5
    (job, *_) = re.findall(r"^[0-9a-f]{8}", said, re.MULTILINE)
    watched = workplace.make("watch", f"JOB={job}")
    assert "queued." in watched.stdout


def test_the_same_text_comes_again(system: System, workplace: Workplace) -> None:
    printed('gptloop generate --prompt "…" --version … --seed …')
    version = system.registry.labels()["best"]  # one that retention keeps
    line = f'gptloop generate --prompt "The old dragon" --version {version} --seed 7 --top-k 20'
    assert shell(workplace, line) == shell(workplace, line)
