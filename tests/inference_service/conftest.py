import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inference_service.client import AsyncInferenceClient, InferenceClient
from inference_service.client.stream import AsyncStream, Stream
from tests.fakes import publish_tiny_version
from tests.inference_service.operated import Operated
from tests.inference_service.scripted_server import Script, ScriptedServer
from tests.inference_service.world import World


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    servers: list[ScriptedServer] = []

    def start(*scripts: Script, port: int = 0) -> ScriptedServer:
        servers.append(ScriptedServer(*scripts, port=port))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def use_sync(address: str, method: str, *arguments: Any, retries: int = 2, **parameters: Any) -> Any:
    with InferenceClient(address, retries) as client:
        result = getattr(client, method)(*arguments, **parameters)
        return list(result) if isinstance(result, Stream) else result


def use_async(address: str, method: str, *arguments: Any, retries: int = 2, **parameters: Any) -> Any:
    async def run() -> Any:
        async with AsyncInferenceClient(address, retries) as client:
            result = getattr(client, method)(*arguments, **parameters)
            return [event async for event in result] if isinstance(result, AsyncStream) else await result

    return asyncio.run(run())


@pytest.fixture(params=[use_sync, use_async], ids=["sync", "async"])
def use(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls a method of either client; reads all events of a stream."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    """A server with a token and one version, for all tests of a file."""
    operated = Operated(tmp_path_factory.mktemp("server") / "var")
    try:
        operated.publish()
        yield operated
    finally:
        operated.end()


@pytest.fixture
def fresh(tmp_path: Path) -> World:
    """A world with an empty registry."""
    return World(tmp_path / "registry")


@pytest.fixture
def world(fresh: World) -> World:
    """A world with three versions, of which the second is the best."""
    for bits_per_byte in (3.0, 1.0, 2.0):
        publish_tiny_version(fresh.registry, bits_per_byte)
    return fresh
