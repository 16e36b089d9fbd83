import plistlib
from pathlib import Path

from deploy.services.installation import PROCESSES, Installation
from deploy.services.launchd import Launchd
from shared.service.settings import Directories

# The keys of launchd.plist(5) that the agents use, with their types.
_TYPES = {
    "Label": str,
    "ProgramArguments": list,
    "WorkingDirectory": str,
    "EnvironmentVariables": dict,
    "RunAtLoad": bool,
    "KeepAlive": bool,
    "ExitTimeOut": int,
    "ProcessType": str,
    "LowPriorityIO": bool,
    "StandardOutPath": str,
    "StandardErrorPath": str,
}
_FOLDER = """/sp ace & <b> %d "quo'ted" $HOME \\x ü"""


def test_an_agent_is_a_plist_with_known_keys_of_the_right_types() -> None:
    installation = Installation(Directories(Path(_FOLDER)), {"GPTLOOP_VAR": _FOLDER}, PROCESSES)
    files = Launchd({"HOME": "/Users/ü"}).files(installation)
    assert [path.name for path in files] == [f"gptloop.{process.name}.plist" for process in PROCESSES]
    for path, contents in files.items():
        assert path.parent == Path("/Users/ü/Library/LaunchAgents")
        assert contents.startswith(b"<?xml") and b"//Apple//DTD PLIST 1.0//EN" in contents
        agent = plistlib.loads(contents)
        assert {name: type(value) for name, value in agent.items()} == _TYPES
        assert all(type(word) is str for word in agent["ProgramArguments"])
        assert agent["EnvironmentVariables"] == {"GPTLOOP_VAR": _FOLDER}
        assert f"{_FOLDER}/run/{path.suffixes[0][1:]}.lock" in agent["ProgramArguments"]


def test_only_the_worker_gives_way_and_the_server_that_people_wait_for_has_no_limits() -> None:
    files = Launchd({}).files(Installation(Directories(Path("/var")), {}, PROCESSES))
    agents = {agent["Label"]: agent for agent in map(plistlib.loads, files.values())}
    assert {label for label, agent in agents.items() if agent["LowPriorityIO"]} == {"gptloop.worker"}
    assert agents["gptloop.inference"]["ProcessType"] == "Interactive"
